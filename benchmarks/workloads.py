"""Inputs: hidden states, a head and labels, with *flat* or *trained-like* logits.

**flat**: what a freshly initialised model gives. hidden and weight are independent noise, the
logits are N(0, 1) without structure, labels are uniform. No entry of a softmax row is negligible.

**trained-like**: rows whose softmax has the sparsity of real text. Up to a constant per row,

    z_tv = tau_t * (A_v + s_t G_tv),    A_v = -ALPHA ln(r_v + RANK_OFFSET),    G_tv ~ N(0, 1)

- A is the unigram: r_v = 1..V is the frequency rank of token v;
- G is what the context adds: a random direction of hidden against random rows of weight. Gaussian
  logits of std s near or over sqrt(2 ln V) = 4.6 are a random energy model in its frozen phase,
  whose sorted probabilities fall like a power law, as those of real text do (rank^-1.8);
- s_t = min(SPREAD exp(SPREAD_STD e_t), MAX_SPREAD) is how much the context says: log-normal over
  the rows, capped so that logits stay within what models emit;
- tau_t = exp(TEMPERATURE_STD (c e_t + sqrt(1 - c^2) e'_t)) is a temperature, e, e' ~ N(0, 1).

It is exactly a linear head: hidden_t = tau_t (1 + s_t g_t) and weight_v = A_v 1 + w_v up to norms,
with 1 the constant direction, g_t and w_v random; so the head has a common mean direction.

The seven constants were fitted by random search to 20 figures of real text at V = 32,000, those of
`tests/benchmarks/test_workloads.py`: entries per row over 2^-10 .. 2^-16, the mass below, and the
share of columns kept by blocks of 32, 64 and 128 rows. Every figure is met within 20 %
(`TOLERANCE`), the kept shares at 2^-10 .. 2^-14 within 10 %. Columns come in noisy frequency
order, as ids of a BPE vocabulary do: 128x128 tiles then have a kept entry about as often as in the
text (95 % against 86 % at 2^-12; sorted by mean probability 51 % against 45 %), which is what
skipping tiles lives on.

Other vocabularies, the rule: the law stays and V changes, that is, ranks beyond 32,000 continue
A_v and a smaller V cuts them off. The *number* of kept columns then saturates and their share
falls: a block of 64 rows keeps at 2^-12 about 1,070 columns of 8,000 (13 %), 1,420 of 32,000 (4.4
%), 1,550 of 128,256 (1.2 %), 1,630 of 262,144 (0.6 %). The text itself, cut to the first 8,000,
16,000 and 32,000 ids of its vocabulary and renormalised, keeps 1,140, 1,340 and 1,470. A softcap is
applied on top and flattens the rows a little; the share really kept is measured and stored with
every result.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.heads import Case, sizes_of
from benchmarks.lengths import PairLengths, pair_lengths
from orpo_kernels.constants import IGNORE_INDEX

ALPHA = 1.905
RANK_OFFSET = 0.4734
SPREAD = 4.91
SPREAD_STD = 1.0205
MAX_SPREAD = 7.27
TEMPERATURE_STD = 0.1172
TEMPERATURE_CORRELATION = 0.469
ORDER_NOISE = 0.5  # std of the logarithm of a rank
TOLERANCE = 0.20

FIT_VOCAB = 32_000
BLOCK_ROWS = 4096  # rows of weight made at once: 16 MiB of float32 at H = 1024


@dataclass
class Workload:
    """One step's inputs. `hidden` (2P, T, H), `weight` (V, H), labels (2P, T) int64, shifted.

    `labels` are the odds labels (answers), `nll_labels` the chosen sequence (prompt and answer,
    -100 in rejected rows). `attention` (2P, T) is 1 on real tokens. The last position scores
    nothing.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    nll_labels: Tensor
    attention: Tensor
    softcap: float | None
    lengths: list[PairLengths]

    @property
    def union_labels(self) -> Tensor:
        """(2P, T): the label of every position that either term scores; the two never differ."""
        return torch.where(self.labels != IGNORE_INDEX, self.labels, self.nll_labels)

    @property
    def scored(self) -> int:
        """N: rows of hidden that the loss needs."""
        return sum(pair.scored for pair in self.lengths)

    @property
    def scored_share(self) -> float:
        """N / (2 P T)."""
        return self.scored / self.labels.numel()


def make_workload(
    case: Case, device: str = "cpu", *, tiny: bool = False, seed: int = 0
) -> Workload:
    """The inputs of `case`, the same for a device, a seed and a torch version."""
    sizes = sizes_of(case, device, tiny=tiny)
    dtype = getattr(torch, case.dtype)
    lengths = pair_lengths(case.pairs, sizes.tokens)
    odds, nll, attention = _masks(lengths, device)
    generator = torch.Generator(device).manual_seed(seed)
    weight = make_weight(case.logits, sizes.vocab_size, sizes.hidden_size, dtype, generator)
    rows = make_hidden(case.logits, odds.numel(), sizes.hidden_size, dtype, generator)
    union = odds | nll
    tokens = torch.full(odds.shape, IGNORE_INDEX, device=device)
    sampled = sample_labels(rows[union.flatten()], weight, case.logits, sizes.softcap, generator)
    tokens[union] = sampled
    ignored = torch.full_like(tokens, IGNORE_INDEX)
    return Workload(
        hidden=rows.view(*odds.shape, sizes.hidden_size),
        weight=weight,
        labels=torch.where(odds, tokens, ignored),
        nll_labels=torch.where(nll, tokens, ignored),
        attention=attention,
        softcap=sizes.softcap,
        lengths=lengths,
    )


