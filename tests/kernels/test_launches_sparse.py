"""What a sparse call starts on a GPU that is not here: every launch and torch op of it."""

import itertools

import pytest
import torch

from orpo_kernels.constants import DEFAULT_WORKSPACE_BYTES
from orpo_kernels.engine import host_copy, policy, run, scoring
from orpo_kernels.engine.gpu.model import Job
from orpo_kernels.engine.gpu.plan import plan_scan
from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.engine.sparse import plan as plans
from orpo_kernels.engine.sparse.tail import Packed
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.selftest import logps, sparse

pytest.importorskip("triton")

from orpo_kernels.engine.sparse import scan_loop, slot_gradient
from orpo_kernels.kernels.live_columns import MOST_LIVE
from orpo_kernels.kernels.scan import LOOKED
from orpo_kernels.kernels.slot_store import ScanShape
from tests.kernels.dryrun import dryrun
from tests.kernels.test_launches import CARDS, MIB, PADDED, Events, H, N, V, _spans, outside

MOST_OF_A_TILE = 8
STARTED = ["label_terms", "torch.new_zeros", "first_estimate"]
# Which rows are scored and in which group, the state, the sums of the tail, the certificate.
MOST_OUTSIDE = 29
# Coefficients, q, what is given back, the lists of labels and of slots: all of it before the host
# waits for the number of slots. After it slots that are made again, products, and their memory.
MOST_BEFORE, MOST_AFTER = 40, 3
WAIT = "the host waits"


