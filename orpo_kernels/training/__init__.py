"""Training on preference pairs with transformers' Trainer; needs the `hf` extra."""

from orpo_kernels.training.collator import PreferenceCollator
from orpo_kernels.training.config import ORPOConfig
from orpo_kernels.training.data import prepare_dataset
from orpo_kernels.training.trainer import ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer", "PreferenceCollator", "prepare_dataset"]