def _masks(lengths: list[PairLengths], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Odds mask, NLL mask, attention, all (2P, T): position t scores token t + 1."""
    pairs, longest = len(lengths), max(pair.longest for pair in lengths)
    odds = torch.zeros(2 * pairs, longest, dtype=torch.bool)
    nll, attention = torch.zeros_like(odds), torch.zeros(2 * pairs, longest, dtype=torch.int64)
    for row, pair in enumerate(lengths):
        for sequence, answer in ((row, pair.chosen), (pairs + row, pair.rejected)):
            attention[sequence, : pair.prompt + answer] = 1
            odds[sequence, pair.prompt - 1 : pair.prompt + answer - 1] = True
        nll[row, : pair.prompt + pair.chosen - 1] = True
    return odds.to(device), nll.to(device), attention.to(device)


def make_weight(
    logits: str, vocab: int, hidden_size: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """(V, H): rows of norm about 1; trained-like: plus A_v in the constant direction."""
    device = generator.device
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device)
    mean = torch.zeros(vocab, device=device)
    if logits == "trained":
        mean = -ALPHA * torch.log(_ranks(vocab, generator) + RANK_OFFSET)
    # Uniform bytes instead of normals: 5 times cheaper, and a sum of H of them is Gaussian anyway.
    std = math.sqrt((255**2 - 1) / 12)
    for start in range(0, vocab, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, vocab)
        shape = (stop - start, hidden_size)
        noise = torch.randint(
            -127, 128, shape, generator=generator, device=device, dtype=torch.int8
        )
        scaled = noise.float().mul_(1 / (std * math.sqrt(hidden_size)))
        weight[start:stop] = scaled.add_(mean[start:stop, None] / math.sqrt(hidden_size))
    return weight


def _ranks(vocab: int, generator: torch.Generator) -> Tensor:
    """(V,) float: frequency rank of each column, nearly ascending."""
    options = {"generator": generator, "device": generator.device}
    exact = torch.arange(1.0, vocab + 1, device=generator.device)
    return exact[torch.argsort(torch.log(exact) + ORDER_NOISE * torch.randn(vocab, **options))]


def make_hidden(
    logits: str, rows: int, hidden_size: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """(rows, H): random directions of norm sqrt(H), scaled and shifted as the logits ask."""
    options = {"generator": generator, "device": generator.device}
    noise = torch.randn(rows, hidden_size, **options)
    if logits == "flat":
        return noise.to(dtype)
    noise -= noise.mean(-1, keepdim=True)  # nothing of A_v leaks into the context term
    noise *= math.sqrt(hidden_size) / noise.norm(dim=-1, keepdim=True)
    first, second = _stratified(rows, generator), _stratified(rows, generator)
    spread = (SPREAD * torch.exp(SPREAD_STD * first)).clamp_(max=MAX_SPREAD)
    rest = math.sqrt(1 - TEMPERATURE_CORRELATION**2)
    temperature = torch.exp(TEMPERATURE_STD * (TEMPERATURE_CORRELATION * first + rest * second))
    return (temperature * (1 / math.sqrt(hidden_size) + spread * noise)).to(dtype)


def _stratified(rows: int, generator: torch.Generator) -> Tensor:
    """(rows, 1): the normal quantiles (i + 1/2) / rows in random order: few rows, little noise."""
    order = torch.randperm(rows, generator=generator, device=generator.device)
    return torch.special.ndtri((order + 0.5) / rows)[:, None]


def sample_labels(
    rows: Tensor,
    weight: Tensor,
    logits: str,
    softcap: float | None,
    generator: torch.Generator,
) -> Tensor:
    """(N,) int64: drawn from the softmax of `rows @ weight.T`; uniform for flat logits."""
    vocab, options = weight.shape[0], {"generator": generator, "device": rows.device}
    if logits == "flat":
        return torch.randint(0, vocab, rows.shape[:1], **options)
    labels = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    draws = torch.rand(rows.shape[0], 1, **options)
    for start in range(0, rows.shape[0], 256):
        chunk = slice(start, start + 256)
        cumulated = softmax_rows(rows[chunk], weight, softcap).cumsum_(-1)
        wanted = draws[chunk] * cumulated[:, -1:]
        labels[chunk] = torch.searchsorted(cumulated, wanted)[:, 0].clamp_(max=vocab - 1)
    return labels


def softmax_rows(rows: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """(R, V) float32: softmax of the transformed logits of a few rows."""
    z = (rows @ weight.t()).float()
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return torch.softmax(z, -1)


@dataclass(frozen=True)
class Sparsity:
    """Figures of softmax rows at one threshold: what the table of `TOLERANCE` is about."""

    entries_per_row: float
    mass_below: float
    kept_shares: dict[int, float]


def sparsity(probabilities: Tensor, eps: float, blocks: tuple[int, ...] = (64,)) -> Sparsity:
    """Figures of `probabilities` (R, V); incomplete blocks of rows at the end are left out."""
    kept = probabilities > eps
    shares = {}
    for block in blocks:
        whole = kept[: kept.shape[0] // block * block].view(-1, block, kept.shape[1])
        shares[block] = whole.any(1).float().mean().item() if whole.shape[0] else float("nan")
    mass = probabilities.masked_fill(kept, 0).sum(-1).mean().item()
    return Sparsity(kept.sum(-1).float().mean().item(), mass, shares)
