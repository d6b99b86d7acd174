"""The study of ZeroQuant-V2: which rounding of weights and inputs a language model bears (2023, arXiv:2303.08302).

    d = perplexity of the rounded model - perplexity;   class 1: d <= 0.1,   class 2: d <= 0.5,   class 3: above

Every combination is tried: bits and groups of the weights (a row, or blocks of a row: "FGQ"), with zero points or
without, rounded to nearest, by `gptq` or by `zeroquant` (ZQ-Local and ZQ-Global), with a rank of `lorc` or none; inputs
as they are or rounded per token.
Cost: a calibration (gptq only) and a pass over the held-out text for each combination; minutes of learning for each
with `zq_local` and `zq_global`, which are not tried unless they are asked for.
As in the paper: the classes go by the absolute difference, so tokenizer, length of the rows and text must be the same
for numbers to be compared. A small model makes 0.1 of perplexity a small share: `share` says how large it is.
Settled here: `zq_local` and `zq_global` learn under inputs that are rounded per token; a scale for the tensor is found
behind them.
Not built: blocks along a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.ground.progress import track
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.transform import Transform
from actkit.quantization.gptq import Gptq
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.quantization.zeroquant_v2.zeroquant import ZeroQuant

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table

Weights = tuple[int, int | Literal["row"]]  # bits, and the group
Inputs = tuple[int, Literal["token", "tensor"]]  # bits, and what shares a scale
Method = Literal["rtn", "gptq", "zq_local", "zq_global"]
METHODS: dict[Method, Callable[..., Transform]] = {
    "rtn": RoundToNearest,
    "gptq": Gptq,
    "zq_local": partial(ZeroQuant, inputs="local"),
    "zq_global": partial(ZeroQuant, inputs="global"),
}
LEARNED = "zq_local", "zq_global"
NEARLY_EXACT, BEARABLE = 0.1, 0.5  # the largest d of classes 1 and 2


@dataclass(frozen=True)
class Combination:
    """One way to round a model, and what it costs.

    Attributes:
        weights: bits and group of the weights; None leaves them as they are.
        symmetric: no zero points.
        method: how weights are rounded.
        rank: of the compensation; 0 for none.
        inputs: bits of the inputs and what shares a scale; None leaves them as they are.
        perplexity: of the rounded model.
        loss: d, that less the perplexity of the model as it is.
        share: d over the perplexity of the model as it is.
        sensitivity: the class, 1 to 3.
        bits_per_weight: in storage, with scales, zero points and factors.
    """

    weights: Weights | None
    symmetric: bool
    method: Method
    rank: int
    inputs: Inputs | None
    perplexity: float
    loss: float
    share: float
    sensitivity: int
    bits_per_weight: float

    @property
    def name(self) -> str:
        """A few words, such as '4-bit rows, symmetric, rtn + rank 8; inputs of 8 bits per token'."""
        parts = []
        if self.weights is not None:
            bits, group = self.weights
            groups = "rows" if group == "row" else f"groups of {group}"
            zeros = ", symmetric" if self.symmetric else ""
            parts.append(f"{bits}-bit {groups}{zeros}, {self.method}{f' + rank {self.rank}' if self.rank else ''}")
        if self.inputs is not None:
            zeros = ", symmetric" if self.symmetric else ""
            parts.append(f"inputs of {self.inputs[0]} bits per {self.inputs[1]}{zeros if not parts else ''}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Study:
    """What `ptq_study` found.

    Attributes:
        perplexity: of the model as it is.
        combinations: in the order in which they were tried.
    """

    perplexity: float
    combinations: tuple[Combination, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        rows = [asdict(each) for each in self.combinations]
        for row in rows:
            row |= {name: None if row[name] is None else list(row[name]) for name in ("weights", "inputs")}
        return {"perplexity": self.perplexity, "combinations": rows}

    def table(self) -> Table:
        """A row per combination, for a terminal."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Perplexity {self.perplexity:.2f}; class 1: at most {NEARLY_EXACT} more, class 2: at most {BEARABLE}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("rounding", "perplexity", "more", "class", "bits per weight"):
            table.add_column(name, justify="left" if name == "rounding" else "right")
        for each in self.combinations:
            more = f"{each.loss:+.2f} ({each.share:+.1%})"
            figures = (f"{each.perplexity:.2f}", more, str(each.sensitivity), f"{each.bits_per_weight:.2f}")
            table.add_row(each.name, *figures)
        return table

    def figure(self) -> go.Figure:
        """Draw how much perplexity each combination costs.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        names = all_plain(each.name for each in self.combinations)
        figure = go.Figure(go.Bar(x=[each.loss for each in self.combinations], y=names, orientation="h"))
        return figure.update_layout(xaxis={"title": "perplexity lost"}, yaxis={"autorange": "reversed"})


def ptq_study(
    model: nn.Module,
    calibration: Iterable[Any],
    held_out: Iterable[Any],
    *,
    weights: Sequence[Weights | None] = ((8, "row"), (4, "row"), (4, 64)),
    inputs: Sequence[Inputs | None] = (None, (8, "token")),
    symmetric: Sequence[bool] = (True, False),
    methods: Sequence[Method] = ("rtn", "gptq"),
    ranks: Sequence[int] = (0, 8),
    steps: int = 300,
    progress: bool = True,
) -> Study:
    """Round a language model in many ways, and measure what each costs. The model is as before at the end.

    Args:
        model: not quantized yet.
        calibration: batches for gptq, zq_local and zq_global, and for inputs per tensor.
        held_out: batches that perplexity is measured on.
        weights: bits and group ('row' or a number) of the weights; None for inputs alone.
        inputs: bits and what shares a scale, 'token' or 'tensor'; None for weights alone.
        symmetric: without zero points, or with.
        methods: how weights are rounded: 'rtn', 'gptq', 'zq_local', 'zq_global'.
        ranks: of the low-rank compensation, 0 for none.
        steps: of zq_local and zq_global, per block and learning rate.
        progress: show a bar.

    Returns:
        A row per combination.

    Raises:
        ValueError: there is no combination, or a group does not fit a layer.
        RecipeError: the model is quantized already.
    """
    tried = list(_combinations(weights, inputs, symmetric, methods, ranks))
    if not tried:
        raise ValueError("weights, inputs: no combination rounds anything; name bits for at least one of the two.")
    given, text = sequence_of(calibration), sequence_of(held_out)
    exact = _perplexity(model, text)
    found = []
    for chosen in track(tried, "Trying ways to round", enabled=progress):
        applied = apply(model, list(_recipe(*chosen, steps)), given, undo="memory", progress=False)
        try:
            perplexity, bits = _perplexity(model, text), _bits_per_weight(model)
        finally:
            applied.undo()
        loss = perplexity - exact
        found.append(Combination(*chosen, perplexity, loss, loss / exact, sensitivity_class(loss), bits))
    return Study(exact, tuple(found))


def sensitivity_class(loss: float) -> int:
    """Return the class, 1 to 3, of so much perplexity lost."""
    return 1 if loss <= NEARLY_EXACT else 2 if loss <= BEARABLE else 3


def _combinations(
    weights: Sequence[Weights | None],
    inputs: Sequence[Inputs | None],
    symmetric: Sequence[bool],
    methods: Sequence[Method],
    ranks: Sequence[int],
) -> Iterator[tuple[Weights | None, bool, Method, int, Inputs | None]]:
    """Each once; where weights stay as they are, method and rank say nothing."""
    for weight, even, read in product(weights, symmetric, inputs):
        if weight is not None:
            yield from ((weight, even, method, rank, read) for method, rank in product(methods, ranks))
        elif read is not None:
            yield None, even, "rtn", 0, read


def _recipe(
    weights: Weights | None, symmetric: bool, method: Method, rank: int, inputs: Inputs | None, steps: int
) -> Iterator[Transform]:
    learned: dict[str, int | None] = {}
    if weights is not None:
        bits, group = weights
        if method in LEARNED:
            learned = {"steps": steps, "input_bits": inputs[0] if inputs is not None and inputs[1] == "token" else None}
        yield METHODS[method](bits=bits, group_size=-1 if group == "row" else group, symmetric=symmetric, **learned)
        if rank:
            yield Lorc(rank=rank)
    if inputs is not None and learned.get("input_bits") is None:
        yield RoundInputs(bits=inputs[0], per=inputs[1], symmetric=symmetric)


def _perplexity(model: nn.Module, batches: Sequence[Any]) -> float:
    quality = measure_quality(model, batches, task="language", resamples=1, progress=False)
    return quality.metrics["perplexity"].value


def _bits_per_weight(model: nn.Module) -> float:
    """In storage, over the layers that were changed."""
    layers = [module for module in model.modules() if isinstance(module, ActLinear)]
    factors = [layer.correction.nbytes for layer in layers if layer.correction is not None]
    stored = sum(layer.storage.nbytes for layer in layers) + sum(factors)
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
