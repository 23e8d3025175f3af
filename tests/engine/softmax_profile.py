"""Heads and hidden states whose softmax rows are given: those of real text, or generated ones.

*text* is `softmax_profile.npz` of the data folder beside the project: next-token distributions of
English under a 5-gram model, V = 32,000. *generated* are rows of the benchmarks' trained-like
logits, V = 8,000, for where that file is not.

For log-probs L (N, V), orthonormal rows Q (N, H) and noise W0,

    hidden = scale Q,    weight = W0 (1 - Q^T Q) + L^T Q / scale,    hidden weight^T = L

exactly. Three heads that have the same rows:

- *i.i.d.*: a large scale; rows of the head are noise, the part that makes the logits is small;
- *common mean*: the same, plus one vector of the size of that noise to all rows, as heads of
  trained models have. It is orthogonal to hidden and moves no logit;
- *tilted*: a small scale; half of a row of the head is what makes the logits. Tokens that are
  improbable after h then point away from h: their mean differs from row to row.

In 16 bits the logits of the first two move by 0.07, the truth with them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import make_hidden, make_weight, sample_labels

FILE = Path(__file__).parents[3] / "shared" / "data" / "softmax_profile.npz"
ROWS, HIDDEN = 256, 384
# Scale, and whether there is a common vector.
HEADS = {"i.i.d.": (1000.0, False), "common mean": (1000.0, True), "tilted": (100.0, False)}
GENERATED_VOCAB = 8_000
BLOCKS = (0, 512, 1024, 1536)  # first rows of the stretches of text taken: 64 tokens each


class Profile(NamedTuple):
    """`logp (N, V)` float64, `labels (N,)`: the tokens that followed."""

    logp: Tensor
    labels: Tensor


class Problem(NamedTuple):
    """What a sparse gradient is computed from: float64 truth on these very numbers is the judge."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    a: Tensor  # (N,) float32: negative in group 0, positive in group 1
    groups: Tensor  # (N,)


def names() -> list[str]:
    """The profiles that are there."""
    return [*(["text"] if FILE.is_file() else []), "generated"]


def load(name: str) -> Profile:
    """One of `names()`."""
    return _text() if name == "text" else _generated()


def _text() -> Profile:
    with np.load(FILE) as file:
        data = {name: torch.from_numpy(file[name].astype(np.float64)) for name in file.files}
    indptr, indices = data["indptr"].long(), data["indices"].long()
    rows = torch.cat([torch.arange(first, first + ROWS // len(BLOCKS)) for first in BLOCKS])
    p = torch.empty(ROWS, int(data["vocab"]), dtype=torch.float64)
    for i, row in enumerate(rows):
        stored = slice(int(indptr[row]), int(indptr[row + 1]))
        # What is not stored, all below 2^-17, is the average of the text in this row's amount.
        p[i] = data["tail"].index_fill(0, indices[stored], 0.0)
        p[i] *= data["tail_mass"][row] / p[i].sum()
        p[i, indices[stored]] = data["logp"][stored].exp()
    return Profile(torch.log(p / p.sum(1, keepdim=True)), data["labels"][rows].long())


def _generated() -> Profile:
    generator = torch.Generator().manual_seed(0)
    weight = make_weight("trained", GENERATED_VOCAB, 256, torch.float32, generator)
    hidden = make_hidden("trained", ROWS, 256, torch.float32, generator)
    labels = sample_labels(hidden, weight, "trained", None, generator)
    return Profile(torch.log_softmax(hidden.double() @ weight.double().t(), 1), labels)


def problem(profile: Profile, head: str, dtype: torch.dtype = torch.float32) -> Problem:
    """One of `HEADS` over `profile`."""
    scale, common_mean = HEADS[head]
    generator = torch.Generator().manual_seed(1)
    rows, vocabulary = profile.logp.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(draw(HIDDEN, rows).double())[0].t().float()  # (N, H)
    logits = (profile.logp - profile.logp.mean(1, keepdim=True)).float()
    weight = draw(vocabulary, HIDDEN) / HIDDEN**0.5
    if common_mean:
        weight += draw(HIDDEN) / HIDDEN**0.5
    weight += (logits.t() / scale - weight @ basis.t()) @ basis
    groups = (torch.arange(rows) >= rows // 2).long()
    a = (0.5 + torch.rand(rows, generator=generator)) * (2.0 * groups - 1.0) / rows
    return Problem((scale * basis).to(dtype), weight.to(dtype), profile.labels, a, groups)
