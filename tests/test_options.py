"""The public keywords: one list of names, one set of defaults, one message for each mistake."""

import dataclasses
import inspect
import typing
from functools import partial

import pytest
import torch

from orpo_kernels import ORPOLoss, linear_logps, orpo_loss
from orpo_kernels.loss import orpo_loss_from_logps
from orpo_kernels.options import (
    LogpsKeywords,
    LogpsOptions,
    LogpsSettings,
    check_choice,
    check_integer,
    did_you_mean,
    validate_labels,
)
from orpo_kernels.pairing import BatchKeywords, CallKeywords

NAN, INF = float("nan"), float("inf")
TENSORS = torch.ones(2, 3, 2), torch.ones(4, 2), torch.zeros(2, 3, dtype=torch.int64)

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
    for entry in (linear_logps, orpo_loss):
        with pytest.raises(error, match=message):
            entry(*TENSORS, **{name: value})
    if name in LogpsSettings.__annotations__:
        for make in (ORPOLoss, partial(ORPOLoss.from_preset, "trl")):
            with pytest.raises(error, match=message):
                make(**{name: value})


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


@pytest.mark.parametrize(
    ("entry", "keywords"),
    [
        (orpo_loss, LogpsKeywords),
        (ORPOLoss, LogpsSettings),
        (ORPOLoss.from_preset, LogpsSettings),
        (ORPOLoss.forward, CallKeywords),
        (ORPOLoss.from_logps, BatchKeywords),
    ],
)
def test_signatures_show_every_name(entry, keywords):
    parameters = inspect.signature(entry).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    for name, annotation in keywords.__annotations__.items():
        assert parameters[name].annotation == annotation
        assert parameters[name].default == getattr(LogpsOptions, name, None)


def test_a_batch_has_the_arguments_of_the_function():
    parameters = inspect.signature(orpo_loss_from_logps).parameters
    names = typing.get_type_hints(BatchKeywords)
    assert {name: parameters[name].annotation for name in names} == names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(orpo_loss, *TENSORS, alpha=0.5), "orpo_loss has .* 'alpha'; did you mean 'beta'"),
        (partial(orpo_loss, *TENSORS, nll_label=None), "did you mean 'nll_labels'"),
        (partial(ORPOLoss, alpha=0.5), "ORPOLoss has no argument 'alpha'; did you mean 'beta'"),
        (partial(ORPOLoss, work_bytes=1), "did you mean 'workspace_bytes'"),
        (partial(ORPOLoss, xyz=1), "no argument 'xyz'; it takes beta, nll_reduction, .*softcap"),
        (partial(ORPOLoss.from_preset, "trl", lam=1.0), "from_preset has no .* mean 'beta'"),
        (partial(ORPOLoss(), *TENSORS, softcap=3.0), "ORPOLoss.forward has no argument 'softcap'"),
        (partial(ORPOLoss(), *TENSORS, num_pair=3), "did you mean 'num_pairs'"),
        (
            partial(ORPOLoss().from_logps, TENSORS[0][..., 0], TENSORS[2], low_rank=None),
            "ORPOLoss.from_logps has no argument 'low_rank'",
        ),
    ],
)
def test_an_unknown_name_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_an_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of .*; did you mean 'llamafactory'"):
        ORPOLoss.from_preset("llama-factory")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, TypeError, "must be an integer, got 1.0"),
        (-1, ValueError, "must be at least 0, got -1"),
        (torch.ones(2), ValueError, "must be 0-dim"),
    ],
)
@pytest.mark.parametrize("name", ["num_pairs", "num_nll_tokens"])
def test_counts(name, value, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        ORPOLoss().from_logps(TENSORS[0][..., 0], TENSORS[2], **{name: value})


@pytest.mark.parametrize("beta", [-0.1, NAN, INF, -INF])
def test_beta_out_of_range(beta):
    for call in (ORPOLoss, partial(orpo_loss, *TENSORS)):
        with pytest.raises(ValueError, match="beta must be a finite number >= 0, got"):
            call(beta=beta)


@pytest.mark.parametrize("beta", ["0.1", None, True, torch.ones(())])
def test_beta_of_another_type(beta):
    with pytest.raises(TypeError, match="beta must be a number, got"):
        ORPOLoss(beta)


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


@pytest.mark.parametrize(
    ("head", "vocabulary", "eps", "same"),
    [
        ("frozen", 98_304, 2.0**-14, True),  # 6 / V
        ("frozen", 98_304, 2.0**-12, False),
        ("trains", 98_304, 2.0**-12, True),
        ("trains", 98_304, 2.0**-14, False),
        ("frozen", 16_384, 2.0**-12, True),  # 6 / V is more
    ],
)
def test_the_default_of_eps_is_by_vocabulary_where_the_head_is_frozen(head, vocabulary, eps, same):
    # A few rows, H 8; peaked softmaxes whose entries are on both sides of both thresholds.
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8) * 4, torch.randn(vocabulary, 8)
    weight[0] = 0
    hidden.requires_grad_()
    weight.requires_grad_(head == "trains")
    labels = torch.arange(6)

    def gradient(**options):
        logps = linear_logps(hidden, weight, labels, gradient="sparse", **options)
        return torch.autograd.grad(logps.sum(), hidden)[0]

    assert torch.equal(gradient(), gradient(eps=eps)) == same
