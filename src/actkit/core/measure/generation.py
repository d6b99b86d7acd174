"""Text from a causal language model, token by token, and a check that a changed model still writes.

One loop over what gives the logits: a decoder (`core.measure.decoding`), or the model's forward pass with transformers'
own key-value cache: the prompt at once, then a token at a time, so a changed layer decodes here as it does anywhere.
Nothing about the model is changed while it runs: leave the iterator half read, or interrupt it, and the model is as it
was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.example import Inputs
from actkit.core.forward.hooks import evaluating
from actkit.core.forward.texts import check_text
from actkit.core.ground.errors import DataError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.offload import device_of
from actkit.core.layers.linear import pack_for_decode
from actkit.core.layers.prefill import decoding_only, dense_prompt
from actkit.core.measure.decoding import Decoder, choose_engine
from actkit.core.measure.sampling import LIKELIEST, Sampling
from actkit.core.store.pending import whole

_UNFINISHED = "�"  # what decoders write for bytes that are no character (yet)

# -- text --------------------------------------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = LIKELIEST,
    stop: str | int | Sequence[str | int] = (),
    chat: bool = False,
    cache: str | None = None,
    decode_only: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Write on after a prompt, in pieces that are whole characters as soon as they are known.

    A decoder writes if one takes the model, else transformers (`core.measure.decoding.choose_engine`). For float32
    models a decoder writes what transformers writes; for others it rounds elsewhere, so that texts may part. Nothing
    else of a generation config (penalties, bad words) is applied.

    Args:
        model: a language model; its weights may still be in its files (`core.store.pending`).
        tokenizer: its tokenizer.
        prompt: what it goes on from; an empty one starts from the token that begins a text.
        max_new_tokens: at most; the text also ends at the model's or tokenizer's end of a text.
        sampling: how each token is chosen; the likeliest by default.
        stop: texts that end it and are not returned, or token ids.
        chat: the prompt is what a user says, and the tokenizer's chat template stands around it.
        cache: how a decoder keeps keys and values, 'float32', 'bfloat16' or 'int8'; None for its own choice.
        decode_only: a decoder, which packs the weights first, takes them out of the model; the model is then of no
            other use.
        announce: called with which of the two writes, and why.

    Returns:
        The text, piece by piece.

    Raises:
        DataError: there is no chat template; prompt and new tokens exceed the model's context; or the prompt is no text
            (token ids go to `generate_ids`), holds a lone surrogate or does not fit its vocabulary.
        ValueError: a setting is out of bounds.
        UnsupportedModelError: the model generates nothing.
        NonFiniteError: a logit is NaN or Inf.
    """
    texts, end = ends_of(model, tokenizer, stop)
    ids = ids_of(model, tokenizer, prompt, max_new_tokens, chat=chat)  # checked before a decoder is built
    engine = choose_engine(model, capacity=len(ids) + max_new_tokens, decode_only=decode_only, cache=cache)
    if announce is not None:
        announce(engine.describe())
    if engine.decoder is None:
        model = whole(model)
        if decode_only:  # nothing else holds the model
            pack_for_decode(model)
    tokens = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end=end,
        decoder=engine.decoder,
    )
    return text_of(tokenizer, ids, (token for token in tokens if token not in end), texts)


def ends_of(
    model: nn.Module, tokenizer: Any, stop: str | int | Sequence[str | int]
) -> tuple[list[str], frozenset[int]]:
    """Return the texts and the tokens that end a text. Arguments and errors are those of `generate`."""
    stops = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [each for each in stops if isinstance(each, str)]
    if "" in texts:
        raise ValueError("stop: an empty text was given, which is found everywhere; give at least one character.")
    return texts, end_tokens(model, tokenizer) | {each for each in stops if isinstance(each, int)}


def ids_of(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool = False) -> list[int]:
    """Return the token ids of a prompt, checked. Arguments and errors are those of `generate`."""
    check_text(prompt, "prompt: it")
    ids = _encode_turn(tokenizer, prompt) if chat else _encode(model, tokenizer, prompt)
    _check(model, ids, max_new_tokens)
    return ids


def text_of(tokenizer: Any, prompt: list[int], tokens: Iterable[int], stops: list[str]) -> Iterator[str]:
    """Yield the text of tokens that follow a prompt, piece by piece, up to the first of some texts.

    Args:
        tokenizer: whose tokens they are.
        prompt: token ids.
        tokens: those that follow, without one that ends the text.
        stops: texts that end it, and are not part of it.
    """
    return _until(stops, _pieces(tokenizer, prompt, tokens))


