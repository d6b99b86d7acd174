"""Sites: named places of activations, and taps: how each one is read off a module's call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from actkit.core.model.fused_layers import PartRows
from actkit.core.model.transformer_lens_names import our_name

SITE_NAMES = (
    "block.input",
    "block.middle",
    "block.output",
    "attention.input",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.scores",
    "attention.weights",
    "attention.mixed",
    "attention.output",
    "mlp.input",
    "mlp.preactivation",
    "mlp.gate",
    "mlp.hidden",
    "mlp.output",
    "router.logits",
    "layer.input",
    "layer.output",
    "activation.input",
    "activation.output",
)

_TEXT = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?:experts\.(?P<expert>\d+)\.)?(?P<name>[a-z]+\.[a-z]+)")


@dataclass(frozen=True)
class Site:
    """A named place of an activation.

    Attributes:
        name: one of SITE_NAMES.
        block: index of the block. None stands for every block, and is all that a site with a path may have.
        expert: index of the expert, for sites inside one.
        path: the module of a `layer` or an `activation` site; None stands for every one.

    Raises:
        ValueError: the name is unknown, or the parts do not go together.
    """

    name: str
    block: int | None = None
    expert: int | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if self.name not in SITE_NAMES:
            raise ValueError(f"site: {self.name!r} was given, allowed are {', '.join(SITE_NAMES)}.")
        if self.path is not None and not self.is_at_module:
            raise ValueError(f"site: {self.name} has no path; name its block, or use layer.input or layer.output.")
        if self.is_at_module and (self.block is not None or self.expert is not None):
            raise ValueError(f"site: {self.name} is named by its module path, not by a block or an expert.")

    @property
    def is_at_module(self) -> bool:
        """Whether the site is named by the path of a module."""
        return self.name.startswith(("layer.", "activation."))

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.name}:{self.path}"
        block = "" if self.block is None else f"blocks.{self.block}."
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"{block}{expert}{self.name}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read what `str(site)` wrote, or TransformerLens' name of a site (`core/model/transformer_lens_names.py`).

        Args:
            text: such as 'blocks.3.mlp.hidden', 'layer.input:a.b' or 'blocks.3.hook_resid_post'.

        Raises:
            ValueError: it is anything else.
        """
        name, colon, path = text.partition(":")
        if colon:
            return cls(name, path=path)
        text = our_name(text)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"site: {text!r} was given; write it like 'blocks.3.mlp.hidden' or 'layer.input:a.b'.")
        block, expert = match["block"], match["expert"]
        return cls(match["name"], None if block is None else int(block), None if expert is None else int(expert))


@dataclass(frozen=True)
class Joined:
    """Two sites whose rows a statistic reads together (`core/watch/joined.py`).

    Attributes:
        first: a site of one block.
        second: the same; its rows are those of the same tokens.
    """

    first: Site
    second: Site

    def __str__(self) -> str:
        return f"{self.first} with {self.second}"


Layout = Literal["tokens", "flat", "heads", "weights", "channels_first"]
Angles = Literal["halves", "neighbours", "once"]  # how rotary tables list them: 0 1 2 0 1 2, 0 0 1 1 2 2 or 0 1 2
Pairs = Literal["halves", "neighbours"]  # of n turned features: i and i + n / 2, or 2i and 2i + 1


@dataclass(frozen=True)
class Tap:
    """How a site is read: at which module's call, which of its tensors, and how that tensor is laid out.

    The layout of the result is one of

    - tokens: [batch, length, channels], or [batch, channels] if a layer reads one vector per sequence;
    - flat: [batch * length, channels];
    - heads: [batch, heads, length, head_dim];
    - weights: [batch, heads, query, key];
    - channels_first: [batch, channels, ...].

    Attributes:
        path: the module whose call is watched.
        where: at its input, at its output, or inside its attention function (`core/watch/inside_attention.py`).
        index: position or keyword of the argument, or position in an output tuple; inside, 'scores' or 'weights'.
        layout: of the result.
        heads: the last dimension is split into so many heads.
        columns: these of the last dimension (a fused qkv).
        heads_first: it is split already, and the heads stand before the positions.
        rotary: the rotary embedding still has to be applied; its (cos, sin) are the keyword `position_embeddings` of
            the
            module at `attention`.
        angles: how these tables are laid out.
        pairs: how the features that they turn are laid out.
        limit: both signs of the tensor are clamped to it.
        copied: it is copied, as the model changes it in place afterwards.
        attention: path of the module that is given the tables.
        expert: path of the expert around the tap; its second argument says which tokens (flat indices) the rows are.
        most: how many dimensions the tensor may have so that the layout holds.
        shared: paths of the other modules that are called with this tensor, which are all given what is put there.
        passing: path of a module around it whose output is the sum of this tensor, unseen, and of what is made of it.
    """

    path: str
    where: Literal["input", "output", "inside"]
    index: int | str = 0
    layout: Layout = "tokens"
    heads: int | None = None
    columns: PartRows | None = None
    heads_first: bool = False
    rotary: bool = False
    angles: Angles = "halves"
    pairs: Pairs = "halves"
    limit: float | None = None
    copied: bool = False
    attention: str | None = None
    expert: str | None = None
    most: int | None = None
    shared: tuple[str, ...] = ()
    passing: str | None = None


