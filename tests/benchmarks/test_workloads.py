"""The benchmark's inputs look like what they claim to look like."""

import pytest
import torch

from benchmarks.heads import HEADS, Case, sizes_of
from benchmarks.lengths import pair_lengths
from benchmarks.workloads import (
    TOLERANCE,
    make_hidden,
    make_weight,
    make_workload,
    softmax_rows,
    sparsity,
)

# 2,048 tokens of English technical text under an interpolated 5-gram model, V = 32,000, mean
# entropy 1.5 nats. Per threshold: entries per row over it, mass below, share of columns kept by
# blocks of 32, 64, 128 rows, share of 128x128 tiles with a kept entry in vocabulary order.
TEXT_VOCAB = 32_000
TEXT = {
    2.0**-10: (23, 0.029, 0.014, 0.022, 0.036, 0.69),
    2.0**-12: (52, 0.015, 0.029, 0.046, 0.073, 0.86),
    2.0**-14: (112, 0.008, 0.054, 0.083, 0.128, 0.94),
    2.0**-16: (241, 0.004, 0.099, 0.145, 0.212, 0.98),
}
BLOCKS = (32, 64, 128)


def _probabilities(logits: str, vocab: int, rows: int, hidden_size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = make_weight(logits, vocab, hidden_size, dtype, generator)
    hidden = make_hidden(logits, rows, hidden_size, dtype, generator)
    return torch.cat([softmax_rows(chunk, weight) for chunk in hidden.split(128)])


@pytest.fixture(scope="module")
def trained():
    # 512 rows: four blocks of 128, the largest block of the table; H = 512: logits Gaussian to
    # 1e-2.
    return _probabilities("trained", TEXT_VOCAB, 512, 512, torch.bfloat16)


@pytest.mark.parametrize("eps", TEXT)
def test_trained_like_logits_have_the_sparsity_of_text(trained, eps):
    found = sparsity(trained, eps, BLOCKS)
    tiles = (trained > eps).view(4, 128, TEXT_VOCAB // 128, 128).any(3).any(1).float().mean().item()
    shares = [found.kept_shares[block] for block in BLOCKS]
    measured = (found.entries_per_row, found.mass_below, *shares, tiles)
    for got, expected in zip(measured, TEXT[eps], strict=True):
        assert got == pytest.approx(expected, rel=TOLERANCE)


def test_trained_like_rows_are_as_certain_as_a_chat_model(trained):
    entropy = torch.special.entr(trained).sum(-1)
    assert entropy.mean().item() == pytest.approx(1.5, rel=TOLERANCE)
    assert entropy.min() < 0.2  # some tokens are certain
    assert entropy.max() > 3  # and some are open


def test_a_larger_vocabulary_keeps_about_as_many_columns(trained):
    eps = 2.0**-12
    # 128 rows: two blocks of 64; H = 128: cheap, and the law does not depend on H.
    large = sparsity(_probabilities("trained", 128_256, 128, 128, torch.bfloat16), eps)
    small = sparsity(trained[:128], eps)
    columns = large.kept_shares[64] * 128_256, small.kept_shares[64] * TEXT_VOCAB
    assert columns[0] / columns[1] == pytest.approx(1550 / 1420, rel=TOLERANCE)
    assert large.entries_per_row == pytest.approx(small.entries_per_row, rel=TOLERANCE)


def test_flat_logits_have_no_sparsity():
    # V = 4,096 < 2^14: the mean probability is over both thresholds.
    found = sparsity(_probabilities("flat", 4096, 64, 256, torch.float32), 2.0**-14)
    assert found.kept_shares[64] > 0.99
    assert found.mass_below < 0.2


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_labels_are_drawn_from_the_softmax(softcap):
    # Mistral's head has no softcap, Gemma 2's has; tiny sizes.
    head = "mistral-7b" if softcap is None else "gemma-2-2b"
    workload = make_workload(Case(head, pairs=8), tiny=True, seed=1)
    assert workload.softcap == softcap
    mask = workload.union_labels >= 0
    p = softmax_rows(workload.hidden[mask], workload.weight, softcap)
    found = p.gather(1, workload.union_labels[mask][:, None]).mean().item()
    expected = p.square().sum(-1).mean().item()
    # 96 draws of a probability in [0, 1]: std of the mean <= 0.05.
    assert found == pytest.approx(expected, abs=0.15)


def test_masks_agree_with_the_lengths():
    workload = make_workload(Case("opt-125m", pairs=2), tiny=True)
    odds, nll = workload.labels >= 0, workload.nll_labels >= 0
    for row, pair in enumerate(workload.lengths):
        assert odds[row].sum() == pair.chosen
        assert odds[row + 2].sum() == pair.rejected
        assert nll[row].sum() == pair.prompt + pair.chosen - 1
        assert workload.attention[row].sum() == pair.prompt + pair.chosen
    assert not nll[2:].any()
    assert not (odds | nll)[:, -1].any()  # the last position has no next token
    assert (odds | nll).sum() == workload.scored
    both = odds & nll
    assert torch.equal(workload.labels[both], workload.nll_labels[both])


def test_workloads_repeat():
    first, second = (make_workload(Case("cpu"), tiny=True) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("pairs", [1, 2, 8])
@pytest.mark.parametrize("tokens", [96, 512, 1024, 8192])
def test_lengths_score_exactly_the_tokens_asked_for(pairs, tokens):
    lengths = pair_lengths(pairs, tokens)
    assert len(lengths) == pairs
    assert sum(pair.scored for pair in lengths) == tokens
    assert min(min(pair.prompt, pair.chosen, pair.rejected) for pair in lengths) >= 1


def test_many_lengths_follow_the_real_pairs():
    # 512 pairs at their natural size (951 scored tokens on average).
    lengths = pair_lengths(512, 512 * 951)
    share = sum(p.scored / (2 * p.longest) for p in lengths) / 512
    prompts = sum(p.prompt / (p.prompt + p.chosen) for p in lengths) / 512
    assert share == pytest.approx(0.69, abs=0.05)
    assert prompts == pytest.approx(0.45, abs=0.05)


def test_sizes_follow_the_rule():
    llama = Case("llama-3-8b")
    assert sizes_of(llama, "cuda").tokens == 8192
    assert sizes_of(llama, "cuda").vocab_size == 128_256
    assert sizes_of(llama, "cpu").vocab_size == 128_256 // 16
    assert sizes_of(llama, "cpu").tokens == 512
    assert sizes_of(llama, "cpu").hidden_size == 4096
    for device in ("cpu", "cuda"):
        assert sizes_of(Case("cpu"), device).vocab_size == HEADS["cpu"].vocab_size