def end_tokens(model: nn.Module, tokenizer: Any = None) -> frozenset[int]:
    """Return the tokens that end a text: of the generation config, else the config, else the tokenizer.

    Args:
        model: a language model.
        tokenizer: its tokenizer, or None.

    Returns:
        Token ids; there may be none.
    """
    for source in (*_configs(model), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(int(token) for token in (found if isinstance(found, Sequence | Tensor) else [found]))
    return frozenset()


def _configs(model: nn.Module) -> tuple[Any, Any]:
    """The configs in which a model may say how its texts begin and end."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(model, "generation_config", None), text


def _encode(model: nn.Module, tokenizer: Any, prompt: str) -> list[int]:
    # `verbose=False`: a prompt that is too long is an error of ours, which says what to do.
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if ids:
        return ids
    sources = (tokenizer, *_configs(model))
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            token = getattr(source, name, None)
            if isinstance(token, int):
                return [token]
    raise DataError(
        "prompt: it holds no token, and neither tokenizer nor model names one that begins or ends a text; give at "
        "least one word."
    )


def _encode_turn(tokenizer: Any, prompt: str) -> list[int]:
    """A user's turn in the chat template, up to the beginning of the answer."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "chat: the tokenizer has no chat template, so the model was not trained to answer; leave chat out, or "
            "take an instruct model, such as smollm2."
        )
    turn = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"chat: the tokenizer's chat template fails ({error}); leave chat out.") from error
    # The template writes the special tokens itself, also the one that begins a text.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pieces(tokenizer: Any, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece: a piece waits until its last bytes are a whole character.

    A token's text depends on what stands before it (a space, the first bytes of a character), so the tokens of the last
    piece are decoded again with each new one, and what is longer is the new piece.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    window, known = list(prompt), len(prompt)
    before = decode(window)
    for token in tokens:
        window.append(token)
        text = decode(window)
        if len(text) > len(before) and not text.endswith(_UNFINISHED):
            yield text[len(before) :]
            window = window[known:]
            known = len(window)
            before = decode(window)
    rest = decode(window)[len(before) :]  # bytes that never became a character
    if rest:
        yield rest


def _until(stops: list[str], pieces: Iterator[str]) -> Iterator[str]:
    """The pieces up to the first of some texts; what may be its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            held = held[: min(found)]
            break
        waiting = max((_overlap(held, stop) for stop in stops), default=0)
        if waiting < len(held):
            yield held[: len(held) - waiting]
            held = held[len(held) - waiting :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


# -- tokens ------------------------------------------------------------------------------------------------------------


def generate_ids(
    model: nn.Module,
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = LIKELIEST,
    end: Collection[int] | None = None,
    decoder: Decoder | None = None,
) -> Iterator[int]:
    """Return the tokens that a model writes after some, one by one.

    Everything is checked here, before the first is asked for. Settings and errors are as in `generate`.

    Args:
        model: a language model.
        input_ids: int64 [length] or [1, length].
        max_new_tokens: at most.
        sampling: how each token is chosen.
        end: the tokens that end it, which are yielded too; None for those of the model (`end_tokens`), () to go on to
            `max_new_tokens` in any case.
        decoder: computes the logits, of this model and with room for all tokens; None for transformers.

    Returns:
        The token ids, one by one.

    Raises:
        DataError: the shape is none of these, or the tokens do not fit the model.
        ValueError: a setting is out of bounds.
        UnsupportedModelError: the model generates nothing, or chooses a token that it does not embed.
        NonFiniteError: a logit is NaN or Inf.
    """
    prompt = torch.as_tensor(input_ids).tolist()
    if len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if not prompt or isinstance(prompt[0], list):
        raise DataError(
            f"input_ids: shape {list(torch.as_tensor(input_ids).shape)} was given; give one text with at least one "
            f"token, [length] or [1, length]."
        )
    _check(model, prompt, max_new_tokens)
    decode = _Transformers(model) if decoder is None else decoder
    embedded = Inputs.of(model).vocabulary
    ends = end_tokens(model) if end is None else frozenset(end)
    generator = sampling.generator()

    def tokens() -> Iterator[int]:
        new = prompt
        decode.reset()
        for _ in range(max_new_tokens):
            if embedded is not None and new[-1] >= embedded:
                raise UnsupportedModelError(
                    f"model: it chose token {new[-1]}, but embeds 0 to {embedded - 1}; its output layer is wider than "
                    f"its embedding, so cut one or extend the other."
                )
            token = sampling.choose(decode(new), generator)
            yield token
            if token in ends:
                return
            new = [token]

    return tokens()


class _Transformers:
    """Logits of the next token by the model's own forward pass, call by call; keeps the cache between calls."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = device_of(model)
        # The logits of the prompt's other tokens would be the largest tensor of all.
        keep_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if keep_last else {})
        self.training = any(module.training for module in model.modules())
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache: Any = None
        self.tokens: list[int] = []
        self.written = 0

    def __call__(self, new: Sequence[int]) -> Tensor:
        """new: the tokens since the last call; returns float32 [vocabulary]."""
        self.tokens += new
        ids = new if self.cache is not None else self.tokens  # a model that returns no cache reads all again
        # Around each pass, not around the loop: between two tokens the caller computes in the mode that it has set.
        mode = evaluating(self.model) if self.training else torch.no_grad()
        with mode, dense_prompt(self.model, len(new)):
            output = self.model(
                input_ids=torch.tensor([ids], device=self.device), past_key_values=self.cache, **self.options
            )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None and decoding_only(self.model):
            raise UnsupportedModelError(
                f"model: {type(self.model).__name__} keeps no cache, so that its prompt is read again with every "
                f"token, and prompts are to be read dense (prefill); apply the recipe without prefill."
            )
        self.written += 1
        logits = output.logits[0, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"logits: NaN or Inf at token {self.written} after the prompt; check the weights and scales of the "
                f"model, or compute in a wider dtype."
            )
        return logits


