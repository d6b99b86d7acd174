"""Changed transformers models: a subclass of the model's own class, with a `model_type` of its own.

`LlamaForCausalLM` becomes `ActkitLlamaForCausalLM` with the model type `actkit_llama`: transformers without actkit
refuses that type instead of initialising weights that it does not understand. The subclass builds the base
architecture, replays the edits, and loads strictly. Keys are those of the model in memory, so transformers' weight
conversions (made for hub checkpoints of the base types) do not apply to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from actkit.core.edit import changes
from actkit.core.edit.changes import Changes
from actkit.core.edit.edits import settled
from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.modules import is_pretrained
from actkit.core.model.architectures import known_model_types

PREFIX = "actkit_"


def base_type(model_type: str) -> str:
    """The transformers model type behind a changed one: 'actkit_llama' -> 'llama'."""
    return model_type.removeprefix(PREFIX)


class ChangedModel:
    """What the subclass of a changed transformers model adds: loading and saving in actkit's own format."""

    actkit_base: type[PreTrainedModel]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: Any, config: Any = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Load an actkit folder strictly.

        Args:
            folder: that `save` wrote.
            args: of transformers; nothing reads them.
            config: the folder's own is used.
            dtype: as in `load`.
            kwargs: others of transformers; `device_map`, `quantization_config` and `state_dict` are refused.

        Raises:
            CheckpointError: keys are missing, unexpected or mismatched.
        """
        from actkit.core.store import checkpoint

        loading_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("torch_dtype", dtype)
        _refuse(
            {
                name: value
                for name, value in kwargs.items()
                if value and name in ("device_map", "quantization_config", "state_dict")
            }
        )
        model = checkpoint.load(folder, dtype=None if dtype == "auto" else dtype)
        empty: dict[str, Any] = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return (model, empty) if loading_info else model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write an actkit folder; files beside the model's own (a tokenizer) stay. max_shard_size is transformers'.

        Args:
            save_directory: to write.
            kwargs: others of transformers.

        Raises:
            CheckpointError: the folder holds a plain model or something else.
        """
        from actkit.core.store import checkpoint

        _refuse(
            {
                name: value
                for name, value in kwargs.items()
                if value and name in ("push_to_hub", "variant", "state_dict")
            }
        )
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        replaceable = folder.is_dir() and (not any(folder.iterdir()) or (folder / checkpoint.MANIFEST).exists())
        shard = kwargs.get("max_shard_size", "4GB")
        checkpoint.save(self, folder, overwrite=replaceable, keep_others=True, max_shard=shard)  # type: ignore[arg-type]


def _refuse(options: dict[str, Any]) -> None:
    if options:
        raise CheckpointError(
            f"{', '.join(options)}: not supported for a model that actkit changed. Load it as it is "
            f"(actkit.load(folder, device=..., dtype=...)), or save it with actkit.save."
        )


