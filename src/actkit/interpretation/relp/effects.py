"""What each part of a model does to an answer: RelP, and what it is measured against.

    exact        c(n) = m(base | n := n_patch) - m(base)                       one forward pass for each node
    attribution  c(n) = (n_patch - n_base) . dm/dn at the base                  two forward passes, one backward
    relp         the same with the gradient that the rules of relevance give    the same
    integrated   c(n) = (n_patch - n_base) . mean over k < steps of dm/dn at n_base + k / steps (n_patch - n_base)

A node is a site at one position: the residual stream, what attention or an MLP adds, or one head's part of what is
mixed. m is a number for a batch of pairs of equal length, such as a mean difference of logits; effects are sums over
the batch, so means if m is one. Paper: RelP (2025, arXiv:2508.21258). Integrated gradients are those of its comparison:
a sum that never reaches the patch, one site at a time, for all positions at once.

When to use it: to find which parts cause an answer in seconds, and then to check the first ones exactly.

Cost: relp and attribution two forward passes and one backward pass, for all nodes together; integrated `steps` passes
forward and backward for each site of each block; exact half a forward pass for each node, `rows` at once.

Settled here: the base is what runs; patch it with values of the other input (denoising if the base is the corrupted
one). The graph begins at the first block, whatever parameters require a gradient.
Exact patching begins at the patched block, as all before it is the same.
Features of sparse autoencoders are nodes of `latents.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import standing_in
from actkit.core.forward.batch import forward, main_input
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.progress import track
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.watch.capture import live, resolve
from actkit.core.watch.intervene import At, intervene
from actkit.interpretation.relp.metrics import Metric, logits_of
from actkit.interpretation.relp.results import Method, Node, PatchEffects
from actkit.interpretation.relp.rules import RelevanceRules

METHODS = ("exact", "attribution", "relp", "integrated")
SITES = ("block.output", "attention.output", "mlp.output")
HEADS = "attention.mixed"  # whose nodes are heads


def patch_effects(
    model: nn.Module,
    base: Mapping[str, Tensor],
    patch: Mapping[str, Tensor],
    metric: Metric,
    *,
    sites: Sequence[str] = SITES,
    method: Method = "relp",
    rules: RelevanceRules | None = None,
    steps: int = 10,
    rows: int = 16,
    tokens: Sequence[str] = (),
    progress: bool = True,
) -> PatchEffects:
    """Find what patching each node of one input with another's value does to a metric.

    Args:
        model: any with blocks; in evaluation mode meanwhile.
        base: a batch of inputs that run.
        patch: a batch of inputs of the same shape that values are taken from, row by row.
        metric: of logits [batch, length, vocabulary] (or what the model gives first), a number.
        sites: names of sites [batch, length, channels]; 'attention.mixed' is by head.
        method: 'relp', 'attribution', 'integrated' or 'exact'.
        rules: of 'relp'; None for the paper's.
        steps: of 'integrated'.
        rows: how many nodes 'exact' patches at once.
        tokens: texts of the first base's tokens, for pictures.
        progress: show a bar.

    Returns:
        The effects.

    Raises:
        ValueError: an unknown method or site, inputs of different lengths, or a metric that is no number.
        UnsupportedModelError: a rule does not know the model.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r} was given, allowed are {', '.join(METHODS)}.")
    if rules is not None and method != "relp":
        raise ValueError(f"rules: they are of method 'relp', and {method!r} was given; leave them out.")
    if min(steps, rows) < 1:
        raise ValueError(f"steps, rows: {steps} and {rows} were given; give 1 or more of each.")
    run, places = read_pair(model, base, patch, metric, sites)
    with evaluating(model), run.view.held():
        if method == "exact":
            effects = run.exact(rows, progress)
        elif method == "integrated":
            effects = run.integrated(steps, progress)
        else:
            chosen = RelevanceRules.none() if method == "attribution" else rules or RelevanceRules()
            with chosen.applied(run.view):
                effects = run.first_order()
    values: dict[str, Tensor] = {}
    blocks: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(site.name for site in places):
        mine = [site for site in places if site.name == name]
        values[name] = torch.stack([effects[site].cpu() for site in mine])
        blocks[name] = tuple(int(site.block or 0) for site in mine)
    return PatchEffects(method, values, blocks, run.before, run.patched, tuple(tokens))


