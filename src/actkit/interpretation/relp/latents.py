"""The latents of sparse autoencoders as nodes: what each of them does to an answer.

    c(l) = (a_patch(l) - a_base(l)) <d_l, g>        g = dm/dx at the site, by the gradient of the method
    c(error) = <e_patch - e_base, g>                what the autoencoder leaves out
    exact c(l) = m(base | x := x + (a_patch(l) - a_base(l)) d_l) - m(base)

x = sum_l a(l) d_l + b + e holds at the base and at the patch, so that the effects of all latents and of the error add
up to the effect of the site at that position, exactly. Paper: RelP (2025, arXiv:2508.21258).

When to use it: to name what an effect of the residual stream is made of.
Cost: two forward passes and one backward pass for all latents of all sites; exact one forward pass for each node.
Settled here: the autoencoder is not in the model's pass, so that those of several layers do not act on one another.
Our own reading: the paper takes features as nodes of its circuits, and splices the autoencoders in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.model.sites import Site
from actkit.core.watch.intervene import At, intervene
from actkit.interpretation.relp.effects import Patching, measured, read_pair
from actkit.interpretation.relp.metrics import Metric
from actkit.interpretation.relp.rules import RelevanceRules
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.splice import check_model

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class LatentNode:
    """One latent at one position, or what an autoencoder leaves out there.

    Attributes:
        site: of the autoencoder.
        latent: its number; None for the error.
        position: of the token, from 0.
        effect: on the metric, by the gradient.
        exact: the same by patching, if it was asked for.
    """

    site: str
    latent: int | None
    position: int
    effect: float
    exact: float | None = None


@dataclass(frozen=True)
class LatentEffects:
    """The effects of all latents.

    Attributes:
        method: how they were found.
        values: by site, [latents, positions].
        errors: by site, [positions], of what the autoencoders leave out.
        base: the metric of the base.
        patch: the metric of the patch.
        checked: the nodes that were patched exactly, with the largest effects first.
        tokens: of the first pair's base.
    """

    method: Literal["relp", "attribution"]
    values: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    base: float
    patch: float
    checked: tuple[LatentNode, ...] = ()
    tokens: tuple[str, ...] = ()

    def top(self, count: int = 20) -> tuple[LatentNode, ...]:
        """Return the nodes with the largest effects, in magnitude, errors among them.

        Args:
            count: how many, at most.
        """
        found: list[LatentNode] = []
        for site, values in self.values.items():
            both = torch.cat([values, self.errors[site][None]])
            for index in both.abs().flatten().topk(min(count, both.numel())).indices.tolist():
                latent, position = divmod(index, both.shape[1])
                named = None if latent == len(values) else latent
                found.append(LatentNode(site, named, position, float(both[latent, position])))
        return tuple(sorted(found, key=lambda node: -abs(node.effect))[:count])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; of values [latent, position, value] of those that are not 0."""
        nodes = {
            site: [
                [latent, position, float(values[latent, position])] for latent, position in values.nonzero().tolist()
            ]
            for site, values in self.values.items()
        }
        return {
            "method": self.method,
            "base": self.base,
            "patch": self.patch,
            "tokens": list(self.tokens),
            "values": nodes,
            "errors": {site: values.tolist() for site, values in self.errors.items()},
            "checked": [asdict(node) for node in self.checked],
        }

    def table(self) -> Table:
        """The nodes with the largest effects."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        about = f"{self.method}; the metric goes from {self.base:.4g} to {self.patch:.4g} if all is patched"
        table = PlainTable(title=f"Effects of latents ({about})", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("site", "latent", "position", "token", "effect", "exact"):
            table.add_column(name, justify="left" if name in ("site", "token") else "right")
        for node in self.checked or self.top():
            token = self.tokens[node.position] if node.position < len(self.tokens) else ""
            latent = "error" if node.latent is None else str(node.latent)
            exact = "" if node.exact is None else f"{node.exact:.4g}"
            table.add_row(node.site, latent, str(node.position), token, f"{node.effect:.4g}", exact)
        return table

    def figure(self) -> Figure:
        """Draw the nodes with the largest effects as bars.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        nodes = (self.checked or self.top())[::-1]
        names = [
            f"{node.site}, {'error' if node.latent is None else node.latent}, position {node.position}"
            for node in nodes
        ]
        figure = graph_objects.Figure(
            graph_objects.Bar(x=[node.effect for node in nodes], y=names, orientation="h", name=self.method)
        )
        if self.checked:
            figure.add_trace(
                graph_objects.Bar(x=[node.exact for node in nodes], y=names, orientation="h", name="exact")
            )
        return figure.update_layout(title=f"Effects of latents by {self.method}")


