"""How a user meets the errors of `atlas`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import build

from actkit.core.store.deltas import Delta, Dense
from actkit.data.image_tasks import image_task
from actkit.finetuning.atlas.atlas import Atlas, isotropic_search
from actkit.finetuning.atlas.selection import disentanglement, select_vectors
from error_proofs import proof

proof(lambda p: Atlas().attach(build("mlp")))


proof(lambda p: Atlas.of([Delta({"x": Dense(torch.zeros(2))})]).attach(build("mlp")))


proof(lambda p: Atlas.of([Delta({}, "0" * 64)]).attach(build("mlp")))


proof(lambda p: Atlas.of([Delta({})]).attach(build("mlp")))


proof(lambda p: isotropic_search(build("mlp"), [], lambda model: 0.0, grid=()))


proof(lambda p: select_vectors(build("mlp"), [], [], 1))


proof(lambda p: disentanglement(build("mlp"), {}, {}))


proof(lambda p: image_task(torch.zeros(1, 1, 8, 8), "x"))  # type: ignore[arg-type]
