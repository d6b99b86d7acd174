"""How a user meets the errors of `sparsity`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import batches, build
from torch import nn

from actkit.core.train import rules
from actkit.core.train.objective import Objective
from actkit.sparsity.active_dendrites.pattern_simulation import _halves
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.lazy_neuron.activity_curve import activity_curve
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKMlp
from actkit.sparsity.plm.activated_parameters import activated_parameters
from actkit.sparsity.plm.model import load_plm
from actkit.sparsity.plm.schedule import wsdc_lambda
from actkit.sparsity.prosparse.activation_predictor import ActivationPredictor, activation_pairs
from actkit.sparsity.prosparse.fatrelu import FatRelu, sweep_threshold
from actkit.sparsity.prosparse.prosparse import ProSparse
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.sparsing_law.activation_ratio import activation_ratio
from actkit.sparsity.sparsing_law.shared_cett import in_float32, measure
from error_proofs import HOST, NAN, PADDED, Place, proof, run

proof(lambda p: run(Cats(sparsity={99: 0.5})))


proof(lambda p: run(FatRelu()))


proof(lambda p: run(TopKMlp(k=999)))


proof(lambda p: RSparse(alpha="search").alpha_of("a"))


proof(lambda p: run(RSparse(alpha={"nothing*": 0.5})))


proof(lambda p: activation_ratio(build("gpt2"), [PADDED], "topk", 0.5, progress=False))


proof(lambda p: _halves(torch.ones(3, 4), torch.zeros(3, dtype=torch.long), 0))


proof(lambda p: activation_pairs(build("llama"), batches("llama"), 0, progress=False))


proof(
    lambda p: ActivationPredictor(4, 8, 2).fit((torch.ones(3, 4), torch.ones(3, 8, dtype=torch.bool)), progress=False)
)


proof(lambda p: neuron_activity(nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)], progress=False))


proof(lambda p: activity_curve([], [HOST]))


@proof
def no_loss(p: Place) -> None:
    model = build("gpt2")
    with in_float32(model) as view:
        measure(view, [HOST], Objective(model, lambda model, batch: torch.tensor(NAN)), {})


proof(lambda p: sweep_threshold(build("bert"), batches("bert")))


proof(lambda p: sweep_threshold(build("llama", num_hidden_layers=0), [HOST]))


proof(lambda p: rules.attached([ProSparse(preset="7b")], build("llama")).__enter__())


proof(lambda p: run("cats", kind="mlp"))


proof(lambda p: in_float32(build("mlp"), batches("mlp")[0]).__enter__())


proof(lambda p: load_plm(p.copy("plain")))


proof(lambda p: activated_parameters(build("mixtral"), batches("mixtral"), progress=False))


proof(lambda p: wsdc_lambda(1, 5, 5, 10))
