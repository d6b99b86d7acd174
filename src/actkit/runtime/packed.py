"""Packed checkpoints: a decoder's weights as they lie in memory, in a file that is mapped.

    write_packed(decoder, "smaller-packed")
    model = open_packed("smaller-packed")            reads a header; maps the weights
    decoder = Decoder(model, capacity=512)           at once: there is nothing to pack

`packed.bin` holds the packed matrices of all threads, the embedding and the tables (`core.store.mapped_arrays`);
`packed.json` says what lies where, what the matrices are, and for which layout and how many threads they were packed.
Processes that decode from one file share its pages; what each has of its own are the cache and the libraries. Addresses
are not stored: the table of products is filled in when the file is mapped.

Cost: a packed folder is of one number of threads, and of this layout. Mapped pages are small ones, of 4 KB; the decoder
that packs for itself asks for large ones (`kernels.packing.allocate`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError, MemoryLimitError, UnsupportedModelError
from actkit.core.ground.machine import versions
from actkit.core.ground.memory import format_bytes
from actkit.core.layers.selections import Selection
from actkit.core.store import checksums
from actkit.core.store.mapped_arrays import ADVICE, HEADER, Mapped, Writer
from actkit.core.store.plain_tokenizer import PlainTokenizer, describes
from actkit.kernels import decode_products as forms
from actkit.kernels import decode_step as steps
from actkit.kernels.numba_cpu import array
from actkit.kernels.output_rows import BundledUnits, PackedRows
from actkit.kernels.packing import HALF, PackedWeight
from actkit.kernels.process import most_threads
from actkit.kernels.quantized import BLOCK, LANES, Layout, QuantizedWeight
from actkit.kernels.quantized_rows import QuantizedRows, RowLayout
from actkit.runtime import tables
from actkit.runtime.prompt import few_tokens
from actkit.runtime.shards import Kind, NoMatrix

SCHEMA = 1
WEIGHTS = "packed.bin"
FORMS: dict[str, Any] = {
    each.__name__: each for each in (PackedWeight, PackedRows, QuantizedRows, BundledUnits, QuantizedWeight, NoMatrix)
}
LAYOUTS: dict[str, Any] = {"QuantizedWeight": Layout, "QuantizedRows": RowLayout}
# Fields of a product that are addresses of this process.
ADDRESSES = [forms.FUNCTION, forms.ADDRESS, forms.SCALES, forms.ZEROS, forms.BIAS, forms.SCORE]
MADE_HERE = ("products", "thresholds", "rotary")  # fields of a plan that are not stored as they are


def layout_here() -> dict[str, Any]:
    """Return what the bytes of packed weights depend on, besides the number of threads."""
    plan = [*steps.StepPlan._fields, forms.FIELDS, steps.LAYER_FIELDS]
    return {"byte order": sys.byteorder, "columns": [BLOCK, LANES, HALF], "plan": plan}


class PackedModel(nn.Module):
    """What stands for the model of a packed folder: it has a config, and only a decoder runs it.

    Attributes:
        config: the entries of config.json.
        generation_config: those of generation_config.json, or None.
        header: of the folder.
        arrays: of the folder.
    """

    decodes_as: ClassVar[str] = "packed"

    def __init__(self, folder: Path, header: dict[str, Any], arrays: Mapped) -> None:
        super().__init__()
        self.folder, self.header, self.arrays = folder, header, arrays
        self.config = SimpleNamespace(**header["config"])
        self.generation_config = None if header["generation"] is None else SimpleNamespace(**header["generation"])

    def can_generate(self) -> bool:
        """Whether it writes text: it does."""
        return True

    def get_input_embeddings(self) -> Any:
        """Say how many tokens are embedded."""
        return SimpleNamespace(num_embeddings=self.header["vocabulary_in"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Refuse: a packed model has no forward pass."""
        raise UnsupportedModelError(
            f"model: {self.folder} is packed for the decoder, which runs it token by token; load the model that it was "
            f"made of."
        )


@dataclass(frozen=True)
class StoredProduct:
    """What is known of a product whose layers are gone, by the names of `blocks.Product`.

    Attributes:
        kind: how the matrix is stored.
        at: where its outputs begin.
        inputs: which it reads.
        all_inputs: of the whole product.
        inputs_at: where these begin in the stage's.
        apart: whether each output has its own row.
        select: what selects the inputs.
        added: the bias, or None.
    """

    kind: Kind
    at: int
    inputs: range
    all_inputs: int
    inputs_at: int
    apart: bool
    select: Selection | None
    added: Tensor | None

    def bias(self) -> Tensor | None:
        """float32 [outputs], or None."""
        return self.added


