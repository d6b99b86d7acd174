"""The verbs `generate` and `generate_all`, apart from the others.

From a packed folder they import neither them nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actkit.core.ground.errors import DataError
from actkit.core.measure.sampling import LIKELIEST, Sampling
from actkit.core.store.mapped_arrays import HEADER

Model = nn.Module | str | Path


def generate(
    model: Model,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = LIKELIEST,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    cache: str | None = None,
    tokenizer: Any = None,
    threads: int | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Write text that follows the prompt, piece by piece; with chat the answer to it, by the model's chat template.

    On the CPU a decoder writes if it takes the model, else transformers. Each call packs the weights anew: for many
    texts take `generate_all`, make a `runtime.decoder.Decoder` once, or export the model packed (`format="packed"`).

    Args:
        model: a language model, or its name; or a packed folder.
        prompt: the text to go on from.
        max_new_tokens: at most so many.
        sampling: how a token is chosen; by default the likeliest.
        stop: texts to stop before.
        chat: answer the prompt, by the model's chat template.
        cache: how a decoder keeps keys and values, 'float32', 'bfloat16' or 'int8'; None for its own choice.
        tokenizer: for a model that has none beside it.
        threads: None for torch's number, or for that of a packed folder; another one is refused.
        announce: called with what writes, and why it is not a decoder.
        options: of `open_model`.

    Returns:
        An iterator over the pieces.

    Raises:
        DataError: there is no tokenizer.
        ValueError: another number of threads is asked for.
        ActkitError: what `core.measure.generation.generate` raises.
    """
    from actkit.core.measure.generation import generate as write

    opened, found = _opened(model, tokenizer, chat, threads, **options)
    return write(
        opened,
        found,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        chat=chat,
        cache=cache,
        announce=announce,
        decode_only=not isinstance(model, nn.Module),
    )


def generate_all(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = LIKELIEST,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    cache: str | None = None,
    batch: int | None = None,
    tokenizer: Any = None,
    threads: int | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Write the text that follows each of some prompts, several at a time if that is faster.

    Args:
        model: as in `generate`, and so are all that are not listed.
        prompts: texts to go on from.
        max_new_tokens: at most, for each.
        sampling: how a token is chosen.
        stop: texts to stop before.
        chat: answer each prompt.
        cache: how a decoder keeps keys and values.
        batch: texts at a time; None for the fastest number up to 8, which is measured.
        tokenizer: for a model that has none beside it.
        threads: as in `generate`.
        announce: called with what writes, and what several texts at a time give.
        options: of `open_model`.

    Returns:
        (number of the prompt, text), each when it is complete.

    Raises:
        ActkitError: what `core.measure.texts.generate_all` raises.
        ValueError: as in `generate`.
    """
    from actkit.core.measure.texts import generate_all as write

    opened, found = _opened(model, tokenizer, chat, threads, **options)
    return write(
        opened,
        found,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        chat=chat,
        cache=cache,
        batch=batch,
        announce=announce,
        decode_only=not isinstance(model, nn.Module),
    )


def _opened(model: Model, tokenizer: Any, chat: bool, threads: int | None, **options: Any) -> tuple[nn.Module, Any]:
    """A model that is only decoded from, and its tokenizer."""
    folder = packed_folder(model)
    if folder is not None:
        opened, found = _open_packed(folder, chat, threads, **options)
    else:
        from actkit.zoo.loading import open_model

        if threads not in (None, torch.get_num_threads()):
            raise ValueError(f"threads: {threads} was given, and torch has {torch.get_num_threads()}; set torch's.")

        opened, found = open_model(model, to_decode=True, **options)
    tokenizer = tokenizer or found
    if tokenizer is None:
        raise DataError("tokenizer: the model has none beside it; pass tokenizer=, or choose a language model.")
    return opened, tokenizer


def packed_folder(model: Model) -> Path | None:
    """Return the folder of a packed model, or None for any other model."""
    if isinstance(model, nn.Module) or not (Path(model) / HEADER).is_file():
        return None
    if isinstance(model, str) and Path(model).name == model:
        from actkit import zoo

        return None if model in zoo.names() else Path(model)  # a name of the zoo wins
    return Path(model)


def _open_packed(
    folder: Path,
    chat: bool,
    threads: int | None,
    *,
    device: Any = "cpu",
    dtype: Any = None,
    base: Any = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any | None]:
    """What a packed folder decodes with, and its tokenizer."""
    from actkit.runtime.packed import check_threads, open_packed, tokenizer_of

    if str(device) != "cpu" or dtype is not None or base is not None:
        raise ValueError(f"device, dtype: {folder} is packed for the CPU's decoder as it is; leave them out.")
    opened = open_packed(folder)
    check_threads(opened, threads)
    return opened, tokenizer_of(opened, chat=chat, trust_remote_code=trust_remote_code)
