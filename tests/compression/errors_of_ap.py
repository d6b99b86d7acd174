"""How a user meets the errors of `ap` and `dead_neuron_rate`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import batches, build
from torch import nn

from actkit.compression.ap.ap import ActivatingPruner, Ap, ap_select
from actkit.compression.ap.dead_neurons import dead_neuron_rate
from error_proofs import proof

FOUR, ALL = torch.ones(4), torch.ones(4, dtype=torch.bool)

proof(lambda p: ap_select(FOUR, FOUR, ALL, 2))


proof(lambda p: ActivatingPruner(build("mlp"), share=0.1, activating=0.2))


proof(lambda p: ActivatingPruner(build("mlp"), base="x"))


proof(lambda p: ActivatingPruner(build("mlp"), norms={"x": "y"}))


proof(lambda p: ActivatingPruner(build("mlp"), base=lambda weights, alive, number: {}).prune())


proof(lambda p: ActivatingPruner(build("mlp"), base=lambda weights, alive, number: alive).prune())


proof(lambda p: Ap().attach(build("mlp")).load_state_dict({"cycle": 0}))


proof(lambda p: dead_neuron_rate(build("llama"), batches("llama"), progress=False))


proof(lambda p: dead_neuron_rate(build("llama"), batches("llama"), eps=0.1, layers=["x"], progress=False))


proof(lambda p: dead_neuron_rate(nn.Sequential(nn.Linear(3, 2)), [torch.rand(2, 3)], progress=False))


proof(lambda p: dead_neuron_rate(build("llama"), [], progress=False))


proof(lambda p: dead_neuron_rate(build("llama"), batches("llama"), granularity="row"))  # type: ignore[arg-type]
