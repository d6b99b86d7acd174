"""How a user meets the errors of core, the room `ground`: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import batches, build

from actkit.core.ground import processes, registry
from actkit.core.ground.largest import allocate, largest
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.search.search import optimize
from error_proofs import HOST, Lazy, Place, beside, changed, offloaded, points, proof, raising, train

proof(lambda p: largest(torch.zeros(3), -1))


proof(lambda p: allocate([1.0, -1.0], 0.5))


proof(lambda p: allocate([1.0, 2.0], 2.0))


proof(
    lambda p: (
        p.patch.setattr(checkpoint, "save_file", raising(OSError(28, "full"))),
        checkpoint.save(changed(), p.path / "new"),
    )
)


proof(lambda p: Recipe.of("awk"))


proof(lambda p: (points(p, registry.METHODS, ("twice", "a:A"), ("twice", "b:B")), Recipe.of("twice")))


proof(lambda p: (points(p, registry.METHODS, ("gone_x", "no_such_module_x:A")), Recipe.of("gone_x")))


proof(lambda p: (points(p, registry.METHODS, ("odd_x", "json:dumps")), Recipe.of("odd_x")))


proof(lambda p: registry.method_name(Lazy))


proof(lambda p: Recipe.of("cfsp:uniform=true"))
proof(lambda p: Recipe.of("nowhere.yaml"))


proof(lambda p: Recipe.load(p.file("#" * 300_000)))


proof(lambda p: Recipe.load(p.file("{")))


proof(lambda p: Recipe.load(p.file(b"\xff\xfe\xff")))


proof(lambda p: apply(build("llama").to("meta"), "teal", batches("llama"), progress=False))


proof(lambda p: train(p, model=offloaded()))


proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, [HOST], max_memory="10 B"))


def a_sum() -> Any:
    return processes.total("a sum", torch.ones(2))


@proof
def started_several_times(p: Place) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        p.patch.setenv(name, value)
    optimize(build("llama"), out=p.path / "new", data=batches("llama"))


proof(lambda p: (beside(p, "a sum", b"ValueError: no", failed=True), a_sum()))


proof(lambda p: (beside(p, gone=True), a_sum()))


proof(lambda p: (beside(p, "another sum"), a_sum()))


proof(lambda p: (beside(p, "what the processes were given", b'[{"seed": "1"}, {}]'), processes.agree(seed="0")))
