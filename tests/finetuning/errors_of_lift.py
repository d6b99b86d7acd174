"""How a user meets the errors of `lift`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import nn

from actkit.core.recipe.runner import apply
from actkit.finetuning.lift.lift import Lift, LiftAdamW
from actkit.finetuning.lift.principal import principal_mask
from actkit.finetuning.lift.probe import weight_probe
from actkit.finetuning.lift.shira import lift_shira
from actkit.quantization.rtn import RoundToNearest
from error_proofs import Place, missing, proof

WEIGHT = torch.randn(4, 5)

proof(lambda p: principal_mask(WEIGHT, 2))


proof(lambda p: principal_mask(WEIGHT, 2, k=0))


proof(lambda p: principal_mask(WEIGHT, 0, k=1))


proof(lambda p: principal_mask(WEIGHT[0], 2, k=1))


proof(lambda p: LiftAdamW([nn.Parameter(WEIGHT)], lora_rank=0))


proof(lambda p: LiftAdamW([nn.Parameter(WEIGHT.bfloat16())]))


proof(lambda p: LiftAdamW([nn.Parameter(WEIGHT)]).step())


proof(lambda p: Lift().attach(build("mlp"), torch.optim.AdamW([nn.Parameter(WEIGHT)])))


proof(lambda p: Lift(exclude=("*",)).trainable(build("mlp")))


proof(lambda p: Lift().trainable(apply(build("llama"), RoundToNearest(bits=4, group_size=8), progress=False).model))


proof(lambda p: lift_shira(build("gpt2"), 1, 2))


proof(lambda p: weight_probe(build("mlp"), {}, lambda model: 0.0))


@proof
def shira_without_peft(p: Place) -> None:
    missing("peft", p)
    lift_shira(build("mlp"), 1, 2)
