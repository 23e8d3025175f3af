"""Axolotl's `rl: orpo` without logits: a plugin, or a trainer class, named in the YAML.

    plugins:
      - orpo_kernels.integrations.axolotl.ORPOKernelsPlugin

    trainer_cls: orpo_kernels.integrations.axolotl.ORPOTrainer     # or: this one line

Axolotl's trainer is a subclass of TRL's, and gets the one method that `integrations.trl` replaces.
Importing this imports Axolotl; 0.19 is tested.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from axolotl.core.trainers import AxolotlORPOTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.integrations.trl import FusedForward, concatenated_forward, refuse_unknown_trl

_LOG = get_logger("axolotl.orpo_kernels")  # of others it shows warnings only


class ORPOTrainer(FusedForward, AxolotlORPOTrainer):  # type: ignore[misc]
    """Axolotl's ORPO trainer on the fused head: same numbers, no logits."""


class ORPOKernelsPlugin(BasePlugin):  # type: ignore[misc]
    """Replaces one method of the trainer that Axolotl has made."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called by Axolotl when the trainer is there, before it trains.

        Args:
            cfg: Axolotl's; not read.
            trainer: TRL's ORPOTrainer or a subclass.

        Raises:
            TypeError: the trainer of another method.
            NotImplementedError: a TRL this package does not know.
        """
        del cfg
        refuse_unknown_trl()
        if not isinstance(trainer, TRLTrainer):
            raise TypeError(
                f"ORPOKernelsPlugin is for `rl: orpo`, got a {type(trainer).__name__}; take it out "
                "of `plugins`, or set rl"
            )
        vars(trainer)["concatenated_forward"] = MethodType(concatenated_forward, trainer)
        _LOG.info(f"{type(trainer).__name__} trains without logits")
