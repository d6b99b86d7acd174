"""Which inputs of a linear layer are read: registered by `kind` under the entry-point group `actkit.selections`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from actkit import kernels
from actkit.core.ground import registry
from actkit.core.ground.largest import largest
from actkit.core.layers.keeps_dtype import KeepsDtype

Prefill = Literal["sparse", "dense"]


class Selection(KeepsDtype):
    """Which inputs are read: those with a large |x| * score.

    Args:
        score: float32 [in], or None for 1.

    Attributes:
        prefill: 'dense' if it is meant for decoding only, so that what decodes reads all inputs of a prompt
            (`core.layers.prefill`). A plain forward pass selects the inputs of every token either way.
    """

    kind: ClassVar[str]
    score: Tensor | None
    prefill: Prefill = "sparse"

    def __init__(self, score: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("score", None if score is None else score.detach().float())

    def scored(self, x: Tensor) -> Tensor:
        """|x| * score in float32 (16-bit products under- and overflow), shape of x."""
        magnitude = x.detach().float().abs()
        return magnitude if self.score is None else magnitude * self.score

    def mask(self, x: Tensor) -> Tensor:
        """Which entries of x [..., in] are kept: bool, shape of x. NaN is kept, so that it is seen."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] with what is not selected set to zero."""
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if not plain and x.device.type == "cpu" and x.dtype in kernels.MASKED:
            given = self.kernel_arguments(x.shape[-1])
            if given is not None:
                return kernels.masked_inputs(x, self.score, **given)
        return torch.where(self.mask(x), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def kernel_arguments(self, in_features: int) -> dict[str, Any] | None:
        """Return what `kernels.masked_inputs` is given besides x and the score, or None if it cannot say this."""
        return None

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them, as a checkpoint keeps them."""
        prefill = {} if self.prefill == "sparse" else {"prefill": self.prefill}
        return {"kind": self.kind, "score": self.score is not None, **prefill}

    @staticmethod
    def read(spec: dict[str, Any], in_features: int) -> Selection:
        """Make the selection that `spec` described, of whichever kind; its values come from a file."""
        made: Selection = registry.selection_class(spec["kind"]).from_spec(spec, in_features)
        made.prefill = spec.get("prefill", "sparse")
        return made

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> Self:
        """One of the right structure whose values come from a file."""
        raise NotImplementedError

    @staticmethod
    def _score_of(spec: dict[str, Any], in_features: int) -> Tensor | None:
        return torch.ones(in_features) if spec["score"] else None


def check_prefill(prefill: Prefill, name: str, value: float | None) -> None:
    """Refuse a dense prefill where a transform's setting drops nothing at all.

    Args:
        prefill: the setting.
        name: of the setting that says how much is dropped.
        value: its value.

    Raises:
        ValueError: it is 0.
    """
    if prefill == "dense" and value == 0:
        raise ValueError(f"prefill: 'dense' was given with {name}={value:g}, which drops nothing; leave prefill out")


class Threshold(Selection):
    """Keeps input i if |x_i| * score_i > threshold."""

    kind = "threshold"
    threshold: Tensor

    def __init__(self, threshold: float, score: Tensor | None = None) -> None:
        super().__init__(score)
        if not threshold >= 0:
            raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more.")
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float32))

    def mask(self, x: Tensor) -> Tensor:
        return ~(self.scored(x) <= self.threshold)

    def kernel_arguments(self, in_features: int) -> dict[str, Any] | None:
        return {"threshold": float(self.threshold)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> Threshold:
        return cls(0.0, cls._score_of(spec, in_features))


class TopK(Selection):
    """Keeps the k inputs of each row with the largest |x_i| * score_i; of equal ones the first."""

    kind = "top_k"

    def __init__(self, k: int, score: Tensor | None = None) -> None:
        super().__init__(score)
        if k < 0:
            raise ValueError(f"k: {k} was given; give 0 or more.")
        self.k = k

    def mask(self, x: Tensor) -> Tensor:
        return largest(self.scored(x), self.k)

    def kernel_arguments(self, in_features: int) -> dict[str, Any] | None:
        return {"k": min(self.k, in_features)}

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "k": self.k}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], in_features: int) -> TopK:
        return cls(spec["k"], cls._score_of(spec, in_features))
