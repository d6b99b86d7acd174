"""How a user meets the errors of neural codes: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from actkit.interpretation.neural_code.categories import code_kmeans, code_knn, code_logistic
from actkit.interpretation.neural_code.codes import CodeLayer, Codes, SignBits, hamming, nearest, neural_codes
from actkit.interpretation.neural_code.neural_code import neural_code
from actkit.interpretation.neural_code.phase_chart import CodeNet, phase_chart
from actkit.interpretation.neural_code.regions import code_diffusion, region_diameter
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, missing, proof


def codes(labels: Any = (0, 1, 0), width: int = 4) -> Codes:
    given = None if labels is None else np.array(labels)
    packed = np.packbits(np.eye(3, width, dtype=np.uint8), axis=1)
    return Codes(packed, (CodeLayer("act", 0, width, False, 0),), given, np.arange(3))


class Function(nn.Module):
    """A net that calls a smooth function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def labelled(rows: int, length: int | None = None) -> list[dict[str, torch.Tensor]]:
    batch = tiny_batches("llama")[0]
    labels = torch.zeros(rows, dtype=torch.long) if length is None else torch.zeros(rows, length, dtype=torch.long)
    return [{**batch, "labels": labels}]


proof(lambda p: codes().of_layer("relu"))


proof(lambda p: hamming(codes(), codes(width=5)))


proof(lambda p: nearest(codes(), codes(), 4))


proof(lambda p: SignBits().update(torch.ones(2, 3)))


proof(lambda p: neural_codes(tiny_model("mlp"), tiny_batches("mlp"), samples="token"))  # type: ignore[arg-type]


proof(lambda p: neural_codes(tiny_model("mlp"), []))


proof(lambda p: neural_codes(tiny_model("llama"), tiny_batches("llama"), pool="any"))


proof(lambda p: neural_codes(Function(), [torch.ones(2, 4)]))


proof(lambda p: neural_codes(nn.Sequential(nn.Linear(4, 2)), [torch.ones(2, 4)]))


proof(lambda p: neural_codes(tiny_model("mlp"), tiny_batches("mlp"), layers=["relu*"]))


@proof
def layers_of_other_rows(p: Place) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    neural_codes(net, [torch.ones(1, 1, 6, 6)], samples="row", progress=False)


proof(lambda p: neural_codes(tiny_model("llama"), tiny_batches("llama"), samples="example", progress=False))


proof(lambda p: neural_codes(tiny_model("llama"), labelled(1), progress=False))


proof(lambda p: neural_codes(tiny_model("llama"), labelled(3, 1), progress=False))


proof(lambda p: code_knn(codes(), codes(), k=4))


proof(lambda p: neural_code(tiny_model("mlp"), tiny_batches("mlp"), k=0))


proof(lambda p: code_knn(codes(None), codes(), k=1))


proof(lambda p: code_logistic(codes((1, 1, 1)), codes()))


proof(lambda p: code_kmeans(codes(), codes(), matching="best"))  # type: ignore[arg-type]


@proof
def without_scikit_learn(p: Place) -> None:
    missing("sklearn.neighbors", p)
    code_knn(codes(), codes(), k=1)


proof(lambda p: region_diameter(tiny_model("mlp"), torch.ones(16), torch.ones(3)))


proof(lambda p: code_diffusion(codes(None)))


proof(lambda p: code_diffusion(codes((1, 1, 1))))


proof(lambda p: neural_code(tiny_model("mlp"), tiny_batches("mlp"), fitted=0, progress=False))


proof(lambda p: CodeNet((4,), 2, 1, 2))


def chart(**settings: Any) -> Any:
    data = {"x": torch.ones(4, 4), "labels": torch.zeros(4, dtype=torch.long)}
    return phase_chart(
        lambda size, seed: CodeNet((4,), 2, size), data, **{"held_out": data, **settings}, steps=1, sizes=(2,)
    )


proof(lambda p: chart(held_out={"x": torch.ones(4, 4)}))


proof(lambda p: chart(samples=(9,)))
