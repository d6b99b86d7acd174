"""A mixture of experts in a folder of transformers' own: its experts one by one, and the model without them.

    source = ExpertSource(folder)
    source.expert(3, 7)                     # gate, up and down of expert 7 in block 3
    model = source.model_without_experts()  # all else, in memory; an `AbsentExperts` in each place

The model never has to fit into memory. Which tensor of the files is which parameter, transformers' own table of
conversions says: an expert may have tensors of its own, or be a part of one tensor of all experts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import set_module
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.model.expert_places import expert_places, expert_shape
from actkit.core.store.quantized_source import quantization_of
from actkit.core.store.tensor_source import TensorSource
from actkit.core.store.transformers_folder import class_of, kinds_of, refuse_adapter, stored_dtype, weight_files

PARTS = ("gate", "up", "down")
NUMBER = re.compile(r"\.experts\.(\d+)\.")
ROUTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a model may be loaded in


class AbsentExperts(nn.Module):
    """Stands where experts were left out, and says so if it is called.

    Args:
        activation: of the experts that belong here.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act_fn = activation

    def forward(self, *arguments: Any) -> Tensor:
        """Refuse: there is nothing to compute with."""
        raise UnsupportedModelError(
            "model: it was loaded without its experts; open it with OffloadedMoE and a store, or load the whole model."
        )


