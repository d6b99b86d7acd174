"""actkit: profile, change and prove the activations of any PyTorch model.

    import actkit
    from rich import print

    model = actkit.load("swiglu")                                   # a zoo name, a folder or a hub id
    applied = actkit.apply(model, "awq,wina")                       # calibrated on the embedded text
    print(actkit.evaluate(model, against="swiglu").table())
    actkit.save(model, "smaller")

Every verb of the command line is a function here. Names are read on first use, so that `import actkit` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actkit.catalogue import papers as papers
    from actkit.claims import reproduce as reproduce
    from actkit.comparison.compare import compare_functions as compare_functions
    from actkit.core.ground.errors import ActkitError as ActkitError
    from actkit.core.layers.linear import ActLinear as ActLinear
    from actkit.core.measure.proof import prove as prove
    from actkit.core.measure.sampling import Sampling as Sampling
    from actkit.core.model.anatomy import Site as Site
    from actkit.core.model.anatomy import anatomy as anatomy
    from actkit.core.recipe.recipe import Recipe as Recipe
    from actkit.core.recipe.transform import Transform as Transform
    from actkit.core.store.checkpoint import save as save
    from actkit.core.watch.capture import live as live
    from actkit.core.watch.capture import record as record
    from actkit.core.watch.intervene import intervene as intervene
    from actkit.data import load_data as load_data
    from actkit.functions.swap import swap as swap
    from actkit.generating import generate as generate
    from actkit.generating import generate_all as generate_all
    from actkit.search.search import optimize as optimize
    from actkit.verbs import analyze as analyze
    from actkit.verbs import apply as apply
    from actkit.verbs import evaluate as evaluate
    from actkit.verbs import export as export
    from actkit.verbs import harvest as harvest
    from actkit.verbs import latents as latents
    from actkit.verbs import profile as profile
    from actkit.verbs import sae as sae
    from actkit.verbs import show as show
    from actkit.verbs import train as train
    from actkit.zoo.loading import load as load
    from actkit.zoo.loading import load_tokenizer as load_tokenizer

_HOMES = {
    "ActLinear": "core.layers.linear",
    "ActkitError": "core.ground.errors",
    "Recipe": "core.recipe.recipe",
    "Sampling": "core.measure.sampling",
    "Site": "core.model.anatomy",
    "Transform": "core.recipe.transform",
    "analyze": "verbs",
    "anatomy": "core.model.anatomy",
    "apply": "verbs",
    "compare_functions": "comparison.compare",
    "evaluate": "verbs",
    "export": "verbs",
    "generate": "generating",
    "generate_all": "generating",
    "harvest": "verbs",
    "intervene": "core.watch.intervene",
    "live": "core.watch.capture",
    "load": "zoo.loading",
    "load_data": "data",
    "load_tokenizer": "zoo.loading",
    "optimize": "search.search",
    "papers": "catalogue",
    "latents": "verbs",
    "profile": "verbs",
    "prove": "core.measure.proof",
    "record": "core.watch.capture",
    "reproduce": "claims",
    "sae": "verbs",
    "save": "core.store.checkpoint",
    "show": "verbs",
    "swap": "functions.swap",
    "train": "verbs",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
