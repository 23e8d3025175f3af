"""The self-test finds and names what is broken on purpose in the sparse gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_kernels.engine.sparse import tail
from orpo_kernels.engine.sparse import weight_gradient as sparse_weight
from orpo_kernels.engine.tiles import compact_weight_gradient, softmax_compact_online_
from orpo_kernels.engine.tiles.compact import pack_entries
from orpo_kernels.selftest import sparse
from tests.csrc.forms import plain
from tests.test_selftest import kernel, run


def _loses_a_row_of_the_tail(*arguments: Any) -> Any:
    groups = arguments[14].clone()
    groups[3] = -1
    return plain(softmax_compact_online_, *arguments[:14], groups, *arguments[15:])


def _drops_more(*arguments: Any) -> Any:
    return plain(softmax_compact_online_, *arguments[:9], 2 * arguments[9], *arguments[10:])


def _mixes_the_groups(*arguments: Any) -> Any:
    return plain(softmax_compact_online_, *arguments[:14], 1 - arguments[14], *arguments[15:])


def _refuses_nothing(*arguments: Any) -> Any:
    return plain(softmax_compact_online_, *arguments[:16], 10**6)


def _forgets_the_first_column(*arguments: Any) -> None:
    plain(compact_weight_gradient, *arguments[:4], 0, *arguments[5:])


@pytest.mark.parametrize(
    ("name", "function", "cases"),
    [
        ("softmax_compact_online_", _drops_more, 9),
        ("softmax_compact_online_", _mixes_the_groups, 9),
        ("softmax_compact_online_", _loses_a_row_of_the_tail, 9),
        ("softmax_compact_online_", _refuses_nothing, 9),
        ("compact_weight_gradient", _forgets_the_first_column, 3),
    ],
)
def test_finds_a_wrong_kernel(name: str, function: Callable[..., Any], cases: int) -> None:
    with kernel(name, function):
        failed = run(name)
    assert [check.op for check in failed] == [name] * cases
    assert all("is off by" in check.message for check in failed)


def test_finds_a_store_that_never_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(entries: Any, store: Tensor, table: Tensor, item: int) -> None:
        pack_entries(entries, store, table, item)
        table[item, 1].clamp_(min=0)

    monkeypatch.setattr(sparse, "pack_entries", never)
    assert [check.op for check in run("pack_entries")] == ["pack_entries"] * 3


def test_finds_a_tail_that_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tail.Tail.product
    monkeypatch.setattr(tail.Tail, "product", lambda *given: torch.zeros_like(right(*given)))
    failed = run("sparse_token_logps", "softmax_compact_online_", "linear_logps")
    assert {check.op for check in failed} == {"sparse_token_logps"}
    assert len(failed) == 12
    assert all("dhidden" in check.message for check in failed)


def test_finds_one_tail_for_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(*given: Any) -> Tensor:
        rows = right(*given)
        return rows.sum(0, keepdim=True).expand_as(rows)

    right = sparse_weight.tail_rows
    monkeypatch.setattr(sparse_weight, "tail_rows", together)
    failed = run("sparse_token_logps")
    assert {check.case for check in failed} == {"trainable head, peaked", "all of it"}
