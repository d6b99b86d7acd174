"""How a user meets the errors of core, the room `grids`: one function per way, which raises it."""

from __future__ import annotations

from actkit.core.grids.floats import FloatGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.ranges import Percentile, Shrunk
from error_proofs import proof

proof(lambda p: FloatGrid(6, 1))


proof(lambda p: FloatGrid(2, 1, reserved="inf"))


proof(lambda p: IntegerGrid(4, scale_dtype="e8m0"))


proof(lambda p: Percentile(99.9))


proof(lambda p: Shrunk(1.5))
