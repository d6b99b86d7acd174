"""Where a model's parameters are, and how many examples determine them (2024, arXiv:2410.13732).

    Q = K M / P        K training examples, M outputs of each, P parameters

Below 1 a model can fit any labels, and comparing how variants generalise says little; the paper asks for more than 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.ground.figures import all_plain, plotly
from actkit.core.model.coverage import sizes

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Component:
    """Modules of one place in every block.

    Attributes:
        name: the path of the modules, with * for the numbers of blocks.
        modules: how many there are.
        parameters: of all of them.
        share: of the model's parameters.
    """

    name: str
    modules: int
    parameters: int
    share: float


@dataclass(frozen=True)
class ParameterBudget:
    """Where the parameters of a model are.

    Attributes:
        parameters: of the whole model; tied ones count once, a weight that is stored in codes as its size.
        components: the largest first.
    """

    parameters: int
    components: tuple[Component, ...]

    def overdetermination(self, examples: int, outputs: int) -> float:
        """Return Q = examples x outputs / parameters.

        Args:
            examples: of a training set.
            outputs: numbers that each determines, such as classes.

        Raises:
            ValueError: one of them is below 1, or the model has no parameters.
        """
        if min(examples, outputs) < 1 or not self.parameters:
            raise ValueError(
                f"examples, outputs: {examples} and {outputs} were given for {self.parameters} parameters; give "
                f"numbers of at least 1, for a model that has some."
            )
        return examples * outputs / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"parameters": self.parameters, "components": [asdict(each) for each in self.components]}

    def table(self) -> Table:
        """A row per component."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title=f"{self.parameters:,} parameters", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("component", overflow="fold")
        for name in ("modules", "parameters", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.components:
            table.add_row(each.name, f"{each.modules}", f"{each.parameters:,}", f"{each.share:.1%}")
        return table

    def figure(self) -> Figure:
        """Draw the share of each component.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = all_plain(each.name for each in self.components)
        figure = graph_objects.Figure([graph_objects.Bar(x=names, y=[100 * each.share for each in self.components])])
        figure.update_yaxes(title_text="parameters (%)")
        return figure


def parameter_budget(model: nn.Module) -> ParameterBudget:
    """Say where the parameters of a model are.

    Args:
        model: any; it is not called.
    """
    counts: dict[str, int] = defaultdict(int)
    places: dict[str, set[str]] = defaultdict(set)
    for name, numel in sizes(model):
        path, _, leaf = name.rpartition(".")
        path = path or leaf  # a parameter of the model itself
        component = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        counts[component] += numel
        places[component].add(path)
    total = sum(counts.values())
    ranked = sorted(counts, key=lambda component: -counts[component])
    return ParameterBudget(
        total, tuple(Component(each, len(places[each]), counts[each], counts[each] / total) for each in ranked)
    )


def overdetermination(model: nn.Module, examples: int, outputs: int) -> float:
    """Return how many numbers of a training set determine each parameter of a model.

    Args:
        model: any.
        examples: of the training set.
        outputs: numbers that each determines, such as classes.

    Raises:
        ValueError: one of them is below 1, or the model has no parameters.
    """
    return parameter_budget(model).overdetermination(examples, outputs)
