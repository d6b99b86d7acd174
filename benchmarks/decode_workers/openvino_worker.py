"""OpenVINO on the CPU: a Llama with int8 or int4 weights, and its keys and values as state inside the model.

optimum-intel, the usual way to such a model, does not run with transformers 5.23, so that the graph is built here, of
the operations that its export and nncf compression end with. The CPU plugin fuses them: weights stay packed, attention
writes its state in place (for which it insists on the choice of a beam), rotary positions are one operation.

Settings, the fastest of those tried at 1.1B on two cores with AVX-512 (tokens a second, int4 / int8):
dynamic quantization of activations by 128 (59 / 45; by 32: 43 / 41; off: 39 / 30), bfloat16 for the rest (float32 is as
fast). Symmetric int4; with a zero point, or without pinned threads or the 8-bit state, all default, speed is the same.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from openvino import Node, Type
from protocol import SHAPES, prompt_ids, serve
from torch import nn

from actkit.testing.random_llama import random_llama

GROUP = 128  # weights that share a scale in int4; in int8 a row does
SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_PRECISION_HINT": "bf16"}


class OpenVino:
    def load(self, *, variant: str, threads: int, folder: str, shape: str = "") -> dict[str, Any]:
        """Quantize a random model, build its graph, compile it and warm up. No files: folder is not used."""
        if variant not in ("int8", "int4"):
            raise ValueError(f"variant {variant!r}: choose int8 or int4.")
        self.vocabulary = SHAPES[shape]["vocab_size"]
        model, stored = graph(random_llama(SHAPES[shape]), bits=int(variant.removeprefix("int")))
        compiled = ov.Core().compile_model(model, "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})
        self.request = compiled.create_infer_request()
        self.round()
        scales = "by row" if variant == "int8" else f"by {GROUP}"
        return {
            "about": f"OpenVINO {variant} weights, symmetric {scales}, activations dynamically int8 by 128, bf16, "
            f"{compiled.get_property('KV_CACHE_PRECISION').get_type_name()} state, hint LATENCY",
            "bytes_per_token": stored,
            "versions": {"openvino": ov.get_version()},
        }

    def round(self, *, prompt: int = 128, tokens: int = 16) -> dict[str, Any]:
        """From an empty state: the prompt, then so many greedy tokens, each timed."""
        self.request.reset_state()
        ids, past, seconds = prompt_ids(prompt, self.vocabulary), 0, []
        for _ in range(tokens + 1):
            start = time.perf_counter()
            positions = np.arange(past, past + len(ids), dtype=np.int32)
            logits = self.request.infer([np.array([ids], np.int32), positions, np.zeros(1, np.int32)])[0]
            ids, past = [int(logits.argmax())], past + len(ids)
            seconds.append(time.perf_counter() - start)
        return {"first_token_seconds": seconds[0], "token_seconds": seconds[1:]}


def graph(llama: nn.Module, bits: int) -> tuple[ov.Model, int]:
    """A model of ids [1, n], positions [n] and beam [1] to the last position's logits. And bytes of its matrices."""
    config, weights = llama.config, llama.state_dict()
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    ids = ops.parameter([1, -1], np.int32, "ids")
    positions = ops.parameter([-1], np.int32, "positions")
    beam = ops.parameter([-1], np.int32, "beam")
    sinks: list[Node] = []
    stored: list[int] = []

    def linear(x: Node, name: str) -> Node:
        matrix, count = packed(weights[f"{name}.weight"], bits)
        stored.append(count)
        return ops.matmul(x, matrix, False, True)

    def norm(x: Node, name: str) -> Node:
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        scale = ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(config.rms_norm_eps))))
        return ops.multiply(ops.multiply(x, scale), weights[f"{name}.weight"].float().numpy())

    turns = config.rope_parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(config.max_position_embeddings), np.tile(turns, 2))
    cosine, sine = (
        ops.unsqueeze(ops.gather(table.astype(np.float32), positions, np.int32(0)), np.array([0, 1]))
        for table in (np.cos(angles), np.sin(angles))
    )

    def rotate(x: Node) -> Node:
        first, second = ops.variadic_split(x, np.array(3), np.array([size // 2, size // 2])).outputs()
        turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
        return ops.add(ops.multiply(x, cosine), ops.multiply(turned, sine))

    def project(x: Node, name: str, count: int) -> Node:
        """[1, n, hidden] -> [1, count, n, size]"""
        return ops.transpose(ops.reshape(linear(x, name), [0, 0, count, size], True), np.array([0, 2, 1, 3]))

    def remember(new: Node, name: str) -> Node:
        """All positions' keys or values, each repeated for the queries that share it."""
        none = ops.concat([ops.shape_of(beam, "i32"), np.array([shared, 0, size], np.int32)], 0)
        past = ops.read_value(
            ops.broadcast(np.float32(0), none), name, Type.f32, ov.PartialShape([-1, shared, -1, size])
        )
        every = ops.concat([ops.gather(past, beam, np.int32(0)), new], 2)
        sinks.append(ops.assign(every, name))
        if heads == shared:
            return every
        repeated = ops.broadcast(
            ops.unsqueeze(every, np.array(2)), [1, 1, heads // shared, 1, 1], None, "BIDIRECTIONAL"
        )
        return ops.reshape(repeated, [0, heads, -1, size], True)

    def attention(x: Node, name: str) -> Node:
        queries = rotate(project(x, f"{name}.q_proj", heads))
        keys = remember(rotate(project(x, f"{name}.k_proj", shared)), f"{name}.keys")
        values = remember(project(x, f"{name}.v_proj", shared), f"{name}.values")
        mixed = ops.transpose(ops.scaled_dot_product_attention(queries, keys, values, causal=True), [0, 2, 1, 3])
        return linear(ops.reshape(mixed, [0, 0, heads * size], True), f"{name}.o_proj")

    def feed_forward(x: Node, name: str) -> Node:
        gated = ops.multiply(ops.swish(linear(x, f"{name}.gate_proj")), linear(x, f"{name}.up_proj"))
        return linear(gated, f"{name}.down_proj")

    rows = weights["model.embed_tokens.weight"].half().numpy()
    x = ops.convert(ops.gather(rows, ids, np.int32(0)), "f32")
    for number in range(config.num_hidden_layers):
        name = f"model.layers.{number}"
        x = ops.add(x, attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn"))
        x = ops.add(x, feed_forward(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"))
    last = ops.gather(norm(x, "model.norm"), np.array([-1]), np.int32(1))
    return ov.Model([ops.result(linear(last, "lm_head"))], sinks, [ids, positions, beam]), sum(stored)


def packed(weight: torch.Tensor, bits: int) -> tuple[Node, int]:
    """The matrix out of codes and scales, rounded to nearest, and the bytes of these."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, columns if bits == 8 else GROUP)
    most = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / most).half()
    codes = (groups / scale.float()).round_().clamp_(-most - 1, most).to(torch.int8).numpy()
    shape = ov.Shape(codes.shape)
    if bits == 4:  # two to a byte, the first in the low half
        pairs = codes.reshape(-1, 2).view(np.uint8)
        codes = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    tensor = ov.Tensor(codes, shape, Type.i8 if bits == 8 else Type.i4)
    whole = ops.multiply(ops.convert(ops.constant(tensor, shared_memory=False), "f16"), scale.numpy())
    return ops.convert(ops.reshape(whole, [rows, columns], False), "f32"), codes.nbytes + 2 * scale.numel()


if __name__ == "__main__":
    serve(OpenVino())