def latent_effects(
    model: nn.Module,
    base: Mapping[str, Tensor],
    patch: Mapping[str, Tensor],
    metric: Metric,
    autoencoders: Mapping[str, SparseAutoencoder],
    *,
    method: Literal["relp", "attribution"] = "relp",
    rules: RelevanceRules | None = None,
    exact: int = 0,
    tokens: Sequence[str] = (),
    progress: bool = True,
) -> LatentEffects:
    """Find what patching each latent of one input with another's value does to a metric.

    Args:
        model: any with blocks; in evaluation mode meanwhile.
        base: a batch of inputs that run.
        patch: a batch of inputs of the same shape that values are taken from, row by row.
        metric: of logits [batch, length, vocabulary] (or what the model gives first), a number.
        autoencoders: by site, such as 'blocks.3.block.output'.
        method: 'relp' or 'attribution'.
        rules: of 'relp'; None for the paper's.
        exact: how many nodes with the largest effects are also patched exactly.
        tokens: texts of the first base's tokens.
        progress: show a bar.

    Returns:
        The effects, of each batch the sum.

    Raises:
        ValueError: an unknown method or site, an autoencoder of another site or width, inputs of different lengths, or
            a metric that is no number.
        UnsupportedModelError: an autoencoder is of another model, or a rule does not know the model.
    """
    if method not in ("relp", "attribution"):
        raise ValueError(f"method: {method!r} was given, allowed are relp and attribution.")
    if not autoencoders:
        raise ValueError("autoencoders: none were given; give at least one, by its site.")
    for site, each in autoencoders.items():
        check_model(each, model)
        if each.site not in (None, site):
            raise ValueError(f"autoencoders: the one for {site} was trained on {each.site}; give it for that site.")
    run, places = read_pair(model, base, patch, metric, list(autoencoders))
    by_site = {Site.parse(site): each for site, each in autoencoders.items()}
    chosen = RelevanceRules.none() if method == "attribution" else rules or RelevanceRules()
    with evaluating(model), run.view.held(), chosen.applied(run.view):
        gradients = run.gradients(places)
    values, errors, changes = {}, {}, {}
    with torch.no_grad():
        for place in places:
            autoencoder = by_site[place]
            before = autoencoder.encode(run.own[place])
            change = autoencoder.encode(run.own[place] + run.differences[place]) - before  # [batch, length, latents]
            along = gradients[place].to(change) @ autoencoder.decoder.T
            left = run.differences[place].to(change) - change @ autoencoder.decoder
            values[str(place)] = (change * along).sum(0).T
            errors[str(place)] = (left * gradients[place].to(change)).sum((0, 2))
            changes[str(place)] = change
    found = LatentEffects(method, values, errors, run.before, run.patched, (), tuple(tokens))
    nodes = []
    with evaluating(model), torch.no_grad():
        for node in track(found.top(exact), "Patching exactly", exact, progress and exact > 0):
            moved = changes[node.site]
            if node.latent is None:
                whole = run.differences[Site.parse(node.site)].to(moved)
                step = (whole - moved @ autoencoders[node.site].decoder)[:, node.position]
            else:
                direction = autoencoders[node.site].decoder[node.latent]
                step = moved[:, node.position, node.latent, None] * direction
            nodes.append(replace(node, exact=_patched(run, node, step) - run.before))
    return replace(found, checked=tuple(nodes))


def _patched(run: Patching, node: LatentNode, step: Tensor) -> float:
    """The metric with a step [batch, channels] added at the place of a node."""

    def put(value: Tensor, at: At) -> Tensor:
        value = value.clone()
        value[:, node.position] += step.to(value)
        return value

    with intervene(run.view.model, {node.site: put}, anatomy=run.view):
        return float(measured(run.metric, forward(run.view.model, run.base)))
