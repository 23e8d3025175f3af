"""The launchers of the sparse gradient for GPUs not here: what they launch compiles."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orpo_kernels.engine import host_copy, run, scoring
from orpo_kernels.ops import sparse as ops

pytest.importorskip("triton")

from orpo_kernels.engine.sparse import scan_loop, slot_gradient
from tests.kernels.dryrun import SHARED_LIMIT, dryrun, resources
from tests.kernels.test_launches_sparse import evenly


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


BUDGET = 256 * 2**20


@pytest.fixture
def engine(monkeypatch):
    """Sets what a backward finds in the store: slots of each row block in turn, -1 for none."""
    # nonzero has no fake: every row is processed, as while a graph is captured.
    for module in (host_copy, scoring, scan_loop):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(slot_gradient, "is_capturing", lambda device: False)
    # Nor can a count be read that the forward left.
    monkeypatch.setattr(
        run, "select_again", lambda problem, scored, places: scoring.select(problem, scored)
    )

    def keeps(*counts):
        found = []

        def kept_blocks(table):
            found[:] = [counts[i % len(counts)] for i in range(table.shape[0])]
            return found

        monkeypatch.setattr(slot_gradient, "kept_blocks", kept_blocks)
        monkeypatch.setattr(
            slot_gradient, "ranges_of", lambda edges, _: [*evenly(edges, sum(found))]
        )

    keeps(1000)
    return keeps


def whole_loss(rows, H, V, *, trains=True, sets=1, bias=False, budget=BUDGET):
    """The op's own two functions, as autograd calls them."""
    dtype = torch.bfloat16
    hidden, weight = cuda(rows, H, dtype=dtype), cuda(V, H, dtype=dtype)
    labels, groups = cuda(sets, rows, dtype=torch.int64), cuda(rows, dtype=torch.int64)
    bias = cuda(V, dtype=dtype) if bias else None
    problem = (
        hidden, weight, labels, bias, None, None, 1.0, None, -100, dtype, budget, groups, 2.0**-12,
    )  # fmt: skip
    outputs = ops.sparse_token_logps._init_fn(*problem, True, trains, True)
    _, _, statistics, _, _, _, sums, *of_forward = outputs
    if trains:
        ops.sparse_token_logps_dweight._init_fn(
            cuda(sets, rows), statistics, sums, *of_forward, *problem,
            [True, bias is not None, False],
        )  # fmt: skip
    return of_forward[0].shape[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_the_whole_sparse_loss(engine, architecture):
    # Of a device that is not there nothing can be read: a forward that waits for it fails here.
    with dryrun(architecture) as log:
        for H, V in itertools.product((4096, 4097), (128256, 151936, 262144, 32003)):
            whole_loss(300, H, V, trains=False)
            assert whole_loss(300, H, V, bias=True, sets=2)
        engine(500, -1)  # one that is dense, or without room in the store
        assert whole_loss(700, 4096, 32768, bias=True)
    names = {launch.name for launch in log}
    assert {
        "_scan_kernel", "_first_estimate_kernel", "_live_columns_kernel", "_pack_slots_kernel",
        "_dense_rows_kernel", "pieces_kernel", "_gather_slots_kernel", "_add_further_kernel",
        "_dropped_rows_kernel", "_tail_product_kernel", "_keep_slots_kernel",
        "_given_back_kernel", "_slot_products_kernel", "_sum_products_kernel",
        "_weight_probs_kernel",
    } <= names  # fmt: skip
    compiled = {id(launch.compiled): launch for launch in log}
    # With H of whole vectors, and without: a bias is one column.
    assert [each.name for each in compiled.values()].count("_sum_products_kernel") == 2
    for each in compiled.values():
        figures = resources(each.compiled)
        assert figures.spills == 0, each.name
        assert figures.shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize(
    ("N", "budget"),
    [(1200, 48 * 2**20), (3000, 256 * 2**20), (3000, 1400 * 2**20), (8192, 64 * 2**20)],
)
@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_within_the_budget(engine, trains, N, budget):
    # What is alive at once, by storages: all kept, as many as there is room for; and some rows not.
    H, V = 1024, 128256
    for counts in ((1700,), (1700, -1)):
        engine(*counts)
        with dryrun(89) as log, Alive() as alive:
            whole_loss(N, H, V, trains=trains, budget=budget, bias=trains)
        # Of many rows and little memory the store has the columns of slots alone.
        remade = trains and N == 8192 and -1 not in counts
        assert ("_remake_slots_kernel" in {launch.name for launch in log}) == remade
        inputs = 2 * (N * H + V * H + V) + 8 * 2 * N
        results = 2 * N * H + 4 * 9 * N + (2 * (V * H + V) + 8 * V if trains else 0)
        per_row = 300 * N  # which rows are scored, coefficients
        assert alive.peak <= budget + inputs + results + per_row


class Alive(TorchDispatchMode):
    """Bytes of the fake storages that are alive at once."""

    def __init__(self):
        super().__init__()
        self.known = weakref.WeakKeyDictionary()
        self.now = self.peak = 0

    def _freed(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage not in self.known:
                    size = storage.nbytes()
                    self.known[storage] = size
                    weakref.finalize(storage, self._freed, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out
