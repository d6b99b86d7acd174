"""DOEI: amplify what attention is sure of and suppress the rest, inside a vision transformer (2025, arXiv:2502.15885).

    W = w_1 K_rgb + w_2 K_emb + w_3 K_att,  rows of each sum to 1        (what belongs together, by three views)
    S_c = minmax_i(A_c W^t^T),  s_i = max of S_c(i) over the classes c of the image       (how sure a patch is)
    patches:       x_i <- x_i (1 + a g(s_i)), then all of them scaled to the mean norm that they had
    class tokens:  x_c <- x_c (1 + a g(r_c)) - b |x_c| sum over c' of relu(cos(x_c, x_c')) x_c' / |x_c'|

behind the last third of the blocks, with a and b rising from block to block. A_c is the attention of class token c to
the patches, mean over heads; K_rgb compares the mean colours of neighbouring patches, K_emb their tokens by cosine,
K_att is their attention to each other, made symmetric; r_c is the mean of the top 10 % of S_c; g(s) = tanh((s - mean) /
temperature), or +1 above and -1 below two thresholds. No weight is added.

    with DOEI().on(model): ...                              # edits while the context lasts
    actkit.train(model, ..., rules=[DOEI()])                # or `--rule doei`: edits in a training

When to use it: for tighter class activation maps of a vision transformer that finds classes from labels alone.
Cost: two products of patches by patches for each edited block; attention weights must be formed ('eager').
Settled here: the classes of an image are its labels if the model is called with them, in both cases; without labels
those whose class token has a mean above 0 at this block. An image without any is left as it is, and counted. What is
sure is not differentiated through. A training begins without edits, as attention knows nothing at first. A model with
one class token (ViT) has its patches edited by its attention, and no classes.
Our own reading: all of the above. The paper was not obtainable beyond its abstract and a README, which name the three
parts (patch-wise and class-wise progressive decoupling, alignment of colours, embeddings and attention) and no
equation, threshold or layer. Each part is a function of this file, so that the authors' can take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked
from actkit.core.model.sites import Site
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.watch.intervene import At, Change, intervene
from actkit.interpretation.doei.class_token_vit import shown_classes
from actkit.interpretation.doei.tokens import Tokens, between_0_and_1

DILATIONS = (1, 2, 4)  # of the neighbours whose colours are compared
TOP = 0.1  # of the patches, for how sure a class is
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


# -- the parts ---------------------------------------------------------------------------------------------------------


@cache
def neighbours(rows: int, columns: int) -> Tensor:
    """Return which patches are compared by colour: bool [patches, patches], themselves and eight at each dilation.

    Args:
        rows: of the grid.
        columns: of the grid.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    down, right = (a.flatten()[:, None] - a.flatten() for a in (y, x))
    near = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for step in DILATIONS:
        steps = [torch.isin(each, torch.tensor([-step, 0, step])) for each in (down, right)]
        near |= steps[0] & steps[1]
    return near


def affinity(
    colours: Tensor, tokens: Tensor, attention: Tensor, weights: tuple[float, float, float], sigma: float | None
) -> Tensor:
    """Return how much patches belong together: [batch, patches, patches], rows sum to 1.

    Args:
        colours: [batch, channels, rows, columns], means of patches.
        tokens: [batch, patches, features].
        attention: [batch, patches, patches], mean over heads.
        weights: of colours, tokens and attention.
        sigma: by how much colours may differ; None for the deviation of the image's.

    Raises:
        ValueError: all weights are 0.
    """
    near = neighbours(*colours.shape[-2:]).to(tokens.device)
    flat = colours.flatten(2).mT
    spread = flat.var(1, correction=0).sum(-1)[:, None, None] if sigma is None else sigma**2
    apart = torch.cdist(flat, flat).square()
    by_colour = torch.exp(-apart / (2 * torch.as_tensor(spread, device=flat.device).clamp(min=1e-12))) * near
    unit = nn.functional.normalize(tokens, dim=-1)
    alike = (unit @ unit.mT).relu() + torch.diag_embed((unit.norm(dim=-1) == 0).to(unit))  # a token of 0 is its own kin
    views = (by_colour, alike, (attention + attention.mT) / 2)
    total = sum(weights)
    if total <= 0:
        raise ValueError(f"hfa_weights: {weights} were given; give three of 0 or above, one of them above 0.")
    return sum(w / total * view / view.sum(-1, keepdim=True) for w, view in zip(weights, views, strict=True))  # type: ignore[return-value]


