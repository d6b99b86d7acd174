"""Reads one block of a model as its architecture's row describes it, with a tap for every site.

If a module stands at the attention or MLP of the row and computes in another way, its class says by an attribute
`linear_inputs` what its layers read: pairs of a site's name (None for `layer.input`) and the linear layers inside that
read this one tensor. Such a part is no Attention or Mlp, so that no method takes it for one; its layers are among
`Block.other`. A LayersRow says the same of a class of another library. An MLP of another class that computes as an
MlpRow describes says so by an attribute `row`, with paths inside of itself, and is an Mlp. A module that only wraps a
part of the row is entered (`wrapping.py`). A block whose hidden states carry more than channels says by
`hidden_columns` which columns of its input and output are these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from actkit.core.ground.errors import CoverageError
from actkit.core.model.architectures import Architecture, AttentionRow, ExpertsRow, LayersRow, MlpRow, Role
from actkit.core.model.experts import ExpertList
from actkit.core.model.fused_layers import PartRows, query_key_value_rows
from actkit.core.model.parts import Attention, Block, Experts, Linear, LinearInput, LinearRole, Mlp, Norm, is_linear
from actkit.core.model.sites import Site, Tap
from actkit.core.model.wrapping import inside, outside


class BlockReader:
    """Reads one block as its row describes it.

    Args:
        model: holds the block.
        row: of the model's family, adapted to this block.
        index: of the block.
        path: of the block.
    """

    def __init__(self, model: nn.Module, row: Architecture, index: int, path: str) -> None:
        self.model, self.row, self.index, self.path = model, row, index, path
        self.taps: dict[Site, Tap] = {}
        self.other: list[LinearInput] = []

    def read(self, originals: Mapping[str, nn.Module] | None) -> Block:
        """Return the block as the model holds it now.

        Args:
            originals: what `Block.original` answers, by full path.
        """
        row = self.row
        norms = tuple(
            Norm(self._full(norm.path), self._module(norm.path), norm.role, norm.offset, norm.feeds_residual)
            for norm in row.norms
        )
        feeding = {norm.role: norm for norm in norms}
        if "both" in feeding:
            feeding["attention"] = feeding["mlp"] = feeding["both"]
        if isinstance(row.attention, AttentionRow):
            known = {None, *(norm.path for norm in row.norms)}
            heads = [path for path in (row.attention.query_norm, row.attention.key_norm) if path not in known]
            norms += tuple(Norm(self._full(path), self._module(path)) for path in heads if path is not None)
        columns = getattr(submodule(self.model, self.path, row), "hidden_columns", (None, None))
        self._tap("block.input", self.path, "input", columns=columns[0])
        attention, mlp, experts = None, None, None
        if isinstance(row.attention, LayersRow):
            self._layers(row.attention, "attention")
            self._tap("attention.weights", self._inside(row.attention.path), "output", 1, layout="weights")
        elif row.attention is not None and not self._own(row.attention, "attention"):
            attention = self._attention(row.attention, feeding.get("attention"))
        if row.experts is not None and (row.mlp is None or self._has(row.experts.path)):
            experts = self._experts(row.experts, feeding.get("mlp"))
        elif isinstance(row.mlp, LayersRow):
            self._layers(row.mlp, "mlp")
        elif row.mlp is not None and not self._own(row.mlp, "mlp"):
            mlp = self._mlp(self._row_of(row.mlp), feeding.get("mlp"))
        if row.beside is not None:
            self._layers(row.beside)
        self._middle(feeding, mlp or experts)
        self._tap("block.output", self.path, "output", columns=columns[1])
        module = submodule(self.model, self.path, row)
        return Block(
            self.index,
            self.path,
            module,
            attention,
            mlp,
            experts,
            norms,
            tuple(self.other),
            root=self.model,
            taps=self.taps,
            _originals=originals,
        )

    def _middle(self, norms: Mapping[Role, Norm], second: Mlp | Experts | None) -> None:
        """The residual stream between attention and MLP, if one comes after the other."""
        parallel: Any = self.row.parallel
        if isinstance(parallel, str):
            parallel = getattr(self.model.config, parallel)
        if self.row.attention is None or second is None or "both" in norms or parallel:
            return
        norm = norms.get("mlp")
        if norm is not None and norm.feeds_residual:
            self._tap("block.middle", norm.path, "output")
        else:
            path = second.path if norm is None else norm.path
            layout = "flat" if isinstance(self.row.mlp, MlpRow) and self.row.mlp.flat else "tokens"
            self._tap("block.middle", path, "input", layout=layout, passing=self.path)

    def _full(self, path: str) -> str:
        """Where a module of the row stands; a wrapper that stands there itself is not entered."""
        return outside(self.model, f"{self.path}.{path}")

    def _inside(self, path: str) -> str:
        """As `_full`, and inside of the wrappers that stand there."""
        return inside(self.model, f"{self.path}.{path}")

    def _module(self, path: str) -> nn.Module:
        return submodule(self.model, self._full(path), self.row)

    def _part(self, path: str) -> nn.Module:
        """The attention, MLP or experts of the row, inside of their wrappers."""
        return submodule(self.model, self._inside(path), self.row)

    def _feeding(self, part: str, norm: Norm | None) -> Norm | None:
        """The norm in front of a part; None if the part is wrapped, as something else may come between the two."""
        return norm if self._inside(part) == self._full(part) else None

    def _has(self, path: str) -> bool:
        try:
            self.model.get_submodule(self._full(path))
        except AttributeError:
            return False
        return True

    def _linear(self, path: str, role: LinearRole, expert: int | None = None) -> Linear:
        return Linear(self._full(path), role, self._module(path), expert)

    def _optional(self, path: str | None, role: LinearRole) -> Linear | None:
        return None if path is None else self._linear(path, role)

    def _tap(
        self, name: str, path: str, where: Any, index: int | str = 0, *, of_expert: int | None = None, **settings: Any
    ) -> None:
        self.taps[Site(name, self.index, of_expert)] = Tap(path, where, index, **settings)

    def _input(self, name: str, linears: Sequence[Linear], **settings: Any) -> None:
        """What several linear layers read: it is watched at the first of them."""
        self._tap(name, linears[0].path, "input", shared=tuple(linear.path for linear in linears[1:]), **settings)

    def _own(self, row: AttentionRow | MlpRow, name: str) -> bool:
        """Whether a module stands here that says itself what its linear layers read; then reads those."""
        declared = getattr(self._part(row.path), "linear_inputs", None)
        if declared is None:
            return False
        for _, names in declared:
            for each in names:
                self._module(f"{row.path}.{each}")  # what a class declares of itself it has
        self._layers(LayersRow(row.path, tuple(declared)), name, row.added)
        return True

    def _row_of(self, row: MlpRow) -> MlpRow:
        """The row of the MLP that stands here, if its class says another one than the family has."""
        own = getattr(type(self._part(row.path)), "row", None)
        if not isinstance(own, MlpRow):
            return row
        paths = {name: getattr(own, name) for name in ("up", "gate", "gate_up", "down", "activation")}
        here: Any = {name: None if path is None else f"{row.path}.{path}" for name, path in paths.items()}
        return replace(row, **here)

    def _layers(self, row: LayersRow, name: str | None = None, added: str | None = None) -> None:
        """Read linear layers alone; name: of the part ('attention', 'mlp'), if its input and output are sites."""
        if name is not None:
            self._tap(f"{name}.input", self._inside(row.path), "input")
        for site_name, names in row.linear_inputs:
            paths = [f"{row.path}.{each}" for each in names if self._has(f"{row.path}.{each}")]
            if not paths:
                continue
            linears = tuple(self._linear(path, "layer") for path in paths)
            site = Site("layer.input", path=linears[0].path)
            if site_name is not None:
                site = Site(site_name, self.index)
                if site not in self.taps:
                    self._input(site_name, linears)
            self.other.append(LinearInput(site, linears))
        if name is not None:
            self._tap(f"{name}.output", self._full(added or row.path), "output")

    def _attention(self, row: AttentionRow, norm: Norm | None) -> Attention:
        config: Any = self.model.config
        heads = getattr(config, self.row.heads)
        shared: Any = self.row.key_value_heads
        key_value_heads = (getattr(config, shared, None) if isinstance(shared, str) else shared) or heads
        output = self._linear(row.output, "output")
        head_dim = output.in_features // heads
        fused, rows = self._optional(row.query_key_value, "query_key_value"), None
        if fused is not None and row.layout is not None:
            rows = query_key_value_rows(row.layout, heads, key_value_heads, head_dim)
            if is_linear(fused.module) and fused.out_features != sum(map(len, rows)):
                raise CoverageError(
                    f"{fused.path}: it has {fused.out_features} outputs, and the row {self.row.name!r} says that they "
                    f"are query, key and value of {heads} and {key_value_heads} heads of {head_dim} features each. "
                    f"Correct the row, or set layout=None if the layout is not known."
                )
        attention = Attention(
            self._inside(row.path),
            self._part(row.path),
            self._optional(row.query, "query"),
            self._optional(row.key, "key"),
            self._optional(row.value, "value"),
            fused,
            output,
            heads,
            key_value_heads,
            head_dim,
            self._feeding(row.path, norm),
            None if rows is None else rows[2],
            row.limit,
            None if rows is None else rows[0],
            None if rows is None else rows[1],
            row.pairs if row.rotary else None,
            row.query_norm is not None or row.key_norm is not None,
        )
        self._input("attention.input", attention.inputs)
        if row.readable and (fused is None or rows is not None):
            self._head_taps(row, attention, rows or (None, None, None))
        self._tap("attention.scores", attention.path, "inside", "scores", layout="weights")
        self._tap("attention.weights", attention.path, "output", 1, layout="weights")
        self._tap("attention.mixed", output.path, "input")
        self._tap("attention.output", self._full(row.added or row.path), "output")
        return attention

    def _head_taps(self, row: AttentionRow, attention: Attention, rows: tuple[PartRows | None, ...]) -> None:
        layers, norms = (attention.query, attention.key, attention.value), (row.query_norm, row.key_norm, None)
        for name, layer, norm, columns in zip(("query", "key", "value"), layers, norms, rows, strict=True):
            source = layer or attention.query_key_value
            assert source is not None
            settings: dict[str, Any] = {"heads": attention.heads if name == "query" else attention.key_value_heads}
            settings |= {"columns": columns if norm is None else None, "limit": row.limit}
            if row.rotary and name != "value":
                settings |= {"rotary": True, "angles": row.angles, "pairs": row.pairs, "attention": attention.path}
            if norm is not None:
                settings["heads_first"] = row.heads_first
            path = source.path if norm is None else self._full(norm)
            self._tap(f"attention.{name}", path, "output", layout="heads", **settings)

    def _mlp(self, row: MlpRow, norm: Norm | None) -> Mlp:
        gate, down, rows = self._optional(row.gate, "gate"), self._linear(row.down, "down"), None
        if row.gate_up is not None:
            up, rows = self._linear(row.gate_up, "gate_up"), PartRows(down.in_features, down.in_features)
        elif row.up is not None:
            up = self._linear(row.up, "up")
        else:
            raise CoverageError(f"MlpRow: the row {self.row.name!r} names neither up nor gate_up; give one of them.")
        self._module(row.activation)
        norm, activation = self._feeding(row.path, norm), self._full(row.activation)
        mlp = Mlp(self._inside(row.path), self._part(row.path), gate, up, down, activation, norm, rows)
        layout = "flat" if row.flat else "tokens"
        self._mlp_taps(mlp, self._full(row.added or row.path), row.overwritten, layout=layout)
        return mlp

    def _mlp_taps(self, mlp: Mlp, added: str, overwritten: bool = False, **settings: Any) -> None:
        self._input("mlp.input", mlp.inputs, **settings)
        self._tap("mlp.preactivation", mlp.activation, "input", **settings)
        if mlp.gated:
            self._tap("mlp.gate", mlp.activation, "output", **settings)
        self._tap("mlp.hidden", mlp.down.path, "input", **settings)
        self._tap("mlp.output", added, "output", copied=overwritten, **settings)

    def _experts(self, row: ExpertsRow, norm: Norm | None) -> Experts:
        module, path, router = self._part(row.path), self._inside(row.path), self._full(row.router)
        self._module(row.router)
        self._tap("mlp.input", self._inside(row.module), "input")
        self._tap("router.logits", router, "output", layout="flat")
        members: tuple[Mlp, ...] = ()
        if isinstance(module, ExpertList):
            members = tuple(self._expert(f"{row.path}.{e}", e) for e in range(len(module)))
            count = len(module)
        else:
            stacked = getattr(module, row.down, None)
            if stacked is None or stacked.dim() != 3:
                kind = type(module).__name__
                raise CoverageError(f"{path}: a {kind} without the 3-D parameter {row.down!r} stands here.")
            count = stacked.shape[0]
        self._tap("mlp.output", self._full(row.module), "output")
        return Experts(path, module, router, count, members, self._feeding(row.module, norm), row)

    def _expert(self, path: str, e: int) -> Mlp:
        gate, up, down = (self._linear(f"{path}.{role}", role, e) for role in ("gate", "up", "down"))
        mlp = Mlp(self._full(path), self._module(path), gate, up, down, self._full(f"{path}.activation"), None)
        self._mlp_taps(mlp, mlp.path, layout="flat", of_expert=e, expert=mlp.path)
        return mlp


def submodule(model: nn.Module, path: str, row: Architecture) -> nn.Module:
    """Return the module at a full path.

    Args:
        model: any module.
        path: as the row says.
        row: for the error.

    Raises:
        CoverageError: there is none, so that the model does not fit its row.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise CoverageError(
            f"{type(model).__name__}: the row {row.name!r} expects a module at {path!r}, and there is none. "
            f"Register a row that describes this model (register_architecture). A class of your own around a part "
            f"of the model says so: wraps = 'the attribute that holds the part'."
        ) from error
