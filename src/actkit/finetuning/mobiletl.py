"""MobileTL: fine-tune the last inverted residual blocks with few activations (2022, AAAI 2023, arXiv:2212.03246).

    block:     x -> PW1 -> N1 -> act -> DW -> N2 -> act -> [SE] -> PW2 -> N3 (+ x)
    N1, N2:    y = a x + (beta - mean a),  a = gamma / sqrt(var + eps) constant;  dx = a dy,  dbeta = sum dy
    act:       y = act(x),  dx = dy 1[x > 0]                                      one bit for each number
    trained:   PW1, DW, PW2, the shifts of N1 and N2, all of N3 with its statistics, and the classifier

An inverted residual block stores its wide tensor many times over: for each norm, each activation and each convolution.
MobileTL keeps it for the convolutions alone. What stands in front of the last blocks is frozen and keeps nothing.

When to use it: to fine-tune MobileNets and their kin on a small device, as a rule in any loop.
Cost: none in time worth naming. The gradient of hard-swish is replaced by a step, so that it is biased: try smaller
rates than those of plain fine-tuning.
Settled here: blocks are found by their layers in the order of their registration, in models of torchvision, timm,
transformers or your own: a pointwise convolution (none if the block does not expand), a depthwise one and a pointwise
one, each before a batch norm; convolutions without a norm behind them belong to squeeze and excitation. Layers between
the last block and the classifier are frozen, and keep one bit for each activation. Batch norms of what is frozen keep
their statistics, and its dropout is off, also if somebody calls `model.train()`. Activations that work in place do not
while the rule works. After `detach` the model is a plain one, with the keys that it had.
Our own reading: training hyper-parameters were not found, nor code. In squeeze and excitation a hard-sigmoid keeps one
bit too, by which its slope is exact; a step would be six times too large. With `backward: exact` ReLU6 is exact in one
bit, and functions that are not keep what torch keeps; `codes` are the 4-bit codes of S2A.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import standing_in
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.modules import is_within
from actkit.core.layers.activations import is_activation, record_of
from actkit.core.layers.coded import CodedActivation, FrozenNorm, StandIn
from actkit.core.layers.packed_codes import DerivativeCode
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.finetuning.s2a.s2a import head_of

SIGN = DerivativeCode((0.0,), (0, 1), (0.0, 1.0))
GATES = ("sigmoid", "hardsigmoid")  # of squeeze and excitation
BITS = 4  # of `codes`


@dataclass(frozen=True)
class InvertedResidual:
    """An inverted residual block.

    Attributes:
        path: of its module.
        convolutions: paths of the expanding one (if there is one), the depthwise and the projecting one.
        norms: paths of the batch norms behind them.
        activations: paths, those of squeeze and excitation included.
        excitation: paths of the convolutions and linear layers of squeeze and excitation.
    """

    path: str
    convolutions: tuple[str, ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    excitation: tuple[str, ...] = ()


def find_inverted_residuals(model: nn.Module) -> list[InvertedResidual]:
    """Find the inverted residual blocks of a model.

    Args:
        model: any; modules are read in the order of their registration.

    Returns:
        The blocks in that order; none lies in another.
    """
    found: list[InvertedResidual] = []
    for path, module in model.named_modules():
        if any(is_within(path, block.path) for block in found):
            continue
        block = _read(path, module)
        if block is not None:
            found.append(block)
    return found


def _read(path: str, module: nn.Module) -> InvertedResidual | None:
    """A module as a block, if it is one."""
    layers: list[tuple[str, nn.Module]] = []
    activations: list[str] = []
    for name, each in module.named_modules(prefix=path):
        if isinstance(each, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            layers.append((name, each))
        elif is_activation(each):
            activations.append(name)
    pairs = [
        (name, each, behind)
        for (name, each), (behind, norm) in pairwise(layers)
        if isinstance(each, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]
    norms = sum(isinstance(each, nn.BatchNorm2d) for _, each in layers)
    kinds = tuple(_kind(each) for _, each, _ in pairs)
    if norms != len(pairs) or kinds not in (("point", "depth", "point"), ("depth", "point")):
        return None
    convolutions = tuple(name for name, _, _ in pairs)
    others = tuple(name for name, each in layers if not isinstance(each, nn.BatchNorm2d) and name not in convolutions)
    return InvertedResidual(path, convolutions, tuple(norm for _, _, norm in pairs), tuple(activations), others)


def _kind(convolution: nn.Conv2d) -> str:
    if convolution.groups == convolution.in_channels > 1:
        return "depth"
    return "point" if convolution.kernel_size == (1, 1) and convolution.groups == 1 else "other"


class MobileTL(TrainingRule):
    """Fine-tune the last inverted residual blocks.

    Attributes:
        blocks: how many, counted from the output.
        head: what stands behind the model's body trains; or patterns of names of what trains in its place.
        norm_internal: of N1 and N2 the shift trains, or nothing.
        norm_last: N3 trains with its statistics, or its shift alone, under frozen ones.
        backward: of activations: a step, the exact slope if one bit can hold it (else plain), or 4-bit codes of it.

    Raises:
        UnsupportedModelError: the model has no such blocks, or fewer.
    """

    blocks: int = Field(5, ge=1)
    head: bool | tuple[str, ...] = True
    norm_internal: Literal["shift", "frozen"] = "shift"
    norm_last: Literal["train", "shift"] = "train"
    backward: Literal["sign", "exact", "codes"] = "sign"

    def chosen(self, model: nn.Module) -> list[InvertedResidual]:
        """Return the blocks that train, in order.

        Args:
            model: any.

        Raises:
            UnsupportedModelError: there are none, or fewer.
        """
        found = find_inverted_residuals(model)
        if len(found) < self.blocks:
            known = ", ".join(block.path or "the model itself" for block in found[-5:])
            raise UnsupportedModelError(
                f"blocks: {self.blocks} were given, and this {type(model).__name__} has {len(found)} inverted "
                f"residual blocks{f' (the last are {known})' if found else ''}: a pointwise, a depthwise and a "
                f"pointwise Conv2d, each before a BatchNorm2d; give at most {len(found)}, or train without mobiletl."
            )
        return found[-self.blocks :]

    def trainable(self, model: nn.Module) -> Iterable[str]:
        names: list[str] = []
        for block in self.chosen(model):
            for path in (*block.convolutions, *block.excitation):
                names += _parameters(model, path)
            for path in block.norms[:-1]:
                names += [f"{path}.bias"] if self.norm_internal == "shift" else []
            last = block.norms[-1]
            names += [f"{last}.bias"] if self.norm_last == "shift" else _parameters(model, last)
        known = {name for name, _ in model.named_parameters()}
        head = self.head if isinstance(self.head, tuple) else head_of(model) if self.head else []
        return [*(name for name in names if name in known), *head]

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedMobileTL:
        return AttachedMobileTL(self, model)


def _parameters(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()]


class NoDropout(StandIn):
    """A dropout of what is frozen: it drops nothing, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> x."""
        return x


class AttachedMobileTL(AttachedRule):
    """The rule at work: modules that keep little stand in for others.

    Args:
        rule: its settings.
        model: in place.
    """

    def __init__(self, rule: MobileTL, model: nn.Module) -> None:
        chosen = rule.chosen(model)
        trained = {block.norms[-1] for block in chosen} if rule.norm_last == "train" else set()
        inside = [block.path for block in chosen]
        stand_ins: dict[str, nn.Module] = {}
        behind = False  # the first trained block
        self.counts = {"norms": 0, "activations": 0}
        for path, module in model.named_modules():
            behind = behind or path in inside
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and path not in trained:
                stand_ins[path] = FrozenNorm(module)
                self.counts["norms"] += 1
            elif isinstance(module, nn.modules.dropout._DropoutNd) and not behind:
                stand_ins[path] = NoDropout(module)
            elif path and behind and is_activation(module) and (code := _code(rule, module)) is not None:
                stand_ins[path] = CodedActivation(module, code)
                self.counts["activations"] += 1
        self._stack = ExitStack()
        self._stack.enter_context(standing_in(model, stand_ins))

    def report(self) -> dict[str, Any]:
        """Return how many norms are frozen and how many activations keep codes."""
        return dict(self.counts)

    def detach(self) -> None:
        self._stack.close()


def _code(rule: MobileTL, module: nn.Module) -> DerivativeCode | None:
    """What is kept of the slope of an activation; None leaves it as it is."""
    record = record_of(module)
    if record is None or record.mixes or record.derivative is None or any(True for _ in module.parameters()):
        return None
    if rule.backward == "codes":
        return DerivativeCode.fit(record, BITS)
    one_bit = DerivativeCode.fit(record, 1)
    if one_bit.rmse == 0 and (rule.backward == "exact" or record.name in GATES):
        return one_bit
    return SIGN if rule.backward == "sign" and record.name not in GATES else None