def exact_effects(
    model: nn.Module,
    base: Mapping[str, Tensor],
    patch: Mapping[str, Tensor],
    metric: Metric,
    nodes: Sequence[Node],
    *,
    rows: int = 16,
    progress: bool = True,
) -> tuple[float, ...]:
    """Patch some nodes exactly, such as the first that another method found.

    Args:
        model: as in `patch_effects`.
        base: as in `patch_effects`.
        patch: as in `patch_effects`.
        metric: as in `patch_effects`.
        nodes: whatever their sites.
        rows: how many are patched at once.
        progress: show a bar.

    Returns:
        The effect of each, in their order.

    Raises:
        ValueError: a node is beyond the inputs, or what `patch_effects` raises.
    """
    run, _ = read_pair(model, base, patch, metric, list(dict.fromkeys(node.site for node in nodes)))
    flat: list[tuple[Site, int]] = []
    for node in nodes:
        site = Site.parse(node.site)
        length, heads = run.own[site].shape[1], run.heads_of(site)
        if not 0 <= node.position < length or (node.head is None) != (heads is None):
            raise ValueError(f"nodes: {node} is no node of inputs of {length} tokens; give what `top` returns.")
        flat.append((site, node.position if heads is None else (node.head or 0) * length + node.position))
    with evaluating(model), run.view.held():
        return tuple(run.exactly(flat, rows, progress))


def read_pair(
    model: nn.Module, base: Mapping[str, Tensor], patch: Mapping[str, Tensor], metric: Metric, sites: Sequence[str]
) -> tuple[Patching, list[Site]]:
    """Run the patch and keep what stands at sites, for all methods.

    Args:
        model: as in `patch_effects`, as are all others.
        base: that runs.
        patch: of the same shape.
        metric: a number.
        sites: names.

    Returns:
        What the methods share, and the sites in their order.

    Raises:
        ValueError: an unknown site, one without a row per token, or inputs of different lengths.
    """
    shapes = [tuple(main_input(batch, model).shape) for batch in (base, patch)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"patch: its inputs are {list(shapes[1])}, and those of the base {list(shapes[0])}; pairs need equal "
            f"lengths, token by token."
        )
    view = anatomy(model, base)
    with view.held():
        places = _places(view, sites)
        with evaluating(model), torch.no_grad(), live(model, places, view) as found:
            patched = float(measured(metric, forward(model, patch)))
            other = {site: found[site][0] for site in places}
    for site in places:
        if other[site].dim() != 3 or other[site].shape[0] != shapes[0][0]:
            raise ValueError(
                f"sites: {site} is {list(other[site].shape)} here, and nodes are at [batch, length, channels]; "
                f"choose among {', '.join(SITES)} and {HEADS}."
            )
    return Patching(view, base, metric, patched, other), places


def _places(view: Anatomy, sites: Sequence[str]) -> list[Site]:
    if not sites:
        raise ValueError(f"sites: none were given; choose among {', '.join(SITES)} and {HEADS}.")
    found = list(resolve(view, dict.fromkeys(sites)))
    wrong = next((site for site in found if site.block is None or site.expert is not None), None)
    if wrong is not None:
        raise ValueError(f"sites: {wrong} is no part of a block; choose among {', '.join(SITES)} and {HEADS}.")
    return found


def measured(metric: Metric, output: Any) -> Tensor:
    """Return the metric of an output, a scalar.

    Args:
        metric: of logits.
        output: of a model.

    Raises:
        ValueError: it is no number.
    """
    value = metric(logits_of(output))
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metric: it gave {shape}; give one number for a batch, such as a mean difference of logits.")
    return value.reshape(())