def confidence(attention: Tensor, belonging: Tensor, steps: int) -> Tensor:
    """Return how sure each class is of each patch: [batch, classes, patches] from 0 to 1.

    Args:
        attention: of class tokens to patches, [batch, classes, patches].
        belonging: as of `affinity`.
        steps: how often attention is spread by it.
    """
    for _ in range(steps):
        attention = attention @ belonging.mT
    return between_0_and_1(attention)


# -- the rule ----------------------------------------------------------------------------------------------------------


class Edited:
    """What the edits did so far.

    Attributes:
        active: whether they are made.
        images: that passed an edit.
        left_alone: of those, the ones without a class.
    """

    def __init__(self) -> None:
        self.active, self.images, self.left_alone = True, 0, 0


class DOEI(TrainingRule):
    """Edit the tokens of a vision transformer by what its attention is sure of.

    Attributes:
        layers: blocks behind which tokens are edited: 'late' is the last third, 'all', or their numbers.
        hfa_weights: of colours, tokens and attention in what belongs together.
        mode: how sure becomes an edit: 'soft' by tanh, 'hard' by the thresholds.
        amplify: a at the last of these blocks; 0 changes nothing at all.
        tau: thresholds of 'hard', below and above.
        temperature: of 'soft'.
        decouple: b at the last of these blocks.
        ppdo: edit patches.
        cpdo: edit class tokens.
        rgb_sigma: by how much colours may differ, in the units of the images; 'auto' is their deviation in the image.
        steps: how often attention is spread.
        site: what is edited: the residual stream behind a block, or what its MLP reads.
        begin: the share of a training that is over before edits begin.

    Raises:
        ValueError: a value is out of bounds.
    """

    layers: Literal["late", "all"] | tuple[int, ...] = "late"
    hfa_weights: tuple[Weight, Weight, Weight] = (1 / 3, 1 / 3, 1 / 3)
    mode: Literal["soft", "hard"] = "soft"
    amplify: float = Field(0.2, ge=0, lt=1)
    tau: tuple[Share, Share] = (0.3, 0.7)
    temperature: float = Field(0.25, gt=0)
    decouple: float = Field(0.1, ge=0, lt=1)
    ppdo: bool = True
    cpdo: bool = True
    rgb_sigma: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    steps: int = Field(1, ge=0)
    site: Literal["block.output", "mlp.input"] = "block.output"
    begin: float = Field(0.1, ge=0, lt=1)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Edited]:
        """Edit tokens as long as a context lasts.

        Args:
            model: a vision transformer of transformers, or a ClassTokenViT, whose attention is 'eager'.

        Yields:
            What the edits did so far; `active` switches them.

        Raises:
            ValueError: a block does not exist, or attention weights are not formed.
            DataError: the tokens of a pass are not class tokens and patches.
            UnsupportedModelError: it is no such model.
        """
        place = Tokens(model)
        edited = Edited()
        blocks = _blocks(self.layers, len(place.view.blocks))
        if self.amplify == 0:
            yield edited
            return
        shown: list[Tensor | None] = [None]

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shown[0] = kwargs.get("labels")

        def change(block: int, share: float) -> Any:
            def changed(value: Tensor, at: At) -> Tensor | None:
                if not edited.active:
                    return None
                attention = at[f"blocks.{block}.attention.weights"]
                return self._edited(value, attention, at[place.image], shown[0], place, share, edited)

            return changed

        changes: dict[Site | str, Change]
        changes = {f"blocks.{each}.{self.site}": change(each, (i + 1) / len(blocks)) for i, each in enumerate(blocks)}
        reads = [place.image, *(f"blocks.{each}.attention.weights" for each in blocks)]
        with hooked(model, before={"": see}), intervene(model, changes, reads=reads, anatomy=place.view):
            yield edited

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedRule:
        return AttachedDOEI(self, model)

    def _edited(
        self,
        value: Tensor,
        attention: Tensor,
        image: Tensor,
        labels: Tensor | None,
        place: Tokens,
        share: float,
        edited: Edited,
    ) -> Tensor:
        """The tokens [batch, classes + patches, features] behind the edits of one block."""
        count = place.classes
        place.grid(tuple(image.shape[-2:]), value.shape[1])  # type: ignore[arg-type]
        colours = nn.functional.avg_pool2d(image.detach().float(), place.patch)
        tokens = value.detach().float()
        classes, patches = tokens[:, :count], tokens[:, count:]
        seen = attention.detach().float().mean(1)
        sigma = None if self.rgb_sigma == "auto" else self.rgb_sigma
        belonging = affinity(colours, patches, seen[:, count:, count:], self.hfa_weights, sigma)
        sure = confidence(seen[:, :count, count:], belonging, self.steps)
        present = _present(labels, classes)
        some = present.any(-1)
        edited.images += len(some)
        edited.left_alone += int((~some).sum())
        factor = torch.ones_like(tokens[..., :1])
        away = torch.zeros_like(classes)
        if self.ppdo:
            best = sure.masked_fill(~present[..., None], -1).amax(1)
            gain = 1 + share * self.amplify * self._gain(best, best.mean(-1, keepdim=True))
            lengths = patches.norm(dim=-1)
            gain = gain * (lengths.sum(-1) / (lengths * gain).sum(-1).clamp(min=1e-12))[:, None]
            factor[:, count:] = torch.where(some[:, None], gain, 1)[..., None]
        if self.cpdo and count > 1:
            top = max(1, round(TOP * sure.shape[-1]))
            sureness = sure.topk(top, -1).values.mean(-1)
            mean = (sureness * present).sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp(min=1)
            gain = 1 + share * self.amplify * self._gain(sureness, mean)
            factor[:, :count] = torch.where(present, gain, 1)[..., None]
            away = share * self.decouple * shared_direction(classes, present)
        edits = torch.cat((away, torch.zeros_like(patches)), 1)
        return (value * factor.to(value.dtype) - edits.to(value.dtype)).contiguous()

    def _gain(self, sure: Tensor, mean: Tensor) -> Tensor:
        """How much more or less, -1 to 1."""
        if self.mode == "soft":
            return ((sure - mean) / self.temperature).tanh()
        return (sure > self.tau[1]).float() - (sure < self.tau[0]).float()


