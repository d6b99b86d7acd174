"""Which task vectors to compose, and how much they disturb each other (aTLAS, 2024, arXiv:2407.02880).

    score of block j of vector i:   |dL / d lambda_i^(j)| at lambda = 0
    xi[i, j] = share of task i's samples whose prediction changes if vector j is added to base + vector i

When to use it: `select_vectors` with many vectors, of which a few per block do most of the work at a part of the
memory; `disentanglement` to see which tasks cannot be merged.
Cost: a pass forward and backward over the batches; for the other one a forward pass for each pair of tasks.
Our own reading: the score of a whole vector is the sum over its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.store.deltas import Delta
from actkit.core.train.choice import trained_parameters
from actkit.core.train.objective import Loss, Objective
from actkit.finetuning.atlas.atlas import Atlas

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

By = Literal["block", "vector", "random"]


def select_vectors(
    model: nn.Module,
    vectors: Sequence[Delta],
    batches: Sequence[Any],
    budget: int,
    *,
    by: By = "block",
    loss: Loss | None = None,
    seed: int = 0,
) -> list[Delta]:
    """Keep the task vectors whose coefficients matter most to a loss.

    Args:
        model: the base; it is as it was afterwards.
        vectors: of it.
        batches: of the task, with labels.
        budget: how many vectors stay.
        by: 'block' keeps as many in each block, each its own; 'vector' keeps whole vectors; 'random' draws these.
        loss: of (model, batch); None for that of the model's task.
        seed: of what is drawn.

    Returns:
        The vectors with the parts that stay; those without any are left out.

    Raises:
        ValueError: budget is below 1 or above the number of vectors, or what `Atlas` raises.
        DataError: batches without labels.
    """
    if not 1 <= budget <= len(vectors):
        raise ValueError(f"budget: {budget} was given; give 1 to {len(vectors)}, the number of vectors.")
    if by == "random":
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:budget]
        return [vectors[index] for index in sorted(drawn.tolist())]
    scores = coefficient_gradients(model, vectors, batches, loss)
    if by == "vector":
        whole = torch.stack(list(scores.values())).sum(0)
        return [vectors[index] for index in sorted(whole.topk(budget).indices.tolist())]
    first = _first_names(model)
    kept = {name: set(each.topk(budget).indices.tolist()) for name, each in scores.items()}
    reduced = [
        replace(vector, parts={name: part for name, part in vector.parts.items() if index in kept[first[name]]})
        for index, vector in enumerate(vectors)
    ]
    return [vector for vector in reduced if vector.parts]


def coefficient_gradients(
    model: nn.Module, vectors: Sequence[Delta], batches: Sequence[Any], loss: Loss | None = None
) -> dict[str, Tensor]:
    """Measure how much a loss depends on each coefficient at the base.

    Args:
        model: the base; it is as it was afterwards.
        vectors: of it.
        batches: of the task, with labels.
        loss: of (model, batch); None for that of the model's task.

    Returns:
        The magnitudes of the gradients of the mean loss, [vectors] by block.
    """
    rule, objective = Atlas.of(vectors), Objective(model, loss)
    shares = [objective.labels(batch) for batch in batches]
    with trained_parameters(model, [rule]), torch.enable_grad():
        running = rule.attach(model)
        try:
            for batch, share in zip(batches, shares, strict=True):
                (objective(model, batch) * (share / sum(shares))).backward()
            gradients = {name: each.coefficients.grad for name, each in running.composed.items()}
        finally:
            running.detach()
    return {name: each.abs().flatten() for name, each in gradients.items() if each is not None}


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by all of its names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


# -- how much tasks disturb each other ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disentanglement:
    """How much each task suffers from the vector of another.

    Attributes:
        tasks: their names.
        shares: xi[i][j], of task i's samples whose prediction changes with vector j; 0 on the diagonal.
    """

    tasks: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def error(self) -> float:
        """The mean over pairs of different tasks."""
        count = len(self.tasks)
        return mean(self.shares[i][j] for i in range(count) for j in range(count) if i != j)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"tasks": list(self.tasks), "shares": [list(row) for row in self.shares], "error": self.error}

    def table(self) -> Table:
        """A row per task, a column per vector that is added."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Predictions that another task's vector changes: {self.error:.1%} in the mean"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("task", overflow="fold")
        for task in self.tasks:
            table.add_column(f"+ {task}", justify="right")
        for i, (task, row) in enumerate(zip(self.tasks, self.shares, strict=True)):
            table.add_row(task, *("" if i == j else f"{share:.1%}" for j, share in enumerate(row)))
        return table

    def figure(self) -> Figure:
        """Draw the shares as a map.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = all_plain(self.tasks)
        figure = graph_objects.Figure(graph_objects.Heatmap(z=self.shares, x=names, y=names, zmin=0))
        figure.update_xaxes(title_text="vector that is added")
        figure.update_yaxes(title_text="task")
        return figure


def disentanglement(
    model: nn.Module, vectors: Mapping[str, Delta], batches: Mapping[str, Sequence[Any]]
) -> Disentanglement:
    """Count the predictions that change as the vector of another task is added.

    Args:
        model: the base, a classifier; it is as it was afterwards.
        vectors: by task, as they are to be added: `0.3 * vector` for a coefficient.
        batches: samples of each task; their labels are not needed.

    Returns:
        The shares by pair.

    Raises:
        ValueError: fewer than two tasks, or tasks without samples.
        CheckpointError: a vector is of another base.
    """
    tasks = tuple(vectors)
    if len(tasks) < 2 or set(tasks) != set(batches):
        raise ValueError(
            f"vectors, batches: {list(tasks)} and {list(batches)} were given; give two tasks at least, the same "
            f"in both."
        )

    def predictions(of: Sequence[str], task: str) -> Tensor:
        changed = copy.deepcopy(model)
        for index, each in enumerate(of):
            vectors[each].add_to(changed, check=index == 0)
        with evaluating(changed):
            return torch.cat([first_tensor(forward(changed, batch)).argmax(-1).flatten() for batch in batches[task]])

    shares = []
    for task in tasks:
        own = predictions([task], task)
        others = [own if other == task else predictions([task, other], task) for other in tasks]
        shares.append(tuple(float((own != each).double().mean()) for each in others))
    return Disentanglement(tasks, tuple(shares))
