"""Round-to-nearest floats: weights in 8 or 4 bits with a sign, an exponent and a mantissa.

    w' = Q(w / scale) * scale      (core/grids/floats.py)

    fp8      E4M3 as torch.float8_e4m3fn, a float32 scale for each row
    fp4      E2M1, the same
    mxfp4    E2M1, a power of two for each 32 inputs (OCP)
    nvfp4    E2M1, an E4M3 for each 16 inputs, and one float32 for the layer

When to use it: for machines that multiply these formats, or to see what they cost before one is bought. On smollm2
(perplexity 24.84 in bf16, on 2,048 tokens) fp8 gives 25.33, where integers of 8 bits by rows give 24.96; nvfp4 30.46,
fp4 in groups of 64 32.18, mxfp4 34.54, fp4 by rows 37.76, where integers of 4 bits in groups of 64 give 32.71.
`llm_fp4` searches ranges, and `rtn` has zero points and kernels.
Cost: one pass over the weights, no data. The codes are widened where they are multiplied: smaller, and not faster.
Settled here: scales of fp8 and fp4 take 16 bits in groups (`group_size`), float32 by whole rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from actkit.core.grids.floats import FloatGrid, fp4, fp8, mxfp4, nvfp4
from actkit.quantization.rtn import RoundedWeights

FIXED = {"mxfp4": mxfp4(), "nvfp4": nvfp4()}


class RoundFloats(RoundedWeights):
    """Round the weights of linear layers to floats of few bits.

    Attributes:
        format: 'fp8', 'fp4', 'mxfp4' or 'nvfp4'.
        group_size: inputs per scale, -1 for a whole row, 'auto' the largest of 128, 64, 32 and 16 that divides it; the
            formats 'mxfp4' and 'nvfp4' have their own.
        embedding: how embedding and head are rounded, to integers; None leaves them.

    Raises:
        ValueError: a value is out of bounds, or a group size is given for a format that has its own.
    """

    format: Literal["fp8", "fp4", "mxfp4", "nvfp4"] = "fp8"
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = -1

    not_proposed: ClassVar[str] = "floats are widened where they are multiplied; integers of as many bits have a kernel"

    @model_validator(mode="after")
    def _group_is_the_formats(self) -> Self:
        if self.format in FIXED and self.group_size not in (-1, FIXED[self.format].group_size):
            own = FIXED[self.format].group_size
            raise ValueError(f"group_size: {self.group_size} was given, {self.format} has {own}; leave it out")
        return self

    @property
    def grid(self) -> FloatGrid:
        """The grid that weights are rounded to."""
        if self.format in FIXED:
            return FIXED[self.format]
        grid = (fp8 if self.format == "fp8" else fp4)(self.group_size)
        return grid if self.group_size == -1 else replace(grid, scale_dtype="float16")
