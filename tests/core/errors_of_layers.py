"""How a user meets the errors of core, the room `layers`: one function per way, which raises it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import build
from torch import nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import Activation, record_of
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.hidden_act import enter
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import decompose
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.selections import Threshold, check_prefill
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import anatomy
from error_proofs import Place, proof


def byte_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    return layer


proof(lambda p: anatomy(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))))


proof(lambda p: anatomy(inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), build("llama"))))


proof(lambda p: anatomy(nn.Sequential(byte_layer())))


proof(lambda p: ActLinear.of(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))))


proof(lambda p: torch.relu(ActLinear.of(torch.nn.Linear(2, 2), select=Threshold(0.5)).weight))


proof(lambda p: check_prefill("dense", "sparsity", 0.0))


proof(lambda p: ActivationFunction(name="mine", function=torch.tanh))


proof(
    lambda p: ActivationFunction(name="mine", function=torch.tanh, derivative=torch.tanh, limits=(-1.0, 1.0), pieces=())
)


proof(lambda p: Activation("softmax"))


proof(lambda p: LowRank(torch.ones(2, 3), torch.ones(2, 3)))


proof(lambda p: LowRankWeight(torch.ones(2, 3), torch.ones(2, 3)))


proof(lambda p: LowRankWeight(torch.ones(4, 3), torch.ones(6, 3), heads=2).factors(range(1, 2)))


proof(lambda p: decompose(torch.ones(2, 3), 3))


proof(lambda p: RoundedInputs(IntegerGrid(8, scope="tensor"), torch.ones(3, 1))(torch.ones(2, 4)))


@proof
def an_embedding_of_another_kind(p: Place) -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    QuantizedEmbedding.of(Doubled(4, 8), DenseWeight(torch.ones(4, 8)))


proof(lambda p: record_of(torch.nn.PReLU(3), 3))


proof(lambda p: enter("act_linear"))