@dataclass
class Patching:
    """What all methods share.

    Attributes:
        view: of the model.
        base: the input that runs.
        metric: of logits.
        patched: the metric of the patch.
        other: values at the patch, by site, [batch, length, channels].
    """

    view: Anatomy
    base: Mapping[str, Tensor]
    metric: Metric
    patched: float
    other: Mapping[Site, Tensor]

    @cached_property
    def _at_base(self) -> tuple[float, dict[Site, Tensor]]:
        """The metric and the values; `first_order` reads them off the pass that it differentiates."""
        model, sites = self.view.model, list(self.other)
        with evaluating(model), torch.no_grad(), live(model, sites, self.view) as found:
            before = float(measured(self.metric, forward(model, self.base)))
            return before, {site: found[site][0] for site in sites}

    @property
    def before(self) -> float:
        """The metric of the base."""
        return self._at_base[0]

    @property
    def own(self) -> dict[Site, Tensor]:
        """Values at the base, by site."""
        return self._at_base[1]

    @cached_property
    def differences(self) -> dict[Site, Tensor]:
        """Of the patch to the base, by site."""
        return {site: other - self.own[site] for site, other in self.other.items()}

    def heads_of(self, site: Site) -> int | None:
        """Return how many heads a site has; None if its nodes are whole.

        Args:
            site: of a block.
        """
        block = self.view.blocks[site.block or 0]
        return block.attention.heads if site.name == HEADS and block.attention is not None else None

    def summed(self, site: Site, products: Tensor) -> Tensor:
        """Return products [batch, length, channels] by node: [length] or [heads, length].

        Args:
            site: where they are.
            products: of differences and gradients.
        """
        heads = self.heads_of(site)
        if heads is None:
            return products.sum((0, 2))
        return products.unflatten(-1, (heads, -1)).sum((0, 3)).T

    def first_order(self) -> dict[Site, Tensor]:
        """Return differences times gradients."""
        before, own, gradients = self._differentiated(list(self.other))
        self._at_base = before, own  # rules change no value
        return {site: self.summed(site, self.differences[site] * gradients[site]) for site in own}

    def gradients(self, sites: list[Site], changes: Mapping[Any, Any] | None = None) -> dict[Site, Tensor]:
        """The gradients of the metric at the base.

        Args:
            sites: where.
            changes: made meanwhile, as of `intervene`.
        """
        return self._differentiated(sites, changes)[2]

    def _differentiated(
        self, sites: list[Site], changes: Mapping[Any, Any] | None = None
    ) -> tuple[float, dict[Site, Tensor], dict[Site, Tensor]]:
        """The metric, the values at sites and their gradients."""
        model = self.view.model

        def begin(value: Tensor, at: At) -> Tensor:
            return value.detach().clone().requires_grad_()

        first = intervene(model, {"blocks.0.block.input": begin}, anatomy=self.view)
        changed = intervene(model, changes, anatomy=self.view) if changes else nullcontext()
        with torch.enable_grad(), first, changed, live(model, sites, self.view) as found:
            value = measured(self.metric, forward(model, self.base))
            tensors = [found[site][0] for site in sites]
            given = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
        own = {site: tensor.detach() for site, tensor in zip(sites, tensors, strict=True)}
        return float(value.detach()), own, dict(zip(sites, given, strict=True))

    def integrated(self, steps: int, progress: bool) -> dict[Site, Tensor]:
        """Return differences times the mean of the gradients on the way.

        Args:
            steps: on the way.
            progress: show a bar.
        """
        effects = {}
        for site in track(list(self.own), "Integrated gradients", len(self.own), progress):
            mean = torch.zeros_like(self.own[site])
            for step in range(steps):
                here = self.own[site] + step / steps * self.differences[site]
                start = here.requires_grad_()
                mean += self.gradients([site], {site: lambda value, at, start=start: start.clone()})[site] / steps
            effects[site] = self.summed(site, self.differences[site] * mean)
        return effects

    def exact(self, rows: int, progress: bool) -> dict[Site, Tensor]:
        """Patch each node.

        Args:
            rows: nodes at once.
            progress: show a bar.
        """
        effects = {site: self.summed(site, torch.zeros_like(value)).contiguous() for site, value in self.own.items()}
        nodes = [(site, node) for site, found in effects.items() for node in range(found.numel())]
        for (site, node), value in zip(nodes, self.exactly(nodes, rows, progress), strict=True):
            effects[site].view(-1)[node] = value
        return effects

    def exactly(self, nodes: Sequence[tuple[Site, int]], rows: int, progress: bool) -> list[float]:
        """Patch some nodes.

        Args:
            nodes: each (site, flat index).
            rows: nodes of a site that are patched at once.
            progress: show a bar.

        Returns:
            Their effects.
        """
        chunks: list[tuple[Site, list[int]]] = []
        for wanted in dict.fromkeys(site for site, _ in nodes):
            mine = [at for at, (site, _) in enumerate(nodes) if site == wanted]
            chunks += [(wanted, mine[start : start + rows]) for start in range(0, len(mine), rows)]
        effects = [0.0] * len(nodes)
        for site, chosen in track(chunks, "Patching exactly", len(chunks), progress):
            for at, value in zip(chosen, self._patched(site, [nodes[at][1] for at in chosen]).tolist(), strict=True):
                effects[at] = value
        return effects

    @cached_property
    def _outputs(self) -> dict[str, Any]:
        """What the blocks give at the base, by path."""
        found: dict[str, Any] = {}

        def keep(path: str) -> Callable[..., None]:
            return lambda module, args, kwargs, output: found.update({path: output})

        with (
            torch.no_grad(),
            hooked(self.view.model, after={block.path: keep(block.path) for block in self.view.blocks}),
        ):
            forward(self.view.model, self.base)
        return found

    def _known(self, index: int, copies: int) -> dict[str, nn.Module]:
        """What stands where blocks before one are, whose outputs at the base are known."""

        def repeated(output: Any) -> Any:
            if isinstance(output, Tensor):
                return output.repeat(copies, *(1,) * (output.dim() - 1))
            return type(output)(repeated(part) for part in output) if isinstance(output, tuple) else output

        blocks = self.view.blocks[:index]
        return {block.path: _Known(block.module, repeated(self._outputs[block.path])) for block in blocks}

    @torch.no_grad()
    def _patched(self, site: Site, nodes: list[int]) -> Tensor:
        """The effects of some nodes of one site, each in rows of its own."""
        size, length = self.own[site].shape[:2]
        heads = self.heads_of(site)
        batch = {key: value.repeat(len(nodes), *(1,) * (value.dim() - 1)) for key, value in self.base.items()}

        def put(value: Tensor, at: At) -> Tensor:
            value = value.clone()
            for place, node in enumerate(nodes):
                rows, position = slice(place * size, (place + 1) * size), node % length
                if heads is None:
                    value[rows, position] += self.differences[site][:, position]
                else:
                    width = value.shape[-1] // heads
                    own = slice(node // length * width, (node // length + 1) * width)
                    value[rows, position, own] += self.differences[site][:, position, own]
            return value

        model, known = self.view.model, self._known(site.block or 0, len(nodes))
        with intervene(model, {site: put}, anatomy=self.view), standing_in(model, known):
            logits = logits_of(forward(model, batch))
        parts = logits.split(size)
        return torch.stack([measured(self.metric, part) for part in parts]).cpu() - self.before


class _Known(nn.Module):
    """Stands where a block is whose output is known, and gives that.

    Args:
        block: that it stands for, whose attributes it has.
        output: of the block.
    """

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(block=block, output=output)  # no part of this module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["output"]


def faithfulness(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    metric: Metric,
    effects: PatchEffects,
    kept: Iterable[int],
) -> dict[int, float]:
    """Return what is left of a metric if all but the nodes with the largest effects stand at their mean.

        F = (m(circuit) - m(nothing)) / (m(model) - m(nothing))

    The mean is over the batch, position by position. The definition is that of sparse feature circuits (from memory).

    Args:
        model: any.
        batch: of inputs of one length; more than one, as a mean of one is itself.
        metric: as in `patch_effects`.
        effects: which nodes matter; of sites whose ablation leaves the rest, such as attention.output and mlp.output.
        kept: how many nodes are kept; several to draw a curve.

    Returns:
        F by the number of nodes; 1 for all of them.

    Raises:
        ValueError: one input alone, or no difference between the model and nothing of it.
    """
    if main_input(batch, model).shape[0] < 2:
        raise ValueError("batch: 1 input was given; give at least 2, as the mean over one input changes nothing.")
    view = anatomy(model, batch)
    places = [Site(name, block) for name in effects.values for block in effects.blocks[name]]
    with evaluating(model), torch.no_grad(), view.held():
        with live(model, places, view) as found:
            full = float(measured(metric, forward(model, batch)))
        means = {site: found[site][0].mean(0, keepdim=True) for site in places}
        ordered = effects.top(sum(values.numel() for values in effects.values.values()))

        def with_kept(count: int) -> float:
            inside = {site: torch.zeros(means[site].shape, dtype=torch.bool) for site in places}
            for node in ordered[:count]:
                site = Site.parse(node.site)
                channels = slice(None)
                if node.head is not None:
                    attention = view.blocks[site.block or 0].attention
                    assert attention is not None  # it has heads
                    width = means[site].shape[-1] // attention.heads
                    channels = slice(node.head * width, (node.head + 1) * width)
                inside[site][:, node.position, channels] = True

            def ablate(site: Site) -> Callable[[Tensor, At], Tensor]:
                return lambda value, at: torch.where(inside[site].to(value.device), value, means[site])

            with intervene(model, {site: ablate(site) for site in places}, anatomy=view):
                return float(measured(metric, forward(model, batch)))

        nothing = with_kept(0)
        if full == nothing:
            raise ValueError("metric: it is the same with all nodes and with none, so there is no share of it.")
        return {count: (with_kept(count) - nothing) / (full - nothing) for count in kept}
