"""The tokenizer of a GGUF file: byte-level BPE that is split by a pattern llama.cpp knows by name, or SentencePiece.

A SentencePiece model has a score for each token and no list of merges; transformers' has the list and no scores. If
every way to make a token of two others is in the list, and those of a token stand together, its place is a score.
"""

from __future__ import annotations

import json
import re
from typing import Any

from actkit.gguf.tokenizer import (
    BYTE,
    CONTROL,
    DIGITS,
    GPT2_PATTERN,
    NORMAL,
    PATTERNS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    all_merges,
)

NAMES = {pattern: name for name, pattern in reversed(PATTERNS.items())}  # the first name of each pattern


def add_vocabulary(writer: Any, config: Any, tokenizer: Any) -> list[str]:
    """Write the tokenizer's tokens, merges and special tokens.

    If llama.cpp could not split text as the tokenizer does, nothing of it is written, and the note says why: the file
    then takes token ids only.

    Args:
        writer: a GGUFWriter.
        config: of the model.
        tokenizer: of transformers, or None.

    Returns:
        Notes.
    """
    if tokenizer is None:
        return _without(writer, "the model has none beside it")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _without(writer, f"{type(tokenizer).__name__} is no fast tokenizer")
    content = json.loads(backend.to_str())
    tokens, kinds = _tokens(content, config.vocab_size)
    if len(tokens) != config.vocab_size:
        return _without(writer, f"it has {len(tokens)} tokens, the model {config.vocab_size}")
    if content["model"]["type"] == "BPE" and content["model"].get("byte_fallback"):
        why = _add_scored(writer, content, tokens, kinds)
    else:
        why = _add_merged(writer, content, tokens, kinds)
    if why is not None:
        return _without(writer, why)
    for add, token in (
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    return _add_templates(writer, getattr(tokenizer, "chat_template", None))


def _add_merged(writer: Any, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> str | None:
    """Write byte-level BPE; or return why llama.cpp cannot split text as it does."""
    pattern, why = _pattern(content)
    if pattern is None:
        return why
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    return None


def _add_scored(writer: Any, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> str | None:
    """Write BPE with bytes as a fallback as SentencePiece keeps it; or return why its merges are no scores."""
    prefix = _space_prefix(content)
    if prefix is None:
        return "it has bytes as a fallback and treats spaces otherwise than SentencePiece"
    for at, token in enumerate(tokens):
        if kinds[at] == NORMAL and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[at] = BYTE
        elif token == content["model"].get("unk_token"):
            kinds[at] = UNKNOWN
    listed: dict[str, set[tuple[str, str]]] = {}  # a token -> the pairs that make it
    last = None
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if left + right != last and left + right in listed:
            return f"its merges make {left + right!r} at two places of their order, which no score says"
        last = left + right
        listed.setdefault(last, set()).add((left, right))
    place = {token: -float(at) for at, token in enumerate(listed)}
    scores = [place.get(token, 0.0) for token in tokens]
    needed: dict[str, set[tuple[str, str]]] = {}
    for left, right in all_merges(tokens, kinds, scores):
        needed.setdefault(left + right, set()).add((left, right))
    # A token that the user added is cut out of the text before anything is merged, unless it is made of spaces.
    added = {token for at, token in enumerate(tokens) if kinds[at] == USER_DEFINED and SPACE not in token}
    wrong = next((token for token in {**listed, **needed} if listed.get(token) != needed.get(token)
                  and not (token in added and token not in listed)), None)  # fmt: skip
    if wrong is not None:
        return f"not every way to make {wrong!r} of two tokens is among its merges, and SentencePiece takes all"
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefix)
    return None


def _space_prefix(content: dict[str, Any]) -> bool | None:
    """Whether a space is put before the text, if spaces are treated as SentencePiece does; else None."""
    given = content.get("normalizer") or {}
    steps = given.get("normalizers", [given])
    splits = content.get("pre_tokenizer")
    if splits is not None and not (splits.get("type") == "Split" and splits["pattern"] == {"String": " "}):
        return None  # a split at spaces finds none, as they are replaced before
    prefix = bool(steps) and steps[0] == {"type": "Prepend", "prepend": SPACE}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return prefix if steps[int(prefix) :] == [replaced] else None


def _add_templates(writer: Any, templates: str | dict[str, str] | None) -> list[str]:
    """Write the chat template, or each of several by its name; returns notes."""
    if not templates:
        return []
    if isinstance(templates, str):
        writer.add_chat_template(templates)
        return []
    from gguf import Keys

    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    for name, text in named.items():
        keys = Keys.Tokenizer
        writer.add_string(keys.CHAT_TEMPLATE if name == "default" else keys.CHAT_TEMPLATE_N.format(name=name), text)
    writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, [name for name in named if name != "default"])
    taken = (
        "takes 'default' unless another is asked for" if "default" in named else "takes none unless one is asked for"
    )
    return [f"chat templates: {', '.join(named)}; llama.cpp {taken} by name"]


def _without(writer: Any, why: str) -> list[str]:
    writer.add_tokenizer_model("no_vocab")
    return [f"no tokenizer is written ({why}); the file takes token ids only"]


def _pattern(content: dict[str, Any]) -> tuple[str | None, str]:
    """llama.cpp's name of how the tokenizer splits text, or None and why there is none."""
    model, splits = content["model"], content.get("pre_tokenizer") or {}
    if model["type"] != "BPE":
        return None, f"it is {model['type']}"
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":  # NFC leaves text as nearly everyone writes it
        return None, f"it normalizes text ({normalizer['type']})"
    steps = splits.get("pretokenizers", [splits])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        pattern = GPT2_PATTERN
    elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        pattern = DIGITS[0]
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex", "")
    else:
        pattern = ""
    if any(step.get("add_prefix_space") for step in steps):
        return None, "it puts a space before the text"
    known = NAMES.get(pattern) if pattern not in DIGITS else pattern
    return known, "it splits text by a pattern that llama.cpp has no known name for"


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids; ids that the tokenizer leaves free get a name of their own."""
    found: dict[int, tuple[str, int]] = {index: (text, NORMAL) for text, index in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        found[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    count = max(size, max(found) + 1)
    rows = [found.get(index, (f"[PAD{index}]", UNUSED)) for index in range(count)]
    return [text for text, _ in rows], [kind for _, kind in rows]
