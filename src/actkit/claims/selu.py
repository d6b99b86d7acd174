"""SELU's claims: the map of mean and variance, 64 layers of it, and deep networks on small tables.

The map is computed by quadrature, for every element-wise function that is registered. The 64 layers are random, 512
wide. The networks for tables have 32 layers of 64 units, without shortcuts, trained for 40 epochs on six tasks: three
that scikit-learn holds (breast cancer, wine, 600 of the digits) and three that it makes up. The rate of each method is
chosen of the same three, on validation data, with the first seed; accuracies are on test data. The paper's 121 tasks,
Tox21 and HTRU2 cannot be checked here, nor its networks with shortcuts and the regressions of the sheet's slow tier.

About 4 minutes on one idle core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.progress import track
from actkit.core.layers.activations import activation_function, function_names
from actkit.core.layers.moments import moment_map
from actkit.core.recipe.runner import apply
from actkit.functions.selu import selu
from actkit.functions.selu.self_normalize import SelfNormalize
from actkit.functions.selu.self_normalizing import MEANS, OMEGAS, TAUS, VARIANCES, self_normalizing
from actkit.functions.selu.selu import AlphaDropout, lecun_normal_

RATES, MOMENTUM, BATCH = (3e-2, 1e-2, 3e-3), 0.9, 128
METHODS = ("selu", "relu, He", "relu, batch norm", "relu, layer norm")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of networks and splits.
        layers: of the random network.
        width: of it.
        inputs: that go through it.
        depth: of the networks for tables.
        units: of each of their layers.
        epochs: of each training.
        tasks: how many of the six.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 64
    width: int = 512
    inputs: int = 1024
    depth: int = 32
    units: int = 64
    epochs: int = 40
    tasks: int = 6


MAP = Statement(
    "SELU hands on mean 0 and variance 1, and keeps what is near them near",
    "theorem 1",
    "of all registered element-wise functions selu alone maps (0, 1) to itself within 1e-9 with a spectral radius "
    "below 1; on a grid of 5^4 points of the box (mean and omega in [-0.1, 0.1], variance in [0.8, 1.5], tau in [0.95, "
    "1.1]) its map stays inside, and the closed form is the quadrature to 1e-9",
    SYNTHETIC,
)
DEEP = Statement(
    "Through 64 layers a SELU network keeps mean and variance, and others do not",
    "figure 1 (its figures were not read)",
    "random network, 512 wide, inputs of mean 0 and deviation 1, and of 0.5 and 2: behind layer 32 every layer's mean "
    "is in [-0.1, 0.1] and its variance in [0.8, 1.2] with SELU and with alpha dropout of 0.1; tanh, ELU and SELU with "
    "dropout of 0.1 leave the box; the predicted variance of a layer is off by less than 0.05 on average",
    SYNTHETIC,
)
TABLES = Statement(
    "On tables a deep SELU network is better than deep networks with norms or He's initialisation",
    "121 tasks: average rank difference -0.756, next best -0.240 (from memory)",
    "6 tasks, 32 layers, 3 seeds: the best mean rank of 4 methods, or within 0.5 of it, and a mean accuracy of at "
    "least 5 points above ReLU with He's initialisation",
    SMALL,
)
STATEMENTS = (MAP, DEEP, TABLES)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (MAP, the_map),
        (DEEP, partial(sixty_four_layers, sizes)),
        (TABLES, partial(on_tables, sizes, progress)),
    ]
    return conduct("selu", experiments, sizes, subject, progress)


# -- the map -----------------------------------------------------------------------------------------------------------


def the_map() -> Measurement:
    """Map (0, 1) by every registered function, and the box by SELU."""
    rest, outputs = [], {}
    for name in function_names():
        record = activation_function(name)
        if record.mixes:
            continue
        mapped = moment_map(record, 0.0, 1.0)
        outputs[name] = mapped
        radius = abs(mapped.jacobian[1][1])  # of a matrix whose first column is 0
        if abs(mapped.mean) < 1e-9 and abs(mapped.variance - 1) < 1e-9 and radius < 1:
            rest.append(name)
    stays, gap = True, 0.0
    for at in product(*(_grid(bounds) for bounds in (MEANS, VARIANCES, OMEGAS, TAUS))):
        mean_, variance = selu.moment_map(*at)
        by_quadrature = moment_map(activation_function("selu"), at[0], at[1], omega=at[2], tau=at[3])
        gap = max(gap, abs(mean_ - by_quadrature.mean), abs(variance - by_quadrature.variance))
        stays &= MEANS[0] <= mean_ <= MEANS[1] and VARIANCES[0] <= variance <= VARIANCES[1]
    others = ", ".join(f"{name} to ({outputs[name].mean:.2f}, {outputs[name].variance:.2f})" for name in _KNOWN)
    here = (
        f"attracting at (0, 1) of {len(outputs)} functions: {', '.join(rest) or 'none'}, with a radius of "
        f"{outputs['selu'].jacobian[1][1]:.4f}; {others}; the grid {'stays inside' if stays else 'leaves the box'}; "
        f"the closed form is off by {gap:.1e}"
    )
    return Measurement(here, rest == ["selu"] and stays and gap < 1e-9)


_KNOWN = ("relu", "gelu", "silu", "tanh", "elu")


def _grid(bounds: tuple[float, float]) -> list[float]:
    return [float(each) for each in torch.linspace(*bounds, 5, dtype=torch.float64)]


# -- 64 layers ---------------------------------------------------------------------------------------------------------


def sixty_four_layers(sizes: Sizes) -> Measurement:
    """Send inputs through random networks, and look at mean and variance behind the first half of the layers."""
    arms: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], bool]] = {
        "SELU": (nn.SELU, nn.Identity, True),
        "SELU, alpha dropout": (nn.SELU, partial(AlphaDropout, 0.1), True),
        "SELU, dropout": (nn.SELU, partial(nn.Dropout, 0.1), False),
        "tanh": (nn.Tanh, nn.Identity, False),
        "ELU": (nn.ELU, nn.Identity, False),
    }
    parts, passed = [], True
    for name, (function, dropout, stays) in arms.items():
        for shift, deviation in ((0.0, 1.0), (0.5, 2.0)):
            moments = [
                each
                for seed in sizes.seeds
                for each in _moments(function, dropout, shift, deviation, seed, sizes)[sizes.layers // 2 :]
            ]
            inside = all(abs(mean_) <= 0.1 and 0.8 <= variance <= 1.2 for mean_, variance in moments)
            passed &= inside == stays
            means, variances = zip(*moments, strict=True)
            parts.append(
                f"{name} from ({shift:g}, {deviation:g}): mean {min(means):+.3f} to {max(means):+.3f}, variance "
                f"{min(variances):.3f} to {max(variances):.3f}"
            )
    errors = [_prediction_error(seed, sizes) for seed in sizes.seeds]
    here = f"{'; '.join(parts)}; predicted variances are off by {spread(errors, '.4f')}"
    return Measurement(here, passed and max(errors) < 0.05)


def _network(function: Callable[[], nn.Module], seed: int, sizes: Sizes) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    made: list[nn.Module] = []
    for _ in range(sizes.layers):
        made += [lecun_normal_(nn.Linear(sizes.width, sizes.width), generator), function()]
    return made


def _moments(
    function: Callable[[], nn.Module],
    dropout: Callable[[], nn.Module],
    shift: float,
    deviation: float,
    seed: int,
    sizes: Sizes,
) -> list[tuple[float, float]]:
    """Mean and variance over the units behind each layer, for an input, averaged over the inputs."""
    torch.manual_seed(seed)
    x = shift + deviation * torch.randn(sizes.inputs, sizes.width)
    drop, found = dropout().train(), []
    with torch.no_grad():
        for module in _network(function, seed, sizes):
            x = module(x)
            if not isinstance(module, nn.Linear):
                x = drop(x)
                found.append((float(x.mean(1).mean()), float(x.var(1, correction=0).mean())))
    return found


def _prediction_error(seed: int, sizes: Sizes) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(*_network(nn.SELU, seed, sizes), nn.Linear(sizes.width, 1))
    return self_normalizing(model.eval(), [torch.randn(sizes.inputs, sizes.width)], progress=False).error


# -- tables ------------------------------------------------------------------------------------------------------------


def on_tables(sizes: Sizes, progress: bool = True) -> Measurement:
    """Train deep networks on six tasks, and rank the methods by test accuracy."""
    tasks = dict(list(tables().items())[: sizes.tasks])
    accuracy: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for task, method in track(list(product(tasks, METHODS)), "Training on tables", enabled=progress):
        accuracy[method][task] = mean(_of_method(method, *tasks[task], sizes))
    ranks = dict.fromkeys(METHODS, 0.0)
    for task in tasks:
        for method, rank in zip(METHODS, rankdata([-accuracy[each][task] for each in METHODS]), strict=True):
            ranks[method] += float(rank) / len(tasks)
    return judged(accuracy, ranks)


def judged(accuracy: dict[str, dict[str, float]], ranks: dict[str, float]) -> Measurement:
    """Judge the mean ranks and accuracies (in percent, by method and task)."""
    means = {method: mean(found.values()) for method, found in accuracy.items()}
    best = min(ranks.values())
    lines = (
        f"{method}: mean rank {ranks[method]:.2f}, accuracy {means[method]:.1f} % ("
        f"{', '.join(f'{task} {value:.1f}' for task, value in accuracy[method].items())})"
        for method in METHODS
    )
    passed = ranks["selu"] <= best + 0.5 and means["selu"] >= means["relu, He"] + 5
    return Measurement("; ".join(lines), passed)


def _of_method(method: str, x: Tensor, y: Tensor, sizes: Sizes) -> list[float]:
    """Test accuracies over the seeds, at the rate that is best on the validation data of the first."""
    first = {rate: _trained(method, x, y, rate, sizes.seeds[0], sizes) for rate in RATES}
    rate = max(RATES, key=lambda each: first[each][0])
    return [first[rate][1], *(_trained(method, x, y, rate, seed, sizes)[1] for seed in sizes.seeds[1:])]


def _trained(method: str, x: Tensor, y: Tensor, rate: float, seed: int, sizes: Sizes) -> tuple[float, float]:
    """Validation and test accuracy, in percent, of a network trained on 60 % of the rows."""
    generator = torch.Generator().manual_seed(seed)
    x, train, validation, test = split_table(x, generator)
    model = network(method, x.shape[1], int(y.max()) + 1, seed, sizes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    for _ in range(sizes.epochs):
        for part in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            if len(part) == 1:
                continue  # a batch norm has no variance of one row
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = [(model(x[part]).argmax(-1) == y[part]).float().mean() for part in (validation, test)]
    return 100 * float(hits[0]), 100 * float(hits[1])


def split_table(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features standardised by the training rows, and the indices of 60, 20 and 20 % of the rows.

    Args:
        x: features [rows, features].
        generator: of the order.
    """
    order = torch.randperm(len(x), generator=generator)
    train, validation, test = order.tensor_split([int(0.6 * len(x)), int(0.8 * len(x))])
    center, spread_ = x[train].mean(0), x[train].std(0)
    return (x - center) / torch.where(spread_ > 0, spread_, 1), train, validation, test


