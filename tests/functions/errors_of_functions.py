"""How a user meets the errors of `functions`: one function per way, which raises it."""

from __future__ import annotations

from tiny_models import build
from torch import nn

from actkit.functions.swap import Swap
from error_proofs import proof, run

proof(lambda p: Swap.of(build("mlp"), "*", "no_function"))


proof(lambda p: run([Swap(where=("act",), new="silu"), Swap(where=("act",), new="relu")], kind="conv"))


proof(lambda p: Swap.of(build("mlp"), nn.GELU, "relu"))


proof(lambda p: run(Swap(where=("silu*x",), new="relu")))


proof(lambda p: run(Swap(where=("model.layers.0.mlp",), new="relu")))


proof(lambda p: Swap.of(build("mlp"), "*", lambda: 3))


proof(lambda p: Swap.of(build("mlp"), "*", 3))
