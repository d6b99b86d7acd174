"""LIFT: fine-tune the few entries of each weight that are largest in its low-rank part (2025, ICML, arXiv:2506.00772).

    W_R = the rank-R part of W,   M = the k largest |W_R| of the matrix,   k = r (m + n), as many numbers as a LoRA's
    each step:   W[M] <- W[M] - rate sqrt(1 - b2^t) / (1 - b1^t)  v1 / (sqrt(v2) + eps),   v1, v2 moments of g[M]
    every `update_interval` steps M is chosen again; moments of entries that stay are kept, others begin at 0

When to use it: to fine-tune a model with the optimizer state of a LoRA and no adapter afterwards: the model is plain,
and what changed is a sparse delta (`core/store/deltas.py`). Gradients stay whole, so that memory is saved on moments
alone; activations and gradients take what they take in full training.
Cost: a decomposition per weight and choice; a step reads and writes k entries of each weight.
Settled here: all linear layers and convolutions train but the head (`lm_head`, and what is tied to an embedding); the
other parameters are frozen. The release's scripts choose by `largest = "largest" in mask_type` and pass another word,
so that as written they train the smallest entries; paper and README say largest, and so does this. Decay reaches the
weights (in the release it is added to a copy). `eps_mode="torch"` adds eps after the bias correction, as AdamW does;
the default is the release's. The moments are moved by their indices before the mask is replaced. A rank above the
matrix's takes its largest entries, with a warning. Weights of 16 bits are refused, as in all training here.
Our own reading: `choose` has other selectors for comparison, magnitude, gradient and random; the release's `movement`
is left out, as it needs a copy of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.largest import largest
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank import Algorithm
from actkit.core.layers.weights import CodedWeight
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.train.masks import Masks, layer_weights
from actkit.finetuning.lift.principal import Reduce, entries, principal_mask

Choose = Literal["principal", "magnitude", "gradient", "random"]
EpsMode = Literal["released", "torch"]


class LiftAdamW(torch.optim.Optimizer):
    """AdamW on the principal entries of each matrix, with moments of these alone.

    Parameters of one dimension, and groups with `sparse: False`, train whole, by AdamW.

    Args:
        params: parameters or groups of them.
        lr: the rate.
        lora_rank: r, which says how many entries: r (m + n) of a matrix [m, n].
        rank_filter: R, of the low-rank part.
        update_interval: steps from one choice to the next; None chooses once.
        betas: of the moments.
        eps: is added to the root of the second moment.
        weight_decay: apart from the gradient, of the entries that train.
        choose: 'principal', or for comparison the largest entries of W, of its first gradient, or random ones.
        reduce: as in `principal_mask`.
        algorithm: the same.
        eps_mode: 'released' adds eps before the bias correction, 'torch' after it.
        fixed: masks to train in place of chosen ones, by parameter; they are never chosen again.
        seed: of random choices.

    Raises:
        ValueError: a setting out of bounds, a parameter of 16 bits or in two groups, or a step without gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        lora_rank: int = 128,
        rank_filter: int = 128,
        update_interval: int | None = 200,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        choose: Choose = "principal",
        reduce: Reduce = "largest",
        algorithm: Algorithm = "svd",
        eps_mode: EpsMode = "released",
        fixed: Mapping[Tensor, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        bounds: dict[str, tuple[Any, bool, str]] = {
            "lr": (lr, lr >= 0, "0 or more"),
            "lora_rank": (lora_rank, lora_rank >= 1, "1 or more"),
            "rank_filter": (rank_filter, rank_filter >= 1, "1 or more"),
            "update_interval": (update_interval, update_interval is None or update_interval >= 1, "1 or more, or None"),
            "betas": (betas, all(0 <= beta < 1 for beta in betas), "two numbers, 0 to below 1"),
            "eps": (eps, eps >= 0, "0 or more"),
            "weight_decay": (weight_decay, weight_decay >= 0, "0 or more"),
        }
        for name, (value, fine, allowed) in bounds.items():
            if not fine:
                raise ValueError(f"{name}: {value!r} was given, allowed is {allowed}.")
        defaults = {
            "lr": lr,
            "lora_rank": lora_rank,
            "rank_filter": rank_filter,
            "update_interval": update_interval,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "sparse": True,
        }
        self.choose, self.reduce, self.algorithm, self.eps_mode = choose, reduce, algorithm, eps_mode
        self.fixed, self.seed = dict(fixed or {}), seed
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, each of float32 or float64 and in one group only.

        Args:
            param_group: as of any optimizer; `sparse: False` trains them whole.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"params: a parameter is {parameter.dtype}, too coarse for small updates; use float32."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update the chosen entries.

        Args:
            closure: computes the loss again, if given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = False
        for number, (group, parameter) in enumerate(self._all()):
            if parameter.grad is not None:
                self._update(group, parameter, parameter.grad, self.seed + number)
                stepped = True
        if not stepped:
            raise ValueError("step: no parameter has a gradient; call backward on a loss first.")
        return loss

    def _all(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, seed: int) -> None:
        state = self.state[parameter]
        sparse = group["sparse"] and parameter.dim() > 1
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            number = parameter.numel()
            if sparse:
                state["index"] = self._chosen(group, parameter, seed)
                number = len(state["index"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(number, dtype=parameter.dtype, device=parameter.device)
        elif sparse and self._due(group, parameter, int(state["step"])):
            self._choose_again(state, self._chosen(group, parameter, seed))
        state["step"] += 1
        flat = parameter.view(-1) if parameter.is_contiguous() else parameter.reshape(-1)
        index = state.get("index")
        whole = gradient.reshape(-1)
        values, own = (flat, whole) if index is None else (flat[index], whole[index])
        self._adam(group, state, values, own)
        if index is not None:
            flat[index] = values
        if not parameter.is_contiguous():
            parameter.copy_(flat.view_as(parameter))

    def _adam(self, group: dict[str, Any], state: dict[str, Any], values: Tensor, gradient: Tensor) -> None:
        """One step of AdamW, in the order of torch's, on values in place."""
        first, second = group["betas"]
        mean, square, steps = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
        values.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rate, root = group["lr"] / (1 - first**steps), math.sqrt(1 - second**steps)
        if self.eps_mode == "torch":
            values.addcdiv_(mean, (square.sqrt() / root).add_(group["eps"]), value=-rate)
        else:
            values.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate * root)

    def _due(self, group: dict[str, Any], parameter: Tensor, steps: int) -> bool:
        interval = group["update_interval"]
        return interval is not None and parameter not in self.fixed and steps % interval == 0

    def _chosen(self, group: dict[str, Any], parameter: Tensor, seed: int) -> Tensor:
        """The flat indices of the entries that train, ascending."""
        if parameter in self.fixed:
            mask = self.fixed[parameter]
        elif self.choose == "principal":
            settings: dict[str, Any] = {"reduce": self.reduce, "algorithm": self.algorithm, "seed": seed}
            mask = principal_mask(parameter, group["rank_filter"], lora_rank=group["lora_rank"], **settings)
        else:
            rows = parameter.flatten(1)
            number = entries(rows.shape[0], rows.shape[1], None, group["lora_rank"])
            drawn = torch.rand(rows.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            gradient = parameter.grad if parameter.grad is not None else parameter
            scores = {"magnitude": parameter.abs(), "gradient": gradient.abs(), "random": drawn.to(parameter.device)}
            mask = largest(scores[self.choose].reshape(-1), number)
        return mask.to(parameter.device).reshape(-1).nonzero().flatten()

    @staticmethod
    def _choose_again(state: dict[str, Any], index: Tensor) -> None:
        """Move the moments to new entries: those that stay keep theirs, new ones begin at 0."""
        old = state["index"]
        places = torch.searchsorted(old, index).clamp(max=len(old) - 1)
        stays = old[places] == index
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.where(stays, state[name][places], 0)
        state["index"] = index

    # -- what it holds

    def masks(self) -> dict[Tensor, Tensor]:
        """The entries that train, as bool by parameter; parameters that train whole are left out."""
        found = {}
        for parameter, state in self.state.items():
            if "index" in state:
                flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
                found[parameter] = flat.index_fill(0, state["index"], True).view_as(parameter)
        return found

    def density(self) -> float:
        """The share of the numbers of all its matrices that train; 0 before the first step."""
        chosen = {parameter: state["index"] for parameter, state in self.state.items() if "index" in state}
        return sum(map(len, chosen.values())) / max(1, sum(parameter.numel() for parameter in chosen))

    def memory(self) -> int:
        """The bytes of its state, indices included."""
        return sum(value.nbytes for state in self.state.values() for value in state.values())


class Lift(TrainingRule):
    """Train the principal entries of the weights of layers; all else is frozen.

    It brings its optimizer, `LiftAdamW`. In the Trainer and in a loop of one's own that is made first:
    `optimizer = rule.optimizer(parameter_groups(model, 0.0, learning_rate=1e-4))`.

    Attributes:
        lora_rank: r, which says how many entries.
        rank_filter: R, of the low-rank part.
        update_interval: steps from one choice to the next; None chooses once.
        include: patterns of the weights that train; None for those of all linear layers and convolutions.
        exclude: patterns of weights that do not.
        betas: of the moments.
        eps: as in `LiftAdamW`.
        choose: the same.
        reduce: the same.
        algorithm: the same.
        eps_mode: the same.
        seed: the same.

    Raises:
        UnsupportedModelError: the model holds quantized layers.
        ValueError: no weight is left, or the optimizer is another one.
    """

    lora_rank: int = Field(128, ge=1)
    rank_filter: int = Field(128, ge=1)
    update_interval: int | None = Field(200, ge=1)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ("lm_head*",)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-6, ge=0)
    choose: Choose = "principal"
    reduce: Reduce = "largest"
    algorithm: Algorithm = "svd"
    eps_mode: EpsMode = "released"
    seed: int = Field(0, ge=0)

    def trainable(self, model: nn.Module) -> list[str]:
        for path, module in model.named_modules():
            if isinstance(module, ActLinear | CodedWeight):
                raise UnsupportedModelError(
                    f"model: {path} is a {type(module).__name__}, whose weight is not a plain matrix; lift trains "
                    f"before layers are quantized or changed."
                )
        weights = layer_weights(model, self.include)
        chosen = [name for name in weights if not any(fnmatchcase(name, pattern) for pattern in self.exclude)]
        if not chosen:
            raise ValueError(f"exclude: {list(self.exclude)} leaves no weight to train; leave some patterns out.")
        return chosen

    def optimizer(self, groups: list[dict[str, Any]]) -> LiftAdamW:
        settings = self.model_dump(exclude={"include", "exclude"})
        return LiftAdamW(groups, **settings)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedLift:
        if not isinstance(optimizer, LiftAdamW):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} was given, and lift trains by its own; make it by "
                f"rule.optimizer(parameter_groups(model, 0.0, learning_rate=1e-4)), inside trained_parameters(model, "
                f"[rule])."
            )
        return AttachedLift(model, optimizer)


class AttachedLift(AttachedRule):
    """The rule at work.

    Args:
        model: that is trained.
        optimizer: which holds all that changes.
    """

    def __init__(self, model: nn.Module, optimizer: LiftAdamW) -> None:
        self.model, self.optimizer = model, optimizer

    @property
    def masks(self) -> Masks:
        """The entries that train now, by name."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return Masks({names[parameter]: mask for parameter, mask in self.optimizer.masks().items()})  # type: ignore[index]

    def report(self) -> dict[str, Any]:
        """Return the share of the numbers that trains, and the bytes of the optimizer's state."""
        return {"density": self.optimizer.density(), "state_bytes": self.optimizer.memory()}
