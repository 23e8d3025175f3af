"""Two tokens of a fused call, compared with the model's own logits.

In the first call the true logits of two tokens follow the empty tensor that the head returns (see
`follower`). The rest of the model's forward transforms them as it would all logits, and what comes
out is compared with the log-probs that `linear_logps` gives for the same two hidden states. There
is no second forward: no random number is drawn, nothing else is saved for the backward, and
sharded, split and quantised models are as they train.

The second token's hidden state is enlarged until its logits reach about 64: an untrained or tiny
model has logits so small that a missing softcap or norm would pass for rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orpo_kernels.integrations.head import LogitTransform

_LARGE_LOGIT = 64.0
_LARGE_HIDDEN = 1e4  # float16 ends at 65,504
TF32_EPS = 2.0**-10

Score = Callable[[Tensor, Tensor, LogitTransform], Tensor]
"""(hidden (N, H), labels (N,), transform) -> token log-probs (N,)"""


class SelfCheck:
    """Made while the head runs, from two hidden states; judged when the model's logits are there.

    `logits` (1, 2, V) are the head's own, to follow what the rest of the model's forward does;
    `outcome` is what became of them there, or why they could not follow.
    """

    outcome: Tensor | Exception

    def __init__(
        self,
        own: Callable[[Tensor], Tensor],
        tokens: tuple[Tensor, Tensor],
        readings: list[LogitTransform],
        score: Score,
    ) -> None:
        """`own` is the head's own forward; `tokens` are hidden (1 or 2, H) and labels (1 or 2,)."""
        hidden, labels = tokens[0].expand(2, -1).clone(), tokens[1].expand(2)
        with torch.no_grad(), WithoutDropout():
            room = _LARGE_HIDDEN / hidden.abs().amax().float()
            factor = torch.minimum(_LARGE_LOGIT / own(hidden).abs().amax().float(), room)
            hidden[1] *= factor.nan_to_num(1.0, posinf=1.0).to(hidden.dtype)
            self.logits = own(hidden)[None]
            # The transforms are monotone: these stay the best and the worst token.
            self._labels = torch.stack(
                (labels, self.logits[0].argmax(-1), self.logits[0].argmin(-1)), dim=-1
            )  # (2, 3)
            rows = hidden.repeat_interleave(3, dim=0)
            self._logps = {each: score(rows, self._labels.flatten(), each) for each in readings}
            self._largest = float(self.logits.abs().amax())

    def choose(self, model: nn.Module) -> LogitTransform:
        """The first reading of the logit transform that agrees with `outcome`.

        Raises:
            RuntimeError: none does, the logits could not follow, or they are not finite.
        """
        name, logits = type(model).__name__, self.outcome
        if isinstance(logits, Exception):
            raise RuntimeError(
                f"the fused head cannot follow the logits of {name}: {type(logits).__name__}: "
                f"{logits}. The model does more than scale and cap them, so the fused head would "
                "train another objective; train this model on its own logits"
            ) from logits
        if logits.shape != self.logits.shape:
            raise RuntimeError(
                f"{name} turned the logits {tuple(self.logits.shape)} of its head into "
                f"{tuple(logits.shape)}: it does more than scale and cap them, so the fused head "
                "would train another objective; train this model on its own logits"
            )
        if not math.isfinite(self._largest):
            raise RuntimeError(
                f"the head of {name} returns logits that are NaN or infinite, fused or not: the "
                f"weights are, or the model overflows {self.logits.dtype} before its head (float16 "
                "ends at 65,504). Load it in bfloat16 or float32, and look at its logits without "
                "labels"
            )
        theirs = logits[0].detach().float()
        truth = theirs.log_softmax(-1).gather(-1, self._labels.to(theirs.device)).flatten()
        errors = {}
        for reading, ours in self._logps.items():
            errors[reading] = float((ours.to(truth) - truth).abs().amax())
            if errors[reading] <= self._tolerance(reading, logits):
                return reading
        tried = ", ".join(f"{reading}: {error:.3g}" for reading, error in errors.items())
        raise RuntimeError(
            f"the fused head does not reproduce the logits of {name}: the log-probs of two tokens "
            f"are off by (nats) {tried}. The model changes hidden states or logits in a way "
            "its config does not name (an extra norm, scale or bias in the head, or a patched "
            "forward), so the fused head would train another objective. Undo the patch, or train "
            "this model on its own logits; check=False trusts the config instead"
        )

    def _tolerance(self, reading: LogitTransform, logits: Tensor) -> float:
        """Four roundings (GEMM, scale, two of the softcap) of the largest logit, in nats."""
        eps = max(torch.finfo(each.dtype).eps for each in (logits, self.logits))
        if logits.is_cuda:
            eps = max(eps, TF32_EPS)
        largest = min(reading.logit_scale * self._largest, reading.softcap or torch.inf)
        return 1e-4 + 4.0 * eps * largest


class WithoutDropout(TorchFunctionMode):
    """Dropout is the identity in this thread; no module is touched, another thread may train it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return args[0]
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