# -- writing -----------------------------------------------------------------------------------------------------------


def write_packed(decoder: Any, folder: Path, rotaries: list[np.ndarray], tokenizer: Any = None) -> None:
    """Write the header and the weights of a decoder to a folder.

    Args:
        decoder: a `runtime.decoder.Decoder`.
        folder: that exists, and holds the files of the tokenizer.
        rotaries: its rotary tables, for as many tokens as any decoder of the folder may hold.
        tokenizer: that was written there, or None.

    Raises:
        UnsupportedModelError: it holds weights of a form that no packed folder has.
    """
    matrices, plan = decoder._matrices, decoder._plan
    if len(plan.positions):
        raise UnsupportedModelError("model: its positions are learned, which no packed folder holds; generate from it.")
    selections: list[dict[str, Any]] = []
    with Writer(folder / WEIGHTS) as file:
        products: list[dict[str, Any] | None] = []
        for product, weight, bias in zip(matrices.products, matrices.weights, matrices.biases):
            if product is None:
                products.append(None)
                continue
            select = None
            if product.select is not None:
                described = _module(product.select, file) | {"in": product.all_inputs}
                select = len(selections)
                selections.append(described)
            products.append(
                {
                    "kind": {**asdict(product.kind), "dtype": _name(product.kind.dtype)},
                    "weight": _weight(weight, file),
                    "bias": None if bias is None else file.add(bias.numpy()),
                    "select": select,
                    "at": product.at,
                    "inputs": [product.inputs.start, product.inputs.stop],
                    "all_inputs": product.all_inputs,
                    "inputs_at": product.inputs_at,
                    "apart": product.apart,
                }
            )
        table = plan.products.copy()
        table[:, ADDRESSES] = 0
        values = {name: value for name, value in plan._asdict().items() if name not in MADE_HERE}
        header = {
            "schema": SCHEMA,
            "layout": layout_here(),
            "threads": decoder.threads,
            "config": _config(decoder.model),
            "generation": _generation(decoder.model),
            "vocabulary": decoder.vocabulary,
            "vocabulary_in": decoder.vocabulary_in,
            "heads": len(decoder._work.mixed) // plan.size,
            "key_value_heads": decoder._work.keys.shape[1],
            "cache": decoder.cache,
            "rounded": decoder.cache == "int8",
            "products": products,
            "selections": selections,
            "table": file.add(table),
            "plan": {name: _value(value, file) for name, value in values.items()},
            "rotaries": [file.add(each) for each in rotaries],
            "embedding": _embedding(decoder, file),
            "tokenizer": None if tokenizer is None else describes(tokenizer, folder),
            "versions": versions(),
        }
    header["file"] = file.facts
    (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor as an array of a kind that NumPy has."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(tensor: Tensor, file: Writer) -> dict[str, Any]:
    return {"tensor": _name(tensor.dtype), **file.add(_bytes_of(tensor))}


def _weight(weight: Any, file: Writer) -> dict[str, Any]:
    name = type(weight).__name__
    if name not in FORMS:
        raise UnsupportedModelError(f"model: it holds weights as {name}, which no packed folder has; generate from it.")
    found: dict[str, Any] = {"form": name}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if isinstance(value, Tensor):
            value = _tensor(value, file)
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _module(module: Any, file: Writer) -> dict[str, Any]:
    """A small module as a checkpoint describes it, with its tensors."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {"spec": module.spec(), "tensors": {name: _tensor(value, file) for name, value in tensors.items()}}


def _value(value: Any, file: Writer) -> dict[str, Any]:
    if isinstance(value, np.ndarray):
        return {"array": file.add(value)}
    return {"value": value.item(), "dtype": value.dtype.name} if isinstance(value, np.generic) else {"value": value}


def _embedding(decoder: Any, file: Writer) -> dict[str, Any]:
    table = decoder._table
    if isinstance(table, nn.Embedding) or not hasattr(table, "spec"):
        return {"table": _tensor(table.weight, file)}
    return {"module": registry.module_name(type(table)), **_module(table, file)}


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return _json({name: value for name, value in config.to_dict().items() if not name.startswith("_")})


def _generation(model: nn.Module) -> dict[str, Any] | None:
    found: Any = getattr(model, "generation_config", None)
    return None if found is None else _json(found.to_dict())


def _json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


# -- reading -----------------------------------------------------------------------------------------------------------


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (Path(folder) / HEADER).is_file()


def open_packed(folder: str | Path) -> PackedModel:
    """Open a packed folder: read its header, check its weights and map them.

    Args:
        folder: that `write_packed` wrote.

    Raises:
        CheckpointError: it is damaged, or packed for another layout or another version of actkit.
    """
    folder = Path(folder)
    path = folder / HEADER
    checksums.verify(folder, lambda name: name == HEADER, ADVICE)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        schema, layout, facts = header["schema"], header["layout"], header["file"]
        size, digests = facts["bytes"], facts["digests"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as the header of a packed model ({error}); {ADVICE}.") from error
    here = layout_here()
    if schema != SCHEMA or layout != here:
        wrong = ", ".join(name for name in here if not isinstance(layout, dict) or layout.get(name) != here[name])
        raise CheckpointError(
            f"{path}: it was packed for another layout ({wrong or f'schema {schema}'}), of another processor or "
            f"another version of actkit; export the model again, on this machine."
        )
    return PackedModel(folder, header, Mapped(folder / WEIGHTS, {"bytes": size, "digests": digests}))


def tokenizer_of(model: PackedModel, *, chat: bool = False, trust_remote_code: bool = False) -> Any | None:
    """Load the tokenizer of a packed folder; None if it holds none.

    Args:
        model: of the folder.
        chat: its chat template is needed, which transformers reads.
        trust_remote_code: run code that the folder brings.

    Raises:
        CheckpointError: a file is damaged.
    """
    checksums.verify(model.folder, lambda name: name != HEADER)
    if not chat and model.header["tokenizer"] is not None:
        return PlainTokenizer(model.folder, model.header["tokenizer"])
    from actkit.core.store.checkpoint import has_tokenizer, tokenizer_for

    if not has_tokenizer(model.folder):
        return None
    return tokenizer_for(model.folder, dict(model.header["config"]), trust_remote_code)


def check_threads(model: PackedModel, threads: int | None) -> None:
    """Refuse another number of threads than a folder was packed for.

    Args:
        model: of the folder.
        threads: that were asked for; None if nobody did.

    Raises:
        ValueError: they differ, or so many cannot run here.
    """
    packed_for, most = model.header["threads"], most_threads()
    if threads in (None, packed_for) and packed_for <= most:
        return
    instead = f"{most} can run here" if packed_for > most else f"{threads} were asked for"
    raise ValueError(
        f"threads: {model.folder} was packed for {packed_for} threads, and {instead}; export the model again with "
        f"--threads, or decode from the model it was made of."
    )


def restored(
    model: PackedModel, capacity: int | None, threads: int | None, activations: str | None, cache: str | None = None
) -> dict[str, Any]:
    """Return the attributes of the decoder of a packed folder.

    Args:
        model: of the folder.
        capacity: as a decoder takes it.
        threads: the same; None for those that it was packed for.
        activations: the same.
        cache: the same; None for that of the folder.

    Raises:
        ValueError: a setting is out of bounds.
        CheckpointError: the header does not describe its file.
        MemoryLimitError: the cache does not fit.
    """
    header = model.header
    packed_for, context = header["threads"], header["config"]["max_position_embeddings"]
    check_threads(model, threads)
    capacity = min(context, 4096) if capacity is None else capacity
    if not 1 <= capacity <= context:
        raise ValueError(f"capacity: {capacity} was given; give 1 to {context}, the model's context.")
    try:
        found = _restored(model, capacity, activations, cache)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{model.folder / HEADER}: it does not describe a packed model ({type(error).__name__}: {error}); {ADVICE}."
        ) from error
    return {"model": model, "capacity": capacity, "threads": packed_for, "position": 0, "_steps": 0, **found}


def _restored(model: PackedModel, capacity: int, activations: str | None, cache: str | None) -> dict[str, Any]:
    header, arrays = model.header, model.arrays
    read = _Reader(arrays)
    selections = [read.selection(each) for each in header["selections"]]
    products = [None if each is None else read.product(each, selections) for each in header["products"]]
    chosen = tables.choose_activations(activations, [product for product in products if product])
    weights: list[Any] = []
    table = arrays.array(header["table"]).copy()
    biases: list[Tensor | None] = []
    for number, (product, described) in enumerate(zip(products, header["products"])):
        if product is None:
            weights.append(PackedWeight(torch.empty(0, 0, 0), 0))
            biases.append(None)
            continue
        weights.append(read.weight(described["weight"]))
        row, bias = tables.row_of(weights[-1], product, chosen == "int16" and tables.takes_dots(product))
        table[number, ADDRESSES] = np.array(row, np.int64)[ADDRESSES]
        biases.append(bias)
    matrices = tables.Matrices(tuple(products), tuple(weights), tuple(biases), [])  # type: ignore[arg-type]
    values = {name: read.value(value) for name, value in header["plan"].items()}
    thresholds, chosen_inputs = tables.write_selections(matrices, table, values["layers"])
    rotaries = _rotaries([arrays.array(each) for each in header["rotaries"]], capacity)
    made: dict[str, Any] = {"products": table, "thresholds": thresholds, "rotary": rotaries[-1].copy()}
    plan = steps.StepPlan(**values, **made)
    look_up, embedding, by_row = read.embedding(header["embedding"])
    kept = cache or header["cache"]
    if kept not in tables.CACHES:
        raise ValueError(f"cache: {cache!r} was given; give {', '.join(tables.CACHES)}, or None.")
    if header["rounded"] and kept != "int8":
        raise ValueError(f"cache: {cache!r} was given, but the model rounds keys and values to 8 bits; give 'int8'.")
    _check_memory(plan, header, capacity, kept)
    work, memories = tables.memory(
        plan,
        header["threads"],
        header["heads"],
        header["key_value_heads"],
        capacity,
        header["vocabulary"],
        kept,
    )
    return {
        "cache": kept,
        "activations": chosen,
        "vocabulary": header["vocabulary"],
        "vocabulary_in": header["vocabulary_in"],
        "embedding": embedding,
        "few": few_tokens(plan, matrices, embedding.dtype, chosen != "float32"),
        "_table": look_up,
        "_by_row": by_row,
        "_embedding": array(embedding),
        "_matrices": matrices,
        "_selections": chosen_inputs,
        "_plan": plan,
        "_work": work,
        "_memories": memories,
        "_rotaries": rotaries,
        "_turned": rotaries[-1],
    }


def _check_memory(plan: steps.StepPlan, header: Mapping[str, Any], capacity: int, kept: str) -> None:
    """The weights need no memory of their own: their pages can be read again."""
    entries = 2 * len(plan.norms) * header["key_value_heads"] * capacity
    of_entry = {"float32": 4 * plan.size, "bfloat16": 2 * plan.size, "int8": plan.size + 4}[kept]
    cache, free = entries * of_entry, psutil.virtual_memory().available
    if cache > free:
        raise MemoryLimitError(
            f"capacity: a cache of {capacity} tokens ({format_bytes(cache)}) does not fit into the "
            f"{format_bytes(free)} that are free; give a smaller capacity."
        )


def _rotaries(whole: list[np.ndarray], capacity: int) -> list[np.ndarray]:
    """The tables that a decoder of this capacity has: up to the first that reaches its end."""
    found = []
    for each in whole:
        found.append(np.ascontiguousarray(each[:, :, :capacity]))
        if each.shape[2] >= capacity:
            break
    return found


class _Reader:
    """Makes of what a header describes what it was."""

    def __init__(self, arrays: Mapped) -> None:
        self.arrays = arrays

    def tensor(self, described: Mapping[str, Any]) -> Tensor:
        return torch.from_numpy(self.arrays.array(described)).view(getattr(torch, described["tensor"]))

    def value(self, described: Mapping[str, Any]) -> Any:
        if "array" in described:
            return self.arrays.array(described["array"]).copy()
        value = described["value"]
        return np.dtype(described["dtype"]).type(value) if "dtype" in described else value

    def weight(self, described: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in described.items() if name != "form"}
        for name, value in given.items():
            if isinstance(value, dict):
                given[name] = self.tensor(value)
            elif isinstance(value, list):
                given[name] = LAYOUTS[described["form"]](*value)
        return FORMS[described["form"]](**given)

    def module(self, made: Any, described: Mapping[str, Any]) -> Any:
        for name, value in described["tensors"].items():
            parent, _, leaf = name.rpartition(".")
            owner, tensor = made.get_submodule(parent), self.tensor(value)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor
        return made

    def selection(self, described: Mapping[str, Any]) -> Selection:
        return self.module(Selection.read(described["spec"], described["in"]), described)

    def product(self, described: Mapping[str, Any], selections: list[Selection]) -> StoredProduct:
        kind, bias, select = described["kind"], described["bias"], described["select"]
        dtype = None if kind["dtype"] is None else getattr(torch, kind["dtype"])
        return StoredProduct(
            Kind(**{**kind, "dtype": dtype}),
            described["at"],
            range(*described["inputs"]),
            described["all_inputs"],
            described["inputs_at"],
            described["apart"],
            None if select is None else selections[select],
            None if bias is None else torch.from_numpy(self.arrays.array(bias)),
        )

    def embedding(self, described: Mapping[str, Any]) -> tuple[Any, Tensor, bool]:
        if "table" in described:
            weight = self.tensor(described["table"])
            table: Any = SimpleNamespace(weight=weight, embedding_dim=weight.shape[1])
        else:
            made = registry.module_class(described["module"]).from_spec(described["spec"], None)
            table = self.module(made, described)
        return table, *tables.looked_up(table)
