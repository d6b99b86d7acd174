"""The arms of a comparison, by name, and the parts that they are: functions, MLPs, pooling, attention.

An arm changes one thing in the model of a task. Its name says which kind of thing it is: a registered function
(`silu`, `crrelu`, `series:silu`, one of a plug-in), a whole MLP (`swiglu`, `gr_kan`, `bspline_kan`), pooling (`max`,
`poset:12`) or attention (`softmax`, `lssar`).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure
from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.yaml_files import shorten
from actkit.core.layers.activations import Activation, activation_function, function_names
from actkit.core.recipe.runner import apply_edits
from actkit.functions.af_kan.af_kan_layer import AfKanLayer, relu_kan_layer
from actkit.functions.kat.kat import GrKanLinear
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.posets.pooling import PosetPool2d
from actkit.functions.posets.poset import Poset
from actkit.functions.qkan.network import Hqkan
from actkit.functions.s_kan.pool import POOL
from actkit.functions.s_kan.s_kan_layer import SKanLayer
from actkit.functions.vanillanet.series import SeriesActivation2d

Kind = Literal["function", "mlp", "pooling", "attention"]
SERIES, POSET = "series:", "poset:"
INTERNAL = ("actkit_coded", "actkit_rounded_cache")  # attention functions that other methods set
GROUPS = 8  # of the channels of a rational function, if that divides them


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        name: as it was given.
        kind: which part of a model it is.
        what: the name that it is registered under, or the setting of its kind.
    """

    name: str
    kind: Kind
    what: str


# -- names -------------------------------------------------------------------------------------------------------------


def parse(names: str | Sequence[str]) -> tuple[Arm, ...]:
    """Read the names of arms.

    Args:
        names: with commas between, or a list; the first one is the baseline.

    Returns:
        The arms.

    Raises:
        ValueError: fewer than two names, or one twice.
        RecipeError: an unknown name.
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    given = [name.strip() for name in given if name.strip()]
    if len(given) < 2:
        raise ValueError(
            f"names: {', '.join(given) or 'nothing'} was given; give two names or more, the baseline first, such as "
            f"'silu,relu,gr_kan'."
        )
    arms = tuple(map(find, given))
    for number, arm in enumerate(arms):
        before = next((each for each in arms[:number] if (each.kind, each.what) == (arm.kind, arm.what)), None)
        if before is not None:
            raise ValueError(
                f"names: {arm.name} and {before.name} are the same, so that one arm would be there twice; give each "
                f"once."
            )
    return arms


def find(name: str) -> Arm:
    """Read one name.

    Args:
        name: as in `known_names()`; `_` and `-` may be left out.

    Raises:
        RecipeError: an unknown name, or a function that cannot be made from its name alone.
    """
    if name.startswith(SERIES):
        base = name.removeprefix(SERIES)
        known = [each for each in function_names() if not activation_function(each).mixes]
        if base not in known:
            _refuse(name, [f"{SERIES}{each}" for each in known])
        return Arm(name, "function", name)
    if name.startswith(POSET):
        of = name.removeprefix(POSET)
        Poset.of(int(of) if of.isdigit() else of, 4)  # raises what is wrong with it
        return Arm(name, "pooling", of)
    kinds = known_names()
    squashed = {_squashed(each): each for each in kinds}
    found = name if name in kinds else squashed.get(_squashed(name))
    if found is None:
        _refuse(name, [*kinds, f"{SERIES}silu", f"{POSET}12"])
    arm = Arm(name, kinds[found], found)
    if arm.kind == "function":
        _check_function(arm)
    return arm


def known_names() -> dict[str, Kind]:
    """Every name with its kind; `series:` and `poset:` stand in front of others."""
    kinds: dict[str, Kind] = {}
    for name in (*function_names(), *registry.module_names()):
        kinds[name] = "function"
    kinds |= dict.fromkeys(
        ("softmax", *(name for name in registry.attention_names() if name not in INTERNAL)), "attention"
    )
    kinds |= dict.fromkeys(("max", "avg"), "pooling")
    return kinds | dict.fromkeys(MLPS, "mlp")


def _squashed(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _refuse(name: str, known: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise RecipeError(
        f"names: {shorten(name)!r} is not known.{hint} Known are MLPs ({', '.join(MLPS)}), pooling "
        f"(max, avg, poset:0 to poset:15), attention (softmax, lssa, lssar), and every registered function, also as "
        f"series:NAME."
    )


def _check_function(arm: Arm) -> None:
    """Raise RecipeError for a module that is no activation function, or needs settings."""
    try:
        function(arm.what, 64, -1)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"names: {arm.name!r} cannot be compared as a function ({error}); give one that is made from its name "
            f"alone."
        ) from error


# -- parts -------------------------------------------------------------------------------------------------------------


def function(what: str, channels: int, dim: int = -1) -> nn.Module:
    """Make an activation function.

    Args:
        what: a registered name, or `series:` and one.
        channels: that reach it.
        dim: which dimension of its input they are.

    Returns:
        The module.

    Raises:
        ValueError: it mixes as a function, is none as a module, or does not fit the channels.
        TypeError: it needs settings.
    """
    if what.startswith(SERIES):
        base = what.removeprefix(SERIES)
        # on images each value also sees its neighbours; a start that all terms can leave
        return SeriesActivation2d(channels, 1, base) if dim == 1 else SeriesActivation(base, 2, channels, "paper")
    if what in function_names():
        return Activation(what)
    cls = registry.module_class(what)
    if not (hasattr(cls, "mixes") or hasattr(cls, "elementwise")):
        raise ValueError(f"what: a {cls.__name__} was given, which is no activation function; give one.")
    told = {"channels": channels, "dim": dim}
    return cls(**{key: told[key] for key in set(told) & set(inspect.signature(cls).parameters)})


class GatedMlp(nn.Module):
    """SwiGLU's MLP: down(silu(gate(x)) * up(x)).

    Args:
        inputs: channels of x.
        width: hidden units.
        outputs: channels of the output.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(inputs, width), nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _rational(inputs: int, outputs: int, start: str) -> nn.Module:
    groups = next(count for count in range(GROUPS, 0, -1) if inputs % count == 0)
    return GrKanLinear(inputs, outputs, groups, start)


