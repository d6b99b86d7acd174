"""How a user meets the errors of posets: one function per way, which raises it."""

from __future__ import annotations

import torch
from torch import nn

from actkit.core.recipe.runner import apply
from actkit.functions.posets.pooling import PosetActivation, PosetPool1d, PosetPool2d
from actkit.functions.posets.poset import Poset
from actkit.functions.posets.replace_pooling import ReplacePooling
from actkit.functions.posets.tropical import newton_polytope, poset_eval
from actkit.testing import tiny_batches, tiny_model
from error_proofs import proof

IMAGES = torch.zeros(1, 1, 4, 4)


proof(lambda p: Poset(0))


proof(lambda p: Poset(2, frozenset({(0, 2)})))


proof(lambda p: Poset(3, frozenset({(0, 1), (1, 2), (2, 0)})))


proof(lambda p: Poset.of(16))


proof(lambda p: Poset.of("M"))


proof(lambda p: Poset.all(6))


proof(lambda p: Poset(2).relabelled((0, 0)))


proof(lambda p: Poset(21, frozenset({(0, 1), (2, 1), (2, 3)})).upsets())


proof(lambda p: poset_eval(torch.zeros(2, 3), Poset.of("N")))


proof(lambda p: poset_eval(torch.zeros(2, 4, dtype=torch.int64), Poset.of("N")))


proof(lambda p: PosetPool2d()(IMAGES.long()))


proof(lambda p: poset_eval(torch.zeros(2, 21), Poset(21, frozenset({(0, 1), (2, 1), (2, 3)}))))


proof(lambda p: newton_polytope(Poset(2), [Poset(2)]))


proof(lambda p: PosetPool2d("N", 3))


proof(lambda p: PosetPool2d("N", 4))


proof(lambda p: PosetPool1d("N", 10))


proof(lambda p: PosetPool2d()(IMAGES[0]))


proof(lambda p: PosetPool1d()(IMAGES))


proof(lambda p: PosetActivation()(torch.zeros(2, 6)))


proof(lambda p: apply(tiny_model("mlp"), ReplacePooling(), tiny_batches("mlp"), progress=False))


proof(lambda p: apply(nn.Sequential(nn.MaxPool2d(2, padding=1)), ReplacePooling(), [IMAGES], progress=False))
