"""An empty tensor that shows what a model makes of its logits, without changing what it computes.

The fused head returns logits without entries, (B, T, 0). To learn what the rest of the model's
forward does to logits, the head returns them as `Followed`, with the true logits of two tokens as
their follower: every torch operation on the empty tensor is then done to the follower too, without
a graph. The model itself computes, saves for its backward and draws exactly what it does in any
other call, so that a checkpoint that runs the call again finds the same tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


class Followed(Tensor):
    """A tensor with a follower; made by `followed`."""

    follower: Tensor | Exception  # what became of it, or why it could not keep up

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and once more on the followers where it makes or changes tensors."""
        call = (args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            leaves, structure = tree_flatten(result)
            if not any(isinstance(leaf, Tensor) for leaf in leaves) and func is not _SET_ITEM:
                return result
            try:
                with torch.no_grad():
                    args, kwargs = tree_map_only(Followed, _keeping_up, call)
                    followers, other = tree_flatten(func(*args, **kwargs))
                if other != structure:
                    raise TypeError(f"{func} returned {other} for logits, {structure} for none")
            except Exception as error:  # of any kind: it is shown when the call is judged
                followers = [error] * len(leaves)
                if func is _SET_ITEM:
                    call[0][0].follower = error
            pairs = zip(leaves, followers, strict=True)
            return tree_unflatten([followed(*pair) for pair in pairs], structure)


_SET_ITEM = Tensor.__setitem__


def followed(tensor: Any, follower: Any) -> Any:
    """`tensor` itself, followed by `follower`; what is no tensor stays as it is."""
    if type(tensor) is Tensor:
        # No view and no node: its place in the graph is that of the plain tensor.
        tensor.__class__ = Followed
    if isinstance(tensor, Followed):
        tensor.follower = follower
    return tensor


def released(tensor: Tensor) -> Tensor | Exception:
    """What the follower of `tensor` has become; `tensor` itself is a plain one from now on.

    Returns:
        The follower, or an exception that says why it got lost.
    """
    if not isinstance(tensor, Followed):
        return TypeError(f"they became a {type(tensor).__name__} by other means than torch's")
    follower: Tensor | Exception = tensor.__dict__.pop("follower")
    tensor.__class__ = Tensor  # type: ignore[assignment]
    return follower


def _keeping_up(tensor: Followed) -> Tensor:
    if isinstance(tensor.follower, Exception):
        raise tensor.follower
    return tensor.follower