def _check(model: nn.Module, prompt: list[int], max_new_tokens: int) -> None:
    """Raise what `generate` says, before anything is computed."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} was given; give at least 1.")
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} does not write text; give a causal language model of transformers."
        )
    _check_fits(model, prompt, max_new_tokens)


def _check_fits(model: nn.Module, prompt: list[int], max_new_tokens: int) -> None:
    known = Inputs.of(model)
    context, embedded = known.context, known.vocabulary
    if context is not None and len(prompt) + max_new_tokens > context:
        room = context - len(prompt)
        advice = f"ask for at most {room} new tokens, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise DataError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {len(prompt)} tokens exceed the model's context of "
            f"{context}; {advice}."
        )
    if embedded is not None and not 0 <= min(prompt) <= max(prompt) < embedded:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise DataError(
            f"model and tokenizer vocabulary mismatch: the prompt holds token {wrong}, the model embeds 0 to "
            f"{embedded - 1}; use the model's own tokenizer."
        )


# -- the check ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationCheck:
    """Whether a model still writes.

    Attributes:
        passed: it does.
        reason: why it does not; empty if it passed.
        tokens: the greedy continuation of each prompt.
        agreeing_prefix: how many of its leading tokens are the original's, the mean over prompts; None without an
            original.
        distinct_share: distinct tokens over all, the smallest over prompts.
    """

    passed: bool
    reason: str
    tokens: tuple[tuple[int, ...], ...]
    agreeing_prefix: float | None
    distinct_share: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)


def check_generation(
    model: nn.Module, input_ids: Tensor, *, max_new_tokens: int = 32, reference: nn.Module | None = None
) -> GenerationCheck:
    """Let a model continue prompts greedily, past the end of a text too, and look at what comes.

    It passes if all logits are finite, every token is in the vocabulary, and no continuation is one token throughout,
    unless that of the reference is.

    Args:
        model: a language model.
        input_ids: int64 [length], or [prompts, length] without padding.
        max_new_tokens: of each prompt.
        reference: the original.

    Returns:
        Whether it passed, and what was written.

    Raises:
        DataError: a prompt does not fit the model, as in `generate_ids`.
        ValueError: a setting is out of bounds.
        NonFiniteError: the reference does not write either.
    """
    prompts = input_ids if input_ids.dim() == 2 else input_ids[None]
    written: list[tuple[int, ...]] = []
    agreeing: list[int] = []
    reasons: list[str] = []
    for number, prompt in enumerate(prompts, start=1):
        tokens, reason = _continue(model, prompt, max_new_tokens)
        original: list[int] | None = None
        if reference is not None:
            original, broken = (tokens, "") if reference is model else _continue(reference, prompt, max_new_tokens)
            if broken:
                raise NonFiniteError(f"reference: it does not write either: {broken}")
            pairs = list(zip(tokens, original))
            agreeing.append(next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        stuck = max_new_tokens > 1 and len(tokens) == max_new_tokens and len(set(tokens)) == 1
        if stuck and not (original is not None and len(set(original)) == 1):
            reason = f"prompt {number} is continued by token {tokens[0]} {max_new_tokens} times over"
        written.append(tuple(tokens))
        reasons.append(reason)
    shares = [len(set(tokens)) / len(tokens) if tokens else 0.0 for tokens in written]
    reason = next(filter(None, reasons), "")
    prefix = sum(agreeing) / len(agreeing) if agreeing else None
    return GenerationCheck(not reason, reason, tuple(written), prefix, min(shares))


def _continue(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[list[int], str]:
    """The greedy continuation as far as it goes, and why it goes no further."""
    tokens: list[int] = []
    steps = generate_ids(model, prompt, max_new_tokens=new_tokens, end=())
    try:
        for token in steps:
            tokens.append(token)
    except (NonFiniteError, UnsupportedModelError) as error:
        return tokens, str(error)
    embedded = Inputs.of(model).vocabulary
    if embedded is not None and tokens[-1] >= embedded:  # chosen last, so never fed back
        return tokens, f"model: it chose token {tokens[-1]}, but embeds 0 to {embedded - 1}"
    return tokens, ""
