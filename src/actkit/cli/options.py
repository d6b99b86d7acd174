"""The options that several verbs share, each with one meaning and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Argument(
        help="An embedded model (swiglu, geglu, relu, mixtral, minilm, vit, cnn; with their packages smollm2, gemma3), "
        "a folder, a GGUF file or a hub id."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .md or .jsonl file, a folder of these or of images, or 'random'. Default: the embedded data."
    ),
]
Sequences = Annotated[int | None, typer.Option(min=1, metavar="N", help="How many rows of data.")]
Length = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens per row. Default: the model's context, at most 512.")
]
BeyondContext = Annotated[
    bool, typer.Option("--beyond-context", help="Rows may be longer than the context; the result says so.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows per forward pass.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads of the processor. Default: torch's choice.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
MaxMemory = Annotated[str | None, typer.Option(help="Hard cap for calibration beside the model, such as 2GB.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a hub repository brings.")]
Out = Annotated[Path, typer.Option(help="The folder to write.")]


def share(text: str | float) -> float:
    """Read a share, such as 0.02 or 2%.

    Args:
        text: as it was typed.

    Returns:
        A share of at least 0.

    Raises:
        BadParameter: it is neither.
    """
    given = str(text).strip()
    try:
        value = float(given[:-1]) / 100 if given.endswith("%") else float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text} was given; give a share of 0 or more, such as 0.02 or 2%.")
    return value
