"""How long real preference pairs are, and what share of the padded batch is scored.

The quantiles below are the deciles (0, 10, ..., 100 %) of the number of characters in the prompt
(all messages before the answer), the chosen and the rejected answer of 300 English preference pairs
of single- and multi-turn chats (LLaMA-Factory's `dpo_en_demo.json`, Apache-2.0); `CORRELATION` is
that of their normal scores. A token is taken as 4 characters, prompts are cut at 512 tokens and
sequences at 1,024 (TRL's default `max_length`), which favours implementations that compute padding.

In those pairs, after the cut, the scored share N / (2 P T) is 0.69 with one pair in the batch, 0.56
with two and 0.47 with eight: the rest is the rejected prompt and padding. The prompt is 45 % of the
chosen sequence on average. The one pair drawn for P = 1 is the median pair, whose answers are about
equally long: it scores 0.81 of its batch, again in favour of whoever computes padding.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch

CHARACTERS = {
    "prompt": (26, 89, 176, 309, 419, 758, 1542, 2421, 3632, 5042, 13_283),
    "chosen": (2, 108, 315, 671, 1048, 1416, 1785, 2093, 2424, 2795, 4947),
    "rejected": (3, 203, 548, 861, 1129, 1480, 1853, 2122, 2394, 2785, 4601),
}
CORRELATION = ((1.0, 0.207, 0.348), (0.207, 1.0, 0.556), (0.348, 0.556, 1.0))
CHARACTERS_PER_TOKEN = 4
MAX_PROMPT = 512
MAX_LENGTH = 1024


@dataclass(frozen=True)
class PairLengths:
    """Tokens of one pair; the prompt is shared."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def scored(self) -> int:
        """Rows of hidden the loss needs: NLL over prompt and answer, odds over both answers."""
        return self.prompt + self.chosen - 1 + self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


def pair_lengths(pairs: int, tokens: int, seed: int = 0) -> list[PairLengths]:
    """`pairs` pairs drawn as above, scaled by one factor so that they score `tokens` rows in all.

    The draw is stratified (each variable takes the quantiles (i + 1/2) / P, in random order), so
    that one pair is the median pair and few pairs still span the distribution.
    """
    natural = natural_lengths(pairs, seed)
    total = sum(pair.scored for pair in natural)
    factor = tokens / total
    scaled = [
        PairLengths(
            *(max(2, round(size * factor)) for size in (each.prompt, each.chosen, each.rejected))
        )
        for each in natural
    ]
    return _exactly(scaled, tokens)


def natural_lengths(pairs: int, seed: int = 0) -> list[PairLengths]:
    """`pairs` pairs drawn as above, as long as they are."""
    generator = torch.Generator().manual_seed(seed)
    normal = NormalDist()
    strata = torch.tensor([normal.inv_cdf((i + 0.5) / pairs) for i in range(pairs)])
    scores = torch.stack([strata[torch.randperm(pairs, generator=generator)] for _ in range(3)])
    mixed = torch.linalg.cholesky(torch.tensor(CORRELATION)) @ scores  # (3, P)
    names = ("prompt", "chosen", "rejected")
    columns = [
        [_quantile(name, normal.cdf(score)) / CHARACTERS_PER_TOKEN for score in row.tolist()]
        for name, row in zip(names, mixed, strict=True)
    ]
    result = []
    for prompt, chosen, rejected in zip(*columns, strict=True):
        kept = max(2, min(round(prompt), MAX_PROMPT))
        room = MAX_LENGTH - kept
        answers = (max(2, min(round(answer), room)) for answer in (chosen, rejected))
        result.append(PairLengths(kept, *answers))
    return result


def _quantile(name: str, share: float) -> float:
    table = CHARACTERS[name]
    position = share * (len(table) - 1)
    low = min(int(position), len(table) - 2)
    return table[low] + (position - low) * (table[low + 1] - table[low])


def _exactly(lengths: list[PairLengths], tokens: int) -> list[PairLengths]:
    """Correct the rounding, one token at a time, on the pairs that have room."""
    missing = tokens - sum(pair.scored for pair in lengths)
    result = list(lengths)
    step = 1 if missing > 0 else -1
    index = 0
    while missing != 0:
        pair = result[index % len(result)]
        if step > 0 or pair.chosen > 2:
            result[index % len(result)] = PairLengths(
                pair.prompt, pair.chosen + step, pair.rejected
            )
            missing -= step
        index += 1
        if index > 1000 * len(result):
            raise ValueError(
                f"{len(result)} pairs need more than {tokens} tokens; give more tokens"
            )
    return result
