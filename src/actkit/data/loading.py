"""`load_data`: one way from a source (embedded text, a file, a folder, batches, `random`) to checked batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import as_batches, check_batch, first_rows, is_tokens, main_input, reads_beyond
from actkit.core.forward.example import Inputs, has_example, make_example
from actkit.core.forward.limits import DECODER_TOKENS, TOKENS, check_length, context_length
from actkit.core.forward.stream import Stream
from actkit.core.ground.errors import DataError
from actkit.core.ground.progress import track
from actkit.data.batches import Batch, Batches
from actkit.data.files import LINES, SUFFIXES, read_texts, text_files
from actkit.data.images import digits
from actkit.data.text import SPLITS, Split, check_split, documents, sentences, split_of

DEFAULT_LENGTH = 512
_RANDOM_SEQUENCES = 32
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
_SOURCES = "a .txt, .md or .jsonl file, a folder of these or of images, an iterable of batches or 'random'"

Row = tuple[list[int], list[int]]  # token ids, and the document of each


def load_data(
    source: str | Path | Iterable[Batch] | None,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sequences: int | None = None,
    length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    split: Split | None = None,
    pack: bool | None = None,
    beyond_context: bool = False,
) -> Batches:
    """Batches that the model can be called with.

    Args:
        source: what is read:

            - None for the embedded data: text through the tokenizer (documents for causal models, sentences for
              encoders), the digits for models of 8 x 8 images;
            - a .txt or .md file (one text), a .jsonl file (objects with a field `text`, one document each), or a folder
              of such files (a .txt or .md is one document);
            - a folder of images;
            - an iterable of batches, used as they are (`core/forward/batch.py` says what a batch is);
            - "random".

        model: that is called on them.
        tokenizer: the model's own; for a folder of images an image processor, whose mean and standard deviation are
            used (0.5 each without one).
        sequences: how many rows, all if None (32 for random); fewer in the source is an error.
        length: tokens per row; None is the model's context, at most 512.
        batch_size: rows of a batch.
        seed: order of the documents, and random values.
        split: which part of the source; None is `calibration` for embedded data and all of yours. Your files are cut
            like the embedded text, 84 / 4 / 4 / 8 %: by a hash of each document or file name, a single .txt or .md by
            position.
        pack: concatenate the documents with the end-of-text token between and cut them in rows (default for causal
            models); each row begins with what the tokenizer puts first (`<bos>`), and the description says so.
            Otherwise every document is a row, a longer one is cut in windows; what is short is padded under
            `attention_mask`.
        beyond_context: rows may be longer than the model's context, here and for whoever is given the batches; their
            description says so. Refused for a model that looks positions up in a table.

    Returns:
        The batches, with the document of each token or row.

    Raises:
        DataError: data are missing, empty, too few, too long for the context or outside the vocabulary.
        ImportError: pillow or scikit-learn is needed and missing.
    """
    if split is not None:
        check_split(split)
    for name, value in (("sequences", sequences), ("length", length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{name}={value} was given; it must be at least 1.")
    takes = Inputs.of(model)
    context = takes.context
    if length is not None and takes.vocabulary is not None:
        check_length(model, length, "length", beyond_context=beyond_context)
    length = length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)

    if isinstance(source, str) and source == "random":
        made = _random(model, takes, sequences or _RANDOM_SEQUENCES, length, batch_size, seed, split)
        return _beyond(made, model, beyond_context)
    if source is not None and not isinstance(source, str | Path):
        return _given(source, model, sequences, split, beyond_context)
    if source is None and tokenizer is None and takes.shape == (1, 8, 8):
        return _digits(takes, sequences, batch_size, seed, split or "calibration")
    path = None if source is None else Path(source)
    if path is not None and not path.exists():
        raise DataError(f"source={str(source)!r} does not exist; give {_SOURCES}.")
    if path is not None and path.is_dir() and _has_images(path, takes):
        return _images(path, model, takes, tokenizer, sequences, batch_size, seed, split)
    if path is not None and path.suffix.lower() not in SUFFIXES and not path.is_dir():
        raise DataError(f"source={str(source)!r} is a file of an unknown kind; give {_SOURCES}.")
    _check_takes_text(model, takes)
    if tokenizer is None:
        raise DataError(
            "tokenizer: text was asked for and there is none; pass the model's, or token batches, or use --data random."
        )

    pack = takes.causal if pack is None else pack
    if path is None:
        split = split or "calibration"
        texts = [document.text for document in documents(split)] if takes.causal else sentences(split)
        description = f"embedded {'text' if takes.causal else 'sentences'}, {split} split"
    else:
        texts = read_texts(path, split)
        description = path.resolve().name + (f", {split} split" if split else "")
    random.Random(seed).shuffle(texts)
    rows = _packed(texts, tokenizer, length, sequences) if pack else _windows(texts, tokenizer, length, sequences)
    prefix = _marks(tokenizer)[0] if pack else []
    if path is not None and len(texts) == 1 and path.suffix.lower() != LINES:
        # One text has no documents to resample: its rows stand in for them.
        rows = [(ids, [index] * len(ids)) for index, (ids, _) in enumerate(rows)]
    rows = _take(rows, sequences, f"rows of up to {length} tokens", description)
    batches = _padded(rows, batch_size, _pad_id(tokenizer))
    for batch, _ in batches:
        check_batch(model, batch, beyond_context=beyond_context)
    begins = f", each begins with {' '.join(tokenizer.convert_ids_to_tokens(prefix))}" if prefix else ""
    made = _batches(batches, f"{description}, {len(rows)} rows of up to {length} tokens{begins}")
    return _beyond(made, model, beyond_context)


def _beyond(batches: Batches, model: nn.Module, beyond_context: bool) -> Batches:
    """The batches with leave to be longer than the model's context, and a line that says so if they are."""
    if not beyond_context:
        return batches
    context, description = context_length(model), batches.description
    longest = 0 if context is None else max(main_input(batch, model).shape[1] for batch in batches)
    if context is not None and longest > context and "beyond the context" not in description:
        description += f", beyond the context of {context} tokens"
    return Batches(batches.items, batches.document_ids, description, beyond_context=True)


