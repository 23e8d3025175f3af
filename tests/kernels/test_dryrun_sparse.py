"""The launchers of the sparse gradient for GPUs not here: what they launch compiles."""

import itertools
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orpo_kernels.engine import host_copy, operands, weight_gradient
from orpo_kernels.engine.sparse import tail as sparse_tail
from orpo_kernels.engine.sparse import weight_gradient as sparse_weight
from orpo_kernels.ops import sparse as ops

pytest.importorskip("triton")

from orpo_kernels.engine.sparse import scan_loop
from orpo_kernels.kernels import column_sums, softmax_grad
from orpo_kernels.kernels.gather_matmul import further_pieces, slot_matmul
from orpo_kernels.kernels.row_segments import pack_segments
from orpo_kernels.kernels.segment_store import segment_store
from orpo_kernels.kernels.softmax_compact import softmax_compact
from orpo_kernels.kernels.weight_gradient import (
    list_tokens,
    segment_column_sums,
    segment_weight_gradient,
    sort_targets,
)
from tests.kernels.dryrun import SHARED_LIMIT, dryrun, resources


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def both_gradients(R, H, V, *, count=1, trains=True):
    """A frozen or a trainable head over count of R rows, as an engine would call."""
    N, narrow = count * R, torch.bfloat16
    weight, hidden = cuda(V, H, dtype=narrow), cuda(N, H, dtype=narrow)
    labels, groups, tail = cuda(1, N, dtype=torch.int64), cuda(N, dtype=torch.int64), cuda(2, V)
    store = segment_store(cuda(2**26, dtype=torch.uint8), count * (R + 63), V, count)
    for chunk in range(count):
        start, stop = chunk * R, (chunk + 1) * R
        logits = cuda(-(-R // 64) * 64, -(-V // 128) * 128)[:R, :V]
        kept = softmax_compact(
            logits, None, labels[:, start:stop], 0, cuda(R), cuda(R), 2.0**-12, 1.0, None,
            groups[start:stop], tail,
        )  # fmt: skip
        slot_matmul(cuda(R, H), kept, weight)
        if trains:
            pack_segments(store, kept, chunk, chunk * -(-R // 64), start)
    if trains:
        lists = list_tokens(store, 0, V)
        segment_weight_gradient(
            cuda(V, H, dtype=narrow), store, lists, hidden, cuda(1), tail, cuda(2, H),
            sort_targets(labels, cuda(1, N), 0, V), hidden,
        )  # fmt: skip
        segment_column_sums(store, lists, cuda(N), V)


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_shapes_of_real_heads(architecture):
    with dryrun(architecture) as log:
        # Llama 3, Qwen 2.5, Gemma, and a vocabulary and a hidden size no vector divides.
        for V in (128256, 151936, 262144, 32003):
            both_gradients(300, 4096, V)
        both_gradients(300, 4097, 32003)
    compiled = {id(each.compiled): each for each in log}
    assert len({each.name for each in log}) == 10
    for each in compiled.values():
        figures = resources(each.compiled)
        assert figures.spills == 0, each.name
        assert figures.shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize("V", [8192, 8209])  # whole tiles, and a ragged one
def test_few_variants_over_many_lengths(V):
    rng = random.Random(0)
    variants: dict[str, set[int]] = {}
    with dryrun(89) as log:
        for _ in range(12):
            both_gradients(rng.randrange(1, 700), 64, V, count=rng.randrange(1, 4))
        for launch in log:
            variants.setdefault(launch.name, set()).add(id(launch.compiled))
    assert len(variants) == 10
    assert {name: len(found) for name, found in variants.items() if len(found) > 3} == {}


def test_pieces_fill_the_device_in_bounded_memory():
    # Two row blocks on 132 processors: 16 MiB of partials at most; many: two more each.
    tile = 2**30
    assert further_pieces(2, 4096, 132, 256, tile) == 16
    assert further_pieces(2, 512, 132, 256, tile) == 128
    assert further_pieces(32, 4096, 132, 256, tile) == 64
    # And at most a 16th of the tile.
    assert further_pieces(2, 4096, 132, 256, 2**27) == 8


BUDGET = 256 * 2**20


@pytest.fixture
def engine(monkeypatch):
    """The launchers where dispatch would put them, and a backward that knows what was stored."""
    monkeypatch.setattr(weight_gradient, "softmax_grad_", softmax_grad.softmax_grad_)
    for module in (sparse_tail, sparse_weight, weight_gradient):
        monkeypatch.setattr(module, "column_sums", column_sums.column_sums)
    # nonzero has no fake: every row is processed, as while a graph is captured.
    for module in (operands, host_copy, sparse_weight, scan_loop):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)

    def stores(pattern):
        def stored(packed, count, blocks):
            if packed.store.shape[0] == 0:
                return [[False] * blocks] * count
            return [[pattern[i % len(pattern)]] for i in range(count)]

        monkeypatch.setattr(sparse_weight, "stored_tiles", stored)

    stores([True])
    return stores


def whole_loss(rows, H, V, *, trains=True, sets=1, bias=False, budget=BUDGET):
    """The op's own two functions, as autograd calls them."""
    dtype = torch.bfloat16
    hidden, weight = cuda(rows, H, dtype=dtype), cuda(V, H, dtype=dtype)
    labels, groups = cuda(sets, rows, dtype=torch.int64), cuda(rows, dtype=torch.int64)
    bias = cuda(V, dtype=dtype) if bias else None
    problem = (
        hidden, weight, labels, bias, None, None, 1.0, None, -100, dtype, budget, groups, 2.0**-12,
    )  # fmt: skip
    outputs = ops.linear_logps_sparse._init_fn(*problem, True, trains, True)
    _, _, statistics, _, _, _, sums, store, table, per_block = outputs
    if trains:
        ops.linear_logps_sparse_dweight._init_fn(
            cuda(sets, rows), statistics, sums, store, table, per_block, *problem,
            [True, bias is not None, False],
        )  # fmt: skip
    return store.shape[0] > 0


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_the_whole_sparse_loss(engine, architecture):
    # Of a device that is not there nothing can be read: a forward that waits for it fails here.
    with dryrun(architecture) as log:
        for H, V in itertools.product((4096, 4097), (128256, 151936, 262144, 32003)):
            whole_loss(300, H, V, trains=False)
            assert whole_loss(300, H, V, bias=True, sets=2)
        # No size is part of what is compiled: of the next two, which recompute a tile at a time,
        # a smaller vocabulary takes a tenth of the launches.
        assert not whole_loss(300, 4096, 32768, budget=32 * 2**20)  # no room for a store
        engine([True, False])  # the second chunk overflowed
        assert whole_loss(700, 4096, 32768, bias=True)
    names = {launch.name for launch in log}
    assert {
        "_softmax_compact_kernel", "_list_columns_kernel", "pieces_kernel",
        "_gather_matmul_kernel", "_add_pieces_kernel", "_seg_count_kernel",
        "_pack_segments_kernel", "_list_tokens_kernel", "_weight_gradient_kernel",
        "_segment_sums_kernel", "_softmax_grad_kernel", "_scan_kernel", "_first_estimate_kernel",
        "_live_columns_kernel", "_pack_slots_kernel", "_dense_rows_kernel", "_gather_slots_kernel",
        "_add_further_kernel", "_dropped_rows_kernel", "_tail_product_kernel",
    } <= names  # fmt: skip
    compiled = {id(launch.compiled): launch for launch in log}
    # Written at once, and added to a block; both with H of whole vectors and without.
    assert [each.name for each in compiled.values()].count("_weight_gradient_kernel") >= 3
    for each in compiled.values():
        figures = resources(each.compiled)
        assert figures.spills == 0, each.name
        assert figures.shared_bytes <= SHARED_LIMIT[architecture]


# Two chunks or more: of 256 rows x 16,384 columns, 256 x all and 1,536 x all.
@pytest.mark.parametrize(
    ("N", "budget"), [(1200, 48 * 2**20), (3000, 256 * 2**20), (3000, 1400 * 2**20)]
)
@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_within_the_budget(engine, trains, N, budget):
    # What is alive at once, by storages; with segments at once, and with a chunk that overflowed.
    H, V = 1024, 128256
    for pattern in ([True], [False, True]):
        engine(pattern)
        with dryrun(89), Alive() as alive:
            whole_loss(N, H, V, trains=trains, budget=budget, bias=trains)
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
