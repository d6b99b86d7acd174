"""How a user meets the errors of `finetuning`: one function per way, which raises it."""

from __future__ import annotations

from tiny_models import batches, build

from actkit.finetuning.low_rank_training import train_low_rank
from error_proofs import HOST, missing, proof

proof(
    lambda p: (
        missing("peft", p),
        train_low_rank(build("llama"), [HOST], validation=batches("llama"), roles=("gate",), steps=1),
    )
)
