"""Rows of several sequences: which token stands where, who sees whom, how rows are filled."""

from pathlib import Path

import pytest
import torch

from orpo_kernels.layout import BatchLayout, lay_out, visible

# (chosen, rejected): a shared beginning of 3, of 1, none, all of the chosen one, all of both.
PAIRS = [
    ([1, 2, 3, 4, 5], [1, 2, 3, 9]),
    ([1, 7, 7, 7], [1, 8]),
    ([5, 6], [6, 5, 4]),
    ([1, 2], [1, 2, 3]),
    ([4, 4], [4, 4]),
]
NAMES = ("packed", "shared_prompt")


def batch(pairs=PAIRS):
    """input_ids and attention_mask (2P, T); padding is a token that is also a real one."""
    sequences = [side[0] for side in pairs] + [side[1] for side in pairs]
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), 4)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = 1
    return ids, mask


def seen_by(rows, mask, token):
    """Indices in the batch of what a token (flat index) sees, in order, by the mask."""
    place = int(rows.places[token])
    row, place = divmod(place, rows.tokens.shape[1])
    return rows.tokens[row, mask[row, place]].tolist()


@pytest.mark.parametrize("limit", [None, 1, 7, 100], ids=lambda limit: f"rows of {limit}")
@pytest.mark.parametrize("scale", [None, 8.0], ids=["one row is cheapest", "a mask costs"])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_sees_the_sequence_before_it(name, scale, limit):
    ids, mask = batch()
    rows = lay_out(BatchLayout(name, limit), [ids], mask, attention_scale=scale)
    seen = visible(rows)
    width = ids.shape[1]
    for sequence, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            others = seen_by(rows, seen, sequence * width + t)
            # The tokens from the first to this one, whosever copy of the beginning they are.
            assert [int(ids.flatten()[i]) for i in others] == ids[sequence, : t + 1].tolist()
            place = divmod(int(rows.places[sequence * width + t]), rows.tokens.shape[1])
            assert rows.positions[place] == t
    real = rows.groups >= 0
    assert not seen[:, :, :].logical_and(real[:, :, None] & ~real[:, None, :]).any()
    assert seen.any(-1).all()  # padding sees padding: a softmax over nothing is NaN


def test_the_prompt_is_there_once():
    ids, mask = batch()
    padded, sequences = ids.numel(), int(mask.sum())
    packed, shared = (lay_out(BatchLayout(name), [ids], mask) for name in NAMES)
    assert packed.computed == sequences == 29
    assert shared.computed == sequences - (3 + 1 + 0 + 2 + 2)
    assert packed.padded == shared.padded == padded
    assert (packed.unshared, shared.unshared) == (0, 1)


def test_only_equal_tokens_are_shared():
    ids, mask = batch([([1, 2, 3], [1, 2, 4])])
    kinds = torch.tensor([[0, 0, 0], [0, 1, 0]])
    rows = lay_out(BatchLayout("shared_prompt"), [ids, kinds], mask)
    assert rows.computed == 5  # the second token is of another kind in the rejected sequence


def test_windows_and_chunks_are_of_positions():
    # Between the rejected answer and its prompt stand 6 places of the chosen one.
    ids, mask = batch([([1, 2, 3, *[4] * 6], [1, 2, 3, 9, 9, 9])])
    rows = lay_out(BatchLayout("shared_prompt"), [ids], mask)
    last = ids.shape[1] + 5
    assert len(seen_by(rows, visible(rows), last)) == 6
    assert seen_by(rows, visible(rows, window=4), last) == [2, *range(last - 2, last + 1)]
    assert seen_by(rows, visible(rows, chunk=4), last) == [last - 1, last]


