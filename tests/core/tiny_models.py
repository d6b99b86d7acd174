"""Tiny random models of the five described architectures and two plain ones, and how tests compare models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

KINDS = ("llama", "gpt2", "bert", "vit", "mixtral")
HIDDEN, INNER, HEADS, LAYERS, VOCABULARY = 16, 32, 4, 3, 50
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


def build(kind: str, **settings: Any) -> Any:
    """A random model in evaluation mode; the same one each time."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**{**DECODER, **settings}))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**{**DECODER, **settings}, num_local_experts=4, num_experts_per_tok=2))
    elif kind == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **settings))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**{**ENCODER, **settings}, vocab_size=VOCABULARY))
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**{**ENCODER, **settings}, image_size=8, patch_size=4))
    else:
        model = {"mlp": Perceptron, "conv": ConvNet, "loose": LooseChain}[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, INNER), nn.Linear(INNER, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.middle(torch.relu(self.up(x)))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(4 * 64, INNER), nn.Linear(INNER, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(self.act(self.conv(x)).flatten(1))))


class LooseChain(LlamaForCausalLM):
    """A llama in which something happens between two blocks."""

    def __init__(self) -> None:
        super().__init__(LlamaConfig(**DECODER))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        hidden, length = self.model.embed_tokens(input_ids), input_ids.shape[1]
        angles = self.model.rotary_emb(hidden, torch.arange(length)[None])
        mask = torch.ones(length, length).tril().bool() & attention_mask.bool()[:, None, None]
        for index, block in enumerate(self.model.layers):
            hidden = block(hidden, attention_mask=mask, position_embeddings=angles)
            hidden = hidden * 2 if index == 0 else hidden
        return self.lm_head(self.model.norm(hidden))


def batches(kind: str, *, padding: bool = True) -> list[Any]:
    """Two batches; of token models the second has padding."""
    torch.manual_seed(1)
    if kind == "vit":
        return [{"pixel_values": torch.randn(3, 3, 8, 8)}, {"pixel_values": torch.randn(2, 3, 8, 8)}]
    if kind == "mlp":
        return [torch.randn(6, HIDDEN), torch.randn(5, HIDDEN)]
    if kind == "conv":
        return [torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8)]
    found = []
    for index, lengths in enumerate(((6, 6), (7, 4))):
        ids = torch.randint(1, VOCABULARY, (2, max(lengths)))
        mask = torch.ones_like(ids)
        if index and padding:
            mask[1, lengths[1] :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def run(model: nn.Module, batch: Any) -> Tensor:
    """The main output on one batch: logits, or the output itself."""
    with torch.no_grad():
        output: Any = model(**batch) if isinstance(batch, dict) else model(batch)
    return output.logits if hasattr(output, "logits") else output


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every tensor bit by bit, and which module stands where: equal snapshots are equal models."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[str, Any] = {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in named}
    found |= {f"module {path}": type(module) for path, module in model.named_modules(remove_duplicate=False)}
    found |= {f"hooks {path}": _hooks(module) for path, module in model.named_modules()}
    found |= {f"gradient {name}": parameter.requires_grad for name, parameter in model.named_parameters()}
    found |= {f"mode {path}": module.training for path, module in model.named_modules()}
    config: Any = getattr(model, "config", None)
    found["config"] = None if config is None else (config.to_dict(), config._attn_implementation)
    return found


def _hooks(module: nn.Module) -> tuple[int, ...]:
    return len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
