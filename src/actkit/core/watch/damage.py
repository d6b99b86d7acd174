"""How far a model's outputs move if a layer is exchanged for another: for many layers, and many others, at once.

    KL(original | changed)  ~  1/2 E_t (g_t . d_t)^2
    d_t = layer'(x_t) - layer(x_t),   g_t = d log p(y) / d layer(x_t)

with y drawn from what the original says, so that E g g^T is the Fisher information of its outputs: the curvature of
the divergence at the original. Outputs that are no class probabilities take y from a bell curve around them, which
gives half their squared distance. One backward pass serves all layers and all exchanges; each exchange costs the
product of its layer. So a table of every setting of every layer costs about as much as one pass for each setting.

What it leaves out: damage is taken as small (the first term of a series), as that of one token at a time (errors of
tokens that see each other are added as if they had nothing in common), and layers are taken one by one. `optimize`
holds the sum over layers beside what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext, first_tensor, forward, pieces
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.progress import track

ROWS = 2  # of a batch at a time: the logits of more would be the largest tensors by far

Exchanges = Mapping[str, Mapping[str, nn.Module]]


def layer_damage(
    model: nn.Module,
    exchanges: Exchanges,
    batches: Iterable[Any],
    *,
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Estimate the divergence that each exchange of a layer costs by itself.

    Args:
        model: the original; neither compiled nor sharded. It is left as it is.
        exchanges: by a name of your choice, the layers to put in place by their paths; each takes what the layer takes.
        batches: as the model is called with them.
        draws: of y for each batch; more give a steadier estimate.
        seed: of these.
        progress: show a bar.

    Returns:
        By name and path, nats per token (or per example) for outputs that are class probabilities, else half a squared
        distance.

    Raises:
        NonFiniteError: an estimate is NaN or infinite.
    """
    paths = list(dict.fromkeys(path for layers in exchanges.values() for path in layers))
    by_path = {path: {n: layers[path] for n, layers in exchanges.items() if path in layers} for path in paths}
    sums = {(name, path): 0.0 for path in paths for name in by_path[path]}
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    with evaluating(model), ExitStack() as stack, torch.enable_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        for batch in track(list(batches), "Measuring what layers can stand", enabled=progress):
            for piece in pieces(batch, ROWS, model):
                context = BatchContext.of(piece, model)
                tokens += context.tokens
                for found in _pass(model, by_path, piece, context.mask, draws, generator):
                    sums[found[:2]] += found[2]
    for (name, path), value in sums.items():
        if not value < float("inf"):
            raise NonFiniteError(
                f"{path}: exchanged for {name}, it gives {value}; the model or its data hold NaN or Inf."
            )
    return {
        name: {path: sums[name, path] / (2 * draws * max(1, tokens)) for path in layers}
        for name, layers in exchanges.items()
    }


def _pass(
    model: nn.Module,
    exchanges: Mapping[str, Mapping[str, nn.Module]],
    batch: Any,
    mask: Tensor | None,
    draws: int,
    generator: torch.Generator,
) -> Iterable[tuple[str, str, float]]:
    """Run a batch forward once and back `draws` times. Yields name, path, sum over tokens of (g . d)^2."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(path: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            seen.append((path, args[0].detach(), output))
            return output

        return after

    with hooked(model, after={path: watch(path) for path in exchanges}, replacing=True):
        outputs = first_tensor(forward(model, batch))
    total = [_score(outputs, mask, generator) for _ in range(draws)]
    gradients = [
        torch.autograd.grad(each, [output for _, _, output in seen], retain_graph=index + 1 < draws, allow_unused=True)
        for index, each in enumerate(total)
    ]
    with torch.no_grad():
        for index, (path, inputs, output) in enumerate(seen):
            for name, layer in exchanges[path].items():
                moved = (layer(inputs) - output).float()
                for found in gradients:
                    if found[index] is not None:
                        yield name, path, float((moved * found[index].float()).sum(-1).square().sum())


def _score(outputs: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """log p(y) of a y that is drawn from the outputs [rows, ..., classes], of real tokens."""
    outputs = outputs.float()
    flat = outputs.flatten(0, -2)
    if mask is not None and mask.shape == outputs.shape[:-1]:
        flat = flat[mask.flatten()]
    drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)
    return flat.log_softmax(-1).gather(-1, drawn).sum()
