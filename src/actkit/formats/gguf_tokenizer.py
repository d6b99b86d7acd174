"""The tokenizer of a GGUF file: byte-level BPE, which llama.cpp splits by a pattern that it knows by name."""

from __future__ import annotations

import json
import re
from typing import Any

from actkit.gguf.tokenizer import CONTROL, DIGITS, GPT2_PATTERN, NORMAL, PATTERNS, UNUSED, USER_DEFINED

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
    pattern, why = _pattern(content)
    if pattern is None:
        return _without(writer, why)
    tokens, kinds = _tokens(content, config.vocab_size)
    if len(tokens) != config.vocab_size:
        return _without(writer, f"it has {len(tokens)} tokens, the model {config.vocab_size}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    return _add_templates(writer, getattr(tokenizer, "chat_template", None))


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
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None, f"it is {model['type']}{' with bytes as a fallback' if model.get('byte_fallback') else ''}"
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
