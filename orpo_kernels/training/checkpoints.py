"""What a run finds on disk: whose output folder, which checkpoints are whole, which one fits.

Trainer writes a checkpoint file by file, `trainer_state.json` last. A run that is killed meanwhile
leaves an incomplete folder beside the last complete one.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")

logger = logging.getLogger(__name__)


def check_output_dir(folder: Path, overwrite: bool) -> None:
    """Refuse to start a new run in a folder that holds another run's, or clear it.

    Args:
        folder: the output folder; it may not exist.
        overwrite: delete its checkpoint folders instead. Other files are left to be overwritten.

    Raises:
        FileExistsError: checkpoints or model weights are there and `overwrite` is False.
    """
    found = [*_checkpoints(folder), *(path for glob in _WEIGHTS for path in folder.glob(glob))]
    if found and not overwrite:
        raise FileExistsError(
            f"output_dir {str(folder)!r} must be empty or new to start a run, but holds "
            f"{found[0].name} ({len(found)} checkpoints and weight files in all); continue that "
            "run with resume_from_checkpoint=True, choose another output_dir, or set "
            "overwrite_output_dir=True to delete it"
        )
    for path in _checkpoints(folder) if overwrite else ():
        logger.warning("overwrite_output_dir: deleting %s", path)
        shutil.rmtree(path)


def last_complete_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint in an output folder.

    Newer incomplete ones are named in a warning.

    Args:
        folder: the output folder.

    Returns:
        Path of the checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in reversed(_checkpoints(folder)):
        problems = incomplete_files(path)
        if not problems:
            return path
        logger.warning("%s is incomplete and not used: %s", path, "; ".join(problems))
    raise FileNotFoundError(
        f"expected a complete {PREFIX_CHECKPOINT_DIR}-<step> folder in {str(folder)!r} to resume "
        "from, found none; start without resume_from_checkpoint, or pass a checkpoint's path"
    )


def incomplete_files(checkpoint: Path) -> list[str]:
    """What is missing or cut short in a checkpoint.

    Args:
        checkpoint: its folder.

    Returns:
        One "file: what is wrong" for each; empty if the checkpoint is whole. Tensors are not read.
    """
    if not (checkpoint / TRAINER_STATE_NAME).is_file():  # the last file to be written
        return [f"{TRAINER_STATE_NAME}: not there"]
    problems = []
    for path in sorted(checkpoint.rglob("*")):
        problem = _problem(path)
        if problem:
            problems.append(f"{path.relative_to(checkpoint)}: {problem}")
    return problems


def check_complete(checkpoint: Path) -> None:
    """Refuse an incomplete checkpoint.

    Args:
        checkpoint: its folder.

    Raises:
        ValueError: naming the broken files.
    """
    problems = incomplete_files(checkpoint)
    if problems:
        raise ValueError(
            f"expected a complete checkpoint in {str(checkpoint)!r}, got {'; '.join(problems)}; "
            "resume_from_checkpoint=True takes the last complete one of the output folder"
        )


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What fails in here has failed to be saved: say where, and what is left.

    Args:
        folder: the output folder.

    Raises:
        OSError: for whatever torch, safetensors and the system call a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder if folder.is_dir() else ".").free
        raise OSError(
            f"cannot save to {str(folder)!r}, where {free / 2**30:.2f} GiB are free: {error}. "
            "Earlier complete checkpoints are kept: make room (save_total_limit keeps fewer), and "
            "go on with resume_from_checkpoint=True, or --resume"
        ) from error


def check_fits(model: nn.Module, checkpoint: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of the model that is to resume.

    Args:
        model: the model, or `PeftModel`, about to be trained.
        checkpoint: its folder; only the config and headers of safetensors files are read.

    Raises:
        ValueError: naming the first sizes or tensors that differ.
    """
    saved, expected = _saved_shapes(checkpoint), _expected_shapes(model)
    wrong = _different_sizes(model, checkpoint)
    # Tied weights are saved once, so a tensor may be missing on disk.
    wrong += [
        f"{name} is {list(shape)} there and {list(expected[name])} in the model"
        for name, shape in sorted(saved.items())
        if expected.get(name, shape) != shape
    ]
    if _is_adapted(model) or not (checkpoint / CONFIG_NAME).is_file():
        wrong += [f"{name} is not in the model" for name in sorted(saved.keys() - expected)]
    if wrong:
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} must be of the model that is trained "
            f"({type(model).__name__}), but {len(wrong)} sizes or tensors do not fit: "
            f"{'; '.join(wrong[:3])}; load the model, vocabulary and peft_config of that run, or "
            "resume from another checkpoint"
        )


def load_renamed(model: nn.Module, checkpoint: Path) -> bool:
    """Load a checkpoint that `save_pretrained` wrote under other names than the model's own.

    transformers 5 saves the experts of a mixture one by one, and some multimodal models under
    older names, and Trainer would leave such tensors as they are, with no more than a warning.

    Args:
        model: takes the checkpoint's values, whatever its dtypes.
        checkpoint: folder with the files of `save_pretrained`.

    Returns:
        False, with nothing done, if Trainer can load the checkpoint itself.
    """
    if _is_adapted(model) or not isinstance(model, PreTrainedModel):
        return False
    if _saved_shapes(checkpoint).keys() <= _expected_shapes(model).keys():
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    # float32 holds the values of all others, so that they come out of it as they went in.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    saved = type(model).from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return True


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    paths = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in paths}
    return sorted((p for p in paths if steps[p].isdigit()), key=lambda path: int(steps[path]))


def _problem(path: Path) -> str | None:
    """What is wrong with one file, by its own format."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):  # checks that the header covers the whole file
                return None
        except (SafetensorError, OSError) as error:
            return f"cut short ({error})"
    if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
        return None if zipfile.is_zipfile(path) else "cut short (no zip directory at its end)"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"cut short ({error})"
    return None


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _saved_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    saved: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return saved


def _expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as `save_pretrained` writes them, unless it renames them."""
    if _is_adapted(model):
        from peft import get_peft_model_state_dict

        # "auto" would ask the hub whether the vocabulary was resized.
        state = get_peft_model_state_dict(model, save_embedding_layers=True)
    else:
        state = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _different_sizes(model: nn.Module, checkpoint: Path) -> list[str]:
    path = checkpoint / CONFIG_NAME
    if not path.is_file() or not isinstance(model, PreTrainedModel):
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    mine = model.config.to_dict()
    pairs = [(name, saved.get(name), mine.get(name)) for name in _SIZES]
    for part in ("text_config", "vision_config"):
        one, other = saved.get(part) or {}, mine.get(part) or {}
        pairs += [(f"{part}.{name}", one.get(name), other.get(name)) for name in _SIZES]
    return [
        f"{name} is {there!r} there and {here!r} in the model"
        for name, there, here in pairs
        if there != here and None not in (there, here)
    ]
