"""Errors of the sparse gradient by its definition, against `sparse_gradients` at a tiny size."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import sparse_definition
from orpo_kernels import reference


def test_errors_are_those_of_the_definition():
    # Two chunks, the second of one row block; V of 1,000 keeps a quarter, H 32 has common vectors.
    torch.manual_seed(0)
    hidden, weight = torch.randn(320, 32), torch.randn(1000, 32) + torch.randn(32)
    labels, groups = torch.randint(0, 1000, (320,)), torch.arange(320) // 100 % 2
    given = sparse_definition.Inputs(hidden / 2, weight, labels, groups)
    (line,) = sparse_definition.measure(given, [-8.0])
    wide = [hidden.double() / 2, weight.double(), (labels,), (torch.ones(320).double(),)]
    found, exact = (
        reference.sparse_gradients(
            *wide, eps=eps, groups=groups, block=64, rounding=torch.bfloat16 if eps else None
        )
        for eps in (2.0**-8, 0.0)
    )
    error = (found.dhidden - exact.dhidden).norm() / exact.dhidden.norm()
    assert line["twice"] == pytest.approx(float(error), rel=1e-2)
    assert line["kept_share"] == pytest.approx(float(found.softmax.mask.double().mean()), rel=1e-3)
    assert line["twice"] < line["once"]
    assert line["rounding"] < line["twice_rounded"]


def test_row_blocks_are_whole_ones_of_all():
    labels = torch.randint(0, 9, (4, 100))
    labels[:, ::7] = -100
    workload = SimpleNamespace(
        hidden=torch.arange(400.0).view(4, 100, 1), weight=torch.ones(9, 1), union_labels=labels
    )
    given = sparse_definition.inputs_of(workload, 192)
    scored = (labels.flatten() >= 0).nonzero()[:, 0]
    blocks = scored[: len(scored) // 64 * 64].view(-1, 64)
    assert torch.equal(given.hidden[:, 0].long(), blocks[[0, (len(blocks) - 1) // 2, -1]].flatten())
    assert torch.equal(given.groups, (given.hidden[:, 0] >= 200).long())


def test_fewer_rows_than_a_block_are_refused(capsys):
    with pytest.raises(SystemExit):
        sparse_definition.main(["--tiny", "--rows", "63"])
    assert "--rows is at least 64" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    assert sparse_definition.main(["--tiny", "--results", str(tmp_path), "--rows", "64"]) == 0
    (path,) = tmp_path.glob(f"*/{sparse_definition.FILE}")
    report = json.loads(path.read_text())
    assert (report["head"], report["rows"]) == ("llama-3-8b", 64)
    assert len(report["results"]) == capsys.readouterr().out.count("dhidden errs") == 3
