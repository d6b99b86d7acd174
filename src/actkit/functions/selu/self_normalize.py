"""`self_normalize`: make a plain network a self-normalizing one, to be trained (2017, arXiv:1706.02515).

    activation between two layers -> SELU        dropout -> alpha dropout at its rate        norms between -> nothing
    weights ~ N(0, 1 / inputs), biases 0

When to use it: on a deep network of linear layers or convolutions, before its training; standardise the inputs. It
starts the weights anew, so that a trained model is one no more.
Cost: none but the initialisation; the network gets faster by its norms.
Settled here: it refuses what adds two activations (shortcuts) and attention, for which the argument about mean and
variance does not hold; `force` does it anyway. A function that is called and is no module is refused, as nothing could
take its place. Functions behind the last layer stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actkit.core.edit.edits import Edit, Note, Replace, Set, Skip
from actkit.core.forward.batch import forward
from actkit.core.forward.example import make_example
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import EditError
from actkit.core.layers.activations import Activation, name_of
from actkit.core.layers.nothing import PassThrough
from actkit.core.model.anatomy import Block
from actkit.core.model.parts import is_linear
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.functions.selu.selu import AlphaDropout

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SelfNormalize(Transform):
    """Make a plain network a self-normalizing one.

    Attributes:
        dropout: 'alpha' puts alpha dropout in the place of dropout, 'keep' leaves it.
        remove_norms: take out batch, layer, group and RMS norms.
        initialise: draw the weights anew, of mean 0 and variance 1 / inputs.
        seed: of these weights.
        force: also on a model with attention, or one that adds two activations.
    """

    dropout: Literal["alpha", "keep"] = "alpha"
    remove_norms: bool = True
    initialise: bool = True
    seed: int = Field(default=0, ge=0)
    force: bool = False

    tags: ClassVar[Tags] = Tags(slot=())
    not_proposed: ClassVar[str] = "it draws the weights of a model anew, which then has to be trained"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Refuse a model that it does not fit.

        Args:
            trial: the model as it is.
            data: batches; the first one is run, or one that is made up.

        Raises:
            EditError: attention, two activations that are added, or functions that are no modules.
        """
        model = trial.model
        named = dict(model.named_modules())
        for block in trial.anatomy.blocks:
            loose = [each for each in block.nonlinearities() if each not in named]
            if loose:
                raise EditError(
                    f"self_normalize: {loose[0]!r} is called as a function, so that nothing can take its place; make "
                    f"it a module (nn.ReLU() for F.relu)."
                )
        reason = None if self.force else _unfit(trial, next(iter(data), None))
        if reason is not None:
            raise EditError(
                f"self_normalize: the model {reason}, and there mean and variance do not go from layer to layer; give "
                f"a plain network, or force=True to do it all the same."
            )
        return self

    def targets(self, block: Block) -> Iterable[Target]:
        return block.linears() if self.initialise else block.nonlinearities()

    def conflicts(self, earlier: Transform) -> str | None:
        if self.initialise and earlier.slots:
            return "it draws the weights anew, and the other one rounded or chose by the old ones; do this first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        """Activations between layers, dropout, norms, weights."""
        prefix = f"{block.path}." if block.path else ""
        for path in block.nonlinearities():
            if name_of(block.root.get_submodule(path)) != "selu":
                yield Replace(path, Activation("selu").train(block.root.get_submodule(path).training))
        for path, module in [(f"{prefix}{path}", each) for path, each in block.module.named_modules() if path]:
            if self.remove_norms and isinstance(module, NORMS):
                yield Replace(path, PassThrough().train(module.training))
            elif self.dropout == "alpha" and isinstance(module, (nn.Dropout, *BY_CHANNEL)):
                by_channel = isinstance(module, BY_CHANNEL)
                yield Replace(path, AlphaDropout(module.p, channels=by_channel).train(module.training))
        if self.initialise:
            yield from self._weights(block, prefix)

    def _weights(self, block: Block, prefix: str) -> Iterator[Edit]:
        generator = torch.Generator().manual_seed(self.seed + block.index)
        for path, module in [(f"{prefix}{path}", each) for path, each in block.module.named_modules() if path]:
            if not (is_linear(module) or isinstance(module, CONVOLUTIONS)):
                continue
            weight: Tensor = module.weight  # type: ignore[assignment]
            inputs = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
            drawn = torch.randn(weight.shape, generator=generator) * inputs**-0.5
            yield Set(f"{path}.weight", drawn.to(weight.device, weight.dtype))
            if isinstance(module.bias, Tensor):
                yield Set(f"{path}.bias", torch.zeros_like(module.bias))


def _unfit(trial: Trial, batch: Any) -> str | None:
    """Why mean and variance do not go from layer to layer; None if they do."""
    model = trial.model
    attention = any(block.attention is not None for block in trial.anatomy.blocks)
    if attention or any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return "has attention"
    watch = _Sums()
    with evaluating(model), watch:
        forward(model, make_example(model) if batch is None else batch)
    return "adds two activations (a shortcut)" if watch.found else None


class _Sums(TorchFunctionMode):
    """Notes whether two activations of one shape are added."""

    found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").strip("_") in ("add", "iadd", "radd") and len(args) == 2:
            first, second = args
            tensors = all(isinstance(each, Tensor) and not isinstance(each, nn.Parameter) for each in args)
            self.found |= tensors and first.shape == second.shape and first.dim() > 1 and first.is_floating_point()
        return result
