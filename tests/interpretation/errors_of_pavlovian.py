"""How a user meets the errors of conditioning: one function per way, which raises it."""

from __future__ import annotations

import torch

from actkit.interpretation.pavlovian.attention import ConditioningMemory, PavlovianAttention
from actkit.interpretation.pavlovian.capacity import capacity_curve, capacity_exponent, heads_needed, reliability
from actkit.interpretation.pavlovian.head_memory import head_memory
from actkit.interpretation.pavlovian.protocols import generalisation, run_protocol
from actkit.interpretation.pavlovian.rules import Rule
from actkit.testing import tiny_batches, tiny_model
from error_proofs import proof

proof(lambda p: Rule("pavlov"))  # type: ignore[arg-type]


proof(lambda p: Rule("delta", 2.0))


proof(lambda p: Rule("trace"))


proof(lambda p: Rule("hebb", trace=0.5))


proof(lambda p: PavlovianAttention(8, 3))


proof(lambda p: PavlovianAttention(8, 2, phi="exp"))  # type: ignore[arg-type]


proof(lambda p: PavlovianAttention(8, 2, normalise=True))


proof(lambda p: PavlovianAttention(8, 2, "delta", phi="relu"))


proof(lambda p: PavlovianAttention(8, 2, "oja", mode="chunk"))


proof(lambda p: ConditioningMemory(0, 1))


proof(lambda p: ConditioningMemory(2, 1).associate(torch.ones(3), torch.ones(1)))


proof(lambda p: run_protocol("sleeping"))


proof(lambda p: run_protocol("blocking", salience={"C": 1.0}))


proof(lambda p: generalisation([1.5]))


proof(lambda p: capacity_curve("hebb", 4, [1], criterion="best"))  # type: ignore[arg-type]


proof(lambda p: capacity_curve("delta", 4, [1, 2]))


proof(lambda p: capacity_curve("hebb", 4, [2, 1]))


proof(lambda p: capacity_curve("hebb", 4, [5], keys="orthogonal"))


proof(lambda p: capacity_curve("hebb", 4, [1, 2]).capacity())


proof(lambda p: capacity_exponent([4], [1.0]))


proof(lambda p: reliability(0.5, 0, 1))


proof(lambda p: heads_needed(1.0, 2, 0.1))


proof(lambda p: head_memory(tiny_model("llama"), []))


proof(lambda p: head_memory(tiny_model("mlp"), tiny_batches("mlp")))


proof(lambda p: head_memory(tiny_model("llama"), tiny_batches("llama"), blocks=(9,)))


proof(lambda p: head_memory(tiny_model("llama", attn_implementation="flex_attention"), tiny_batches("llama")))
