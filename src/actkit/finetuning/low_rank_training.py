"""Low-rank training (LoRA, 2021, arXiv:2106.09685): train two thin matrices beside chosen linear layers, then merge.

    y = W x + (alpha / rank) B A x,   B: [out, rank], from zero,   A: [rank, in]
    at the end  W <- W + (alpha / rank) B A

The adapters are those of peft (`pip install 'actkit[finetune]'`), the loop is `core.train.training.train`. All else is
frozen meanwhile, and afterwards the model has the modules that it had before, so that it is saved, changed and run as
ever. Cost: gradients and moments of rank * (in + out) numbers per layer instead of in * out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actkit.core.edit.edits import set_module
from actkit.core.model.anatomy import Linear, anatomy
from actkit.core.model.parts import LinearRole
from actkit.core.train.training import Trained, train

ADAPTER = "default"  # peft's name for the only one


def train_low_rank(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    validation: Iterable[Any],
    roles: Sequence[LinearRole],
    rank: int = 8,
    alpha: float | None = None,
    ranks: Mapping[int, int] | None = None,
    seed: int = 0,
    **training: Any,
) -> Trained:
    """Train low-rank changes of some linear layers of a model, in place, and merge them into its weights.

    Args:
        model: of transformers; as it was, if an error is raised.
        batches: to train on.
        validation: batches for the loss that chooses the best step.
        roles: of the layers in the blocks that are trained, such as ("query", "gate").
        rank: of the changes.
        alpha: the change is multiplied by alpha / rank; default 2 * rank.
        ranks: of single blocks, by index; their alpha / rank is that of the others.
        seed: of A and of the training.
        training: what `train` takes (steps, learning_rate, rules, mixed_precision ...) except `out`: save the model
            afterwards.

    Returns:
        What `train` returns.

    Raises:
        ImportError: peft is missing.
        ValueError: a layer whose weight is quantized or packed, roles that the model does not have, or settings out of
            bounds; and what `train` raises.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} was given, allowed is 1 or more.")
    alpha = 2.0 * rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"alpha: {alpha} was given, allowed is a number above 0.")
    for name in {"out", "resume", "overwrite"} & training.keys():
        raise ValueError(f"{name}: adapters are not saved; train without it, then save the model with actkit.save.")
    blocks = len(anatomy(model).blocks)
    wrong = {index: own for index, own in (ranks or {}).items() if not 0 <= index < blocks or own < 1}
    if wrong:
        raise ValueError(f"ranks: {wrong} were given; give blocks of 0 to {blocks - 1}, each a rank of 1 or more.")
    if "trainable" in training:
        raise ValueError("trainable: adapters alone are trained; say with roles= beside which layers they stand.")
    targets = _targets(model, roles)
    with _adapters(model, targets, rank, alpha, seed, ranks or {}) as adapted:
        trained = train(model, batches, validation=validation, seed=seed, trainable="*.lora_*", **training)
        for layer in adapted:
            weight = layer.get_base_layer().weight
            with torch.no_grad():
                weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())
    return trained


def _targets(model: nn.Module, roles: Sequence[LinearRole]) -> dict[int, list[Linear]]:
    """The layers that are trained, by block."""
    by_block: dict[int, list[Linear]] = {}
    for block in anatomy(model).blocks:
        layers = by_block.setdefault(block.index, [])
        if block.experts is not None and not block.experts.members and {"gate", "up", "down"} & set(roles):
            raise ValueError(
                f"roles: {block.experts.path} keeps its experts in 3-D parameters, which are no linear layers; apply a "
                f"transform that opens them first, or leave gate, up and down out."
            )
        if block.attention is not None:
            layers += [*block.attention.inputs, block.attention.output]
        for _, mlp in block.mlps():
            layers += [*mlp.inputs, mlp.down]
    chosen = {index: [linear for linear in layers if linear.role in roles] for index, layers in by_block.items()}
    if not any(chosen.values()):
        found = ", ".join(sorted({linear.role for layers in by_block.values() for linear in layers})) or "none"
        raise ValueError(f"roles: {', '.join(roles) or 'none'} were given; the blocks of this model have {found}.")
    for linear in chain(*chosen.values()):
        if not isinstance(linear.module, nn.Linear | Conv1D) or not linear.module.weight.is_floating_point():
            raise ValueError(
                f"model: {linear.path} ({type(linear.module).__name__}) has a weight that cannot be trained and "
                f"merged; train first and quantize or sparsify this layer after, or leave out the role {linear.role!r}."
            )
    return chosen


@contextmanager
def _adapters(
    model: nn.Module, by_block: dict[int, list[Linear]], rank: int, alpha: float, seed: int, ranks: Mapping[int, int]
) -> Iterator[list[Any]]:
    """The layers with their adapters, which alone are trainable meanwhile; afterwards the plain layers stand again."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("low-rank training: peft is missing; pip install 'actkit[finetune]'.") from error
    targets = list(chain(*by_block.values()))
    plain = {linear.path: linear.module for linear in targets}
    own = {
        f"^{re.escape(x.path)}$": ranks[index] for index, layers in by_block.items() if index in ranks for x in layers
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    transposed = isinstance(targets[0].module, Conv1D)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(plain),
        fan_in_fan_out=transposed,
        rank_pattern=own,
        alpha_pattern={path: alpha / rank * each for path, each in own.items()},  # type: ignore[misc]
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # of an adapter, which takes the dtype of its layer: too coarse in 16 bits
                parameter.data = parameter.data.float()
        yield [model.get_submodule(path) for path in plain]
    finally:
        for path, module in plain.items():
            set_module(model, path, module)
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.__dict__.pop("peft_config", None)  # peft leaves it there