def _check_takes_text(model: nn.Module, takes: Inputs) -> None:
    kind, name = type(model).__name__, getattr(model, "main_input_name", TOKENS)
    if DECODER_TOKENS in takes.keywords:
        raise DataError(
            f"data: {kind} is an encoder-decoder, which takes two sequences, and text is one; pass batches of your own "
            f"with {name} and {DECODER_TOKENS} (or labels), or use --data random."
        )
    if takes.vocabulary is None and hasattr(model, "main_input_name"):
        raise DataError(
            f"data: {kind} takes {name}, and text alone is no input of it; pass batches of your own, such as "
            f"[{{{name!r}: tensor, ...}}]{'' if takes.shape is None else ', a folder of images, or --data random'}."
        )


def _has_images(folder: Path, takes: Inputs) -> bool:
    """Whether a folder is read as images: for a model of images, and if it holds images and no text."""
    of_images = takes.shape is not None and len(takes.shape) == 3
    return of_images or (bool(_image_files(folder)) and not text_files(folder))


# --- text ------------------------------------------------------------------------------------------------------------


def _encode(text: str, tokenizer: Any, special: bool) -> list[int]:
    # `verbose=False`: the text is cut below, so the warning that it is longer than the context would be wrong.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text: [CLS] text [SEP], <bos> text, text </s>."""
    special = _encode("", tokenizer, special=True)
    probe, bare = _encode("a", tokenizer, special=True), _encode("a", tokenizer, special=False)
    before = next((at for at in range(len(probe)) if probe[at : at + len(bare)] == bare), 0)
    return special[:before], special[before:]


def _check_room(length: int, marks: int) -> None:
    if length <= marks:
        raise DataError(f"length={length} leaves no room beside the tokenizer's {marks} special tokens; give more.")


