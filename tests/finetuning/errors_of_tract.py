"""How a user meets the errors of `tract`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import build
from torch import nn

from actkit.finetuning.tract import Tract, tract_gradient
from error_proofs import proof

proof(lambda p: Tract().attach(build("llama")))


proof(lambda p: Tract().attach(nn.ReLU()))


proof(lambda p: Tract().attach(nn.Linear(2, 2).requires_grad_(False)))


proof(lambda p: tract_gradient(torch.zeros(2, 3), torch.zeros(2, 4), ridge=0.0))


proof(lambda p: tract_gradient(torch.zeros(2, 3), torch.zeros(3, 4)))
