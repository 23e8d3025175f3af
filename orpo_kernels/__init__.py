"""ORPO without logits: the loss and its gradients in a small, fixed workspace.

Importing this needs torch and does no work. What needs the `hf` extra (`ORPOTrainer`, `ORPOConfig`,
`fuse_head`) is loaded when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from orpo_kernels.backend import use_backend
from orpo_kernels.linear_logps import linear_logps
from orpo_kernels.logps_output import LogpsOutput, linear_logps_output
from orpo_kernels.loss import ORPOLoss, orpo_loss
from orpo_kernels.loss_output import ORPOOutput
from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.presets import PRESETS
from orpo_kernels.version import __version__

if TYPE_CHECKING:
    from orpo_kernels.estimate import estimate_memory as estimate_memory
    from orpo_kernels.integrations.transformers import fuse_head as fuse_head
    from orpo_kernels.integrations.transformers import unfuse_head as unfuse_head
    from orpo_kernels.selftest import self_test as self_test
    from orpo_kernels.training import ORPOConfig as ORPOConfig
    from orpo_kernels.training import ORPOTrainer as ORPOTrainer


__all__ = [
    "PRESETS",
    "LogpsOutput",
    "ORPOLoss",
    "ORPOOutput",
    "__version__",
    "linear_logps",
    "linear_logps_output",
    "odds_ratio_loss",
    "orpo_loss",
    "use_backend",
]

# Not in __all__: `from orpo_kernels import *` works without the `hf` extra.
_LAZY = {
    "ORPOConfig": "orpo_kernels.training",
    "ORPOTrainer": "orpo_kernels.training",
    "estimate_memory": "orpo_kernels.estimate",
    "fuse_head": "orpo_kernels.integrations.transformers",
    "self_test": "orpo_kernels.selftest",
    "unfuse_head": "orpo_kernels.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
