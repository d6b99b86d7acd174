"""The tokenizer of a GGUF file, built as it says: byte-level BPE, or SentencePiece's BPE with bytes as a fallback.

    byte-level       merges as listed; text is cut by a pattern that the file names
    SentencePiece    the two neighbours are merged whose union has the largest score, ties from the left

A pattern that is not known here is an error: another one would give other tokens, and nobody would notice.
"""

from __future__ import annotations

from typing import Any

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.progress import track
from actkit.gguf.file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, as GGUF numbers them
SPACE = "\u2581"  # how SentencePiece writes a space

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # GPT-2's pattern, each digit for itself
# llama.cpp's name of a pattern -> the pattern. The writer takes the first name of each.
PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "phi-2": GPT2_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "llama-v3": LLAMA3_PATTERN,
    "deepseek-r1-qwen": QWEN2_PATTERN,
    **dict.fromkeys(DIGITS, GPT2_PATTERN),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not merged, and texts begin with <bos>
# Tokens that end a turn of a chat whatever the file's settings say, as llama.cpp takes them.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")


def build_tokenizer(file: GgufFile) -> Any | None:
    """Build the tokenizer of a file as a fast tokenizer of transformers, with its chat template.

    Args:
        file: the open file.

    Returns:
        The tokenizer; None if the file has none.

    Raises:
        CheckpointError: the kind of tokenizer or its pattern is not known.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    settings = file.settings
    kind = settings.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path}: its tokenizer is of the kind {kind!r}, and actkit builds gpt2 (byte-level BPE) and llama "
            f"(SentencePiece); load the model's original checkpoint."
        )
    tokens: list[str] = file.setting("tokenizer.ggml.tokens")
    kinds: list[int] = settings.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    pattern = settings.get("tokenizer.ggml.pre", "")
    if kind == "gpt2":
        found = _byte_level(file, tokens, pattern)
    else:
        found = _sentencepiece(file, tokens, kinds)
    marked = [(token, kind) for token, kind in zip(tokens, kinds) if kind in (CONTROL, USER_DEFINED)]
    found.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == CONTROL])
    found.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in marked if k == USER_DEFINED])

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {short: settings.get(f"tokenizer.ggml.{name}_token_id") for short, name in names.items()}
    special = {f"{short}_token": tokens[at] for short, at in ids.items() if at is not None and at < len(tokens)}
    begins = settings.get("tokenizer.ggml.add_bos_token", kind == "llama" or pattern in WHOLE_WORDS)
    ends = settings.get("tokenizer.ggml.add_eos_token", False)
    before = special.get("bos_token") if begins else None
    after = special.get("eos_token") if ends else None
    if before is not None or after is not None:
        marks = [(token, tokens.index(token)) for token in dict.fromkeys((before, after)) if token is not None]
        single, second = ([before] if before else []), ([after] if after else [])
        found.post_processor = processors.TemplateProcessing(
            single=[*single, "$A", *second],
            pair=[*single, "$A", *second, *(f"{t}:1" for t in single), "$B:1", *(f"{t}:1" for t in second)],
            special_tokens=marks,
        )
    template: Any = settings.get("tokenizer.chat_template")
    start = "tokenizer.chat_template."
    named = {key.removeprefix(start): text for key, text in settings.items() if key.startswith(start)}
    if named:
        template = {**({} if template is None else {"default": template}), **named}
    return PreTrainedTokenizerFast(
        tokenizer_object=found, chat_template=template, clean_up_tokenization_spaces=False, **special
    )


def end_tokens(file: GgufFile) -> list[int]:
    """The ids that end a text or a turn: as the file names them, and those that llama.cpp knows by their text."""
    settings = file.settings
    named = [settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens: list[str] = settings.get("tokenizer.ggml.tokens", [])
    kinds = settings.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    named += [at for at, token in enumerate(tokens) if token in ENDS and kinds[at] in (CONTROL, USER_DEFINED)]
    return list(dict.fromkeys(at for at in named if at is not None))


def _byte_level(file: GgufFile, tokens: list[str], pattern: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if pattern not in PATTERNS:
        raise CheckpointError(
            f"{file.path}: its tokenizer cuts text by the pattern {pattern!r}, and actkit knows {', '.join(PATTERNS)}; "
            f"load the model's original checkpoint."
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in file.setting("tokenizer.ggml.merges")]
    found = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pattern in WHOLE_WORDS))
    if PATTERNS[pattern] == GPT2_PATTERN:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pattern in DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    found.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    found.decoder = decoders.ByteLevel()
    return found


def _sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[file.settings.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = all_merges(tokens, kinds, file.setting("tokenizer.ggml.scores"))
    found = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = file.settings.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    found.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    found.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return found


def all_merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Find every way to make a token of two others, best first. The file of a SentencePiece model lists no merges.

    Args:
        tokens: the text of each id.
        kinds: the type of each, as GGUF numbers them.
        scores: of each; the larger, the earlier it is made.

    Returns:
        Pairs; those of one token stand together, the shortest first part first.
    """
    ordinary = {token: at for at, (token, kind) in enumerate(zip(tokens, kinds)) if kind in (NORMAL, USER_DEFINED)}
    order = sorted((at for token, at in ordinary.items() if len(token) > 1), key=lambda at: (-scores[at], at))
    found = []
    for at in track(order, "Reading the vocabulary"):
        token = tokens[at]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ordinary and right in ordinary:
                found.append((left, right))
    return found
