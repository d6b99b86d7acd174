"""How a user meets the errors of the local interaction basis: one function per way, which raises it."""

from __future__ import annotations

import torch
from torch import nn

from actkit.interpretation.lib.basis import InteractionBasis, local_interaction_basis
from actkit.interpretation.lib.graph import accuracy, fewest_edges, interaction_graph, modules
from actkit.interpretation.lib.lib import lib
from actkit.interpretation.lib.sections import head_of, mlp_sections, sections_of
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, proof

X = torch.arange(12.0).reshape(4, 3).sin()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def basis() -> InteractionBasis:
    return local_interaction_basis(sections_of(net(), X), X, progress=False)


proof(lambda p: sections_of(nn.Sequential(nn.ReLU()), X))


proof(lambda p: sections_of(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), X))


proof(lambda p: sections_of(net(), X, starts=[1]))


@proof
def in_training_mode(p: Place) -> None:
    torch.manual_seed(0)
    sections_of(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2)), X)


proof(lambda p: mlp_sections(tiny_model("mixtral"), 0))


proof(lambda p: mlp_sections(tiny_model("llama"), 9))


proof(lambda p: local_interaction_basis(sections_of(net(), X), X, kind="ica"))  # type: ignore[arg-type]


proof(lambda p: local_interaction_basis(sections_of(net(), X), X[:1].repeat(4, 1), progress=False))


@proof
def no_influence(p: Place) -> None:
    silent = net()
    nn.init.zeros_(silent[2].weight)
    local_interaction_basis(sections_of(silent, X), X, progress=False)


proof(lambda p: basis().edges(X, points=0))


@proof
def too_much_was_dropped(p: Place) -> None:
    narrow = local_interaction_basis(sections_of(net(), X), X, kind="pca", truncation=0.5, progress=False)
    labels = net()(X).argmax(-1)
    fewest_edges(narrow, narrow.edges(X, progress=False)[0], 0, X, accuracy(labels), -0.5)


proof(lambda p: interaction_graph(basis().edges(X, progress=False), 0.0))


proof(lambda p: modules(basis().edges(X, progress=False), 1e30))


proof(lambda p: local_interaction_basis(sections_of(net(), X), X, sources=0))


proof(lambda p: basis().edges(X, directions=0))


proof(lambda p: head_of(net(), X, start="nothing"))


proof(lambda p: head_of(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), X))


proof(lambda p: lib(net(), [X, X], rows=0))


proof(lambda p: lib(net(), [X]))


proof(lambda p: lib(net(), [X, X], blocks=(0,)))


proof(lambda p: lib(tiny_model("llama"), tiny_batches("llama"), start="model.layers.0"))


proof(lambda p: lib(tiny_model("gemma2"), tiny_batches("gemma2"), progress=False))
