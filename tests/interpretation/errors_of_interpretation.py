"""How a user meets the errors of `interpretation`: one function per way, which raises it."""

from __future__ import annotations

import math

from tiny_models import batches, build

from actkit.core.model.sites import Site
from actkit.core.watch.extremes import Extremes
from actkit.interpretation.massive_activations.dynamics import dynamics
from actkit.interpretation.massive_activations.forecast import Forecast, Shape
from actkit.interpretation.massive_activations.law import Fitted, fit
from actkit.interpretation.massive_activations.massive_activations import massive_activations
from actkit.interpretation.massive_activations.overwriting import MassiveValues, massive_values, overwritten
from error_proofs import Place, missing, proof

ROWS = [(Shape(4, 64, 8, 256), 0)] * 10
LAWS = [dict.fromkeys(("A", "lambda", "gamma", "t0", "K"), 1.0)] * 10

proof(lambda p: fit([1, 2, 3], [1, 2, 3]))


proof(lambda p: fit([1, 2, 3], [1, 2]))


proof(lambda p: fit([3, 2, 1, 4, 5, 6], [1, 2, 3, 4, 5, 6]))


proof(lambda p: fit([1, 2, 3, 4, 5, 6], [1, 2, -3, 4, 5, 6]))


proof(lambda p: Fitted("law", {}, math.nan, math.nan, math.nan, 1.0, False).predict([1.0]))


proof(lambda p: dynamics({}))


proof(lambda p: massive_values(build("llama"), batches("llama"), progress=False))


@proof
def another_mode(p: Place) -> None:
    with overwritten(build("llama"), MassiveValues("blocks.0.block.output", 100.0, {0: 1.0}, {0: 0.0}, 1), "half"):  # type: ignore[arg-type]
        pass


proof(lambda p: massive_activations(build("llama", hidden_act="relu"), batches("llama"), site="mlp.hidden"))


proof(lambda p: massive_activations(build("llama"), batches("llama"), top=0))


@proof
def no_token_came_there(p: Place) -> None:
    place = "actkit.interpretation.massive_activations.massive_activations.record"
    p.patch.setattr(place, lambda *_, **__: {Site("mlp.hidden", 0, 1): [Extremes()]})
    massive_activations(build("llama"), batches("llama"))


proof(lambda p: Shape.of(object()))


proof(lambda p: Forecast().predict(ROWS))


proof(lambda p: Forecast().fit(ROWS[:3], LAWS[:3]))


proof(lambda p: Forecast("ridge").score(ROWS, LAWS))


proof(lambda p: Forecast("oracle"))  # type: ignore[arg-type]


@proof
def no_scikit_learn(p: Place) -> None:
    missing("sklearn.compose", p)
    Forecast()
