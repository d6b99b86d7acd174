"""What the verbs share on the terminal: what is printed, by which process, and which errors are one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def is_expected(error: Exception) -> bool:
    """Return whether the error tells the user what to do; anything else is a bug and shows its traceback."""
    from actkit.core.ground.errors import ActkitError

    missing_extra = isinstance(error, ImportError) and "pip install" in str(error)
    refused = (
        isinstance(error, ValueError | TypeError) and (type(error).__module__ + _raised_in(error)).find("actkit") >= 0
    )
    return isinstance(error, ActkitError) or missing_extra or refused


def _raised_in(error: Exception) -> str:
    """The module whose code raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def print_error(text: str) -> None:
    """Print an error on standard error."""
    if not prints():  # an error of another process reaches the first one too, and is printed there
        return
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, markup=False)


def prints() -> bool:
    """Return whether this process prints: the only one, or the first of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def together() -> Iterator[None]:
    """Run several processes as one, if torchrun started them."""
    from actkit.core.ground.processes import together

    with together():
        yield


def alone(verb: str) -> None:
    """Refuse to run a verb under torchrun."""
    from actkit.core.ground.processes import refuse

    refuse(verb, f"run it without torchrun: actkit {verb} ...")


def set_up(threads: int | None = None, seed: int = 0, *, transformers: bool = True) -> None:
    """Set threads and seeds of torch, and hide transformers' own bars, which would appear between ours.

    Args:
        threads: None for torch's number.
        seed: of torch.
        transformers: whether it will be imported at all.
    """
    import torch

    if transformers:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def print_result(result: Any, as_json: bool) -> None:
    """Print a result's table, or its dictionary as JSON."""
    if not prints():
        return
    if as_json:
        typer.echo(json.dumps(result if isinstance(result, dict | list) else result.to_dict(), indent=2, default=str))
        return
    from rich.console import Console

    Console(highlight=False).print(result.table())


def note(text: str) -> None:
    """Print a line for people on standard error, so that standard output holds the result alone."""
    if not prints():
        return
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
