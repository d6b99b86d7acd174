"""MLPs without a gate, of as many parameters as the gated ones in their place, for PolyCom (2024, arXiv:2411.03884).

    down( f(up x) )   in place of   down( silu(gate x) * up x ),   1.5 times as wide

f is PolyNorm, PolyReLU or any other activation function. That is the form in which the paper trains language models:
two matrices of 1.5 times the width hold what the gated MLP's three do. The new matrices are drawn as the model draws
its own: the function of the model is lost, and it is trained from there, as from scratch. Of an MLP that has no gate
the activation alone is exchanged, and its weights stay.

When to use it: before the first step of a training. To try a polynomial in a trained model take `swap`, which keeps the
weights.
Cost: none beyond the drawing. As many parameters and multiplications as before, in two products in place of three; the
hidden values, 1.5 times as many, are kept for the backward pass once in place of three times.
Settled here: the width from the parameters of the MLP that stands there, biases included, rounded to `multiple_of`; how
far the count is off is noted. Experts are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground import registry
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.layers.activations import Activation, function_names
from actkit.core.model.anatomy import Block, Mlp
from actkit.core.model.architectures import MlpRow
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform


class UngatedMlp(nn.Module):
    """down(f(up x)): [..., inputs] -> [..., outputs].

    Args:
        inputs: channels of x.
        width: hidden units.
        outputs: channels of what it gives.
        biases: whether up and down have one.
        activation: f, a module that is registered under `actkit.modules`.
    """

    row: ClassVar[MlpRow] = MlpRow("", up="up_proj", down="down_proj", activation="act_fn")
    decodes_as: ClassVar[str] = "row"

    def __init__(self, inputs: int, width: int, outputs: int, biases: tuple[bool, bool], activation: nn.Module) -> None:
        super().__init__()
        self.up_proj = nn.Linear(inputs, width, bias=biases[0])
        self.act_fn = activation
        self.down_proj = nn.Linear(width, outputs, bias=biases[1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., inputs]."""
        return self.down_proj(self.act_fn(self.up_proj(x)))

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        f: Any = self.act_fn
        return {
            "inputs": self.up_proj.in_features,
            "width": self.up_proj.out_features,
            "outputs": self.down_proj.out_features,
            "biases": [self.up_proj.bias is not None, self.down_proj.bias is not None],
            "activation": {"module": registry.module_name(type(f)), "spec": f.spec()},
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> UngatedMlp:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        f = registry.module_class(spec["activation"]["module"]).from_spec(spec["activation"]["spec"], None)
        made = cls(spec["inputs"], spec["width"], spec["outputs"], tuple(spec["biases"]), f)
        return made if original is None else made.to(next(original.parameters()).dtype)


class Ungate(Transform):
    """Put an MLP without a gate, of equal parameters and with random weights, in place of each gated MLP.

    Attributes:
        activation: the registered name of a function, or of a module that is made without arguments.
        multiple_of: the width is rounded to it.
        seed: of the new weights.
    """

    activation: str = "poly_norm"
    multiple_of: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(least_coverage=0.25)
    not_proposed: ClassVar[str] = "it gives the MLPs new weights, which have to be trained"

    @field_validator("activation")
    @classmethod
    def _known(cls, name: str) -> str:
        _activation(name)
        return name

    def targets(self, block: Block) -> Iterable[Target]:
        for mlp in _alone(block):
            yield from (*mlp.inputs, mlp.down) if mlp.gated else (mlp.activation,)

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"what {type(earlier).__name__} made of the MLPs' layers would be lost; ungate and train first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for mlp in _alone(block):
            if not mlp.gated:
                yield Replace(mlp.activation, _activation(self.activation))
                continue
            new, before = self._ungated(mlp, block), sum(map(_size, (*mlp.inputs, mlp.down)))
            after = sum(parameter.numel() for parameter in new.parameters())
            width = new.up_proj.out_features
            yield Replace(mlp.path, new)
            yield Note(
                mlp.path,
                f"{width} units without a gate for {mlp.width} with one, random weights: train the model. "
                f"{after:,} parameters for {before:,} ({after / before - 1:+.2%})",
                {"width": width, "before": before, "after": after},
            )
        if block.experts is not None:
            yield Skip(block.experts.path, "experts are not rebuilt")
        elif block.mlp is None:
            yield Skip(block.path or "model", "no MLP that actkit reads")

    def _ungated(self, mlp: Mlp, block: Block) -> UngatedMlp:
        model: Any = block.root
        weight = mlp.down.weight
        biases = (mlp.up.bias is not None, mlp.down.bias is not None)
        inputs, outputs = mlp.up.in_features, mlp.down.out_features
        whole = sum(map(_size, (*mlp.inputs, mlp.down))) - biases[1] * outputs
        width = whole / (inputs + outputs + biases[0])
        width = max(1, round(width / self.multiple_of)) * self.multiple_of
        with own_random_numbers(weight.device, self.seed + block.index):
            made = UngatedMlp(inputs, width, outputs, biases, _activation(self.activation))
            draw = getattr(model, "_init_weights", None)
            if draw is not None:
                for layer in (made.up_proj, made.down_proj):
                    draw(layer)
        return made.to(weight.device, weight.dtype).train(mlp.module.training)


def _alone(block: Block) -> list[Mlp]:
    """The block's MLP, if it is no expert."""
    return [] if block.mlp is None else [block.mlp]


def _size(linear: Any) -> int:
    return int(linear.in_features * linear.out_features + (0 if linear.bias is None else linear.out_features))


def _activation(name: str) -> nn.Module:
    if name in function_names():
        return Activation(name)
    cls = registry.module_class(name)
    if not hasattr(cls, "mixes"):
        raise ValueError(f"{name!r} is a {cls.__name__}, which is no activation function; give one of {_suited()}")
    try:
        made: nn.Module = cls()
    except TypeError as error:
        raise ValueError(f"{name!r} is a {cls.__name__}, which needs settings ({error}); give another") from error
    return made


def _suited() -> str:
    return ", ".join(["poly_norm", "poly_relu", *function_names()])
