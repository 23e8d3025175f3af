"""How the sequences of a batch are laid out in the rows that a model computes.

    padded          one sequence in a row, filled up to the longest
    packed          sequences one after the other, several in a row, nothing between them
    shared_prompt   of each pair what both sequences begin with, once, then the rest of the chosen
                    one, then the rest of the rejected one; several pairs in a row

A batch travels, and is scored, padded: (2P, T), chosen first. In between, `Rows` say which token
of it stands at each place of the rows (R, L), and at which place the hidden state of each token
is found again. A token sees the places of its own group that stand at most at its own position,
in a branch that it continues: branch 0 is the beginning of all others of the group.

    sees(q, k) = group_q == group_k and branch_k in (0, branch_q) and position_k <= position_q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.options import check_choice, check_integer

LAYOUTS = ("padded", "packed", "shared_prompt")

_COMMON, _CHOSEN, _REJECTED = 0, 1, 2
_PADDING = -1  # a group of its own: what fills a row up is seen by nothing else


@dataclass(frozen=True)
class BatchLayout:
    """Which layout, and how long a row may become.

    Attributes:
        name: one of `LAYOUTS`.
        max_tokens_per_row: places of a row, more only where one sequence (one pair) needs them.
            None: everything in one row where the attention passes over what is masked; where it
            computes every entry of a mask, the number of rows that costs least.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown name, a number below 1.
    """

    name: str = "padded"
    max_tokens_per_row: int | None = None

    def __post_init__(self) -> None:
        check_choice("batch_layout", self.name, LAYOUTS)
        if self.max_tokens_per_row is not None:
            check_integer("max_tokens_per_row", self.max_tokens_per_row, least=1)


class Rows(NamedTuple):
    """A batch of B = 2P sequences of up to T tokens in R rows of L places.

    Attributes:
        tokens: (R, L) int64, the token at each place, as an index into the B * T of the batch; 0
            where a row is filled up.
        positions: (R, L) int64, of the token in its sequence.
        groups: (R, L) int64, the pair or the sequence it belongs to; -1 where a row is filled up.
        branches: (R, L) int64, 0 what all of the group begins with, 1 chosen, 2 rejected.
        places: (B * T,) int64, where each token is, as an index into the R * L; 0 for padding.
        real: (B, T) bool, the tokens that are no padding.
        starts: where each run of one group and branch begins, of the R * L, and R * L itself.
        unshared: pairs packed as two sequences: they begin with different tokens, or share so few
            that a longer mask would cost more.
    """

    tokens: Tensor
    positions: Tensor
    groups: Tensor
    branches: Tensor
    places: Tensor
    real: Tensor
    starts: tuple[int, ...]
    unshared: int

    @property
    def computed(self) -> int:
        """Places of all rows."""
        return self.tokens.numel()

    @property
    def padded(self) -> int:
        """Places of the padded batch."""
        return self.real.numel()


class _Run(NamedTuple):
    """Tokens `start` to `stop` of a sequence, and of which group and branch they are.

    `owners` are the sequences that have them, the first of which they are taken from.
    """

    owners: tuple[int, ...]
    start: int
    stop: int
    branch: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def lay_out(
    layout: BatchLayout,
    per_token: Sequence[Tensor],
    attention_mask: Tensor | None,
    *,
    attention_scale: float | None = None,
    multiple_of: int = 1,
) -> Rows:
    """Lay the sequences of a batch out in rows.

    The same batch gives the same rows. Pieces are placed longest first: each in the first row that
    has room for it, or, where a mask costs, in the shortest of as many rows as cost least.

    Args:
        layout: "packed" or "shared_prompt".
        per_token: (B, T) integer tensors, at least one: ids and whatever else a token has. Two
            sequences share their beginning as far as all of these are equal.
        attention_mask: (B, T), 0 on padding, which is on the right; None: no padding.
        attention_scale: L at which the attention of a row costs as much as the rest of a layer;
            None: attention that passes over what is masked.
        multiple_of: L is rounded up to it.

    Returns:
        The rows, on the device of the batch.

    Raises:
        ValueError: padding that is not on the right; "shared_prompt" and an odd number of
            sequences.

    Note:
        Waits for the device once, for the lengths.
    """
    shape, device = per_token[0].shape, per_token[0].device
    if layout.name == "shared_prompt" and shape[0] % 2:
        raise ValueError(
            "batch_layout='shared_prompt' needs pairs, P chosen then P rejected sequences, got "
            f"{shape[0]} sequences; take 'packed' for others"
        )
    lengths, shared = _extents(per_token, attention_mask, pairs=layout.name == "shared_prompt")
    shared = [_if_worth(p, shared, lengths, attention_scale) for p in range(len(shared))]
    pieces = _pieces(lengths, shared)
    sizes = [sum(run.length for run in piece) for piece in pieces]
    rows = _fill(sizes, layout.max_tokens_per_row, attention_scale)
    placed = [[run for index in row for run in pieces[index]] for row in rows]
    groups = [[index for index in row for _ in pieces[index]] for row in rows]
    longest = max((sum(sizes[index] for index in row) for row in rows), default=0)
    length = max(1, -(-longest // multiple_of)) * multiple_of
    return _write(placed, groups, lengths, shape, length, shared.count(0)).to(device)


def _extents(
    per_token: Sequence[Tensor], attention_mask: Tensor | None, *, pairs: bool
) -> tuple[list[int], list[int]]:
    """Of each sequence its length; of each pair how many tokens both begin with."""
    count, width = per_token[0].shape
    device = per_token[0].device
    real = torch.ones(count, width, dtype=torch.bool, device=device)
    if attention_mask is not None:
        real = attention_mask.to(device) != 0
    lengths = real.sum(1)
    on_the_right = (real == (torch.arange(width, device=device) < lengths[:, None])).all()
    found = [lengths, on_the_right[None].long()]
    if pairs:
        half = count // 2
        same = real[:half] & real[half:]
        for each in per_token:
            same = same & (each[:half] == each[half:])
        found.append(same.long().cumprod(1).sum(1))
    numbers: list[int] = torch.cat(found).tolist()
    if not numbers[count]:
        raise ValueError(
            "the layouts 'packed' and 'shared_prompt' need batches padded on the right, as "
            "PreferenceCollator makes them; attention_mask has a 0 in front of a 1"
        )
    return numbers[:count], numbers[count + 1 :]


def _if_worth(pair: int, shared: list[int], lengths: list[int], scale: float | None) -> int:
    """How much a pair is to share: nothing where a longer mask costs more than the tokens."""
    common, sides = shared[pair], (lengths[pair], lengths[pair + len(shared)])
    apart = sum(_cost(length, scale) for length in sides)
    return common if _cost(sum(sides) - common, scale) < apart else 0


def _cost(length: int, scale: float | None) -> float:
    """Of a row, in tokens."""
    return length if scale is None else length * (1 + length / scale)


def _pieces(lengths: list[int], shared: list[int]) -> list[list[_Run]]:
    """What must stay in one row: sequences, or pairs that begin with the same tokens."""
    pieces, pairs = [], len(shared)
    for pair, common in enumerate(shared):
        chosen, rejected = pair, pair + pairs
        if common == 0:
            continue
        pieces.append([
            _Run((chosen, rejected), 0, common, _COMMON),
            _Run((chosen,), common, lengths[chosen], _CHOSEN),
            _Run((rejected,), common, lengths[rejected], _REJECTED),
        ])  # fmt: skip
    alone = [s for s in range(len(lengths)) if not pairs or shared[s % pairs] == 0]
    pieces += [[_Run((sequence,), 0, lengths[sequence], _COMMON)] for sequence in alone]
    pieces = [[run for run in piece if run.length] for piece in pieces]
    return [piece for piece in pieces if piece]


def _fill(sizes: list[int], limit: int | None, attention_scale: float | None) -> list[list[int]]:
    """Indices of the pieces in each row, at the number of rows that costs least."""
    total, longest = sum(sizes), max(sizes, default=0)
    most = total if limit is None else max(limit, longest)
    if attention_scale is None:
        return _first_fit(sizes, most)
    best, least = list[list[int]](), float("inf")
    for count in range(1, len(sizes) + 1):
        rows = _balanced(sizes, count)
        length = max(sum(sizes[index] for index in row) for row in rows)
        cost = count * _cost(length, attention_scale)
        if length <= most and cost < least:
            best, least = rows, cost
    return best


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """The fewest rows of up to `capacity`, nearly: each piece in the first that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(sizes):
        row = next((r for r, left in enumerate(room) if left >= sizes[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= sizes[index]
    return rows


def _balanced(sizes: list[int], count: int) -> list[list[int]]:
    """`count` rows of one length, nearly: each piece in the one that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for index in _longest_first(sizes):
        row = lengths.index(min(lengths))
        rows[row].append(index)
        lengths[row] += sizes[index]
    return rows


def _longest_first(sizes: list[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))


class _Written(NamedTuple):
    """`Rows` on the host: of each place token, position, group and branch; (B * T,) places."""

    of_places: Tensor  # (4, R, L)
    places: Tensor
    real: Tensor
    starts: tuple[int, ...]
    unshared: int

    def to(self, device: torch.device) -> Rows:
        def sent(tensor: Tensor) -> Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        tokens, positions, groups, branches = sent(self.of_places).unbind()
        return Rows(
            tokens, positions, groups, branches, sent(self.places), sent(self.real), self.starts,
            self.unshared,
        )  # fmt: skip


def _write(
    rows: list[list[_Run]],
    groups: list[list[int]],
    lengths: list[int],
    shape: torch.Size,
    length: int,
    unshared: int,
) -> _Written:
    """Write down, on the host, what stands at each place."""
    count, width = shape
    of_places = torch.zeros(4, max(1, len(rows)), length, dtype=torch.int64, device="cpu")
    of_places[2] = _PADDING
    places = torch.zeros(count, width, dtype=torch.int64, device="cpu")
    starts = []
    for row, (runs, of_runs) in enumerate(zip(rows, groups, strict=True)):
        at = 0
        for run, group in zip(runs, of_runs, strict=True):
            stop = at + run.length
            sequence = run.owners[0] * width
            of_places[0, row, at:stop] = _range(sequence + run.start, sequence + run.stop)
            of_places[1, row, at:stop] = _range(run.start, run.stop)
            of_places[2, row, at:stop] = group
            of_places[3, row, at:stop] = run.branch
            for owner in run.owners:
                places[owner, run.start : run.stop] = _range(row * length + at, row * length + stop)
            starts.append(row * length + at)
            at = stop
        if at < length:
            starts.append(row * length + at)
    real = _range(0, width) < torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
    end = of_places[0].numel()
    return _Written(of_places, places.flatten(), real, (*(starts or [0]), end), unshared)


def _range(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device="cpu")  # whatever the default device is


def visible(rows: Rows, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Which places see which: the mask of the attention.

    Args:
        rows: of a batch.
        window: a token sees the last `window` positions only, its own among them.
        chunk: it sees its own of the chunks of so many positions only.

    Returns:
        (R, L, L) bool, True where the place of the second dimension sees that of the third.
    """
    L = rows.tokens.shape[1]
    q = torch.arange(L, device=rows.tokens.device)[:, None]
    row = torch.arange(rows.tokens.shape[0], device=q.device)[:, None, None]
    return sees(rows, row, q, q.t(), window, chunk)


def sees(
    rows: Rows, row: Tensor, q: Tensor, k: Tensor, window: int | None, chunk: int | None
) -> Tensor:
    """Whether place `q` of a row sees its place `k`; see `visible` for the window and the chunk.

    Distances are positions in a sequence, which are not those of the places: between a rejected
    answer and its prompt stands the chosen one.
    """
    position_q, position_k = rows.positions[row, q], rows.positions[row, k]
    branch_k = rows.branches[row, k]
    continues = (branch_k == _COMMON) | (branch_k == rows.branches[row, q])
    allowed = (rows.groups[row, q] == rows.groups[row, k]) & continues & (position_k <= position_q)
    if window is not None:
        allowed = allowed & (position_q - position_k < window)
    if chunk is not None:
        allowed = allowed & (position_q // chunk == position_k // chunk)
    return allowed