def read_tap(
    tap: Tap,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Read the tensor of a site off one call of the module at `tap.path`.

    Args:
        tap: of the site.
        args: of the call.
        kwargs: of the call.
        output: of the call, if the tap reads it.
        position_embeddings: (cos, sin), each [batch, length, features that are turned] (half as many if `tap.angles` is
            'once'); needed if `tap.rotary`.

    Returns:
        The tensor, in the tap's layout.

    Raises:
        ValueError: the call does not hold the tensor, or its layout is not known.
    """
    value = _argument(tap, args, kwargs) if tap.where == "input" else _output(tap, output)
    if not isinstance(value, Tensor):
        raise ValueError(f"{tap.path}: its {tap.where} {tap.index!r} is a {type(value).__name__}, not a tensor.")
    if tap.most is not None and value.dim() > tap.most:
        refuse_unknown_layout(tap.where, tap.path, value.dim())
    if tap.columns is not None:
        value = tap.columns.of(value)
    if tap.limit is not None:
        value = value.clamp(-tap.limit, tap.limit)
    if tap.copied:
        value = value.clone()
    if tap.heads is not None and not tap.heads_first:
        if value.dim() == 3:
            value = value.unflatten(-1, (tap.heads, -1))
        value = value.transpose(1, 2)
    if tap.rotary:
        if position_embeddings is None:
            raise ValueError(f"{tap.path}: give position_embeddings (cos, sin), as {tap.attention} received them.")
        cos, sin = (each_once(table, tap.angles) for table in position_embeddings)
        value = _rotate(value, cos, sin, tap.pairs)
    return value


def write_tap(
    tap: Tap,
    value: Tensor,
    before: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Put another tensor at a site, in one call of the module at `tap.path`: `read_tap` would read it then.

    What is equal to what was read leaves the model's own tensor as it was, to the bit.

    Args:
        tap: of the site.
        value: in the tap's layout.
        before: what was read there.
        args: as in `read_tap`.
        kwargs: as in `read_tap`.
        output: as in `read_tap`.
        position_embeddings: as in `read_tap`.

    Returns:
        The output, or (args, kwargs) if the tap reads an argument; nothing that was given is changed in place.
    """
    old = _argument(tap, args, kwargs) if tap.where == "input" else _output(tap, output)
    if tap.rotary:
        assert position_embeddings is not None  # it was read with them
        cos, sin = (each_once(table, tap.angles) for table in position_embeddings)
        length = cos.square() + sin.square()  # not 1 if the tables are scaled, as YaRN's
        value = _rotate(value - before, cos / length, -sin / length, tap.pairs)  # what is added: 0 stays 0
    if tap.heads is not None and not tap.heads_first:
        value = value.transpose(1, 2)
        flat = old.dim() == 3
        value = value.flatten(-2) if flat else value
    if tap.rotary:
        stood = old if tap.columns is None else tap.columns.of(old)
        stood = stood if tap.limit is None else stood.clamp(-tap.limit, tap.limit)
        value = value + stood.reshape(value.shape)
    if tap.columns is not None:
        value = tap.columns.replaced(old, value)
    value = _laid_out_as(old, value if value.shape == old.shape else value.reshape(old.shape))
    return _with_argument(tap, value, args, kwargs) if tap.where == "input" else _with_output(tap, value, output)


def _laid_out_as(old: Tensor, value: Tensor) -> Tensor:
    """The value with the strides of what stood there, as kernels round otherwise in another order."""
    if value.stride() == old.stride() or old.is_contiguous() or 0 in old.stride():
        return value
    return torch.empty_strided(old.shape, old.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _with_argument(
    tap: Tap, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(tap.index, str):
        return tuple(args), {**kwargs, tap.index: value}
    if tap.index < len(args):
        return (*args[: tap.index], value, *args[tap.index + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, "hidden_states": value}


def _with_output(tap: Tap, value: Tensor, output: Any) -> Any:
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # transformers' outputs are mappings that count their entries too
        key = list(output)[int(tap.index)]
        return type(output)(**{**output, key: value})
    parts = [value if place == tap.index else part for place, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def each_once(table: Tensor, angles: Angles) -> Tensor:
    """Return a rotary table with each angle once: [..., n / 2] of [..., n], or itself."""
    if angles == "once":
        return table
    return table[..., ::2] if angles == "neighbours" else table[..., : table.shape[-1] // 2]


def refuse_unknown_layout(where: str, path: str, dimensions: int) -> NoReturn:
    """Refuse a tensor of a module whose channels are in a dimension that is not known.

    Args:
        where: 'input' or 'output'.
        path: of the module.
        dimensions: how many the tensor has.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"site: the {where} of {path} is a tensor of {dimensions} dimensions, and which of them holds the channels is "
        f"not known, or changes from call to call; record a linear layer or a convolution beside it instead."
    )


def _argument(tap: Tap, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(tap.index, str):
        return kwargs.get(tap.index)
    if tap.index < len(args):
        return args[tap.index]
    return kwargs.get("hidden_states") if tap.index == 0 else None  # transformers' name of the first argument


def _output(tap: Tap, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output if tap.index == 0 else None
    return None if output is None else output[tap.index]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: Pairs) -> Tensor:
    """Turn the first n features of x [batch, heads, length, head_dim] by cos, sin [batch, length, n / 2]."""
    cos, sin, size = cos.unsqueeze(1), sin.unsqueeze(1), 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1) if pairs == "halves" else (turned[..., ::2], turned[..., 1::2])
    both = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat(both, dim=-1) if pairs == "halves" else torch.stack(both, dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)  # the tables may be wider than the model