def _packed(texts: Iterable[str], tokenizer: Any, length: int, sequences: int | None) -> list[Row]:
    """Rows of one stream: end-of-text, document, end-of-text, document ...; what ends a document belongs to it.

    Every row begins as the tokenizer begins a text: a model that learned to find `<bos>` there is lost without it.
    """
    prefix, _ = _marks(tokenizer)
    _check_room(length, len(prefix))
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = [] if end is None or prefix else [end]
    owners = [0] * len(ids)
    for index, text in enumerate(track(texts, "Reading the text")):
        if sequences is not None and len(ids) >= sequences * length:
            break
        tokens = _encode(text, tokenizer, special=True)
        if end is not None and (not tokens or tokens[-1] != end):
            tokens.append(end)
        ids += tokens
        owners += [index] * len(tokens)
    rows: list[Row] = []
    at = 0
    while at < len(ids):
        before = [] if ids[at : at + len(prefix)] == prefix else prefix  # a document that begins here brings its own
        to = at + length - len(before)
        rows.append(([*before, *ids[at:to]], [owners[at]] * len(before) + owners[at:to]))
        at = to
    return rows


def _windows(texts: Iterable[str], tokenizer: Any, length: int, sequences: int | None) -> list[Row]:
    """Rows of one document each, with the tokenizer's own special tokens in every window."""
    prefix, suffix = _marks(tokenizer)
    size = length - len(prefix) - len(suffix)
    _check_room(length, len(prefix) + len(suffix))
    rows: list[Row] = []
    for index, text in enumerate(track(texts, "Reading the text")):
        if sequences is not None and len(rows) >= sequences:
            break
        tokens = _encode(text, tokenizer, special=False)
        for at in range(0, len(tokens), size):
            ids = [*prefix, *tokens[at : at + size], *suffix]
            rows.append((ids, [index] * len(ids)))
    return rows


def _take(rows: Sequence[Any], sequences: int | None, what: str, description: str) -> list[Any]:
    if not rows:
        raise DataError(f"data: {description} is empty; give at least one of: {what}.")
    if sequences is not None and len(rows) < sequences:
        raise DataError(
            f"sequences={sequences} was given, but {description} holds {len(rows)} {what}; give at most {len(rows)}."
        )
    return list(rows[:sequences])


def _pad_id(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _padded(rows: Sequence[Row], batch_size: int, pad: int) -> list[tuple[Batch, Tensor]]:
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = max(len(ids) for ids, _ in part)
        batch = {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in part]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in part]),
        }
        found.append((batch, torch.tensor([owners + [-1] * (longest - len(owners)) for _, owners in part])))
    return found


# --- images, random values, given batches ----------------------------------------------------------------------------


def _digits(takes: Inputs, sequences: int | None, batch_size: int, seed: int, split: Split) -> Batches:
    images, labels = digits(split)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = torch.tensor(_take(order, sequences, "images", f"the digits, {split} split"))
    return _image_batches(
        takes, images[chosen], labels[chosen], batch_size, f"digits, {split} split, {len(chosen)} images"
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)