def shared_direction(classes: Tensor, present: Tensor) -> Tensor:
    """Return what class tokens share with the others, absent ones left out: [batch, classes, features].

    Args:
        classes: tokens [batch, classes, features].
        present: bool [batch, classes].
    """
    unit = nn.functional.normalize(classes, dim=-1)
    both = present[:, :, None] & present[:, None]
    both = both & ~torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
    return ((unit @ unit.mT).relu() * both) @ unit * classes.norm(dim=-1, keepdim=True)


class AttachedDOEI(AttachedRule):
    """The edits in a training.

    Args:
        rule: its settings.
        model: in place.
    """

    def __init__(self, rule: DOEI, model: nn.Module) -> None:
        self.rule = rule
        self._stack = ExitStack()
        self.edited = self._stack.enter_context(rule.on(model))
        self.edited.active = rule.begin == 0

    def before_step(self, progress: float) -> None:
        self.edited.active = progress >= self.rule.begin
        self.edited.images = self.edited.left_alone = 0  # what is reported is of one step

    def report(self) -> dict[str, Any]:
        return {"images": self.edited.images, "left_alone": self.edited.left_alone}

    def detach(self) -> None:
        self._stack.close()


def _blocks(layers: Literal["late", "all"] | tuple[int, ...], count: int) -> list[int]:
    """The numbers of the blocks that are edited, rising."""
    if layers == "late":
        return list(range(count - max(1, count // 3), count))
    if layers == "all":
        return list(range(count))
    wrong = sorted(each for each in layers if not 0 <= each < count)
    if wrong or not layers:
        raise ValueError(f"layers: {list(layers)} were given; give 'late', 'all', or blocks from 0 to {count - 1}.")
    return sorted(set(layers))


def _present(labels: Tensor | None, classes: Tensor) -> Tensor:
    """Bool [batch, classes]: what images show; of a model with one class token, that one."""
    if classes.shape[1] == 1:
        return torch.ones(classes.shape[:2], dtype=torch.bool, device=classes.device)
    if labels is None:
        return classes.mean(-1) > 0
    return shown_classes(labels, classes.shape[1]).to(classes.device)
