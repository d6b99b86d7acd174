"""How much a model suffers if some of its weights are disturbed: which entries matter.

    W[M] <- W[M] + noise,   noise ~ N(0, (sigma rms W)^2),   then measure, and put W back

From LIFT (2025, arXiv:2506.00772): noise on principal weights ruins a language model, the same noise on as many of the
largest weights, or of random ones, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actkit.core.ground.figures import all_plain, plotly
from actkit.core.ground.progress import track
from actkit.core.train.masks import Masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class ProbedWeights:
    """One choice of weights.

    Attributes:
        name: as it was given.
        entries: how many are disturbed.
        values: what was measured, for each seed of the noise.
    """

    name: str
    entries: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean(self.values)


@dataclass(frozen=True)
class WeightProbe:
    """What noise did to a model.

    Attributes:
        sigma: of the noise, in root mean squares of each weight.
        before: what is measured without noise.
        choices: one for each choice of weights.
    """

    sigma: float
    before: float
    choices: tuple[ProbedWeights, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        choices = [{**asdict(choice), "values": list(choice.values), "mean": choice.mean} for choice in self.choices]
        return {"sigma": self.sigma, "before": self.before, "choices": choices}

    def table(self) -> Table:
        """A row per choice."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Noise of {self.sigma:g} rms on chosen weights; without noise {self.before:.4g}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("weights", overflow="fold")
        for name in ("entries", "measured", "lowest", "highest"):
            table.add_column(name, justify="right", no_wrap=True)
        for choice in self.choices:
            numbers = (choice.mean, min(choice.values), max(choice.values))
            table.add_row(choice.name, f"{choice.entries:,}", *(f"{number:.4g}" for number in numbers))
        return table

    def figure(self) -> Figure:
        """Draw the mean of each choice, with what was measured before.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = all_plain(choice.name for choice in self.choices)
        figure = graph_objects.Figure(graph_objects.Bar(x=names, y=[choice.mean for choice in self.choices]))
        figure.add_hline(y=self.before, annotation_text="without noise")
        figure.update_yaxes(title_text="measured")
        return figure


def weight_probe(
    model: nn.Module,
    masks: Mapping[str, Masks],
    evaluate: Callable[[nn.Module], float],
    *,
    sigma: float = 0.01,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> WeightProbe:
    """Measure a model with noise on some of its weights.

    Args:
        model: as it was afterwards.
        masks: choices of weights by a name of your own, such as {'principal': ..., 'random': ...}.
        evaluate: what is measured, such as a loss on held-out text.
        sigma: of the noise, in root mean squares of each weight.
        seeds: of the noise.
        progress: show a bar.

    Returns:
        What was measured for each choice.

    Raises:
        ValueError: no choices or seeds, sigma is not above 0, or masks of another model.
    """
    if not masks or not seeds or not (sigma > 0 and isfinite(sigma)):
        raise ValueError(
            f"masks, seeds, sigma: {list(masks)}, {list(seeds)} and {sigma} were given; give a choice and a seed at "
            f"least, and a finite sigma above 0."
        )
    before = float(evaluate(model))
    found: dict[str, list[float]] = {name: [] for name in masks}
    for name, seed in track([(name, seed) for name in masks for seed in seeds], "Disturbing", enabled=progress):
        with disturbed(model, masks[name], sigma, seed):
            found[name].append(float(evaluate(model)))
    choices = [ProbedWeights(name, masks[name].alive, tuple(values)) for name, values in found.items()]
    return WeightProbe(sigma, before, tuple(choices))


@contextmanager
def disturbed(model: nn.Module, masks: Masks, sigma: float, seed: int) -> Iterator[None]:
    """Add noise to the chosen weights; afterwards they are as they were.

    Args:
        model: in place.
        masks: which weights.
        sigma: of the noise, in root mean squares of each weight.
        seed: of the noise.

    Raises:
        ValueError: the masks are of another model.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = masks.check(model)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                chosen = masks.kept[name].to(weight.device)
                noise = torch.randn(int(chosen.sum()), generator=generator).to(weight.device)
                scale = sigma * float(weight.float().square().mean().sqrt())
                weight[chosen] += (noise * scale).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
