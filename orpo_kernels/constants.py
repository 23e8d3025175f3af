"""Constants that mean the same thing in every file of the package."""

IGNORE_INDEX = -100
"""Label of a position that is not scored (torch's and transformers' convention)."""

MAX_MEAN_LOGP = -(2.0**-27)
"""Largest mean log-prob the odds are evaluated at (nats).

`log(p / (1 - p))` and its gradient have a pole at p = 1. Mean log-probs above this value
(p closer to 1 than 7.5e-9) are evaluated at it, and counted in `ORPOOutput.clamped_logps`.
"""

DEFAULT_WORKSPACE_BYTES = 64 * 2**20
"""Smallest default of `workspace_bytes`: what the vocabulary-sized work may allocate."""

COMPACT_ROWS = 64
"""Rows of a block of the sparse gradient on a GPU: a kept column is kept for all of them."""

SPLIT = 0.25
"""Sum of the kept entries of a column in 64 rows over which it has two slots on a GPU.

The second one has what rounding left of the first. A hundredth of the columns of a trained model
are such, and have nearly all that rounding kept entries to bfloat16 costs dhidden.
"""

LARGEST_EPS = 2.0**-12
"""Default of `eps`, of a head that trains, and the largest: probabilities over it enter the sparse
gradient one by one."""

FINE_EPS = 6.0
"""Default of `eps` of a frozen head, in units of 1 / V: 2^-14.4 for Llama 3, 2^-12 up to 24,576.

Then dhidden errs about what it does where it is exact: rounding it to bfloat16 and the average have
like shares. A head that trains would write and read H numbers for each column that it keeps.
"""

LARGE = 2.0**-10
"""Share of a row's sum over which an entry of a rounded tile is redone in float32.

About 40 entries of a row of a trained model are; the rounding of the others averages to 4e-5.
"""

MOST_LARGE = 256
"""Entries of a row of a tile that are redone, at most: a row with more has none that matters."""

MOST_MOVED = 2.0**6
"""How far an entry that is redone may be from the rounded one, either way: a factor.

Rounding to bfloat16 moves logits beyond 2^10 by more. Those stay as wrong as eager's: by the sums
of what was rounded it was decided which entries are redone, and unbounded ones overflow.
"""
