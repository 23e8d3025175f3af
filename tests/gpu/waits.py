"""Where the host waits for the device."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import orpo_kernels

PACKAGE = Path(orpo_kernels.__file__).parent


def waits(run: Callable[[], Any]) -> list[Path]:
    """Files whose code made the host wait, in order, one for each time; `HostCopy` is not seen.

    Run it once before: what is compiled or loaded waits too.
    """
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [Path(w.filename) for w in caught if "called a synchronizing" in str(w.message)]