def _images(
    folder: Path,
    model: nn.Module,
    takes: Inputs,
    processor: Any,
    sequences: int | None,
    batch_size: int,
    seed: int,
    split: Split | None,
) -> Batches:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"source={str(folder)!r} is a folder of images, which needs pillow; pip install pillow."
        ) from error
    files = _image_files(folder)
    if split is not None:
        files = [path for path in files if split_of(path.relative_to(folder).as_posix()) == split]
    random.Random(seed).shuffle(files)
    files = _take(files, sequences, f"images ({', '.join(sorted(_IMAGES))})", f"the folder {folder}")
    shape = takes.shape
    if shape is None or len(shape) != 3:
        raise DataError(
            "source: a folder of images was given, but the model states no image size (config.image_size, or "
            "input_shape = (channels, height, width)); pass batches of tensors."
        )
    channels, height, width = shape
    mean, deviation = (
        torch.tensor(getattr(processor, name, None) or [0.5] * channels).view(-1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    images = []
    for file in track(files, "Reading the images"):
        with Image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, -1)
        images.append((pixels.permute(2, 0, 1).float() / 255 - mean) / deviation)
    # Folder names are labels only if the model itself knows them; anything else would be a guess.
    known = getattr(getattr(model, "config", None), "label2id", None) or {}
    labels = [known.get(file.parent.name) for file in files]
    targets = torch.tensor(labels) if None not in labels else None
    return _image_batches(takes, torch.stack(images), targets, batch_size, f"{folder.name}, {len(files)} images")


def _image_batches(takes: Inputs, images: Tensor, labels: Tensor | None, batch_size: int, description: str) -> Batches:
    found: list[tuple[Batch, Tensor]] = []
    for at in range(0, len(images), batch_size):
        batch = takes.named("pixel_values", images[at : at + batch_size])
        if labels is not None and isinstance(batch, dict):
            batch["labels"] = labels[at : at + batch_size]
        found.append((batch, torch.arange(at, min(at + batch_size, len(images)))))
    return _batches(found, description)


def _random(
    model: nn.Module, takes: Inputs, sequences: int, length: int, batch_size: int, seed: int, split: Split | None
) -> Batches:
    number = seed * len(SPLITS) + SPLITS.index(split or "calibration")  # another split is other data
    sizes = [min(batch_size, sequences - at) for at in range(0, sequences, batch_size)]
    if has_example(model):
        examples = [make_example(model, size, number * len(sizes) + index) for index, size in enumerate(sizes)]
        return Batches(examples, description=f"random, {sequences} examples of the model's own", model=model)
    generator = torch.Generator().manual_seed(number)
    shape, vocabulary = takes.shape, takes.vocabulary
    make: Callable[[int], Batch]
    if shape is not None:

        def make(count: int) -> Batch:
            return takes.named("pixel_values", torch.rand(count, *shape, generator=generator))

        what = f"values of shape {list(shape)}"
    elif vocabulary is not None:

        def make(count: int) -> Batch:
            ids = torch.randint(vocabulary, (count, length), generator=generator)
            return takes.of_tokens(ids, generator)

        what = f"rows of {length} tokens"
    else:
        raise DataError(
            "source='random': the model states neither a vocabulary (config.vocab_size) nor an input shape "
            "(config.image_size, input_shape); pass an iterable of batches, or give the model example(rows, seed)."
        )
    return Batches([make(size) for size in sizes], description=f"random, {sequences} {what}")


def _given(
    source: Iterable[Batch], model: nn.Module, sequences: int | None, split: Split | None, beyond_context: bool
) -> Batches:
    if split is not None:
        raise DataError(
            f"split={split!r}: batches cannot be split by document; pass other batches for each split, and no split."
        )
    if isinstance(source, Stream):
        raise DataError(f"source: {source} has no end; give some of its batches: stream.take(8).")
    source = as_batches(source, "source")
    documents_given = getattr(source, "document_ids", None)
    description = getattr(source, "description", "given batches")
    given = source if isinstance(source, Batches) else Batches(list(source), documents_given, description, model)
    if sequences is not None:
        _take(range(given.rows), sequences, "rows", given.description)
        given = _first_rows(given, sequences, model)
    beyond_context |= reads_beyond(source)
    for batch in given:
        check_batch(model, batch, beyond_context=beyond_context)
    return _beyond(given, model, beyond_context and is_tokens(given[0], model))


def _first_rows(batches: Batches, count: int, model: nn.Module) -> Batches:
    items: list[Batch] = []
    ids: list[Tensor] = []
    for batch, owners in zip(batches.items, batches.document_ids):
        size = len(main_input(batch, model))
        items.append(batch if count >= size else first_rows(batch, count, model))
        ids.append(owners[:count])
        count -= size
        if count <= 0:
            break
    return Batches(items, ids, batches.description, beyond_context=batches.beyond_context)


def _batches(pairs: Sequence[tuple[Batch, Tensor]], description: str) -> Batches:
    """Batches of (batch, document ids) pairs."""
    return Batches([batch for batch, _ in pairs], [ids for _, ids in pairs], description)
