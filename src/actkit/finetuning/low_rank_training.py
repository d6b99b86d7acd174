"""Low-rank training (LoRA, 2021, arXiv:2106.09685): train two thin matrices beside chosen linear layers, then merge.

    y = W x + (alpha / rank) B A x,   B: [out, rank], from zero,   A: [rank, in]
    at the end  W <- W + (alpha / rank) B A

The adapters are those of peft (`pip install 'actkit[finetune]'`), the loop is `core.train.training.train`. All else is
frozen meanwhile, and afterwards the model has the modules that it had before, so that it is saved, changed and run as
ever; or the adapter is kept alone, as peft's folder, and the model is what it was.

When to use it: to train a model, or to heal one that was changed, with little memory for gradients and moments.
Cost: gradients and moments of rank * (in + out) numbers per layer instead of in * out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actkit.core.edit.edits import get_module, set_module
from actkit.core.ground.modules import is_within
from actkit.core.ground.whole_file import write_whole
from actkit.core.model.anatomy import anatomy
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.rule import parse_rules
from actkit.core.store import checkpoint
from actkit.core.store.adapter_folder import AdapterBase, write_adapter
from actkit.core.train.training import Trained, train
from actkit.core.train.training_setup import RECORD, check_folder
from actkit.finetuning.adapters import AdaptedLayer, adaptable

ADAPTER = "default"  # peft's name for the only one
WHOLE = "modules_to_save"  # and for the trained copies of modules that train whole


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
        training: what `train_adapter` takes (steps, learning_rate, rules, out ...).

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
    view = anatomy(model)
    blocks = len(view.blocks)
    wrong = {index: own for index, own in (ranks or {}).items() if not 0 <= index < blocks or own < 1}
    if wrong:
        raise ValueError(f"ranks: {wrong} were given; give blocks of 0 to {blocks - 1}, each a rank of 1 or more.")
    by_block = {index: (ranks or {}).get(index, rank) for index in range(blocks)}
    layers = {
        linear.path: AdaptedLayer(by_block[index], alpha / rank * by_block[index])
        for index, linears in adaptable(view, roles).items()
        for linear in linears
    }
    return train_adapter(model, batches, validation=validation, layers=layers, seed=seed, **training)


def train_adapter(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    validation: Iterable[Any],
    layers: Mapping[str, AdaptedLayer],
    also: Sequence[str] = (),
    merge: bool = True,
    out: str | Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    seed: int = 0,
    **training: Any,
) -> Trained:
    """Train adapters beside some layers of a model.

    Args:
        model: as it was, if an error is raised.
        batches: to train on.
        validation: batches for the loss that chooses the best step.
        layers: how which layers are adapted, by their paths, as `Adapter.layers` says.
        also: paths of modules that train whole beside them, such as a head (peft's `modules_to_save`).
        merge: add the changes to the weights of the model. Otherwise the model is as it was afterwards, and `out` holds
            the adapter alone, as peft writes it, with the fingerprint of the model: `actkit.load` opens it.
        out: folder to write; needed without `merge`.
        overwrite: replace what is there.
        base: the name by which `actkit.load` opens the model; by default the folder that it was loaded from.
        seed: of what begins at random, and of the training.
        training: what `train` takes (steps, learning_rate, rules, mixed_precision ...).

    Returns:
        What `train` returns.

    Raises:
        ImportError: peft is missing.
        ValueError: no layers, a start of another shape, modules that cannot train whole, settings out of bounds, or a
            rule that trains more than the adapter where that alone is kept; and what `train` raises.
        CheckpointError: `out` holds something that is not to be replaced, or the model cannot be saved.
    """
    check(merge, out=out, overwrite=overwrite, **training)
    _check_layers(model, layers)
    _check_whole(model, also, layers)
    if not merge:
        _refuse_more(model, training.get("rules", ()))
    folder = None if out is None else Path(out)
    if folder is not None and merge:
        checkpoint.check_savable(model)
    trained_on = None if merge else AdapterBase.of(model, base)
    trainable = adapter_parameters(also)
    with adapters_beside(model, layers, seed, also) as (config, adapted, whole):
        trained = train(model, batches, validation=validation, seed=seed, trainable=trainable, **training)
        if trained_on is not None and folder is not None:
            write_adapter(model, config, trained_on, folder)
        else:
            for layer in adapted:
                weight = layer.get_base_layer().weight
                with torch.no_grad():
                    weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())
            for module in whole:
                module.original_module.load_state_dict(getattr(module, WHOLE)[ADAPTER].state_dict())
    if folder is None:
        return trained
    trained = replace(trained, folder=folder)
    if merge:
        checkpoint.save(model, folder, overwrite=True)
    write_whole(folder / RECORD, json.dumps(trained.to_dict(), indent=1))
    return trained


def check(merge: bool, *, out: str | Path | None = None, overwrite: bool = False, **training: Any) -> None:
    """Refuse settings of `train_adapter` that cannot go well; ask before long work, not after it.

    Args:
        merge: as in `train_adapter`.
        out: the same.
        overwrite: the same.
        training: the same.

    Raises:
        ValueError: a setting that adapters do not take.
        CheckpointError: `out` holds something that is not to be replaced.
    """
    if "resume" in training:
        raise ValueError("resume: the state of an adapter's training is not kept; train without it, from the start.")
    if "trainable" in training:
        raise ValueError("trainable: adapters alone are trained; say with roles= beside which layers they stand.")
    if not merge and out is None:
        raise ValueError("merge: False was given without out=, so that nothing of the training would be left.")
    check_folder(None if out is None else Path(out), False, overwrite)


def _check_layers(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
    if not layers:
        raise ValueError("layers: none were given, so that nothing would be trained; give at least one.")
    for path, layer in layers.items():
        weight: Any = get_module(model, path).weight
        width = weight.shape[0] if isinstance(get_module(model, path), Conv1D) else weight[0].numel()
        if layer.start is not None and tuple(layer.start.shape) != (layer.rank, width):
            raise ValueError(
                f"layers: {path} was given a start of shape {list(layer.start.shape)}; give [{layer.rank}, {width}], "
                f"its rank by its inputs."
            )


def _check_whole(model: nn.Module, also: Sequence[str], layers: Mapping[str, AdaptedLayer]) -> None:
    """Refuse modules that peft would not train whole, or others that it would take for them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in also:
        module = modules.get(path)
        parameters = [] if module is None else list(module.parameters())
        if module is None or not parameters:
            raise ValueError(f"also: {path!r} is no module of the model with parameters; give paths of such modules.")
        reason = None
        inside = next((each for each in layers if is_within(each, path) or is_within(path, each)), None)
        same = next((name for name in modules if name.endswith(path) and name != path), None)
        own = {id(parameter) for parameter in parameters}
        outside = (p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(f"{path}."))
        if inside is not None:
            reason = f"{inside} is adapted already"
        elif same is not None:
            reason = f"peft goes by the ends of names, and {same} ends alike"
        elif any(id(parameter) in own for parameter in outside):
            reason = "a parameter of it is tied to one elsewhere"
        elif any(parameter.dtype not in (torch.float32, torch.float64) for parameter in parameters):
            reason = f"it is kept in {parameters[0].dtype}, in which small steps vanish; load the model in float32"
        if reason is not None:
            raise ValueError(f"also: {path} cannot train whole: {reason}. Leave it out, or change what is named.")


def _refuse_more(model: nn.Module, rules: Any) -> None:
    """Refuse rules that train more than adapters, where these alone are kept."""
    for rule in parse_rules(rules):
        more = list(rule.trainable(model) or ())
        if more:
            raise ValueError(
                f"rules: {type(rule).__name__} trains parameters of the model beside the adapter ({more[0]} ...), "
                f"which a folder of the adapter alone does not hold; merge the adapter, or let the rule train nothing."
            )


def adapter_parameters(also: Sequence[str] = ()) -> list[str]:
    """Return patterns of the names of what trains while adapters stand there.

    Args:
        also: paths of modules that train whole.
    """
    return ["*.lora_*", *(f"{path}.{WHOLE}.*" for path in also)]


@contextmanager
def adapters_beside(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], seed: int, also: Sequence[str] = ()
) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Let adapters stand beside layers, which alone are trainable; afterwards all is as it was.

    Args:
        model: in place.
        layers: how which are adapted, by their paths.
        seed: of what begins at random.
        also: paths of modules that train whole, as in `train_adapter`.

    Yields:
        peft's settings, the layers with their adapters, and the modules that train whole, in peft's wrappers.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("low-rank training: peft is missing; pip install 'actkit[finetune]'.") from error
    plain = {path: get_module(model, path) for path in (*layers, *also)}
    (rank, alpha), _ = Counter((each.rank, each.alpha) for each in layers.values()).most_common(1)[0]
    names = {path: f"^{re.escape(path)}$" for path in layers}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(layers),
        modules_to_save=list(also) or None,
        fan_in_fan_out=isinstance(next(iter(plain.values())), Conv1D),
        rank_pattern={names[path]: each.rank for path, each in layers.items() if each.rank != rank},
        alpha_pattern={names[path]: each.alpha for path, each in layers.items() if each.alpha != alpha},  # type: ignore[misc]
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # they take the dtype of their layer: too coarse in 16 bits
                parameter.data = parameter.data.float()
        adapted: list[Any] = [model.get_submodule(path) for path in layers]
        for layer, each in zip(adapted, layers.values(), strict=True):
            if each.start is not None:
                with torch.no_grad():
                    start = layer.lora_A[ADAPTER].weight  # of a convolution [rank, in, height, width]
                    start.copy_(each.start.view_as(start))
        yield config, adapted, [model.get_submodule(path) for path in also]
    finally:
        for path, module in plain.items():
            set_module(model, path, module)
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.__dict__.pop("peft_config", None)  # peft leaves it there
