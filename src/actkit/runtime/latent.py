"""Latent attention in the decoder: which products a thread computes, what is cached, and a prompt's way through it.

A thread owns some heads. What all heads share (the latent, the turned key, what queries go through) the threads compute
in parts and exchange. The key projection of a head is transposed and stands before the sums over tokens, its value
projection behind them; both keep the codes that they are stored as. So a token is cached as rank + rope numbers. A
module with `cache = 'expanded'` has keys and values of all heads cached instead, as a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.model.parts import Block, Linear
from actkit.core.model.wrapping import inside
from actkit.kernels import decode_step as steps
from actkit.kernels.decode_latent import LatentPlan, no_latents
from actkit.kernels.quantized import BLOCK, PIECES
from actkit.runtime.blocks import Product, Share, columns, factors_of, rows, share_of
from actkit.runtime.shards import kind_of

TRANSFORMERS = ("DeepseekV3Attention",)  # whose attributes ours has too


@dataclass(frozen=True)
class Latent:
    """Latent attention of a block.

    Attributes:
        path: of its module.
        module: whose parameters have the names of public checkpoints.
        interleaved: whether neighbouring features turn together.
    """

    path: str
    module: Any
    interleaved: bool

    @property
    def heads(self) -> int:
        """How many."""
        return int(self.module.num_heads)

    @property
    def rank(self) -> int:
        """Numbers of a token that keys and values are made of."""
        return int(self.module.kv_lora_rank)

    @property
    def rope(self) -> int:
        """Features that turn."""
        return int(self.module.qk_rope_head_dim)

    @property
    def nope(self) -> int:
        """Features of a query that do not."""
        return int(self.module.qk_nope_head_dim)

    @property
    def value(self) -> int:
        """Features of a head's output."""
        return int(self.module.v_head_dim)

    @property
    def narrow(self) -> int:
        """Numbers that queries go through, 0 for none."""
        return int(self.module.q_lora_rank or 0)

    @property
    def expanded(self) -> bool:
        """Whether keys and values of all heads are cached."""
        return getattr(self.module, "cache", "latent") == "expanded"

    @property
    def cached(self) -> int:
        """Numbers that are cached of a token."""
        if self.expanded:
            return self.heads * (self.nope + self.rope + self.value)
        return self.rank + self.rope

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of its norms."""
        names = ("kv_a_layernorm", "q_a_layernorm")[: 2 if self.narrow else 1]
        return tuple(f"{self.path}.{name}" for name in names)

    def linear(self, name: str) -> Linear:
        """One of its layers."""
        return Linear(f"{self.path}.{name}", "layer", getattr(self.module, name))


def latent_of(model: nn.Module, block: Block) -> Latent | None:
    """Return the latent attention of a block, None if it has another one.

    Args:
        model: whose block.
        block: as the anatomy has it.
    """
    if block.attention is not None:
        return None
    path = inside(model, f"{block.path}.self_attn")
    module: Any = get_module(model, path)
    if getattr(module, "decodes_as", None) == "latent_attention":
        return Latent(path, module, bool(module.interleaved))
    if type(module).__name__ in TRANSFORMERS:
        return Latent(path, module, bool(module.config.rope_interleave))
    return None


def refuse(latent: Latent) -> None:
    """Raise UnsupportedModelError if what is absorbed is more than a matrix."""
    layer = latent.linear("kv_b_proj")
    if factors_of(layer.module) is not None:
        raise UnsupportedModelError(f"{layer.path} is kept as two factors, which queries do not absorb here")
    if isinstance(layer.module, ActLinear) and (layer.module.select is not None or layer.module.correction is not None):
        raise UnsupportedModelError(
            f"{layer.path} selects its inputs or corrects its outputs, so that queries cannot absorb it"
        )


def latents_of(model: nn.Module, blocks: Sequence[Block]) -> list[Latent] | None:
    """Return the latent attention of all blocks, None if there is none.

    Args:
        model: whose blocks.
        blocks: as the anatomy has them.

    Raises:
        UnsupportedModelError: only some have it, or they differ.
    """
    found = [latent_of(model, block) for block in blocks]
    if not any(found):
        return None
    shapes = {None if each is None else (each.cached, each.narrow, each.expanded) for each in found}
    if len(shapes) > 1:
        raise UnsupportedModelError("some of its blocks have latent attention of another shape, or other attention")
    return [each for each in found if each is not None]


def apart(size: int) -> int:
    """From where one head's product writes to where the next one's does: it writes whole tiles."""
    return -(-size // BLOCK) * BLOCK + BLOCK


def plan_of(model: nn.Module, latents: list[Latent] | None, layers: int) -> LatentPlan:
    """Return what the step computes.

    Args:
        model: whose attention.
        latents: of all blocks.
        layers: how many.
    """
    if latents is None:
        return no_latents(layers)
    first = latents[0]

    def gains(name: str, size: int) -> np.ndarray:
        if not size:
            return np.ones((layers, 0), np.float32)
        return np.stack([getattr(each.module, name).weight.detach().float().numpy() for each in latents])

    return LatentPlan(
        first.rank,
        first.rope,
        first.nope,
        first.value,
        first.narrow,
        first.expanded,
        apart(first.rank),
        apart(first.value),
        gains("kv_a_layernorm", first.rank),
        gains("q_a_layernorm", first.narrow),
    )


def latent_attention(share: Share, latent: Latent, thread: int, threads: int) -> None:
    """Add one thread's part of latent attention.

    Args:
        share: filled.
        latent: of the block.
        thread: whose share, from 0.
        threads: of the team.
    """
    own, each = share_of(latent.heads, thread, threads), latent.nope + latent.rope
    narrow = share_of(latent.narrow, thread, threads, PIECES[0])
    part = share_of(latent.rank + latent.rope, thread, threads, PIECES[0])
    queries = range(own.start * each, own.stop * each)
    layers: dict[int, tuple[Linear, range]] = {}
    if latent.narrow:
        layers[steps.KEY_AT] = (latent.linear("q_a_proj"), narrow)
        share.stages[steps.QUERIES] = columns([(latent.linear("q_b_proj"), queries)])[0] if own else []
    else:
        layers[steps.QUERY_AT] = (latent.linear("q_proj"), queries)
    layers[steps.VALUE_AT] = (latent.linear("kv_a_proj_with_mqa"), part)
    layers = {place: (linear, cut) for place, (linear, cut) in layers.items() if cut}
    products, places = columns(list(layers.values()))
    share.stages[steps.QKV] = products
    share.places |= dict(zip(layers, places))
    both, inner = latent.linear("kv_b_proj"), latent.nope + latent.value
    if latent.expanded:
        cut = range(own.start * inner, own.stop * inner)
        share.stages[steps.ABSORB], share.stages[steps.EXPAND] = columns([(both, cut)])[0] if own else [], []
    else:
        share.stages[steps.ABSORB] = [_absorbed(both, head, inner, latent, head - own.start) for head in own]
        share.stages[steps.EXPAND] = [_expanded(both, head, inner, latent, head - own.start) for head in own]
    mixed = range(own.start * latent.value, own.stop * latent.value)
    share.stages[steps.OUTPUT] = [rows(latent.linear("o_proj"), mixed, own.start == 0)] if own else []
    turn = steps.NEIGHBOURS if latent.interleaved else steps.HALVES
    share.places |= {steps.FIRST_HEAD: own.start, steps.HEADS: len(own), steps.TURN: turn}
    share.places |= {steps.FIRST_NARROW: narrow.start, steps.NARROW: len(narrow)}
    share.places |= {steps.FIRST_LATENT: part.start, steps.LATENT: len(part)}


def _absorbed(both: Linear, head: int, inner: int, latent: Latent, number: int) -> Product:
    """K^T of a head, which makes rank features of a query's plain ones. A bias is the same for all keys: none."""
    cut = range(head * inner, head * inner + latent.nope)
    kind = kind_of(both.module, outputs=cut).transposed()
    at, begin = number * apart(latent.rank), number * (latent.nope + latent.rope)
    return Product(((both, cut),), kind, at, biased=False, transposed=True, inputs_at=begin)


