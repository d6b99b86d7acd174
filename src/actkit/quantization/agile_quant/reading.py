"""One pass of some tokens through the blocks of a model, some of them dropped on the way: what `TokenPruner` runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.model.sites import Tap, read_tap

if TYPE_CHECKING:
    from actkit.quantization.agile_quant.token_pruner import TokenPruner

Score = Literal["start_token", "column_mean", "random"]
Positions = Literal["keep", "renumber"]


class Reading:
    """One pass of some tokens through the blocks, and what each of them is given.

    Args:
        pruner: whose pass it is.
        ids: [batch, tokens].
        cached: of each block the positions that its cache holds, [batch, so many]; None if there is nothing yet.
        prunes: tokens go where the schedule says.
        refills: dropped tokens are put back behind the last block.
    """

    def __init__(
        self, pruner: TokenPruner, ids: Tensor, cached: list[Tensor] | None, *, prunes: bool, refills: bool = False
    ) -> None:
        self.pruner, self.refills = pruner, refills
        self.prunes, self.shares = prunes, pruner.schedule.shares if prunes else {}
        start = pruner.position if cached is not None else 0
        self.left = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
        self.tokens, self.cached = ids.shape[1], cached
        self.kept: list[Tensor] = []
        self._whole: Tensor | None = None  # hidden states of all tokens, as they were last
        self.low: list[Tensor] = []  # of each block of which positions it reads fewer bits, bool [batch, tokens]
        self._low = torch.zeros_like(self.left, dtype=torch.bool)  # of the tokens that are left
        self._scores: Tensor | None = None
        self._scored = -1  # the block that these are of
        self._read: dict[str, Tensor] = {}  # queries and keys of a block whose attention does not form its weights
        self._turns: Any = None  # the rotary tables that the block was given
        self._generator = torch.Generator().manual_seed(pruner.seed)

    def running(self) -> Any:
        """A context in which the model's blocks are given what is left."""
        pruner, before, after = self.pruner, {}, {}
        for index, (block, attention) in enumerate(pruner.paths):
            before[block] = _called(self._enter, index)
            after[block] = _called(self._leave, index)
            if not self.prunes:
                continue
            for path, rounding in pruner.coarser.get(index, {}).items():
                after[path] = _called(self._lower, rounding)
            if index in pruner.formed:
                after[pruner.formed[index]] = _called(self._keep_formed, index)
            elif pruner.scores(index):
                after[attention] = _called(self._keep_scores, index)
                if pruner.low.shares.get(index):
                    before[f"{pruner.outputs[index]}.inputs"] = _called(self._form, index, attention)
                taps = pruner.operands.get(index, {})
                for path in {tap.path for tap in taps.values()}:  # one, if queries and keys are one layer's
                    here = {name: tap for name, tap in taps.items() if tap.path == path}
                    after[path] = _called(self._keep_operands, here)
        stack = ExitStack()
        stack.enter_context(evaluating(pruner.model))
        stack.enter_context(hooked(pruner.model, before=before, after=after, replacing=True))
        return stack

    def _enter(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a block is called with: mask and positions of the tokens that are left."""
        held = self.cached[index] if self.cached is not None else self.left[:, :0]
        self.kept.append(torch.cat((held, self.left), 1))
        if not self.pruner.low.inherited:
            self._low = torch.zeros_like(self._low)
        if self.prunes and self.pruner.score == "random" and any(self._numbers(index)):
            self._score(index, None)
        missing = (self.pruner.position if self.cached is not None else 0) - held.shape[1]
        tokens = self.left.shape[1]
        self._turns = kwargs.get("position_embeddings")
        if not missing and tokens == self.tokens:
            return None
        kwargs = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:  # what is left stands in order, so its mask is that of as many tokens in a row
            kwargs["attention_mask"] = mask[..., :tokens, :tokens] if self.cached is None else mask[..., missing:]
        positions = self.left
        if self.pruner.positions == "renumber":
            numbered = torch.arange(held.shape[1], held.shape[1] + tokens, device=positions.device)
            positions = numbered.expand_as(positions)
        kwargs["position_ids"] = positions
        hidden = args[0] if args else kwargs["hidden_states"]
        self._turns = kwargs["position_embeddings"] = rotary_of(self.pruner.model)(hidden, positions)
        return args, kwargs

    def _keep_operands(self, taps: dict[str, Tap], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for name, tap in taps.items():
            self._read[name] = read_tap(tap, args, kwargs, output, self._turns)

    def _keep_scores(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._scored != index:
            self._score(index, self._formed(module) if index in self.pruner.operands else output[1].float())

    def _keep_formed(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._score(index, output.float())

    def _form(self, index: int, attention: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Score before the attention's output layer reads, which may read fewer bits of some tokens."""
        self._score(index, self._formed(self.pruner.model.get_submodule(attention)))

    def _score(self, index: int, weights: Tensor | None) -> None:
        """Score the tokens of a block, and choose those of which it reads fewer bits."""
        if weights is None:
            self._scores = torch.rand(self.left.shape, generator=self._generator).to(self.left.device)
        else:
            self._scores = SCORES[self.pruner.score](weights)
        self._scored = index
        dropped, coarse = self._numbers(index)
        if coarse:
            most = self.left.shape[1] - 2
            chosen = self._order()[:, min(dropped, most) : min(dropped + coarse, most)]
            self._low = self._low.scatter(1, chosen, True)

    def _numbers(self, index: int) -> tuple[int, int]:
        """How many tokens a block drops, and of how many it begins to read fewer bits."""
        tokens = self.left.shape[1]
        low = self.pruner.low.shares if self.prunes else {}
        return int(self.shares.get(index, 0.0) * tokens), int(low.get(index, 0.0) * tokens)

    def _order(self) -> Tensor:
        """The places of the tokens that are left, those of small scores first, the ends last: [batch, tokens]."""
        assert self._scores is not None
        scores = self._scores.clone()
        scores[:, [0, -1]] = torch.inf
        return scores.argsort(dim=1, stable=True)

    def _lower(self, rounding: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What a layer reads: fewer bits of some tokens."""
        if not bool(self._low.any()):
            return None
        x = args[0]
        return torch.where(self._low.reshape(*x.shape[:-1], 1), rounding(x), output)

    def _formed(self, module: nn.Module) -> Tensor:
        """The attention weights of a prompt, of queries and keys that were read: [batch, heads, tokens, tokens]."""
        query, key = self._read.pop("query").float(), self._read.pop("key").float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.mT * getattr(module, "scaling", query.shape[-1] ** -0.5)
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return torch.softmax(scores.masked_fill_(ahead, -torch.inf), -1)

    def _leave(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What leaves a block: without the tokens that it drops; behind the last one with all of them."""
        hidden = output[0] if isinstance(output, tuple) else output
        number = self._numbers(index)[0]
        text = torch.zeros(len(self.left), self.tokens, dtype=torch.bool, device=self.left.device)
        self.low.append(text.scatter(1, self.left, self._low) if self.prunes else text)
        if self.refills and (number or self._whole is not None):
            whole = hidden if self._whole is None else self._whole
            places = self.left[..., None].expand(-1, -1, hidden.shape[-1])
            self._whole = whole.scatter(1, places, hidden)
        if number:
            chosen = self._stay(number)
            self.left, self._low = self.left.gather(1, chosen), self._low.gather(1, chosen)
            hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
        if self.refills and self._whole is not None and index == len(self.pruner.paths) - 1:
            hidden = self._whole
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _stay(self, number: int) -> Tensor:
        """Which of the tokens stay if so many go: places [batch, so many], in order."""
        number = min(number, max(0, self.left.shape[1] - 2))
        return self._order()[:, number:].sort(1).values


def rotary_of(model: Any) -> Any:
    """Return the rotary embedding that all blocks of a model share, or None."""
    return getattr(getattr(model, "base_model", None), "rotary_emb", None)


def _start_token(weights: Tensor) -> Tensor:
    """How much each token attends to the first one: [batch, tokens] of weights [batch, heads, tokens, tokens]."""
    return weights[..., 0].sum(1)


def _column_mean(weights: Tensor) -> Tensor:
    """How much later tokens, and it itself, attend to a token, in the mean."""
    tokens = weights.shape[-1]
    later = tokens - torch.arange(tokens, device=weights.device)
    return weights.tril().sum((1, 2)) / later


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "start_token": _start_token,
    "column_mean": _column_mean,
    "random": lambda weights: weights,
}


def _called(hook: Callable[..., Any], *first: Any) -> Any:
    return lambda *given: hook(*first, *given)
