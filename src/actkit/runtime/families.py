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
        cap: entry at which tanh caps scores.
        capped: entry at which tanh caps logits.
        beside: entry that says whether attention and MLP stand side by side, each behind a norm of its own.
        tables: whether layers of each type have a rotary table of their own.
    """

    windows: Literal["none", "all", "named"] = "none"
    embedding: str | None = None
    residual: str | None = None
    logits: str | None = None
    over: str | None = None
    cap: str | None = None
    capped: str | None = None
    beside: str | None = None
    tables: bool = False


FAMILIES = {
    **dict.fromkeys(("llama", "ernie4_5", "gemma", "glm4", "nemotron", "olmo", "olmo2", "opt"), Family()),
    **dict.fromkeys(("phi", "stablelm"), Family()),
    **dict.fromkeys(("plm", "deepseek_v3"), Family()),
    **dict.fromkeys(("mistral", "starcoder2", "phi3"), Family(windows="all")),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "exaone4"), Family(windows="named")),
    "cohere": Family(logits="logit_scale"),
    "cohere2": Family(windows="named", logits="logit_scale"),
    "gemma2": Family(windows="named", cap="attn_logit_softcapping", capped="final_logit_softcapping"),
    "gemma3_text": Family(windows="named", capped="final_logit_softcapping", tables=True),
    "gpt_neox": Family(beside="use_parallel_residual"),
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
        beside: whether the MLP stands beside attention (`steps.ONE_BY_ONE` and its kin).
        turns: of each block, how query and key turn (`steps.UNTURNED` and its kin).
        limit: to which query, key and value are clamped; 0 for not at all.
        kinds: the types of layers that have rotary tables of their own; () if there is one table for all.
        tables: of each block, which one.
    """

    family: Family
    rows: tuple[Architecture, ...]
    before: tuple[tuple[str | None, str | None], ...]
    behind: tuple[tuple[str | None, str | None], ...]
    last: str
    offset: float
    beside: int
    turns: tuple[int, ...]
    limit: float
    kinds: tuple[str, ...] = ()
    tables: tuple[int, ...] = ()

    def factor(self, config: Any, name: str) -> float:
        """Return a multiplier of the family, 1 if it has none."""
        entry = getattr(self.family, name)
        return 1.0 if entry is None else float(getattr(config, entry))

    def bound(self, config: Any, name: str) -> float:
        """Return at what tanh caps something, 0 for not at all."""
        entry = getattr(self.family, name)
        return float((getattr(config, entry) if entry is not None else None) or 0.0)

    def windowed(self, config: Any, index: int) -> int:
        """How many tokens a block's queries see, 0 for all."""
        slides = self.family.windows == "all"
        if self.family.windows == "named":
            slides = config.layer_types[index] == "sliding_attention"
        return (config.sliding_window or 0) if slides else 0

    def table(self, both: Tensor) -> Tensor:
        """Rotary tables [2, tokens, n] with the angles of the first half of the pairs, then the same again."""
        row = self.rows[0].attention
        once = each_once(both, row.angles if isinstance(row, AttentionRow) else "halves")
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
        assert isinstance(mlp, MlpRow)
        found = {role: outside(model, f"{block.path}.{norm.path}") for norm in own.norms for role in _roles(norm.role)}
        before.append((found.get("attention"), found.get("mlp")))
        norms = {norm.path for norm in own.norms}  # of a part without a module its last layer may be named instead
        added = (path if path in norms else None for path in (getattr(attention, "added", None), mlp.added))
        paths = (None if path is None else outside(model, f"{block.path}.{path}") for path in added)
        behind.append(tuple(paths))  # type: ignore[arg-type]
        turned = steps.HALVES if getattr(attention, "pairs", "halves") == "halves" else steps.NEIGHBOURS
        turns.append(turned if getattr(attention, "rotary", True) else steps.UNTURNED)  # latent attention says its own
    first: Any = rows[0]
    family = FAMILIES[model_type(model)]
    beside = steps.ONE_NORM if any(norm.role == "both" for norm in first.norms) else steps.ONE_BY_ONE
    if family.beside is not None and getattr(config, family.beside):
        beside = steps.TWO_NORMS
    kinds = tuple(sorted(set(config.layer_types))) if family.tables else ()
    form = Form(
        family,
        rows,
        tuple(before),
        tuple(behind),
        f"{model.base_model_prefix}.{row.head[0]}",
        first.norms[0].offset,
        beside,
        tuple(turns),
        getattr(first.attention, "limit", None) or 0.0,
        kinds,
        tuple(kinds.index(config.layer_types[block.index]) if kinds else 0 for block in blocks),
    )
    _check(model, form, blocks)
    return form


def _roles(role: str) -> tuple[str, ...]:
    return ("attention", "mlp") if role == "both" else (role,)


def norms_of(form: Form) -> list[str]:
    """The paths of all norms but those of heads and those in attention."""
    return [path for pair in (*form.before, *form.behind) for path in pair if path is not None] + [form.last]


def inner_norms_of(model: nn.Module, form: Form, blocks: Sequence[Block]) -> list[str]:
    """The paths of the norms of latent attention."""
    return [
        outside(model, f"{block.path}.{norm.path}")
        for row, block in zip(form.rows, blocks)
        for norm in row.norms
        if norm.role == "other" and not isinstance(row.attention, AttentionRow) and not norm.feeds_residual
    ]


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
        if isinstance(row.attention, AttentionRow) and row.attention.query_norm is not None:
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


def _check_ends(model: Any, form: Form) -> None:
    """Refuse what some models of a family have before, between or behind their blocks."""
    config = model.config
    feeding = {norm.path for row in form.rows for norm in row.norms if norm.feeds_residual}
    added = {path for row in form.rows for path in (getattr(row.attention, "added", None), row.mlp.added)}  # type: ignore[union-attr]
    if feeding - added:
        raise UnsupportedModelError("its norms stand behind the residual sum, which the decoder does not compute")
    for path in ("decoder.project_in", "decoder.project_out"):
        if _there(model, path):
            raise UnsupportedModelError(f"its {path.split('.')[1]} stands between embedding and blocks")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError("its tokens see those behind them (use_bidirectional_attention)")
    if form.kinds and any((config.rope_parameters[kind] or {}).get("rope_type") == "longrope" for kind in form.kinds):
        raise UnsupportedModelError("some of its layers change their rotary frequencies with the length (longrope)")


def _there(model: Any, path: str) -> bool:
    """Whether the base model has a module at a path, that may be None."""
    module = model.get_submodule(model.base_model_prefix)
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _check(model: nn.Module, form: Form, blocks: Sequence[Block]) -> None:
    _check_windows(model.config, form.family)
    _check_ends(model, form)
    if not _there(model, form.last.removeprefix(f"{model.base_model_prefix}.")):
        raise UnsupportedModelError("there is no norm behind its last block")
    heads = [path for pair in head_norms_of(form, blocks) for path in pair] + inner_norms_of(model, form, blocks)
    for path in (*norms_of(form), *heads):
        norm = get_module(model, path)
        kind = type(norm).__name__
        if not kind.endswith("RMSNorm") and kind not in CENTERED:
            raise UnsupportedModelError(f"{path} is a {kind}, whose forward pass no decoder calls")
        if path in heads and is_centered(norm):
            raise UnsupportedModelError(f"{path} is a {kind}; the decoder norms in attention by the root mean square")
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
