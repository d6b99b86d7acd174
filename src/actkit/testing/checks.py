"""What the testers share: what a check gives, how checks are run, and how models are compared.

"Equal" means bit for bit. If a rewrite, a compiler or another order of a sum may round differently, the check says so
and bounds the difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from actkit.core.edit import changes
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.random_numbers import random_state
from actkit.core.recipe import exactness

COMPILED = 1e-5  # of the largest value, in float32
ROUNDING = exactness.ROUNDING | {torch.float64: 1e-9}  # of the largest value
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

CaseT = TypeVar("CaseT")


@dataclass(frozen=True)
class Check:
    """A property that was checked.

    Attributes:
        name: of the property.
        outcome: it 'holds', or it 'does not apply'.
        reason: why it does not apply.
    """

    name: str
    outcome: Literal["holds", "does not apply"]
    reason: str = ""


class NotApplicable(Exception):
    """Raised inside a check: the property does not apply to what is checked; the text says why."""


def run_checks(
    checks: Mapping[str, Callable[[CaseT], None]], case: CaseT, after: Callable[[str], None] | None = None
) -> list[Check]:
    """Check one property after another.

    Args:
        checks: name of a property -> a function that raises AssertionError if it does not hold.
        case: what the functions are given.
        after: called with the name after each check, to see that the check changed nothing of the caller's.

    Returns:
        A `Check` for each property.

    Raises:
        AssertionError: a property fails; the text begins with its name.
    """
    found = []
    for name, check in checks.items():
        try:
            check(case)
        except NotApplicable as reason:
            found.append(Check(name, "does not apply", str(reason)))
            continue
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        found.append(Check(name, "holds"))
        if after is not None:
            after(name)
    return found


def works(do: Callable[[], Any]) -> bool:
    """Return whether a call ends without an exception."""
    try:
        do()
    except Exception:
        return False
    return True


# -- how models are compared -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A model at one moment.

    Attributes:
        tensors: parameters and buffers by name, copied.
        modules: by path.
        kind: its class.
        config: as a dictionary; None without one.
        changes: its record of edits.
        trains: whether each parameter requires a gradient.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]
    kind: type
    config: dict[str, Any] | None
    changes: Any
    trains: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The state of a model now, copied."""
        tensors = {name: tensor.detach().clone() for name, tensor in tensors_of(model)}
        config: Any = getattr(model, "config", None)
        return cls(
            tensors,
            dict(model.named_modules(remove_duplicate=False)),
            type(model),
            copy.deepcopy(config.to_dict()) if hasattr(config, "to_dict") else None,
            changes.of(model),
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        )

    def compare(self, model: nn.Module, what: str, modules: bool = True) -> None:
        """Assert that `model` is as this state says.

        Args:
            model: the model now.
            what: how to call it in the error.
            modules: compare the very same objects, and the record; otherwise equal tensors.
        """
        now = State.of(model)
        assert now.tensors.keys() == self.tensors.keys(), (
            f"{what}: other tensors: {', '.join(sorted(now.tensors.keys() ^ self.tensors.keys())[:4])}"
        )
        for name, tensor in self.tensors.items():
            other = now.tensors[name]
            assert other.dtype == tensor.dtype, f"{what}: {name} is {other.dtype}, was {tensor.dtype}"
            assert same_bits(other, tensor), f"{what}: {name} has other values"
        if modules:
            for path, module in self.modules.items():
                assert now.modules.get(path) is module, f"{what}: another module stands at {path!r}"
            assert now.modules.keys() == self.modules.keys(), f"{what}: there are modules more"
            assert now.kind is self.kind, f"{what}: it is a {now.kind.__name__}, was a {self.kind.__name__}"
            assert now.config == self.config, f"{what}: the config differs"
            assert now.changes == self.changes, f"{what}: the record of changes differs"
            assert now.trains == self.trains, f"{what}: requires_grad differs"


def tensors_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved too (rotary tables), under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def storages_of(module: nn.Module) -> dict[int, str]:
    """The memory of parameters and buffers: address -> a name of the tensor that lies there."""
    return {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors_of(module) if tensor.numel()}


def hooks_of(model: nn.Module) -> set[tuple[str, str]]:
    """The path of each module with hooks, and of which kind they are."""
    return {(path, kind) for path, module in model.named_modules() for kind in HOOKS if getattr(module, kind, None)}


def assert_no_hook_left(model: nn.Module, before: set[tuple[str, str]], when: str) -> None:
    """Assert that no module has a kind of hook that it did not have before."""
    left = hooks_of(model) - before
    assert not left, f"{when}: {', '.join(sorted(f'{path}.{kind}' for path, kind in left))}"


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Which modules are in training mode, by path."""
    return {path: module.training for path, module in model.named_modules()}


def outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Compute the main output on each batch, in evaluation mode without gradients."""
    with evaluating(model):
        return [first_tensor(forward(model, batch)).detach() for batch in batches]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal shape, dtype and bits; NaN equals NaN of the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*raw)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Assert that tensors are equal bit for bit."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, f"{what} have the shape {tuple(a.shape)}, not {tuple(b.shape)}"
        assert same_bits(a, b), f"{what} differ by up to {(a.double() - b.double()).abs().max():.3g}"


def close(found: Sequence[Tensor], expected: Sequence[Tensor], what: str, bound: float | None = None) -> None:
    """Assert that tensors are equal to rounding: relative to the largest value, `bound` or by dtype."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, f"{what} has the shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if not b.numel():
            continue
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        allowed = ROUNDING[b.dtype] if bound is None else bound
        assert error <= allowed, f"{what} differs by {error:.3g} of the largest value"


def tensors_in(given: Any) -> list[Tensor]:
    """The tensors of batches, inputs or outputs, however they are nested."""
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floats in another dtype; a tensor, a tuple or a dict."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: in_dtype(value, dtype) for key, value in batch.items()}
    return tuple(in_dtype(value, dtype) for value in batch) if isinstance(batch, tuple) else batch


def random_numbers() -> list[Any]:
    """Return where the global random generators of torch, NumPy and Python stand; equal lists for equal states."""
    state = random_state(torch.device("cpu"))
    return [value.tolist() if isinstance(value, Tensor) else value for value in tree_leaves(state)]