Layer = Callable[[int, int], nn.Module]
LAYERS: dict[str, tuple[Layer, Layer]] = {  # of MLPs that are two layers with nothing between
    "gr_kan": (lambda d, o: _rational(d, o, "identity"), lambda d, o: _rational(d, o, "silu")),
    "af_kan": (AfKanLayer,) * 2,
    "relu_kan": (relu_kan_layer,) * 2,
    "bspline_kan": (POOL["bspline"],) * 2,
    "cheby_kan": (POOL["cheby"],) * 2,
    "rbf_kan": (POOL["fastkan"],) * 2,
    "s_kan": (SKanLayer,) * 2,
}
WHOLE: dict[str, Callable[[int, int, int], nn.Module]] = {  # inputs, width, outputs
    "swiglu": GatedMlp,
    "hqkan": lambda d, width, o: Hqkan(d, o, (max(1, math.ceil(math.log2(d))), width)),
}
MLPS = (*WHOLE, *LAYERS)


def mlp(arm: Arm, inputs: int, width: int, outputs: int) -> nn.Module:
    """Make an MLP with one hidden layer.

    Args:
        arm: a function between two linear layers, or a kind of MLP.
        inputs: channels that it reads.
        width: of the hidden layer.
        outputs: channels that it gives.

    Returns:
        The module, [..., inputs] -> [..., outputs].

    Raises:
        ValueError: the function does not fit the width.
    """
    if arm.kind == "function":
        return nn.Sequential(nn.Linear(inputs, width), function(arm.what, width), nn.Linear(width, outputs))
    if arm.what in WHOLE:
        return WHOLE[arm.what](inputs, width, outputs)
    first, second = LAYERS[arm.what]
    return nn.Sequential(first(inputs, width), second(width, outputs))


def pooling(arm: Arm) -> nn.Module:
    """Make pooling of windows of 2 x 2, with the ReLU behind it that a poset has built in.

    Args:
        arm: of pooling.
    """
    if arm.what in ("max", "avg"):
        return nn.Sequential(nn.MaxPool2d(2) if arm.what == "max" else nn.AvgPool2d(2), nn.ReLU())
    return PosetPool2d(int(arm.what) if arm.what.isdigit() else arm.what, normalize=True)


def attend_by(model: Any, arm: Arm) -> None:
    """Let a model of transformers attend by an arm of attention.

    Args:
        model: changed in place.
        arm: `softmax` leaves it as it is.
    """
    if arm.what != "softmax":
        apply_edits(model, [Configure(ATTENTION, {"name": arm.what})], lambda: type(model).__name__)