def test_rows_are_filled_longest_first():
    lengths = (9, 2, 5, 4, 7, 3)
    sequences = [list(range(n)) for n in lengths]
    ids, mask = batch(list(zip(sequences[:3], sequences[3:], strict=True)))
    rows = lay_out(BatchLayout("packed", 12), [ids], mask)
    # 9 + 3, 7 + 5, 4 + 2: sequences in the order of the batch are 0 to 5.
    owners = [torch.unique(rows.tokens[r][rows.groups[r] >= 0] // 9).tolist() for r in range(3)]
    assert owners == [[0, 5], [2, 4], [1, 3]]
    again = lay_out(BatchLayout("packed", 12), [ids], mask)
    assert all(torch.equal(a, b) for a, b in zip(rows[:6], again[:6], strict=True))


def test_the_cheapest_rows_for_a_mask():
    one, other = [1] * 40, [2] * 40
    even = batch([(one, other)])
    assert lay_out(BatchLayout("packed"), even[:1], even[1]).tokens.shape == (1, 80)
    for scale, shape in ((1.0, (2, 40)), (1e6, (2, 40))):  # equal lengths leave nothing to fill
        rows = lay_out(BatchLayout("packed"), even[:1], even[1], attention_scale=scale)
        assert rows.tokens.shape == shape
    odd = batch([(one, other[:4])])
    # Two rows of 40 compute 80 places, one of 44 computes 44, whatever the mask costs.
    rows = lay_out(BatchLayout("packed"), odd[:1], odd[1], attention_scale=1.0)
    assert rows.tokens.shape == (1, 44)


def test_too_little_to_share():
    one, other = [1, *[2] * 40], [1, *[3] * 40]
    ids, mask = batch([(one, other)])
    # One token saved, and a mask of 81 x 81 instead of two of 41 x 41.
    apart = lay_out(BatchLayout("shared_prompt"), [ids], mask, attention_scale=64.0)
    assert (apart.computed, apart.unshared) == (82, 1)
    skipping = lay_out(BatchLayout("shared_prompt"), [ids], mask)
    assert (skipping.computed, skipping.unshared) == (81, 0)


def test_a_row_longer_than_allowed_is_as_long_as_its_sequence():
    ids, mask = batch([([1] * 10, [2, 3])])
    rows = lay_out(BatchLayout("packed", 4), [ids], mask, multiple_of=8)
    assert rows.tokens.shape == (2, 16)  # 10 rounded up; the 2 do not fit into the 10


def test_sequences_without_a_token():
    ids, mask = batch([([], [1, 2]), ([], [])])
    for name in NAMES:
        rows = lay_out(BatchLayout(name), [ids], mask)
        assert rows.computed == 2
    rows = lay_out(BatchLayout("packed"), [ids[:1]], mask[:1])
    assert rows.computed == 1  # a model cannot compute none


def test_starts_are_those_of_the_sequences():
    ids, mask = batch()
    rows = lay_out(BatchLayout("packed", 6), [ids], mask)
    assert rows.starts[0] == 0
    assert rows.starts[-1] == rows.computed
    flat = rows.groups.flatten()
    for start, stop in zip(rows.starts, rows.starts[1:], strict=False):
        assert len(torch.unique(flat[start:stop])) == 1


def test_refuses_padding_on_the_left():
    ids, mask = batch([([1, 2, 3], [4, 5])])
    with pytest.raises(ValueError, match=r"padded on the right, .* a 0 in front of a 1"):
        lay_out(BatchLayout("packed"), [ids], mask.flip(1))


def test_refuses_what_is_no_layout():
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"needs pairs, .* got 3 sequences"):
        lay_out(BatchLayout("shared_prompt"), [ids[:3]], mask[:3])
    with pytest.raises(ValueError, match=r"batch_layout must be one of .* did you mean 'packed'"):
        BatchLayout("pack")
    with pytest.raises(ValueError, match="max_tokens_per_row must be at least 1"):
        BatchLayout("packed", 0)
    with pytest.raises(TypeError, match="max_tokens_per_row must be an integer"):
        BatchLayout("packed", 4096.0)  # type: ignore[arg-type]


def test_the_picture_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "layouts.md").read_text()
    picture = page.split("<!-- mask -->\n```\n")[1].split("\n```")[0].splitlines()
    ids, mask = batch([([1, 2, 3, 4, 4, 4, 4], [1, 2, 3, 5, 5, 5]), ([1, 2, 4], [1, 2, 5, 5])])
    rows = lay_out(BatchLayout("shared_prompt"), [ids], mask)
    kinds = ["pcr"[branch] for branch in rows.branches[0].tolist()]
    drawn = [" ".join("#" if seen else "." for seen in line) for line in visible(rows)[0].tolist()]
    lines = [f" {kind}   {line}" for kind, line in zip(kinds, drawn, strict=True)]
    assert picture == ["     " + " ".join(kinds), *lines]
