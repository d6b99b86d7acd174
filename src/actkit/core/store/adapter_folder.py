"""A folder of peft's that holds an adapter alone, beside what says which model it was trained on.

    adapter_config.json, adapter_model.safetensors     peft's own, which peft.PeftModel.from_pretrained opens
    actkit_adapter.json                                the base: its name, its fingerprint, and the dtype of its weights

`actkit.load` opens the base by its name, compares the fingerprint, so that no adapter is added to another model, and
merges: what comes out is an ordinary model. A folder of peft's without the third file says of its base nothing but a
name, and is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from actkit.core.edit import changes
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.ground.whole_folder import complete_or_nothing, recover
from actkit.core.store.transformers_folder import ADAPTER

BASE, WEIGHTS = "actkit_adapter.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of a PeftModel
VERSION = 1


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter was trained on.

    Attributes:
        name: that `actkit.load` opens it by; None if nobody knows.
        fingerprint: of its tensors, widened to float32.
        dtype: of its weights while the adapter was trained, such as 'float32'.
    """

    name: str | None
    fingerprint: str
    dtype: str

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> AdapterBase:
        """Describe a model.

        Args:
            model: without adapters.
            name: by default the folder that it was loaded from, if nothing was changed on it since.
        """
        origin = changes.source(model)
        if name is None and origin is not None and origin.untouched(model):
            name = str(Path(origin.name).absolute())
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        return cls(name, model_fingerprint(model, widened=True), str(dtype).removeprefix("torch."))


def is_adapter(folder: str | Path) -> bool:
    """Say whether a folder holds an adapter that says which model it was trained on."""
    return (Path(folder) / BASE).is_file() and (Path(folder) / ADAPTER).is_file()


def write_adapter(model: nn.Module, config: Any, base: AdapterBase, folder: Path) -> None:
    """Write the adapter of a model as peft does.

    Args:
        model: with peft's layers in it.
        config: of peft, by which they were put there.
        base: what the model was before.
        folder: to write; one that is there is replaced.

    Raises:
        CheckpointError: the disk does not take it.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    origin = changes.source(model)
    config.base_model_name_or_path = base.name if origin is None else str(Path(origin.name).absolute())
    config.task_type = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # of a set, so that the file is the same each time
    recover(folder)
    with complete_or_nothing(folder) as temporary:
        save_file(
            {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / WEIGHTS,
            metadata={"format": "pt"},
        )
        config.save_pretrained(temporary)
        text = json.dumps({"actkit": VERSION, **asdict(base)}, indent=2)
        (temporary / BASE).write_text(text + "\n", encoding="utf-8")


def read_base(folder: str | Path) -> AdapterBase:
    """Read which model an adapter was trained on.

    Args:
        folder: of the adapter.

    Raises:
        CheckpointError: the file is damaged, or of a later actkit.
    """
    path = Path(folder) / BASE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("actkit") == VERSION:
            return AdapterBase(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); copy the folder again, or train it again.") from error
    raise CheckpointError(f"{path}: it was written by another version of actkit; install that one, or train it again.")


def merged(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add an adapter to the model that it was trained on.

    Args:
        model: changed in place.
        folder: of the adapter.

    Returns:
        The model, with the modules that it had before.

    Raises:
        CheckpointError: it is another model, or the files are damaged.
        ImportError: peft is missing.
    """
    base = read_base(folder)
    if model_fingerprint(model, widened=True) != base.fingerprint:
        raise CheckpointError(
            f"{folder}: the adapter was trained on another model than {base.name or 'the given one'} is now: their "
            f"tensors differ. Give the model that it was trained on by base=, or train the adapter again."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("adapter: peft is missing; pip install 'actkit[finetune]'.") from error
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        found: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)  # type: ignore[arg-type]
    except Exception as error:  # peft and safetensors raise in many ways
        raise CheckpointError(
            f"{folder}: peft does not read the adapter ({error}); copy the folder again, or train it again."
        ) from error
    for parameter in trainable:
        parameter.requires_grad_(True)
    found.__dict__.pop("peft_config", None)
    return found
