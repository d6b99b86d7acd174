"""What a changed model is to transformers without actkit: the class it came from, its layers, and nothing else.

Whatever plain transformers could not compute is refused here by name, so that a format only decides how a weight is
written. The skeleton is the plain model on the meta device: the list of modules that a reader will build.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actkit.core.edit import changes
from actkit.core.edit.edits import get_module
from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.forward.named_functions import unknown_function
from actkit.core.ground.errors import EditError, ExportError
from actkit.core.layers.activations import Activation, name_of
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.cache_rounding import CHILD, CacheRounding, RoundedAttention
from actkit.core.layers.conv import PLAIN_CONVOLUTIONS, ActConv
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.foreign_layers import refuse_foreign_layers
from actkit.core.layers.hidden_act import own_names
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.model.anatomy import anatomy
from actkit.core.model.architectures import find_architecture
from actkit.core.store.pretrained import base_type
from actkit.core.store.skeleton import plain_model


@dataclass(frozen=True)
class Plain:
    """A model that plain transformers can compute.

    Attributes:
        model: the changed model.
        skeleton: the plain model on the meta device, of the changed model's dtype and settings.
        layers: path -> ActLinear that neither selects inputs nor corrects outputs, its weight as others read it;
            whether it rounds its inputs is for the format to say or refuse.
        corrections: path -> what corrects the outputs of that layer, for the caller who asked for them apart.
        caches: path of an attention -> how it rounds its keys and values to fp8; all of them do, or none.
        transposed: paths at which the plain model has a Conv1D, whose weight is [in, out].
        convolutions: path -> ActConv, which every format writes dense.
        tables: path -> QuantizedEmbedding; GGUF has rows of blocks for it, compressed-tensors writes it dense.
    """

    model: PreTrainedModel
    skeleton: PreTrainedModel
    layers: dict[str, ActLinear]
    transposed: frozenset[str]
    tables: dict[str, QuantizedEmbedding]
    convolutions: dict[str, ActConv] = field(default_factory=dict)
    corrections: dict[str, LowRank] = field(default_factory=dict)
    caches: dict[str, CacheRounding] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *, corrections: bool = False) -> Plain:
        """Read a model.

        Args:
            model: a changed model.
            corrections: take low-rank corrections apart from their layers, for a caller who writes them; else they are
                refused.

        Returns:
            What plain transformers can compute.

        Raises:
            ExportError: plain transformers cannot compute something; the error names it.
            UnsupportedModelError: the model is compiled or sharded.
        """
        refuse_compiled_or_sharded(model)
        refuse_foreign_layers(model)
        if not isinstance(model, PreTrainedModel):
            raise ExportError(
                f"model: {type(model).__name__} is no transformers model, and these formats hold no other; "
                f"keep it with actkit.save."
            )
        caches = _static_caches(model)
        function = unknown_function(model, known=(RoundedAttention,) if caches else ())
        if function is not None:
            raise ExportError(f"model: no reader computes what this model does: {function}, then export.")
        for name in own_names(model.config.to_dict()):
            raise ExportError(
                f"model: its config names the activation function {name!r}, which no reader without actkit computes; "
                f"keep the model with actkit.save."
            )
        skeleton = _plain(model)
        _refuse_experts(model)
        layers: dict[str, ActLinear] = {}
        tables: dict[str, QuantizedEmbedding] = {}
        convolutions: dict[str, ActConv] = {}
        apart: dict[str, LowRank] = {}
        transposed = set()
        for path, plain in skeleton.named_modules():
            if not path or any(path.startswith(f"{done}.") for done in layers):
                continue
            try:
                module = get_module(model, path)
            except EditError:
                raise ExportError(f"{path}: the plain {_name(skeleton)} has it, this model does not.") from None
            if isinstance(module, ActLinear) and isinstance(plain, nn.Linear | Conv1D):
                _refuse_slots(path, module, model, corrections)
                written = module.storage.as_others_read()
                if module.correction is not None:
                    apart[path] = module.correction
                    layers[path] = ActLinear(written, module.bias, inputs=module.inputs).train(module.training)
                else:
                    layers[path] = module if written is module.storage else ActLinear.of(module, weight=written)
                if isinstance(plain, Conv1D):
                    transposed.add(path)
            elif isinstance(module, ActConv) and isinstance(plain, PLAIN_CONVOLUTIONS):
                convolutions[path] = module
            elif isinstance(module, QuantizedEmbedding) and isinstance(plain, nn.Embedding):
                _refuse_rotation(path, module.rotation, model)
                tables[path] = module
            elif type(module) is not type(plain) and not _same_function(module, plain):
                raise ExportError(
                    f"{path}: a {type(module).__name__} stands here{_by(model, path)}, the plain {_name(skeleton)} "
                    f"has a {type(plain).__name__}. No reader without actkit computes it; keep the model with "
                    f"actkit.save, or leave that transform out."
                )
        _refuse_other_tensors(model, skeleton, {**layers, **tables, **convolutions}, transposed, caches)
        return cls(model, skeleton, layers, frozenset(transposed), tables, convolutions, apart, caches)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantized."""
        return self.model.dtype

    def other_linears(self) -> list[str]:
        """Paths of linear layers of the plain model that nothing was changed on."""
        return [p for p, m in self.skeleton.named_modules() if isinstance(m, nn.Linear) and p not in self.layers]

    def rewritten(self, quantized: Iterable[str]) -> list[str]:
        """Say of the layers that take more room as others read them how much, in a line.

        Args:
            quantized: paths of the layers that are written quantized.
        """
        found: dict[str, list[float]] = {}
        for path in (path for path in quantized if path in self.layers):
            layer: ActLinear = get_module(self.model, path)  # type: ignore[assignment]
            if layer.storage is not self.layers[path].storage:
                ratio = self.layers[path].storage.nbytes / layer.storage.nbytes
                found.setdefault(f"{layer.storage.grid.name}s", []).append(ratio)  # type: ignore[union-attr]
        return [
            f"{len(ratios)} layers of {name} are written as odd integers of half the step, which take "
            f"{max(ratios):.1f} times as many bytes here as in this model"
            for name, ratios in found.items()
        ]

    def dense_tensors(self, path: str) -> dict[str, Tensor]:
        """One layer's weight and bias as the plain model stores them, the weight dequantized."""
        layer = self.layers[path]
        weight = layer.dequantized().detach().to(self.dtype)
        found = {f"{path}.weight": weight.t().contiguous() if path in self.transposed else weight}
        return found | self.bias(path)

    def bias(self, path: str) -> dict[str, Tensor]:
        """One layer's bias by its name, or nothing."""
        bias = self.layers[path].bias
        return {} if bias is None else {f"{path}.bias": bias.detach()}

    def other_tensors(self) -> dict[str, Tensor]:
        """All tensors that belong to none of `layers`, by name. Raises ExportError for one without values."""
        found = {f"{path}.weight": table.weight.to(self.dtype) for path, table in self.tables.items()}
        for path, convolution in self.convolutions.items():
            found[f"{path}.weight"] = convolution.weight.detach().to(self.dtype)
            found |= {} if convolution.bias is None else {f"{path}.bias": convolution.bias.detach()}
        inside = tuple(f"{path}." for path in (*self.layers, *self.tables, *self.convolutions))
        inside += tuple(f"{path}.{CHILD}." for path in self.caches)
        for name, tensor in self.model.state_dict().items():
            if inside and name.startswith(inside):
                continue
            if tensor.is_meta:
                raise ExportError(f"{name}: it is on the meta device and has no values; load the weights first.")
            found[name] = tensor
        return found


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    own_head = getattr(model.config, "tie_word_embeddings", False) and _has_own_head(model)
    # readers that go by the config would take the embedding for the head
    plain: Any = plain_model(model, **({"tie_word_embeddings": False} if own_head else {}))
    plain.to(model.dtype)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain


