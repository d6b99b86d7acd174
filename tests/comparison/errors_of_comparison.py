"""How a user meets the errors of `comparison`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

from actkit.comparison.compare import compare_functions
from actkit.comparison.widths import nearest
from error_proofs import proof


def compared(names: str, on: str = "digits-mlp", **settings: Any) -> Any:
    return compare_functions(names, on=on, progress=False, **settings)


proof(lambda p: compared("silu,act_linear"))


proof(lambda p: compared("silu,relu,silu"))


proof(lambda p: compared("silu,max", on="text"))


proof(lambda p: compared("silu,bspline_kan", width=8))


proof(lambda p: compared("group_rational,silu", width=9))


proof(lambda p: nearest(lambda width: None, 100))


proof(lambda p: compared("silu,relu", resume=True))


proof(lambda p: compared("silu,relu", seeds=1))


proof(lambda p: compared("silu,relu", on="digits"))


proof(lambda p: compared("silu,sillu"))
