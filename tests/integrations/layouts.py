"""Pairs whose lengths, prompts and answers differ as much as they may, for the layouts."""

import torch
from torch import Tensor

from tests.tiny_models import VOCAB_SIZE

# Of prompt, chosen and rejected answer. Alone: a prompt of one token, of none, an empty answer.
# The first is longer than every window of a tiny model, the prompt as well.
LENGTHS = ((19, 20, 30), (1, 39, 4), (0, 12, 11), (6, 0, 5))
FIRST_ID = 5  # after the special tokens


def ragged_pairs(lengths=LENGTHS, vocab_size: int = VOCAB_SIZE) -> dict[str, Tensor]:
    """Stacked pairs, padded on the right; `labels` are the answers', `nll_labels` the chosen ones'.

    The answers of a pair begin with different tokens. Padding is a token that is a real one too.
    """
    generator = torch.Generator().manual_seed(1)
    pairs = len(lengths)
    width = max(prompt + max(answers) for prompt, *answers in lengths)
    ids = torch.randint(FIRST_ID + 2, vocab_size - 1, (2 * pairs, width), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for pair, (prompt, *answers) in enumerate(lengths):
        ids[pairs + pair, :prompt] = ids[pair, :prompt]
        for side, answer in enumerate(answers):
            row, stop = side * pairs + pair, prompt + answer
            ids[row, prompt:stop][:1] = FIRST_ID + side
            ids[row, stop:] = FIRST_ID
            mask[row, :stop] = 1
            labels[row, prompt:stop] = ids[row, prompt:stop]
    nll_labels = ids.masked_fill(mask == 0, -100)
    nll_labels[pairs:] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "nll_labels": nll_labels,
    }
