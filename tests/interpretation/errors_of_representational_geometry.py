"""How a user meets the errors of representational geometry: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actkit.core.watch.by_example import ByExample
from actkit.core.watch.streaming import Rows
from actkit.interpretation.representational_geometry.dichotomies import (
    balanced_dichotomies,
    ccgp,
    decodability,
    parallelism,
    shattering,
)
from actkit.interpretation.representational_geometry.kernels import cka, kernel, participation_ratio
from actkit.interpretation.representational_geometry.representational_geometry import representational_geometry
from actkit.interpretation.representational_geometry.tasks import CubeTask, KernelTask, NudgedXor
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, missing, proof

Z = np.arange(12.0).reshape(4, 3)
HALVES, OWNER = np.array([True, True, False, False]), [0, 1, 2, 3]


def report(conditions: Any, **settings: Any) -> Any:
    model, batches = tiny_model("mlp"), tiny_batches("mlp")[:1]
    given = None if conditions is None else torch.tensor(conditions)
    return representational_geometry(
        model, batches, sites=("activation.output:act",), conditions=given, progress=False, **settings
    )


def rows() -> int:
    return len(tiny_batches("mlp")[0])


def two() -> list[int]:
    return [index % 2 for index in range(rows())]


proof(lambda p: ByExample("middle"))  # type: ignore[arg-type]


proof(lambda p: ByExample().update(torch.ones(2, 3)))


@proof
def unequal_lengths(p: Place) -> None:
    flat = ByExample("flat")
    flat.update(torch.ones(3, 2), Rows(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])))
    _ = flat.vectors


proof(lambda p: kernel(np.ones(3)))


proof(lambda p: cka(kernel(Z), kernel(Z[:3])))


proof(lambda p: cka(kernel(Z[:3]), kernel(Z[:3]), debiased=True))


proof(lambda p: cka(kernel(np.ones((4, 3))), kernel(Z)))


proof(lambda p: participation_ratio(np.ones((4, 3))))


proof(lambda p: balanced_dichotomies(5))


proof(lambda p: balanced_dichotomies(64))


proof(lambda p: parallelism(Z, np.array([True, False, False, False])))


proof(lambda p: parallelism(Z, HALVES, "nearest"))  # type: ignore[arg-type]


proof(lambda p: parallelism(np.ones((4, 3)), HALVES))


proof(lambda p: ccgp(Z, OWNER, np.array([True, False, False, False])))


proof(lambda p: decodability(Z, OWNER[:3], HALVES))


proof(lambda p: decodability(Z, [0, 1, 2, 2], HALVES))


proof(lambda p: decodability(Z, OWNER, np.ones(4, dtype=bool)))


proof(lambda p: shattering(Z[:2], [0, 1], trained=balanced_dichotomies(2)))


@proof
def without_scikit_learn(p: Place) -> None:
    missing("sklearn.svm", p)
    decodability(Z, OWNER, HALVES)


proof(lambda p: KernelTask(12))


proof(lambda p: KernelTask(16, 5))


proof(lambda p: KernelTask(16, 1, 0.9))


proof(lambda p: KernelTask(16, 1, rank=15))


proof(lambda p: KernelTask(16, dim=8))


proof(lambda p: NudgedXor(dim=10))


proof(lambda p: CubeTask(6))


proof(lambda p: report(None))


proof(lambda p: report([0.5] * 4))


proof(lambda p: report([0, 2] * 4))


proof(lambda p: report([0, 1]))


proof(lambda p: report(two(), targets=torch.ones(2, 1)))


proof(lambda p: report(two(), clean=[torch.ones(3, 16)]))