def evenly(edges, slots):
    """Ranges that have their share of the slots, and split one in 32 columns."""
    for first, last in itertools.pairwise(edges):
        products = (slots * each // edges[-1] for each in (first, last))
        yield slot_gradient.Range(first, last, first + (last - first) // 32, *products)


@pytest.fixture
def started(monkeypatch):
    """Events of a forward and of its gradients, and the shape of the forward."""
    # nonzero has no fake: every row is processed, as while a graph is captured.
    for module in (host_copy, scoring, scan_loop):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(slot_gradient, "is_capturing", lambda device: False)
    monkeypatch.setattr(
        run, "select_again", lambda problem, scored, places: run.select(problem, scored)
    )

    def start(architecture, mib, *, vocabulary=V, head_dtype=torch.bfloat16, kept=None):
        trains = kept is not None

        def cuda(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        card = CARDS[architecture]
        for module in (policy, run, plans):
            monkeypatch.setattr(module, "card_of", lambda device: card)
        with dryrun(architecture) as log, Events(log) as events:
            problem = Problem(
                cuda(N, H), cuda(vocabulary, H, dtype=head_dtype), cuda(1, N, dtype=torch.int64),
                None, None, None, Transform(), -100, torch.bfloat16, mib * MIB, trains,
                cuda(N, dtype=torch.int64), 2.0**-12,
            )  # fmt: skip
            begin = len(events.all())
            start.events = lambda: events.all()[begin:]
            _, _, state = run.sparse_forward(problem, needs_dhidden=True)
            middle = len(events.all())
            waited = []

            def kept_blocks(table):
                waited.append(len(events.all()) - middle)
                return [kept] * table.shape[0]

            monkeypatch.setattr(slot_gradient, "kept_blocks", kept_blocks)
            monkeypatch.setattr(
                slot_gradient, "ranges_of", lambda edges, _: [*evenly(edges, kept * N // 64)]
            )
            run.hidden_gradient_(
                problem, cuda(1, N, dtype=torch.float32), state.statistics, (state.g, state.g_r),
                state.product,
            )  # fmt: skip
            if trains:
                run.sparse_head_gradient(
                    problem, cuda(1, N, dtype=torch.float32), state.statistics, state.sums,
                    Packed(state.store, state.table, state.per_block),
                    scoring.Places(state.places, state.number),
                    HeadGradients((cuda(vocabulary, H),), None),
                )  # fmt: skip
            names = events.all()
            shape = run.sparse_plan(problem)
        backward = names[middle:]
        if waited:  # where the host waits for what is in the store
            backward.insert(waited[0], WAIT)
        return names[begin:middle], backward, shape.scan

    return start


def expected(shape, vocabulary, *, cast=False, trains=False, rows=N):
    """The launches of the loop, chunk by chunk and block by block."""
    odd = vocabulary % 8 > 0
    first = scan_loop.first_rows(rows, vocabulary, shape)
    for chunk, _ in enumerate(scan_loop.chunks(rows, first, shape)):
        yield "take_rows"
        for v0, v1 in _spans(vocabulary, shape.columns):
            ragged = odd and not cast and v1 == vocabulary
            if ragged and chunk == 0:
                yield from PADDED
            tile = [*["take_rows"] * cast, *["mm"] * (1 + ragged)]
            # Behind the first product: what the others need, made ready while the device has it.
            tile += STARTED * (v0 == chunk == 0) + ["scan"] * (1 + (v0 == 0))
            tile += ["live_columns", "pack_slots", "dense_rows"]
            assert len(tile) <= MOST_OF_A_TILE + len(STARTED) * (v0 == chunk == 0)
            yield from tile
        yield from ("pieces", "gather_slots", "add_further", "finish_rows", "dropped_rows")
        yield from ["keep_slots"] * trains


def around(names, loop):
    """What a call starts beside its loop, whose first product does not wait for the state."""
    begun = loop.index(STARTED[0])
    return outside(outside(names, loop[:begun]), loop[begun:])


@pytest.mark.parametrize("mib", [64, 256, 1024])
@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_the_loop_starts_nothing_else(started, architecture, mib):
    forward, backward, shape = started(architecture, mib)
    if architecture == 90:  # both shapes: blocks, and the whole vocabulary
        assert (shape.columns == V) == (mib == 1024)
    assert shape.columns == V or shape.columns % 256 == 0
    others = around(forward, list(expected(shape, V))) + backward
    assert len(others) <= MOST_OUTSIDE, others
    # Once a call: labels, estimates, the product of the tail, and g to dhidden.
    once = ["score_rows", "tail_product", "certificate", "scale_rows"]
    assert [each for each in others if "torch" not in each] == once


def test_the_first_product_does_not_wait_for_the_count(started, monkeypatch):
    # An H200 was idle for 0.15 ms between the count's arrival and the product it had waited for.
    monkeypatch.setattr(scoring, "is_capturing", lambda device: False)
    asked, waited = [], []
    real = host_copy.HostCopy

    def ask(tensor):
        asked.append(tensor.shape)
        return real(tensor)

    def wait(totals):
        waited.append(started.events())
        return [N - 1, 0, 0]

    monkeypatch.setattr(scoring, "HostCopy", ask)
    monkeypatch.setattr(scoring, "waited_for", wait)
    forward, _, shape = started(90, 64)
    (before,) = waited
    assert asked == [(3,)]  # the copy is sent for before what would hold it up
    assert before.index("choose_rows") < before.index("take_rows") < before.index("mm")
    parts = scan_loop.chunks(N - 1, scan_loop.first_rows(N, V, shape), shape)
    assert forward.count("mm") == len(parts) * len(list(_spans(V, shape.columns)))


@pytest.mark.parametrize("rows", [8192, 10240])  # that are planned for; 8,192 of them are scored
@pytest.mark.parametrize(
    ("mib", "most", "waves"), [(64, 760, 257), (128, 470, 248), (256, 270, 248), (1431, 100, 246)]
)
def test_the_device_is_full_and_the_host_keeps_up(rows, mib, most, waves):
    # 8,192 rows of Llama 3's head on an H200: 243 waves of output tiles are the least there are,
    # and a wave takes 46.5 us. 512 x 18,432 took 12.99 ms, 3 waves for 2.2; 768 x 8,192, four row
    # tiles of 192, 11.2. The host took at most 21 us for a launch: 760 are 1.5 bare GEMMs.
    shape, _ = plan_scan(Job(rows, V, H, 2), 2, mib * MIB, CARDS[90])
    launches = list(expected(shape, V, rows=8192))
    assert len(launches) <= most, shape
    parts = scan_loop.chunks(8192, scan_loop.first_rows(rows, V, shape), shape)
    edges = list(_spans(V, shape.columns))
    tiles = [(-(-(b - a) // 128), -(-(v1 - v0) // 256)) for a, b in parts for v0, v1 in edges]
    assert sum(-(-high * wide // CARDS[90].processors) for high, wide in tiles) <= waves, shape


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_head_that_is_cast_and_odd(started, head_dtype):
    cast = head_dtype == torch.float32
    forward, _, shape = started(90, 64, vocabulary=32_003, head_dtype=head_dtype)
    loop = list(expected(shape, 32_003, cast=cast))
    around(forward, loop)


@pytest.mark.parametrize("architecture", CARDS)
@pytest.mark.parametrize(("item", "wide"), [(4, 4), (2, 4), (2, 2)])
def test_the_self_test_looks_at_whole_rows_on_every_card(architecture, item, wide):
    # In one block of the vocabulary which row blocks are dense is a matter of the inputs alone:
    # what the self-test compares with (`selftest/sparse.py`, `_dense`).
    job = Job(sparse.OF_A_CALL, logps.VOCABULARY, logps.HIDDEN, item=item, wide=wide)
    shape, _ = plan_scan(job, 2, DEFAULT_WORKSPACE_BYTES, CARDS[architecture])
    assert shape.columns == logps.VOCABULARY <= LOOKED
    assert shape.rows >= sparse.OF_A_CALL
    assert shape.listed >= logps.VOCABULARY // MOST_LIVE
    assert shape.slots >= 2 * logps.VOCABULARY // 5  # "peaked" keeps a sixth


@pytest.mark.parametrize(("rows", "columns"), [(1280, V), (2048, 6144), (768, 8192), (8192, V)])
@pytest.mark.parametrize("candidates", [1, 100, 700, 3000, 10_240])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.1])  # of them that are scored: prompts are not
def test_the_first_tile_is_a_small_part(share, candidates, rows, columns):
    shape, scored = ScanShape(rows, columns, 1, 1, 1), max(1, int(share * candidates))
    most = scan_loop.first_rows(candidates, V, shape)
    assert most <= 256 or most * columns <= candidates * V / 16
    parts = scan_loop.chunks(scored, most, shape)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[0] == (0, min(scored, most))
    assert parts[-1][1] == scored
    assert all(start % 64 == 0 and start < stop <= start + rows for start, stop in parts)
    assert len(parts) <= -(-scored // rows) + 1
    # A GEMM of 2,688 rows computes 2,816: equal chunks are whole output tiles, but for the last.
    assert all((stop - start) % 256 == 0 for start, stop in parts[1:-1])


@pytest.mark.parametrize(("mib", "remakes"), [(64, True), (256, False), (1024, False)])
def test_a_head_that_trains(started, mib, remakes):
    # 1,300 slots of every 64 rows: what text keeps. dW is two launches for a panel of products.
    forward, backward, shape = started(90, mib, kept=1300)
    loop = list(expected(shape, V, trains=True))
    around(forward, loop)
    gradient = backward[backward.index("scale_rows") + 1 :]
    assert gradient.count("slot_products") == gradient.count("sum_products")
    assert gradient.count("slot_products") <= 20
    assert gradient.count("given_back") == 1
    before, after = gradient[: gradient.index(WAIT)], gradient[gradient.index(WAIT) + 1 :]
    assert gradient.count("remake_slots") == remakes
    others = [each for each in after if each not in ("slot_products", "sum_products")]
    assert len(before) <= MOST_BEFORE, before
    assert len(others) <= MOST_AFTER, others
    # The host waits once, for what is in the store, and starts the products at once.
    # What the device does until the host has read the number is behind the lists.
    meanwhile = before[before.index("coefficients") :]
    assert "given_back" in meanwhile
    assert "torch.sort" in before
    assert "torch.sort" not in meanwhile
    launched = {each.split("::")[-1] for each in gradient}
    assert not {"mm", "index_put", "weight_probs"} & launched


def test_rows_that_keep_nothing_are_done_the_exact_way(started):
    _, backward, _ = started(90, 256, kept=-1)
    assert "weight_probs" in backward
    assert "sum_products" not in backward
