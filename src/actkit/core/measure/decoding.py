"""What decodes a model: a decoder of the entry-point group `actkit.decoders`, or transformers' own forward pass.

    engine = choose_engine(model, capacity=len(prompt) + 64)
    engine.describe()  # 'decoder, 2 threads', or 'transformers (why not the decoder)'

A decoder computes the logits another way, from a copy of the weights that is made once. It calls no module's forward
pass. So a model with a hook, or with a module that a decoder does not know, is left to transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from actkit.core.forward.named_functions import unknown_function
from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError, RecipeError, UnsupportedModelError
from actkit.core.layers.attention_function import AttentionFunction
from actkit.core.layers.curve import curve_of
from actkit.core.store.pending import pending_of

# The packages of modules whose computation a decoder may know. A class of another package says by an attribute
# `decodes_as` what it computes, and a decoder says whether it knows that (`supports`).
KNOWN = (
    *("torch.nn.", "transformers.", "actkit.core.layers.linear", "actkit.core.layers.weights"),
    *("actkit.core.layers.selections", "actkit.core.layers.activations", "actkit.core.layers.low_rank_weight"),
)
PACKED = "packed"  # what a model says by `decodes_as` that only a decoder runs


class Decoder(Protocol):
    """What a class of the group `actkit.decoders` offers: logits token by token, from a cache of its own.

    It is made by `Class(model, capacity=tokens, decode_only=False)`. With `decode_only` the model is needed for nothing
    else, so its weights may go. Of a model that `core.store.opening` opened it reads the weights itself, or says in
    `supports` that it does not.

    It may also have a method `batch(sequences)`, which `core.measure.texts` writes several texts at once with.

    Attributes:
        threads: that it runs with.

    Raises:
        MemoryLimitError: it does not fit into memory.
        UnsupportedModelError: it cannot be made for this model.
        ValueError: it cannot be made with this capacity.
    """

    threads: int

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Say why it cannot decode a model, or None."""

    def reset(self) -> None:
        """Forget all tokens."""

    def close(self) -> None:
        """Give all memory back; it decodes no more. It may be closed twice."""

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Return the logits of the token after some more tokens: float32 [vocabulary]."""


@dataclass(frozen=True)
class Engine:
    """What decodes a model.

    Attributes:
        decoder: None for transformers.
        reason: why there is no decoder; '' if there is one.
    """

    decoder: Decoder | None
    reason: str = ""

    @property
    def name(self) -> Literal["decoder", "transformers"]:
        """Which of the two it is."""
        return "transformers" if self.decoder is None else "decoder"

    def describe(self) -> str:
        """Say it: 'decoder, 2 threads', or 'transformers (why not the decoder)'."""
        if self.decoder is None:
            return f"transformers ({self.reason})"
        return f"decoder, {self.decoder.threads} thread{'s' if self.decoder.threads > 1 else ''}"


def choose_engine(model: nn.Module, *, capacity: int, decode_only: bool = False, cache: str | None = None) -> Engine:
    """Return the first registered decoder that takes a model and fits into memory, else transformers.

    Args:
        model: a language model; of one whose weights are still in its files (`core.store.pending`), transformers runs
            what `whole(model)` loads.
        capacity: tokens of one text, for which the decoder is ready.
        decode_only: a decoder may take the weights out of the model.
        cache: how a decoder keeps keys and values; None for its own choice.

    Returns:
        What decodes the model, and why it is not a decoder.

    Raises:
        RecipeError: a decoder does not import, or does not say what it supports.
        ActkitError: with `decode_only`, what a decoder raises after it began to take weights.
        ValueError: the same.
        UnsupportedModelError: `cache` was given, and no decoder takes the model.
    """
    reasons = []
    settings: dict[str, Any] = {"capacity": capacity, "decode_only": decode_only}
    settings |= {} if cache is None else {"cache": cache}
    for name in registry.decoder_names():
        decoder = registry.decoder_class(name)
        if not callable(getattr(decoder, "supports", None)):
            raise RecipeError(
                f"{registry.DECODERS}: {name!r} has no supports(model); `core.measure.decoding` says what it is."
            )
        reason = decoder.supports(model) or _own_forward(model)
        if reason is None:
            try:
                return Engine(decoder(model, **settings))
            except (ActkitError, ValueError) as error:
                if getattr(model, "decodes_as", None) == PACKED:
                    raise  # nothing else runs it
                if pending_of(model) is None and any(tensor.is_meta for tensor in model.state_dict().values()):
                    raise  # it has taken weights out of the model, which transformers cannot run any more
                reason = str(error)
        reasons.append(reason.rstrip("."))
    reason = "; ".join(dict.fromkeys(reasons)) or "no decoder is installed"
    if cache is not None:
        raise UnsupportedModelError(f"cache: {cache!r} was given, and no decoder writes ({reason}); leave it out.")
    return Engine(None, reason)


def _own_forward(model: nn.Module) -> str | None:
    """What a model computes that its weights do not tell, or None."""
    function = unknown_function(model, known=(AttentionFunction,))  # whether a decoder takes ours, it has said
    if function is not None:
        return function
    for path, module in model.named_modules():
        where = path or "the model"
        known = type(module).__module__.startswith(KNOWN) or hasattr(type(module), "decodes_as")
        if not known and curve_of(module) is None:
            return f"{where} is a {type(module).__name__}, whose forward pass no decoder calls"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves hooks behind that only record.
        if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            return f"{where} has a hook, which no decoder calls"
        if "forward" in vars(module):
            return f"{where} has another forward pass than its class, which no decoder calls"
    return None
