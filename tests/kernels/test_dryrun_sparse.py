"""The launchers of the sparse gradient for GPUs not here: what they launch compiles."""

import random

import pytest
import torch

pytest.importorskip("triton")

from orpo_kernels.kernels.gather_matmul import compact_matmul, further_pieces
from orpo_kernels.kernels.row_segments import compact_pack, segment_store
from orpo_kernels.kernels.softmax_compact import softmax_compact
from orpo_kernels.kernels.weight_gradient import (
    compact_column_sums,
    compact_weight_gradient,
    list_tokens,
    sort_targets,
)
from tests.kernels.dryrun import SHARED_LIMIT, dryrun, resources


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def both_gradients(R, H, V, *, chunks=1, trains=True):
    """A frozen or a trainable head over chunks of R rows, as an engine would call."""
    N, narrow = chunks * R, torch.bfloat16
    weight, hidden = cuda(V, H, dtype=narrow), cuda(N, H, dtype=narrow)
    labels, groups, tail = cuda(1, N, dtype=torch.int64), cuda(N, dtype=torch.int64), cuda(2, V)
    store = segment_store(chunks * (R + 63), V, chunks, 2**26, weight.device)
    for chunk in range(chunks):
        start, stop = chunk * R, (chunk + 1) * R
        logits = cuda(-(-R // 64) * 64, -(-V // 128) * 128)[:R, :V]
        kept = softmax_compact(
            logits, None, labels[:, start:stop], 0, cuda(R), cuda(R), 2.0**-12, 1.0, None,
            groups[start:stop], tail,
        )  # fmt: skip
        compact_matmul(cuda(R, H), kept, weight)
        if trains:
            compact_pack(store, kept, chunk, chunk * -(-R // 64), start)
    if trains:
        lists = list_tokens(store, 0, V)
        compact_weight_gradient(
            cuda(V, H, dtype=narrow), store, lists, hidden, cuda(1), tail, cuda(2, H),
            sort_targets(labels, cuda(1, N), 0, V), hidden,
        )  # fmt: skip
        compact_column_sums(store, lists, cuda(N), V)


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
            both_gradients(rng.randrange(1, 700), 64, V, chunks=rng.randrange(1, 4))
        for launch in log:
            variants.setdefault(launch.name, set()).add(id(launch.compiled))
    assert len(variants) == 10
    assert {name: len(found) for name, found in variants.items() if len(found) > 3} == {}


def test_pieces_fill_the_device_in_bounded_memory():
    # Two row blocks on 132 processors: 16 MiB of partials at most; many: two more each.
    assert further_pieces(2, 4096, 132, 256) == 16
    assert further_pieces(2, 512, 132, 256) == 128
    assert further_pieces(32, 4096, 132, 256) == 64