class ChangedConfig:
    """What the config of a changed model adds.

    The model classes are made when a config is first read from a file, as that is when an Auto class is about to look
    for them; importing all of them would take seconds.
    """

    actkit_base: Any

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the model class of this config registered first."""
        _register_models(cls.actkit_base)
        return super().from_dict(*args, **kwargs)  # type: ignore[misc]


@cache
def config_class(base: Any) -> type:
    """The config class of changed models over `base`, registered with AutoConfig."""
    name = f"{PREFIX}{base.model_type}"
    namespace = {"model_type": name, "actkit_base": base, "__module__": __name__}
    changed = type(f"Actkit{base.__name__}", (ChangedConfig, base), namespace)
    AutoConfig.register(name, changed, exist_ok=True)
    return changed


@cache
def model_class(base: Any) -> type[PreTrainedModel]:
    """The changed subclass of a transformers model class, registered with every Auto class that knows the base."""
    config = config_class(base.config_class)
    # transformers reads the source of the class's module to choose the experts' implementation: it must be the base's.
    namespace = {"config_class": config, "actkit_base": base, "__module__": base.__module__}
    changed = type(f"Actkit{base.__name__}", (ChangedModel, base), namespace)
    for name in dir(transformers):
        if name.startswith("AutoModel"):
            auto = getattr(transformers, name)
            mapping = getattr(auto, "_model_mapping", None)
            known = None if mapping is None else mapping.get(base.config_class, None)
            if base is known or (isinstance(known, tuple) and base in known):
                auto.register(config, changed, exist_ok=True)
    return changed


def set_changed(model: PreTrainedModel, changed: bool) -> None:
    """Make a transformers model an instance of its changed class, or of its own again."""
    base: Any = getattr(type(model), "actkit_base", type(model))
    base_config: Any = base.config_class
    model.__class__ = model_class(base) if changed else base
    model.config.__class__ = config_class(base_config) if changed else base_config


def record(model: nn.Module, edits: list[dict[str, Any]], recipe: list[dict[str, Any]], architecture: str) -> None:
    """Add edits to a model's changes, and take those away that were restored since.

    Args:
        model: any model. A transformers model changes its class, so that `save_pretrained` writes an actkit folder and
            never a plain config over changed weights; if no edit is left, it is of its own class again.
        edits: in their JSON form.
        recipe: the transforms that made them, as a recipe's YAML form lists them.
        architecture: the row that the model was read by; the one of earlier changes stays.
    """
    known = changes.of(model) or Changes(architecture=architecture)
    known = replace(known, edits=settled(known.edits + edits), recipe=known.recipe + recipe)
    restore(model, replace(known, architecture=known.architecture or architecture))


def record_training(model: nn.Module, settings: dict[str, Any]) -> None:
    """Add a training to a model's record, between what was applied before and after it.

    By itself it makes no model a changed one: its tensors have other values, and that is all.

    Args:
        model: any model.
        settings: of the training, as a recipe has them.
    """
    known = changes.of(model) or Changes()
    restore(model, replace(known, recipe=[*known.recipe, {"train": settings}]))


def restore(model: nn.Module, known: Changes | None) -> None:
    """Set a model's record to `known`, and its class with it; None makes it a plain model again."""
    changes.keep(model, known)
    if is_pretrained(model):
        set_changed(model, known is not None and bool(known.edits))  # type: ignore[arg-type]


def class_by_name(name: str) -> type[PreTrainedModel]:
    """Find a model class of transformers, or one of ours over it, by its name (never an import path).

    Args:
        name: of the class.

    Raises:
        CheckpointError: there is none of that name.
    """
    found = find_class(name)
    if found is None:
        raise CheckpointError(
            f"base_class: {name!r} is not a model class of transformers {transformers.__version__}; install one that "
            f"has it, or for a class of your own pass base= in Python (actkit.load), a function that builds the "
            f"unchanged model."
        )
    return found


def find_class(name: str) -> type[PreTrainedModel] | None:
    """Return the model class of that name, of transformers or registered under `actkit.models`; None without one.

    Args:
        name: of the class.
    """
    found = getattr(transformers, name, None)
    own = registry.model_name_of_class(name) if found is None else None
    found = found if own is None else registry.model_class(own)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


@cache
def _register_models(base: Any) -> None:
    """Make the changed classes over a config class, for every Auto class that has one for it."""
    for name in dir(transformers):
        if name.startswith("AutoModel"):
            mapping = getattr(getattr(transformers, name), "_model_mapping", None)
            known = None if mapping is None else mapping.get(base, None)
            for cls in known if isinstance(known, tuple) else (known,):
                if cls is not None:
                    model_class(cls)


def register(model_types: tuple[str, ...]) -> None:
    """Make changed models of some base model types known to transformers' Auto classes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in model_types:
        if model_type in CONFIG_MAPPING:
            base: Any = CONFIG_MAPPING[model_type]
            config_class(base)


register(known_model_types())
