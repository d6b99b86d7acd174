"""Prompts that are read dense: layers whose selection is meant for decoding only (`Selection.prefill`).

    with dense_prompt(model, tokens=prompt.shape[1]):
        model(input_ids=prompt, use_cache=True)  # all inputs of these layers are read

A prompt goes through dense products, where a dropped input saves nothing and finding it costs something. Whatever
decodes a model with transformers' forward pass stands around the pass over a prompt like this; the CPU decoder does it
by itself. Nothing else does: a plain forward pass, and so every measurement of quality, selects the inputs of every
token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from actkit.core.layers.linear import ActLinear


def decoding_only(model: nn.Module) -> list[ActLinear]:
    """Return the layers that select inputs while decoding only, so that prompts are read dense."""
    layers = [module for module in model.modules() if isinstance(module, ActLinear)]
    return [layer for layer in layers if layer.select is not None and layer.select.prefill == "dense"]


@contextmanager
def dense_prompt(model: nn.Module, tokens: int) -> Iterator[None]:
    """Let these layers read all inputs in the meantime, and correct nothing that would have been dropped.

    Args:
        model: changed for as long as the context lasts.
        tokens: that are given at once; one alone is no prompt, and then nothing is changed.
    """
    layers = decoding_only(model) if tokens > 1 else []
    before = [(layer, layer.select, layer.correction, layer._packed) for layer in layers]
    try:
        for layer, _, correction, _ in before:
            layer.select = layer._packed = None  # what was packed is laid out for a selection
            if correction is not None and correction.of == "dropped":
                layer.correction = None
        yield
    finally:
        for layer, select, correction, packed in before:
            layer.select, layer.correction, layer._packed = select, correction, packed
