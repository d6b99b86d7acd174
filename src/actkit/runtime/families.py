"""The families that the decoder takes: how their blocks are put together, read off their rows and configurations.

A row (`core/model/architectures.py`) says where the norms stand, what query and key turn by and what is clamped. What
no row says, as it concerns decoding alone, is here: multipliers, and whether the family has windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.architectures import Architecture, AttentionRow, MlpRow, find_architecture
from actkit.core.model.parts import Block
from actkit.core.model.sites import each_once
from actkit.core.model.wrapping import outside
from actkit.kernels import decode_step as steps


@dataclass(frozen=True)
class Family:
    """What a family needs for decoding that its row does not say.

    Attributes:
        windows: the blocks that `sliding_window` counts for: none, all, or those that `layer_types` names.
        embedding: entry of the configuration that multiplies embeddings.
        residual: entry that multiplies what is added to the residual stream.
        logits: entry that multiplies logits.
        over: entry that divides logits.
    """

    windows: Literal["none", "all", "named"] = "none"
    embedding: str | None = None
    residual: str | None = None
    logits: str | None = None
    over: str | None = None


FAMILIES = {
    **dict.fromkeys(("llama", "ernie4_5", "glm4", "nemotron", "olmo", "phi", "stablelm"), Family()),
    **dict.fromkeys(("mistral", "starcoder2", "phi3"), Family(windows="all")),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "exaone4"), Family(windows="named")),
    "cohere": Family(logits="logit_scale"),
    "cohere2": Family(windows="named", logits="logit_scale"),
    "granite": Family(embedding="embedding_multiplier", residual="residual_multiplier", over="logits_scaling"),
}
CENTERED = ("LayerNorm", "CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm", "NemotronLayerNorm1P")


@dataclass(frozen=True)
class Form:
    """How the blocks of a model are put together.

    Attributes:
        family: what the row does not say.
        rows: of each block.
        before: of each block, the paths of the norms before attention and MLP; None without one.
        behind: of each block, the paths of the norms behind attention and MLP; None without one.
        last: path of the last norm.
        offset: added to the norms' weights.
        parallel: whether the MLP reads what attention reads.
        turns: of each block, how query and key turn (`steps.UNTURNED` and its kin).
        limit: to which query, key and value are clamped; 0 for not at all.
    """

    family: Family
    rows: tuple[Architecture, ...]
    before: tuple[tuple[str | None, str | None], ...]
    behind: tuple[tuple[str | None, str | None], ...]
    last: str
    offset: float
    parallel: bool
    turns: tuple[int, ...]
    limit: float

    def factor(self, config: Any, name: str) -> float:
        """Return a multiplier of the family, 1 if it has none."""
        entry = getattr(self.family, name)
        return 1.0 if entry is None else float(getattr(config, entry))

    def windowed(self, config: Any, index: int) -> int:
        """How many tokens a block's queries see, 0 for all."""
        slides = self.family.windows == "all"
        if self.family.windows == "named":
            slides = config.layer_types[index] == "sliding_attention"
        return (config.sliding_window or 0) if slides else 0

    def table(self, both: Tensor) -> Tensor:
        """Rotary tables [2, tokens, n] with the angles of the first half of the pairs, then the same again."""
        row = self.rows[0].attention
        assert isinstance(row, AttentionRow)
        once = each_once(both, row.angles)
        return torch.cat((once, once), -1)


def model_type(model: nn.Module) -> str:
    """Of the model, or of the one that actkit changed."""
    return str(getattr(getattr(model, "config", None), "model_type", "")).removeprefix("actkit_")


