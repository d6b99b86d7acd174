"""What the speed of candidates is measured on: a prompt, new tokens, and rows at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from actkit.core.forward.example import Inputs

PROMPT, NEW_TOKENS = 128, 32
BATCH = 8  # rows of a model that runs one pass instead of decoding, and of throughput


@dataclass(frozen=True)
class Workload:
    """What a user says of it.

    Attributes:
        prompt: tokens before those that are timed; None for 128, or half of the context if that is less.
        max_new_tokens: that are timed; None for 32, or half of the context if that is less.
        batch: rows at a time; None for 1, or 8 if the model decodes no text.
    """

    prompt: int | None = None
    max_new_tokens: int | None = None
    batch: int | None = None

    def given(self) -> dict[str, int]:
        """What is not left to the search."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self, *, speed: bool) -> None:
        """Raise ValueError for what cannot be measured on any model.

        Args:
            speed: whether it is measured.

        Raises:
            ValueError: a number is too small, or speed is not measured.
        """
        unmeasured = "" if speed else " with speed=False (--no-speed)"
        if self.prompt is not None and (self.prompt < 1 or not speed):
            raise ValueError(
                f"prompt: {self.prompt} was given{unmeasured}; give the tokens before those that are timed, such as "
                f"2048, and let speed be measured."
            )
        if self.max_new_tokens is not None and (self.max_new_tokens < 2 or not speed):
            raise ValueError(
                f"max_new_tokens: {self.max_new_tokens} was given{unmeasured}; give 2 or more, such as 64, and let "
                f"speed be measured."
            )
        if self.batch is not None and (self.batch < 1 or not speed):
            raise ValueError(
                f"batch: {self.batch} was given{unmeasured}; give the rows that are timed together, such as 8, and let "
                f"speed be measured."
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for what this model cannot be measured on.

        Args:
            model: that is searched.

        Raises:
            ValueError: it decodes no text, or its context is shorter.
        """
        inputs = Inputs.of(model)
        for name, value in (("prompt", self.prompt), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and not inputs.causal:
                raise ValueError(
                    f"{name}: {value} was given, and {type(model).__name__} decodes no text; leave it out."
                )
        if inputs.context is None:
            return
        room = inputs.context - (self.max_new_tokens or 2)
        if self.prompt is not None and self.prompt > room:
            raise ValueError(
                f"prompt: {self.prompt} was given; give 1 to {room}, as the model's context is {inputs.context}."
            )
        if self.max_new_tokens is not None and room < 1:
            raise ValueError(
                f"max_new_tokens: {self.max_new_tokens} was given; give 2 to {inputs.context - 1}, as the model's "
                f"context is {inputs.context}."
            )

    def tokens(self, context: int | None) -> tuple[int, int]:
        """Return the tokens of the prompt and the new ones, as they fit a context; None for one without end."""
        if context is None:
            return self.prompt or PROMPT, self.max_new_tokens or NEW_TOKENS
        if self.prompt is not None:
            return self.prompt, self.max_new_tokens or min(NEW_TOKENS, context - self.prompt)
        new = self.max_new_tokens or max(2, min(NEW_TOKENS, context // 2))
        return max(1, min(PROMPT, context // 2, context - new)), new