class ExpertSource:
    """The experts of a folder, and what is beside them.

    Args:
        folder: a local one, of a model whose family has plain gated experts.

    Attributes:
        shape: sizes.
        places: where the experts stand in the model.
        dtype: that most bytes of the folder have.
        model_type: of the config.

    Raises:
        UnsupportedModelError: the model has no experts, or they are not plain gated ones.
        CheckpointError: the folder is no plain checkpoint of transformers, or tensors are missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _config_of(self.folder)
        self.model_type: str = self.config.model_type
        files = weight_files(self.folder)
        self._source = TensorSource(files)
        kinds = kinds_of(files)
        self.dtype = stored_dtype(kinds, self.folder)
        self._class = class_of(self.config, self.folder, list(kinds), False)
        with torch.device("meta"):
            skeleton = self._class(self.config)
        self.places, self.shape = expert_places(skeleton), expert_shape(skeleton)
        self._experts, self._rest = self._sorted(skeleton)

    def _sorted(self, skeleton: Any) -> tuple[dict[tuple[int, int, str], tuple[str, int | None]], dict[str, str]]:
        """(block, expert, part) -> a tensor, and the index in it; for all else the name in the model -> a tensor."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        conversions = get_model_conversion_mapping(skeleton)
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        order = {pattern: i for each in converters for i, pattern in enumerate(each.source_patterns)}
        expected, prefix = skeleton.state_dict(), skeleton.base_model_prefix
        experts: dict[tuple[int, int, str], tuple[str, int | None]] = {}
        rest: dict[str, str] = {}
        for name in self._source.tensors:
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            place = next((each for each in self.places if renamed.startswith(f"{each.path}.")), None)
            number, leaf = NUMBER.search(name), renamed.rpartition(".")[2]
            if place is None:
                if pattern is not None:
                    raise UnsupportedModelError(
                        f"{self.folder}: transformers converts {name} as it loads, and it is no expert; the experts "
                        f"of this {self.model_type} cannot be stored."
                    )
                rest[renamed] = name
            elif pattern is not None and number is not None:
                part = PARTS[order[pattern]] if leaf == place.row.gate_up else "down"
                experts[place.layer, int(number[1]), part] = name, None
            else:
                parts = ("gate", "up") if leaf == place.row.gate_up else ("down",)
                experts |= {(place.layer, e, part): (name, e) for e in range(self.shape.experts) for part in parts}
        wanted = ((b, e, part) for b in self.shape.layers for e in range(self.shape.experts) for part in PARTS)
        lacking = [key for key in wanted if key not in experts]
        if lacking:
            block, expert, part = lacking[0]
            raise CheckpointError(
                f"{self.folder}: {part} of expert {expert} in block {block} is missing ({len(lacking)} matrices in "
                f"all); copy or download the folder again."
            )
        return experts, rest

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Read the matrices of one expert.

        Args:
            layer: index of its block.
            expert: its index there.

        Returns:
            'gate' and 'up' [intermediate, hidden] and 'down' [hidden, intermediate], as stored.

        Raises:
            CheckpointError: they are not readable, or of other shapes.
        """
        whole: dict[str, Tensor] = {}  # what holds gate and up is read once
        found = {}
        sizes = (self.shape.intermediate, self.shape.hidden)
        for part in PARTS:
            name, index = self._experts[layer, expert, part]
            if name not in whole:
                whole[name] = self._source.read(name, index)
            matrix = whole[name]
            if index is not None and part != "down":
                matrix = matrix.chunk(2)[part == "up"]
            if tuple(matrix.shape) != (sizes[::-1] if part == "down" else sizes):
                raise CheckpointError(
                    f"{self.folder}: {part} in {name} has the shape {list(matrix.shape)}, by the config it is "
                    f"{list(sizes[::-1] if part == 'down' else sizes)}; copy or download the folder again."
                )
            found[part] = matrix.contiguous()
        return found

    def routers(self) -> dict[str, str]:
        """Hash the routers' weights, as `router_digests` does: what tells one model from another."""
        prefixes = tuple(f"{place.router}." for place in self.places)
        names = sorted(name for name in self._rest if name.startswith(prefixes))
        return router_digests((name, self._source.read(self._rest[name])) for name in names)

    def model_without_experts(self, dtype: torch.dtype | None = None) -> Any:
        """Load all but the experts.

        Args:
            dtype: of the parameters; None for that of the folder.

        Returns:
            The model in evaluation mode, an `AbsentExperts` in each place.

        Raises:
            CheckpointError: a tensor is missing, or belongs to no parameter.
        """
        import transformers
        from accelerate import init_empty_weights

        dtype = dtype or self.dtype
        with init_empty_weights(include_buffers=False):  # buffers that no file holds are computed
            model = self._class(self.config)
        for place in self.places:
            set_module(model, place.path, AbsentExperts(place.activation(model)))
        info = model.load_state_dict(dict(self._cast(dtype)), strict=False, assign=True)
        missing = sorted(set(info.missing_keys) - set(model.all_tied_weights_keys))
        if missing or info.unexpected_keys:
            raise CheckpointError(
                f"{self.folder}: the weights do not fit {type(model).__name__}; missing: "
                f"{', '.join(missing[:8]) or 'none'}; unexpected: {', '.join(info.unexpected_keys[:8]) or 'none'}."
            )
        model.tie_weights()
        model.config.dtype = dtype
        if model.can_generate() and (self.folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(self.folder)
        return model.requires_grad_(False).eval()

    def _cast(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """All but the experts, by their names in the model; what transformers keeps in float32 stays so."""
        wide = set(getattr(self._class, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            wide |= set(getattr(self._class, "_keep_in_fp32_modules", None) or ())
        for name, source in self._rest.items():
            tensor = self._source.read(source)
            if tensor.is_floating_point():
                kept = dtype.itemsize == 2 and not wide.isdisjoint(name.split("."))
                tensor = tensor.to(torch.float32 if kept else dtype)
            yield name, tensor


def router_digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hash routers in each dtype that a model may be loaded in.

    Args:
        weights: (name, tensor) pairs, in the order of their names.

    Returns:
        dtype -> 64 hex digits.
    """
    found = {dtype: hashlib.sha256() for dtype in ROUTER_DTYPES}
    for name, tensor in weights:
        for dtype, digest in found.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in found.items()}


def _config_of(folder: Path) -> Any:
    """The config of a plain folder; others are refused."""
    import transformers

    if (folder / "actkit.json").exists():
        raise CheckpointError(
            f"{folder}: actkit saved it, with layers of its own; give the folder of the original model, and the widths "
            f"of its experts as bits=."
        )
    refuse_adapter(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: not readable ({error}); give the folder of a model."
        ) from error
    if quantization_of(config.to_dict()) is not None:
        raise CheckpointError(
            f"{folder}: its weights are quantized (quantization_config in config.json), and experts are rounded from "
            f"the original ones; give the folder of the original model."
        )
    return config
