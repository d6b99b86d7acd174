"""`deepen` makes two layers of one, `collapse` one of two: from VanillaNet (2023, arXiv:2305.12972).

    deepen:    W x + b   ->   W_a faded( W_b x + b ),   W_a W_b = W, the activation faded away (strength 1)
    train:     the rule `fade_activations` puts the activation back in and fades it out
    collapse:  W_a (W_b x + b)   ->   (W_a W_b) x + W_a b,   and batch norms into what stands before them

Deepened, a model computes what it did; between its halves there is room for a nonlinearity that is gone in the end.
When to use it: before a training of a shallow net, which gains from it in the paper; deep nets do not.
Cost: while it is trained, one more layer of out x out weights beside each. Nothing afterwards: as many weights as
before.
Settled here: the halves are W and an identity (nothing is rounded), or by `split: svd` two of equal singular values.
A collapsed layer is of the class and the shape that `deepen` found, and the record forgets the pair: with all of them
collapsed the model is a plain checkpoint again. In a model built of pairs, or if a half was narrowed, the fold is kept
as a dense `ActLinear` or `ActConv`, which every export writes as a plain layer. Each fold is compared with what it
replaces on random inputs, and refused if they differ by more than `tolerance`.
Our own reading: the release builds nets of such pairs; to deepen any layer of any model, and to begin where it stood,
is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Restore, Skip
from actkit.core.ground.errors import EditError
from actkit.core.ground.modules import is_within, tied_names
from actkit.core.layers.activations import Activation
from actkit.core.layers.conv import ActConv
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.functions.vanillanet.folding import NORMS, DeepPair, Layer, described
from actkit.functions.vanillanet.series import SeriesActivation2d


class _ByPath(Transform):
    """What goes by the paths of modules, block by block; what is in no block comes with the first."""

    _places: dict[str, int] = PrivateAttr(default_factory=dict)

    def found(self, model: nn.Module) -> list[str]:
        """The paths that are to be changed."""
        raise NotImplementedError

    def plan(self, trial: Trial, data: Sequence[Any]) -> Any:
        planned = self.model_copy()
        planned._places = {}
        for path in self.found(trial.model):
            inside = (block.index for block in trial.anatomy.blocks if is_within(path, block.path))
            planned._places[path] = next(inside, 0)
        return planned

    def targets(self, block: Block) -> Iterable[Target]:
        return [path for path, index in self._places.items() if index == block.index]


class Deepen(_ByPath):
    """Make two layers of linear layers and convolutions, with an activation between them that has faded.

    Attributes:
        where: patterns of their paths.
        act: the activation, by name.
        split: "identity" keeps the weight and adds an identity behind it, "svd" shares its singular values.

    Raises:
        EditError: no layer is named by `where`.
    """

    where: tuple[str, ...] = ("*",)
    act: str = "relu"
    split: Literal["identity", "svd"] = "identity"

    tags: ClassVar[Tags] = Tags(changes_function="exact", parts=False)
    not_proposed: ClassVar[str] = "it makes a model larger until it is trained and collapsed"

    @field_validator("where", mode="before")
    @classmethod
    def _several(cls, where: Any) -> Any:
        return (where,) if isinstance(where, str) else where

    @field_validator("act")
    @classmethod
    def _known(cls, act: str) -> str:
        Activation(act)  # raises what is wrong with it
        return act

    def found(self, model: nn.Module) -> list[str]:
        paths = [path for path, module in model.named_modules() if path and type(module) in NORMS]
        matching = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in self.where)]
        inside = [path for path, module in model.named_modules() if isinstance(module, DeepPair)]
        matching = [path for path in matching if not any(is_within(path, pair) for pair in inside)]
        if not matching:
            raise EditError(
                f"where: {', '.join(self.where)} matches no linear layer or convolution of this {type(model).__name__} "
                f"that is not deepened already; its layers are {', '.join(paths[:8]) or 'none'}."
            )
        return matching

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"{type(earlier).__name__} filled a slot of the layers, which their halves do not have; deepen first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        tied = tied_names(block.root)
        for path in self.targets(block):
            layer: Any = block.root.get_submodule(str(path))
            other = tied.get(f"{path}.weight")
            reason = _why_whole(layer) if other is None else f"its weight is tied to {other}"
            if reason is not None:
                yield Skip(str(path), reason)
                continue
            yield Replace(str(path), deepened(layer, self.act, self.split))


class Collapse(_ByPath):
    """Make one layer of each deepened one, and fold the batch norms of image series.

    Attributes:
        tolerance: largest difference between a layer and its fold on random inputs, as a share of the largest output.

    Raises:
        EditError: nothing is to be collapsed, an activation has not faded, the model is in training mode (in which its
            batch norms compute something else), or a fold differs.
    """

    tolerance: float = Field(1e-5, gt=0)

    tags: ClassVar[Tags] = Tags(changes_function="exact", parts=False, plans_in_turn=True, evaluated=True)
    not_proposed: ClassVar[str] = "it needs a model that was deepened and trained"

    def found(self, model: nn.Module) -> list[str]:
        found = [
            path
            for path, module in model.named_modules()
            if isinstance(module, DeepPair) or (isinstance(module, SeriesActivation2d) and not module.fused)
        ]
        if not found:
            raise EditError(
                f"collapse: this {type(model).__name__} has no deepened layer and no image series with a batch norm; "
                f"apply `deepen`, or build a VanillaNet, and train it first."
            )
        for path in found:
            _fold(model.get_submodule(path), path)  # all can be folded before the first one is
        return found

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for path in self.targets(block):
            module = block.root.get_submodule(str(path))
            layer = _fold(module, str(path))
            new = _kept(layer)
            gap = _largest_gap(module, new)
            if gap > self.tolerance:
                raise EditError(
                    f"tolerance: {path} and its fold differ by {gap:.1e} of the largest output on random inputs; give "
                    f"tolerance={gap:.0e} or more if that is accepted, or leave the layer deep."
                )
            stood = isinstance(module, DeepPair) and module.stands_for == described(layer)
            yield Restore(str(path), layer, new) if stood else Replace(str(path), new)


def deepened(layer: Layer, act: str = "relu", split: Literal["identity", "svd"] = "identity") -> DeepPair:
    """Return two layers that compute what one does, with a faded activation between them.

    Args:
        layer: a linear layer or a convolution of one group.
        act: the activation, by name.
        split: as in `Deepen`.
    """
    outputs = len(layer.weight)
    weight = layer.weight.detach()
    one, other = weight, torch.eye(outputs, dtype=weight.dtype, device=weight.device)
    if split == "svd":
        u, s, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
        one = (s.sqrt()[:, None] * v).view(-1, *weight.shape[1:]).to(weight.dtype)
        other = (u * s.sqrt()).to(weight.dtype)
    inner = len(one)
    whole = split == "identity"
    first, second = _halves(layer, inner, whole)
    with torch.no_grad():
        first.weight.copy_(one)
        second.weight.copy_(other.view(second.weight.shape))
        if layer.bias is not None:
            target = first.bias if whole else second.bias
            assert target is not None
            target.copy_(layer.bias)
    pair = DeepPair(first, second, act, 1.0, stands_for=described(layer))
    return pair.to(weight.device, weight.dtype).train(layer.training)


def _halves(layer: Layer, inner: int, bias_first: bool) -> tuple[Layer, Layer]:
    """Layers of the right structure; the bias is in the first or in the second."""
    has = layer.bias is not None
    biases = (has and bias_first, has and not bias_first)
    if isinstance(layer, nn.Linear):
        return (
            nn.Linear(layer.in_features, inner, bias=biases[0]),
            nn.Linear(inner, layer.out_features, bias=biases[1]),
        )
    kind: Any = type(layer)
    settings = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    return (
        kind(layer.in_channels, inner, **settings, bias=biases[0]),
        kind(inner, layer.out_channels, 1, bias=biases[1]),
    )


def _why_whole(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1:
            return f"its {layer.groups} groups would be mixed by the second half"
        return None if layer.padding_mode == "zeros" else f"its padding is {layer.padding_mode!r}, not zeros"
    return why_unread(layer)


def _fold(module: nn.Module, path: str) -> Any:
    try:
        if isinstance(module, SeriesActivation2d):
            return module.fuse()
        assert isinstance(module, DeepPair)
        return module.merged()
    except ValueError as error:
        raise EditError(f"collapse: {path}: {error}") from error


def _kept(folded: nn.Module) -> Any:
    """The same in a module that a checkpoint knows by name."""
    if isinstance(folded, nn.Linear):
        return ActLinear.of(folded, weight=DenseWeight(folded.weight.detach()))
    if isinstance(folded, nn.Conv1d | nn.Conv2d):
        return ActConv.of(folded, weight=DenseWeight(folded.weight.detach().flatten(1)))
    return folded


@torch.no_grad()
def _largest_gap(module: nn.Module, new: nn.Module) -> float:
    """The largest difference of two modules' outputs on random inputs, over the largest output."""
    x = _probe(module)
    expected = module(x)
    return float((new(x) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _probe(module: nn.Module) -> Tensor:
    """A random input of a pair or an image series."""
    generator = torch.Generator().manual_seed(0)
    weight: Any = module.first.weight if isinstance(module, DeepPair) else module.weight
    shape: tuple[int, ...] = (16, weight.shape[1])
    if isinstance(module, SeriesActivation2d):
        shape = (4, module.channels, 9, 9)
    elif isinstance(module, DeepPair) and not isinstance(module.first, nn.Linear):
        sizes = [
            kernel * dilation + 3 * stride
            for kernel, dilation, stride in zip(
                module.first.kernel_size, module.first.dilation, module.first.stride, strict=True
            )
        ]
        shape = (4, weight.shape[1], *sizes)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
