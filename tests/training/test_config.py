"""ORPOConfig: values resolved, refused, and parsed from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from orpo_kernels.training import ORPOConfig
from orpo_kernels.training.arguments import adapt_arguments


def config(**changes: Any) -> ORPOConfig:
    return ORPOConfig(**{"output_dir": "unused", "use_cpu": True, **changes})


def test_defaults() -> None:
    args = config()
    assert args.activation_checkpointing is True  # as in TRL
    assert args.gradient_checkpointing is True
    assert args.bf16 is False  # a CPU can, but it is slow: only when asked
    assert config(bf16=True).bf16 is True
    assert args.trust_remote_code is False
    assert args.report_to == []


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_goes_by_both_names(name: str) -> None:
    args = config(**{name: False})
    assert args.gradient_checkpointing is args.activation_checkpointing is False


@pytest.mark.parametrize(
    ("preset", "scope", "reduction"),
    [
        ("trl", "prompt+completion", "token"),
        ("llamafactory", "completion", "pair"),
        ("xfactlab", "prompt+completion-pad", "token"),
        ("paper", "prompt+completion", "token"),
    ],
)
def test_presets(preset: str, scope: str, reduction: str) -> None:
    args = config(preset=preset)
    assert (args.resolved_nll_scope, args.resolved_nll_reduction) == (scope, reduction)
    assert args.resolved_odds_scope == "completion" + ("+pad" if preset == "xfactlab" else "")
    args = config(preset=preset, nll_scope="completion", nll_reduction="pair")
    assert (args.resolved_nll_scope, args.resolved_nll_reduction) == ("completion", "pair")


def test_max_length_none_is_trl_default() -> None:
    with pytest.warns(UserWarning, match="512 is used"):
        assert config(max_length=None).resolved_max_length == 512


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, "beta must be a finite number >= 0, got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta must be a finite number"),
        ({"beta": "0.1"}, TypeError, "beta must be a number, got '0.1'"),
        ({"preset": "unsloth"}, ValueError, "preset must be one of .*'trl'.* got 'unsloth'"),
        ({"nll_scope": "prompt"}, ValueError, "nll_scope must be one of"),
        ({"loss_normalization": "mean"}, ValueError, "loss_normalization must be one of"),
        ({"gradient": "sparce"}, ValueError, "gradient must be one of .*; did you mean 'sparse'"),
        ({"sparse_eps": 2.0}, ValueError, "sparse_eps must be a probability"),
        ({"compute_dtype": "fp16"}, ValueError, "compute_dtype must be one of .*'float16'"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"workspace_bytes": 0.5}, TypeError, "workspace_bytes must be an integer, got 0.5"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be at least 1, got -1"),
        ({"sparse_eps": float("nan")}, ValueError, "sparse_eps must be a probability"),
        ({"max_completion_length": 9}, NotImplementedError, "for them only; use max_length"),
        ({"is_encoder_decoder": True}, NotImplementedError, "encoder-decoder models are not"),
        ({"generate_during_eval": True}, NotImplementedError, "set it to False and call"),
        ({"label_smoothing_factor": 0.1}, NotImplementedError, "set it to 0"),
        (
            {"neftune_noise_alpha": 5.0, "batch_layout": "packed"},
            NotImplementedError,
            "less the longer the row.* set batch_layout to padded",
        ),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


def test_command_line_and_yaml(tmp_path: Path) -> None:
    parser = HfArgumentParser(ORPOConfig)
    flags = "--output_dir x --use_cpu --beta 0.2 --nll_scope completion --gradient_checkpointing no"
    (args,) = parser.parse_args_into_dataclasses(
        [*flags.split(), "--model_init_kwargs", '{"dtype": "float32"}', "--workspace_bytes", "1024"]
    )
    assert (args.beta, args.nll_scope, args.workspace_bytes) == (0.2, "completion", 1024)
    assert args.gradient_checkpointing is False
    assert args.model_init_kwargs == {"dtype": "float32"}
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nuse_cpu: true\npreset: llamafactory\nlearning_rate: 1.0e-5\n")
    (args,) = parser.parse_yaml_file(str(path))
    assert (args.preset, args.learning_rate) == ("llamafactory", 1e-5)


def test_data_parallel_by_threads_is_switched_off(caplog: Any, monkeypatch: Any) -> None:
    args = config()
    monkeypatch.setattr(ORPOConfig, "n_gpu", property(lambda self: self._n_gpu))
    args._n_gpu = 2
    adapt_arguments(args)
    assert args._n_gpu == 1
    assert "of the 2 devices one is used" in caplog.text
    assert args.remove_unused_columns is False
    assert args.accelerator_config.dispatch_batches is False


def test_bf16_is_on_where_the_device_can(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "orpo_kernels.training.config.is_torch_bf16_gpu_available", lambda: True, raising=True
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ORPOConfig.__new__(ORPOConfig)
    args.fp16, args.use_cpu, args.bf16 = False, False, None
    args._resolve_bf16()
    assert args.bf16 is True
    args.fp16, args.bf16 = True, None
    args._resolve_bf16()
    assert args.bf16 is False