def _has_own_head(model: PreTrainedModel) -> bool:
    """Whether the output layer has another weight than the embedding, whatever the config says."""
    head: Any = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is not model.get_input_embeddings().weight


def _refuse_other_tensors(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    layers: Mapping[str, ActLinear | ActConv | QuantizedEmbedding],
    transposed: Collection[str],
    caches: Collection[str],
) -> None:
    """Raise ExportError for a tensor that only one of the two has, or in another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    inside = (*(f"{path}." for path in layers), *(f"{path}.{CHILD}." for path in caches))
    given = {name: tuple(t.shape) for name, t in model.state_dict().items() if not (inside and name.startswith(inside))}
    for path, layer in layers.items():
        shape = expected[f"{path}.weight"]
        if isinstance(layer, ActLinear | ActConv):
            shape = tuple(layer.weight.shape) if isinstance(layer, ActConv) else tuple(layer.storage.shape)
        given[f"{path}.weight"] = shape[::-1] if path in transposed else shape
        if isinstance(layer, ActLinear | ActConv) and layer.bias is not None:
            given[f"{path}.bias"] = tuple(layer.bias.shape)
    for name in {**expected, **given}:
        if given.get(name) != expected.get(name):
            raise ExportError(
                f"{name}: it is {given.get(name, 'not there')} in this model and {expected.get(name, 'not there')} in "
                f"the plain {_name(skeleton)}. No reader without actkit computes it; keep the model with actkit.save"
                f"{_of_one_width(model)}."
            )


def _of_one_width(model: nn.Module) -> str:
    """Return what to do about layers that were narrowed, if some were."""
    known = changes.of(model)
    if known is None or not any("resize" in edit for edit in known.edits):
        return ""
    view = anatomy(model)
    widths = [mlp.down.in_features for each in view.blocks for _, mlp in view.block(each.index).mlps()]
    step = math.gcd(*widths)
    nearest = round(sum(widths) / len(widths) / step) * step
    return (
        f", or narrow all blocks to one width, which a config can say; nearest is {nearest} (`cfsp: {{uniform: true}}` "
        f"in a recipe file)"
    )


def _static_caches(model: PreTrainedModel) -> dict[str, CacheRounding]:
    """The attentions whose keys and values have one scale each; none if some have not, or queries are rounded too."""
    found = {path: getattr(module, CHILD, None) for path, module in model.named_modules()}
    caches = {path: child for path, child in found.items() if isinstance(child, CacheRounding)}
    kinds = tuple({type(model.get_submodule(path)) for path in caches})
    alike = all(child.static for child in caches.values()) and all(
        path in caches for path, module in model.named_modules() if type(module) in kinds
    )
    return caches if alike and not any(isinstance(each, AttentionRounding) for each in model.modules()) else {}


def _refuse_experts(model: PreTrainedModel) -> None:
    row = find_architecture(getattr(model.config, "model_type", None))
    if row is not None and row.experts is not None:
        raise ExportError(
            f"model: {base_type(model.config.model_type)} keeps its experts in 3-D parameters, which these formats' "
            f"writers here do not split into layers; keep the model with actkit.save."
        )


def _refuse_rotation(path: str, rotation: nn.Module | None, model: nn.Module) -> None:
    if rotation is not None:
        raise ExportError(
            f"{path}: it is rotated as the model runs{_by(model, path)}, and readers without actkit drop that without "
            f"a word. Keep the model with actkit.save, or export one on which only R2, which is merged, was rotated "
            f"(rotate: sites: [R2]; R1 too if embedding and head are not tied)."
        )


def _refuse_slots(path: str, layer: ActLinear, model: nn.Module, corrections: bool) -> None:
    if layer.in_training:
        raise ExportError(
            f"{path}: its weight or its inputs are in training{_by(model, path)}, so that nothing says yet what they "
            f"are stored as. Apply freeze, then export."
        )
    _refuse_rotation(path, None if layer.inputs is None else layer.inputs.rotation, model)
    if layer.select is not None:
        raise ExportError(
            f"{path}: its inputs are selected ({type(layer.select).__name__}{_by(model, path)}), which changes what "
            f"the layer computes, and no format outside actkit can say so. Keep the model with actkit.save, or export "
            f"one to which only the quantization was applied."
        )
    if layer.correction is not None and not corrections:
        raise ExportError(
            f"{path}: it has a low-rank correction{_by(model, path)}, which this format cannot say. Export the model "
            f"as compressed-tensors with adapter=True (--adapter), which writes the corrections as a peft adapter "
            f"beside it, or as dense, which merges them into the weights; or keep it with actkit.save."
        )


def _same_function(module: nn.Module, plain: nn.Module) -> bool:
    """Return whether an activation by name computes the function that the plain model has there by its config."""
    return isinstance(module, Activation) and module.name == name_of(plain)


def _by(model: nn.Module, path: str) -> str:
    """Return ' (from wina)': the methods of the recipe, if there is one to name."""
    known = changes.of(model)
    methods = [] if known is None else changes.methods_of(known.recipe)
    return f" (recipe: {', '.join(methods)})" if methods else ""


def _name(skeleton: nn.Module) -> str:
    return type(skeleton).__name__
