"""Whether a layer computes what its class promises, so that its weight says all of it.

Subclasses of nn.Linear, hooks, parametrizations and forward passes set on an object may compute anything behind a
weight. What is not known to be W x + b is left alone by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from actkit.core.layers.conv1d import conv1d

SAME = frozenset(["transformers.models.falcon.modeling_falcon.FalconLinear"])  # x @ W.T + b, written out
OURS = ("actkit.", "transformers.")  # hooks that only record, unless they are marked
INTERVENES = "actkit_intervenes"  # marks a hook of ours that replaces what passes by
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_unread(module: nn.Module) -> str | None:
    """Why an nn.Linear or Conv1D (or a subclass) may not be W x + b, or None if it is.

    Args:
        module: any module.

    Returns:
        A clause that names what stands in the way; None too for modules of other classes.
    """
    plain: tuple[Any, ...] = (nn.Linear, *conv1d())
    base = next((each for each in plain if isinstance(module, each)), None)
    if base is None:
        return None
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" not in SAME and (
        kind.forward is not base.forward or kind.__call__ is not nn.Module.__call__
    ):
        return f"a {kind.__name__} has a forward pass of its own, which its weight does not tell"
    own = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return "its forward pass was replaced on the object"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own: it is computed (a parametrization, a hook), or kept elsewhere"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, which holds something else than its values"
    if isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features):
        return f"its weight is kept in another shape, {tuple(weight.shape)}"
    return None


def hooks_of(module: nn.Module) -> list[str]:
    """The names of the hooks that somebody else registered on a module."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    found = [
        hook
        for hook in hooks
        if hasattr(hook, INTERVENES) or not (getattr(hook, "__module__", None) or "").startswith(OURS)
    ]
    return [getattr(hook, "__qualname__", type(hook).__name__) for hook in found]


def scales_with_weight(norm: nn.Module, offset: float) -> bool:
    """Whether a norm's output is proportional to offset + weight, channel by channel, as two weights show.

    Args:
        norm: a module with a parameter `weight` [channels], whose input is [..., channels].
        offset: what it is said to add to its weight.
    """
    weight: Tensor = norm.weight.detach()  # type: ignore[operator, union-attr, assignment]
    bias = getattr(norm, "bias", None)
    zeros = {} if bias is None else {"bias": bias.detach().new_zeros(bias.shape)}
    x = weight.new_tensor([[1.0, -2.0, 0.5], [-0.25, 3.0, 1.5]]).repeat(1, -(-len(weight) // 3))[:, : len(weight)]
    try:
        one = functional_call(norm, {"weight": weight.new_full(weight.shape, 1 - offset), **zeros}, (x,))
        three = functional_call(norm, {"weight": weight.new_full(weight.shape, 3 - offset), **zeros}, (x,))
        error = float((three.float() - 3 * one.float()).abs().max())
        return bool(one.abs().sum() > 0) and error <= 0.02 * float(three.float().abs().max())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