def network(method: str, features: int, classes: int, seed: int, sizes: Sizes) -> nn.Module:
    """A deep network without shortcuts."""
    torch.manual_seed(seed)
    norms: dict[str, type[Any]] = {"relu, batch norm": nn.BatchNorm1d, "relu, layer norm": nn.LayerNorm}
    layers: list[nn.Module] = []
    for index in range(sizes.depth):
        layers.append(nn.Linear(sizes.units if index else features, sizes.units))
        layers += [norms[method](sizes.units)] if method in norms else []
        layers.append(nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(sizes.units, classes))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    if method == "selu":
        apply(model, SelfNormalize(seed=seed), [torch.zeros(2, features)], undo="off", progress=False)
    return model


def tables() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and classes of the six tasks."""
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification

    def pair(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.int64)

    made = {
        f"made {number}": pair(
            *make_classification(
                n_samples=1000,
                n_features=features,
                n_informative=features // 2,
                n_classes=classes,
                class_sep=1.0,
                random_state=number,
            )
        )
        for number, (features, classes) in enumerate(((20, 2), (30, 3), (40, 4)), start=1)
    }
    digits = load_digits(return_X_y=True)
    return {
        "breast cancer": pair(*load_breast_cancer(return_X_y=True)),
        "wine": pair(*load_wine(return_X_y=True)),
        "digits": pair(digits[0][:600], digits[1][:600]),
        **made,
    }
