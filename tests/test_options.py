"""The public keywords: one list of names, one set of defaults, one message for each mistake."""

import dataclasses
import inspect
import typing

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.options import (
    LogpsKeywords,
    LogpsOptions,
    check_beta,
    check_choice,
    check_integer,
    did_you_mean,
    validate_labels,
)

NAN, INF = float("nan"), float("inf")

# An option, a value, and what is said about it: of a wrong type, or out of range.
REFUSED = [
    ("logit_scale", "1", TypeError, "logit_scale must be a number, got '1'"),
    ("logit_scale", torch.ones(()), TypeError, "logit_scale must be a number, got a Tensor"),
    ("logit_scale", NAN, ValueError, "logit_scale must be finite, got nan"),
    ("logit_scale", INF, ValueError, "logit_scale must be finite, got inf"),
    ("softcap", True, TypeError, "softcap must be a number, got True"),
    ("softcap", -1, ValueError, "softcap must be positive and finite, got -1"),
    ("softcap", NAN, ValueError, "softcap must be positive and finite, got nan"),
    ("ignore_index", -100.0, TypeError, "ignore_index must be an integer, got -100.0"),
    ("gradient", "sparce", ValueError, "gradient must be one of .*; did you mean 'sparse'"),
    ("gradient", None, ValueError, "gradient must be one of .* got None"),
    ("eps", "tiny", TypeError, "eps must be a number, got 'tiny'"),
    ("eps", 1.5, ValueError, "eps must be a probability, from 0 to 1, got 1.5"),
    ("eps", NAN, ValueError, "eps must be a probability, from 0 to 1, got nan"),
    ("compute_dtype", "bfloat16", TypeError, "compute_dtype must be floating point, e.g. torch.b"),
    ("compute_dtype", torch.int8, TypeError, "compute_dtype must be floating point"),
    ("workspace_bytes", 1e6, TypeError, "workspace_bytes must be an integer, got 1000000.0"),
    ("workspace_bytes", True, TypeError, "workspace_bytes must be an integer, got True"),
    ("workspace_bytes", 0, ValueError, "workspace_bytes must be at least 1, got 0"),
    ("workspace_bytes", -5, ValueError, "workspace_bytes must be at least 1, got -5"),
    ("low_rank", torch.ones(2), TypeError, "low_rank must be a tuple of two tensors, got Tensor"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED)
def test_values(name, value, error, message):
    with pytest.raises(error, match=message):
        LogpsOptions(**{name: value})
    with pytest.raises(error, match=message):
        linear_logps(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1).long(), **{name: value})


def test_what_is_taken():
    LogpsOptions(2, 30, 0, "auto", 1, None, torch.float16, 1, (torch.ones(1), torch.ones(1)))
    assert LogpsOptions(logit_scale=-1.0, gradient="auto").is_sparse(torch.bfloat16) is False
    with pytest.raises(ValueError, match=r"needs a positive logit_scale, got -1\.0"):
        LogpsOptions(logit_scale=-1.0, gradient="sparse")


def test_one_list_of_names_types_and_defaults():
    fields = {field.name: field for field in dataclasses.fields(LogpsOptions)}
    signature = inspect.signature(linear_logps).parameters
    keywords = [p for p in signature.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name: p.default for p in keywords} == {n: f.default for n, f in fields.items()}
    assert typing.get_type_hints(LogpsKeywords) == typing.get_type_hints(LogpsOptions)


@pytest.mark.parametrize("beta", [-0.1, NAN, INF, -INF])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta must be a finite number >= 0, got"):
        check_beta(beta)


@pytest.mark.parametrize("beta", ["0.1", None, True, torch.ones(())])
def test_beta_of_another_type(beta):
    with pytest.raises(TypeError, match="beta must be a number, got"):
        check_beta(beta)


def test_choices_and_integers():
    check_choice("scope", None, (None, "completion"))
    with pytest.raises(ValueError, match=r"scope must be one of .* got 3$"):
        check_choice("scope", 3, (None, "completion"))
    check_integer("count", 0, least=0)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        check_integer("count", -1, least=0)


def test_the_nearest_name_is_offered():
    assert did_you_mean("alpha", ["beta", "eps"]) == "; did you mean 'beta'?"
    assert did_you_mean("alpha", ["alphas"]) == "; did you mean 'alphas'?"
    assert did_you_mean("work_space_bytes", ["workspace_bytes"]).endswith("'workspace_bytes'?")
    assert did_you_mean("xyz", ["beta"]) == ""


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "ids must be an integer tensor, got list"),
        (torch.ones(2), "ids must be integer, got torch.float32"),
        (torch.ones(2, dtype=torch.complex64), "ids must be integer, got torch.complex64"),
        (torch.ones(2, dtype=torch.bool), r"got a mask \(torch.bool\); write torch.where\(mask"),
    ],
)
def test_labels_are_integers(labels, message):
    with pytest.raises(TypeError, match=message):
        validate_labels("ids", labels)
