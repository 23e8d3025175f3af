"""Where a training step's time and memory go: marks in the trainer's own loop, and no other loop.

A step is cut at points in time, each ends one part and begins the next, so the parts add up to it:

    data                  get_batch_samples, and the batch's way to the device
    embedding and layers  from compute_loss to the decoder's end, and the backward from there on
    head and loss         from the decoder's end to the gradient of its hidden states
    optimizer             clipping, the step, the schedule, zero_grad
    Trainer               from there to the next batch: callbacks, logs

On a GPU the points are CUDA events, so that nothing waits for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.decoder import decoder_of
from orpo_kernels.integrations.output import router_aux_loss_coef
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training.trainer import ORPOTrainer

DATA, LAYERS, HEAD = "data", "embedding and layers", "head and loss"
OPTIMIZER, REST = "optimizer", "Trainer"
PARTS = (DATA, LAYERS, HEAD, OPTIMIZER, REST)
WARM_UP = 2
"""Steps before those that count: self-checks, states of the optimizer, first launches."""

_SAMPLE_S = 0.002


@dataclass(frozen=True)
class Profile:
    """A mean step: seconds of each of `PARTS`, and the most bytes held in it.

    Args:
        seconds: by part; they add up to a step.
        peak_bytes: by part, over what was held before training; allocated on a GPU, else resident.
        steps: that were measured.
    """

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    steps: int

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return sum(self.seconds.values())


class Timeline:
    """The points in time of the steps that are recorded, and the most memory between them."""

    def __init__(self, device: torch.device) -> None:
        self.recording = False
        self._cuda = device.type == "cuda"
        self._memory = _GPUMemory(device) if self._cuda else _ResidentMemory()
        self._points: list[tuple[str, Any]] = []
        self._peaks = dict.fromkeys(PARTS, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take what is held now for nothing; look at the memory inside."""
        with self._memory:
            yield

    def begin(self, part: str) -> None:
        """`part` begins now, and the one before ends."""
        if not self.recording:
            return
        peak = self._memory.peak()
        if self._points:
            before = self._points[-1][0]
            self._peaks[before] = max(self._peaks[before], peak)
        self._points.append((part, self._now()))

    def start(self, part: str) -> None:
        """Record from now on."""
        self.recording = True
        self.begin(part)

    def stop(self) -> None:
        """Record no more."""
        self.begin(REST)
        self.recording = False

    def profile(self, steps: int) -> Profile:
        """What was recorded, of a mean step."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._points, self._points[1:], strict=False):
            spent = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            seconds[part] += spent / steps
        return Profile(seconds, self._peaks, steps)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class _GPUMemory:
    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def __enter__(self) -> None:
        self._before = torch.cuda.memory_allocated(self._device)

    def __exit__(self, *_: object) -> None:
        pass

    def peak(self) -> int:
        """Most bytes since the last call."""
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return max(0, peak - self._before)


class _ResidentMemory:
    """Looks at this process every other millisecond, in a thread."""

    def __init__(self) -> None:
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        self._process = psutil.Process()
        self._before = self._peak = 0
        self._over = threading.Event()

    def __enter__(self) -> None:
        self._before = self._peak = self._resident()
        self._over.clear()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peak(self) -> int:
        """Most bytes since the last call."""
        now = self._resident()
        peak, self._peak = max(self._peak, now), now
        return max(0, peak - self._before)

    def _look(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


@dataclass
class Plan:
    """What a profiling trainer does.

    Args:
        steps: to measure, after `WARM_UP` others.
        trace: file for a Chrome trace of one more step, or None.
    """

    steps: int
    trace: Path | None = None
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = WARM_UP + self.steps + (self.trace is not None)


class ProfilingTrainer(ORPOTrainer):
    """An `ORPOTrainer` that says where its steps' time and memory go; its rows come in order."""

    def profile(self, plan: Plan) -> Profile:
        """Train `plan.total` steps, as `max_steps` of the arguments must say.

        Args:
            plan: what to measure.

        Returns:
            The mean step.
        """
        self.remove_callback(PrinterCallback)
        self._plan, self._updates = plan, 0
        self._timeline = Timeline(self.args.device)
        self._profiler: Any = None
        self.add_callback(_AfterStep(self))
        decoder = decoder_of(self.fused_head.model)
        handle = decoder.register_forward_hook(self._after_decoder)
        try:
            with self._timeline.watching():
                self.train()
        finally:
            handle.remove()
        return self._timeline.profile(plan.steps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step begins."""
        if self._updates == WARM_UP:
            self._timeline.start(DATA)
        elif self._updates == WARM_UP + self._plan.steps and self._plan.trace is not None:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        self._timeline.begin(DATA)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of one micro-batch."""
        self._timeline.begin(DATA)
        loss = super().training_step(*args, **kwargs)
        self._timeline.begin(OPTIMIZER)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of one micro-batch."""
        self._timeline.begin(LAYERS)
        return super().compute_loss(*args, **kwargs)

    def after_step(self) -> None:
        """The optimizer is done."""
        self._updates += 1
        if self._updates == WARM_UP + self._plan.steps:
            self._timeline.stop()
        self._timeline.begin(REST)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._plan.trace))

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self._timeline.begin(HEAD)
        hidden = output[0]
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._before_layers)  # type: ignore[no-untyped-call]

    def _before_layers(self, gradient: Tensor) -> None:
        self._timeline.begin(LAYERS)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any]:
        return SequentialSampler(cast(Any, self.train_dataset))


class LogitsTrainer(ProfilingTrainer):
    """The same steps on the model's own logits, in plain torch."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """`log_softmax` of all logits, the loss of its entries, and autograd through both."""
        self._timeline.begin(LAYERS)
        batch = stack_batch(inputs)
        columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model(**columns, use_cache=False)
        logps = F.log_softmax(output.logits[:, :-1].float(), dim=-1)
        labels = batch["labels"][:, 1:]
        sets = {"token_logps": picked(logps, labels), "labels": labels}
        if (nll_labels := self._loss.nll_labels_of(batch.get("nll_labels"))) is not None:
            sets["nll_labels"] = nll_labels[:, 1:]
            sets["nll_token_logps"] = picked(logps, sets["nll_labels"])
        if isinstance(num_items_in_batch, Tensor):
            sets["num_nll_tokens"], sets["num_pairs"] = num_items_in_batch.unbind()
        loss = self._loss.from_logps(**sets).loss
        if isinstance(aux_loss := getattr(output, "aux_loss", None), Tensor):
            loss = loss + router_aux_loss_coef(self.fused_head.model) * aux_loss
        return (loss, output) if return_outputs else loss

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Not ORPOTrainer's, which keeps the head in 16 bits where it can.
        return Trainer._inner_training_loop(self, *args, **kwargs)


def picked(logps: Tensor, labels: Tensor) -> Tensor:
    """Of log-probs (B, T, V) those of `labels` (B, T), 0 where ignored."""
    scored = labels != IGNORE_INDEX
    return logps.gather(-1, labels.where(scored, 0)[..., None])[..., 0] * scored


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: ProfilingTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self._trainer.after_step()
