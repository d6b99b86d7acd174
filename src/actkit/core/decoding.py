"""What decodes a model: a decoder of the entry-point group `actkit.decoders`, or transformers' own forward pass.

    engine = choose_engine(model, capacity=len(prompt) + 64)
    engine.describe()  # 'decoder, 2 threads', or 'transformers (why not the decoder)'

A decoder computes the logits another way, from a copy of the weights that is made once. It calls no module's forward
pass, so a model in which something computes in a way of its own (a hook, another module) is left to transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from actkit.core import registry
from actkit.core.errors import ActkitError, RecipeError
from actkit.core.named_functions import unknown_function

# Where the classes of modules come from whose computation a decoder may know. Another class says by an attribute
# `decodes_as` what it computes, and a decoder whether it knows that (`supports`).
KNOWN = ("torch.nn.", "transformers.", "actkit.core.linear", "actkit.core.activations")


class Decoder(Protocol):
    """What a class of the group `actkit.decoders` offers: logits token by token, from a cache of its own.

    It is made by `Class(model, capacity=tokens, decode_only=False)`; decode_only: the model is needed for nothing else,
    so its weights may go. It raises MemoryLimitError, UnsupportedModelError or ValueError where
    it cannot be made. threads: that it runs with.
    """

    threads: int

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why it cannot decode a model, or None."""

    def reset(self) -> None:
        """Forget all tokens."""

    def close(self) -> None:
        """Give all memory back; it decodes no more. More than once is fine."""

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Logits of the token after some more tokens: float32 [vocabulary]."""


@dataclass(frozen=True)
class Engine:
    """What decodes a model. decoder: None for transformers. reason: why there is no decoder, '' where there is one."""

    decoder: Decoder | None
    reason: str = ""

    @property
    def name(self) -> Literal["decoder", "transformers"]:
        """Which of the two it is."""
        return "transformers" if self.decoder is None else "decoder"

    def describe(self) -> str:
        """'decoder, 2 threads', or 'transformers (why not the decoder)'."""
        if self.decoder is None:
            return f"transformers ({self.reason})"
        return f"decoder, {self.decoder.threads} thread{'s' if self.decoder.threads > 1 else ''}"


def choose_engine(model: nn.Module, *, capacity: int, decode_only: bool = False) -> Engine:
    """The first registered decoder that takes a model and fits into memory, ready for `capacity` tokens of one text;
    transformers where there is none. decode_only: a decoder may take the weights out of the model.

    Raises RecipeError for a decoder that does not import or says nothing on what it supports, and with decode_only what
    a decoder raises after it began to take weights.
    """
    reasons = []
    for name in registry.decoder_names():
        decoder = registry.decoder_class(name)
        if not callable(getattr(decoder, "supports", None)):
            raise RecipeError(f"{registry.DECODERS}: {name!r} has no supports(model); `core.decoding` says what it is.")
        reason = decoder.supports(model) or _own_forward(model)
        if reason is None:
            try:
                return Engine(decoder(model, capacity=capacity, decode_only=decode_only))
            except (ActkitError, ValueError) as error:
                if any(tensor.is_meta for tensor in model.state_dict().values()):
                    raise  # it has taken weights out of the model, which transformers cannot run any more
                reason = str(error)
        reasons.append(reason.rstrip("."))
    return Engine(None, "; ".join(dict.fromkeys(reasons)) or "no decoder is installed")


def _own_forward(model: nn.Module) -> str | None:
    """Where a model computes what its weights do not tell, or None."""
    function = unknown_function(model)
    if function is not None:
        return function
    for path, module in model.named_modules():
        where = path or "the model"
        if not type(module).__module__.startswith(KNOWN) and not hasattr(type(module), "decodes_as"):
            return f"{where} is a {type(module).__name__}, whose forward pass no decoder calls"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves hooks behind that only record.
        if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks):
            return f"{where} has a hook, which no decoder calls"
        if "forward" in vars(module):
            return f"{where} has another forward pass than its class, which no decoder calls"
    return None
