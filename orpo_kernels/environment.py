"""`orpo-kernels env`: what a bug report should say of the machine, in one screen.

Versions, device and backends; the switches of other packages that are set; who has replaced which
forward. In a program, `environment_report(model)` says it of the model at hand.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import nn

from orpo_kernels.engine.tiles import native
from orpo_kernels.integrations.owners import class_owners, head_owners, switches
from orpo_kernels.selftest import usable_device
from orpo_kernels.selftest.report import environment, headline, tile_backends


def environment_report(
    model: nn.Module | None = None, device: torch.device | str | None = None
) -> str:
    """Versions, device, backends, switches and patches, as text; nothing in it names the user.

    Args:
        model: a causal LM whose patches are to be named as well; unwrapped.
        device: default: the accelerator, else the CPU.

    Raises:
        ValueError: a device that cannot be used.
    """
    where = usable_device(device)
    backends = tile_backends(where)
    if where.type == "cpu" and native.cpu_backend_reason():
        backends["no C++, because"] = native.cpu_backend_reason()
    owners = [*class_owners(), *(head_owners(model) if model is not None else ())]
    patches = "\n".join(f"  {owner}" for owner in dict.fromkeys(owners)) or "  nobody, so far"
    lines = (f"  {name}={' '.join(value.split())}" for name, value in switches().items())
    found = "\n".join(lines) or "  none"
    return (
        f"{headline(environment(where) | backends)}\n"
        f"switches that are set:\n{found}\n"
        f"who has replaced a model's functions:\n{patches}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`orpo-kernels env`.

    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0, or 2 for a device that cannot be used or a module that cannot be imported.
    """
    parser = argparse.ArgumentParser(
        prog="orpo-kernels env",
        description="Versions, device, backends, and who has patched what: for a bug report.",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, xpu; default: the accelerator, else cpu"
    )
    parser.add_argument(
        "--import", dest="modules", nargs="+", default=[], metavar="MODULE",
        help="import these first, in the order of the script in question: unsloth trl",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        for name in options.modules:
            importlib.import_module(name)
        sys.stdout.write(environment_report(device=options.device))
    except (ImportError, ValueError) as error:
        sys.stderr.write(f"orpo-kernels env: {error}\n")
        return 2
    return 0