def _expanded(both: Linear, head: int, inner: int, latent: Latent, number: int) -> Product:
    """V of a head, which makes its output of a sum of latents; the weights sum to 1, so that a bias is added once."""
    cut = range(head * inner + latent.nope, (head + 1) * inner)
    return Product(
        ((both, cut),), kind_of(both.module, outputs=cut), number * apart(latent.value), inputs_at=number * latent.rank
    )


# -- prompts -----------------------------------------------------------------------------------------------------------


def read_latents(prompt: Any, layer: int, normed: list[Tensor], begin: int, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Attend with the tokens of a prompt, in the form that the step has.

    Args:
        prompt: the `runtime.prompt.Prompt` that reads it.
        layer: which.
        normed: of each thread, what attention reads [tokens, hidden].
        begin: the first token.
        cos: [tokens, rope].
        sin: the same.

    Returns:
        Of each thread, its heads' outputs [tokens, heads * value].
    """
    plan, work, sizes = prompt.plan, prompt.work, LatentPlan.of(prompt.plan)
    places, outs = plan.layers[:, layer], prompt._products(layer, steps.QKV, normed)
    end, turn = begin + len(normed[0]), int(places[0, steps.TURN])

    def gathered(at: int, count: int) -> Tensor:
        return torch.cat([out[:, place[at] : place[at] + place[count]] for out, place in zip(outs, places)], 1).float()

    def normal(x: Tensor, gain: np.ndarray) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], torch.from_numpy(gain[layer]), float(plan.epsilon)).to(prompt.dtype)

    both = gathered(steps.VALUE_AT, steps.LATENT)
    latent = normal(both[:, : sizes.rank], sizes.norms)
    key = prompt._turned(both[:, sizes.rank :], turn, cos, sin)
    if sizes.narrow:
        narrow = normal(gathered(steps.KEY_AT, steps.NARROW), sizes.query_norms)
        outs = prompt._products(layer, steps.QUERIES, [narrow] * len(places))
    every = []
    for out, place in zip(outs, places):
        heads, each = int(place[steps.HEADS]), sizes.nope + sizes.rope
        query = out[:, place[steps.QUERY_AT] :][:, : heads * each].reshape(len(out), heads, each)
        turned = prompt._turned(query[..., sizes.nope :].float().transpose(0, 1), turn, cos, sin).transpose(0, 1)
        every.append(torch.cat((query[..., : sizes.nope], turned.to(query.dtype)), -1).flatten(1))
    visible = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
    if sizes.expanded:
        given = prompt._products(layer, steps.ABSORB, [latent] * len(places))
        return [
            _attend_expanded(work, sizes, layer, place, query, out, key, begin, visible, float(plan.scaling))
            for place, query, out in zip(places, every, given)
        ]
    rows = torch.from_numpy(work.latent_cache[layer, :end])
    rows[begin:, : sizes.rank], rows[begin:, sizes.rank :] = latent, key
    rows = rows.to(prompt.dtype)
    mixed = []
    for place, query, out in zip(places, every, prompt._products(layer, steps.ABSORB, every)):
        sums = [query.new_zeros(len(query), 0)]
        for head in range(int(place[steps.HEADS])):
            plain = out[:, head * sizes.padded :][:, : sizes.rank]
            turned = query[:, head * (sizes.nope + sizes.rope) :][:, sizes.nope : sizes.nope + sizes.rope]
            scores = torch.cat((plain, turned), 1) @ rows.t() * float(plan.scaling)
            weights = scores.float().masked_fill_(~visible, -torch.inf).softmax(-1).to(prompt.dtype)
            sums.append(weights @ rows[:, : sizes.rank])
        mixed.append(torch.cat(sums, 1))
    found = []
    for place, out in zip(places, prompt._products(layer, steps.EXPAND, mixed)):
        own = range(int(place[steps.HEADS]))
        pieces = [out[:, head * sizes.spread :][:, : sizes.value] for head in own]
        found.append(torch.cat(pieces, 1) if pieces else out[:, :0])
    return found


def _attend_expanded(
    work: Any,
    sizes: LatentPlan,
    layer: int,
    place: np.ndarray,
    query: Tensor,
    out: Tensor,
    key: Tensor,
    begin: int,
    visible: Tensor,
    scaling: float,
) -> Tensor:
    """One thread's heads, over keys and values that are cached as they are."""
    heads, first, end = int(place[steps.HEADS]), int(place[steps.FIRST_HEAD]), visible.shape[1]
    if not heads:
        return query.new_zeros(len(query), 0)
    new = out[:, : heads * (sizes.nope + sizes.value)].unflatten(1, (heads, -1)).transpose(0, 1).float()
    keys, values = (
        torch.from_numpy(each[layer, first : first + heads, :end]) for each in (work.latent_keys, work.latent_values)
    )
    keys[:, begin:, : sizes.nope], keys[:, begin:, sizes.nope :] = new[..., : sizes.nope], key
    values[:, begin:] = new[..., sizes.nope :]
    asked = query.unflatten(1, (heads, -1)).transpose(0, 1)
    scores = (asked @ keys.to(asked.dtype).transpose(1, 2)).float() * scaling
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1).to(asked.dtype)
    return (weights @ values.to(asked.dtype)).transpose(0, 1).flatten(1)
