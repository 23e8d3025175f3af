"""What the self-test says of a failure, of a device that is not there, of a package it lacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orpo_kernels import cli, selftest
from orpo_kernels.selftest import report
from tests.test_selftest import MonkeyPatch, kernel, only


def test_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch) -> None:
    def wrong_in_bf16(tile: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients @ tile.float() * (1.1 if tile.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(selftest, "_cases", only("column_sums"))
    monkeypatch.setattr(report.native, "cpu_backend", lambda: "c++")
    with kernel("column_sums", wrong_in_bf16):
        assert cli.main(["selftest", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: column_sums, strided tile, bfloat16: sums is off by" in text
    assert "column_sums in bfloat16" in text
    assert "compute_dtype=torch.float32" in text
    assert "ORPO_KERNELS_CPU_BACKEND=torch" in text
    assert text.splitlines()[-1].endswith("1 failed")


def test_exit_status_without_a_failure(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_cases", only("column_sums"))
    assert cli.main(["selftest", "--device", "cpu"]) == 0


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_rejects_a_device_that_is_not_there(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["--device", device]) == 2
    assert f"got {device}" in capsys.readouterr().err


def test_says_that_transformers_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "find_spec", lambda name: None)
    monkeypatch.setattr(selftest, "_cases", lambda *_, with_model: iter([][with_model:]))
    assert selftest.self_test("cpu").skipped == ("fuse_head: transformers is not installed",)
    assert "skipped: fuse_head" in capsys.readouterr().out