def form_of(model: nn.Module, blocks: Sequence[Block]) -> Form:
    """Read how blocks are put together. Raises UnsupportedModelError if they are put together in another way."""
    config: Any = model.config
    row = find_architecture(model_type(model))
    assert row is not None
    rows = tuple(row.of_block(config, block.index) for block in blocks)
    before: list[tuple[str | None, str | None]] = []
    behind: list[tuple[str | None, str | None]] = []
    turns = []
    for own, block in zip(rows, blocks):
        attention, mlp = own.attention, own.mlp
        assert isinstance(attention, AttentionRow) and isinstance(mlp, MlpRow)
        found = {role: outside(model, f"{block.path}.{norm.path}") for norm in own.norms for role in _roles(norm.role)}
        before.append((found.get("attention"), found.get("mlp")))
        added = (attention.added, mlp.added)
        paths = (None if path is None else outside(model, f"{block.path}.{path}") for path in added)
        behind.append(tuple(paths))  # type: ignore[arg-type]
        turned = steps.HALVES if attention.pairs == "halves" else steps.NEIGHBOURS
        turns.append(turned if attention.rotary else steps.UNTURNED)
    first: Any = rows[0]
    form = Form(
        FAMILIES[model_type(model)],
        rows,
        tuple(before),
        tuple(behind),
        f"{model.base_model_prefix}.{row.head[0]}",
        first.norms[0].offset,
        any(norm.role == "both" for norm in first.norms),
        tuple(turns),
        first.attention.limit or 0.0,
    )
    _check(model, form, blocks)
    return form


def _roles(role: str) -> tuple[str, ...]:
    return ("attention", "mlp") if role == "both" else (role,)


def norms_of(form: Form) -> list[str]:
    """The paths of all norms but those of heads."""
    return [path for pair in (*form.before, *form.behind) for path in pair if path is not None] + [form.last]


def is_centered(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean."""
    return not type(norm).__name__.endswith("RMSNorm")


def epsilon_of(norm: Any) -> float:
    """What a norm adds to the variance."""
    if type(norm).__name__ == "OlmoLayerNorm":
        return 1e-5
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def head_norms_of(form: Form, blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Return, of each block, the paths of the norms of query and key; empty if there are none."""
    found = []
    for row, block in zip(form.rows, blocks):
        assert isinstance(row.attention, AttentionRow)
        if row.attention.query_norm is not None:
            query, key = (f"{block.path}.{path}" for path in (row.attention.query_norm, row.attention.key_norm))
            found.append((outside(block.root, query), outside(block.root, key)))
    return found


def _check_windows(config: Any, family: Family) -> None:
    """Refuse a class that does not apply the windows of its configuration: its forward pass and its cache disagree."""
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if family.windows == "none" and (window or "sliding_attention" in kinds):
        raise UnsupportedModelError("its configuration has a sliding_window, which its class does not apply")
    if family.windows == "all" and window and kinds - {"sliding_attention"}:
        raise UnsupportedModelError("its configuration has layer_types, which its class does not tell apart")


def _check(model: nn.Module, form: Form, blocks: Sequence[Block]) -> None:
    _check_windows(model.config, form.family)
    heads = [path for pair in head_norms_of(form, blocks) for path in pair]
    for path in (*norms_of(form), *heads):
        norm = get_module(model, path)
        kind = type(norm).__name__
        if not kind.endswith("RMSNorm") and kind not in CENTERED:
            raise UnsupportedModelError(f"{path} is a {kind}, whose forward pass no decoder calls")
        if path in heads and is_centered(norm):
            raise UnsupportedModelError(
                f"{path} is a {kind}; the decoder norms query and key by their root mean square"
            )
    modules = [get_module(model, path) for path in (*norms_of(form), *heads)]
    if len({is_centered(get_module(model, path)) for path in norms_of(form)}) > 1:
        raise UnsupportedModelError("some of its norms subtract the mean and some do not")
    if len({epsilon_of(module) for module in modules}) > 1:
        raise UnsupportedModelError("its norms add different numbers to the variance")
    spark = [
        block.path
        for block in blocks
        if block.attention is not None and getattr(block.attention.module, "decodes_as", None) == "spark_attention"
    ]
    if spark and set(form.turns) != {steps.HALVES}:
        raise UnsupportedModelError(f"{spark[0]}: Spark's attention turns halves of a head in every layer")
