"""Small models for experiments that train: language models like the zoo's with text for them, vision transformers.

Language models read the tokens of the zoo's tokenizer (2048 words). Training goes through `core.train.training.train`,
whose validation split is not optional; what is reported is measured on the test split, which neither training nor
validation saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from actkit import zoo
from actkit.claims.subject import spread
from actkit.core.measure.quality import measure_quality
from actkit.core.train.training import train
from actkit.data import Batches, Split, load_data

LENGTH, BATCH = 128, 16  # tokens of a row, rows of a batch


def language_model(
    activation: str = "silu", *, hidden: int = 128, intermediate: int = 384, layers: int = 4, seed: int = 0, **more: Any
) -> nn.Module:
    """A Llama with gated MLPs, tied embeddings and random weights: 1.1 M parameters. more: entries of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            hidden_act=activation,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            **more,
        )
    )


def vision_transformer(
    activation: str = "gelu", *, hidden: int = 64, intermediate: int = 256, layers: int = 2, seed: int = 0
) -> nn.Module:
    """A ViT for the 8 x 8 digits with patches of 2 pixels, 4 heads and random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=4,
            id2label={label: str(label) for label in range(10)},
            label2id={str(label): label for label in range(10)},
            hidden_act=activation,
        )
    )


def text(
    model: nn.Module, split: Split, rows: int | None, *, seed: int = 0, length: int = LENGTH, batch: int = BATCH
) -> Batches:
    """Rows of the embedded text in batches; None for all of the split. seed: which documents."""
    tokenizer = zoo.tokenizer("swiglu")
    return load_data(None, model, tokenizer, sequences=rows, length=length, batch_size=batch, seed=seed, split=split)


class TextArms:
    """Language models that are compared: as many tokens in one order, and a learning rate chosen alike for each arm.

    The rate of an arm is the one whose validation loss is least with the first seed; the test split decides nothing.
    Each model is trained when it is first needed: AdamW, cosine, gradients clipped at 1, float32; the last weights
    count.

    Args:
        fresh: (arm, seed) -> a model with random weights.
        seeds: of weights, documents and order.
        rates: that are tried.
        length: tokens of a row.
        rows: of a step.
        steps: of a training.
        held_out: rows of the test split, and a quarter as many of validation.
        progress: show bars.
    """

    def __init__(
        self,
        fresh: Callable[[str, int], nn.Module],
        *,
        seeds: Sequence[int],
        rates: Sequence[float],
        length: int = 64,
        rows: int = 16,
        steps: int = 250,
        held_out: int = 640,
        progress: bool = False,
    ) -> None:
        self.fresh, self.seeds, self.rates, self.progress = fresh, tuple(seeds), tuple(rates), progress
        self.length, self.rows, self.steps, self.held_out = length, rows, steps, held_out
        self._trained: dict[tuple[str, int, float], tuple[nn.Module, float]] = {}
        self._losses: dict[tuple[str, int], float] = {}

    def rate(self, arm: str) -> float:
        """The rate of an arm, by the validation loss of the first seed."""
        return min(self.rates, key=lambda rate: self._model(arm, self.seeds[0], rate)[1])

    def model(self, arm: str, seed: int) -> nn.Module:
        """The trained model of an arm, at its rate."""
        return self._model(arm, seed, self.rate(arm))[0]

    def loss(self, arm: str, seed: int) -> float:
        """Nats per token of an arm on test text."""
        if (arm, seed) not in self._losses:
            model = self.model(arm, seed)
            quality = measure_quality(model, self.test(model), task="language", resamples=1, progress=False)
            self._losses[arm, seed] = math.log(quality.metrics["perplexity"].value)
        return self._losses[arm, seed]

    def losses(self, arm: str) -> list[float]:
        """Nats per token of an arm in each seed."""
        return [self.loss(arm, seed) for seed in self.seeds]

    def test(self, model: nn.Module) -> Batches:
        """Rows of the test split."""
        return text(model, "test", self.held_out, length=self.length)

    def described(self, arm: str) -> str:
        """Losses, rate and parameters of an arm, for the record."""
        size = sum(parameter.numel() for parameter in self.model(arm, self.seeds[0]).parameters())
        return f"{arm} {spread(self.losses(arm), '.3f')} ({size:,} parameters, rate {self.rate(arm):g})"

    def _model(self, arm: str, seed: int, rate: float) -> tuple[nn.Module, float]:
        """A trained model and its validation loss."""
        if (arm, seed, rate) not in self._trained:
            model = self.fresh(arm, seed)
            trained = train(
                model,
                text(model, "train", self.rows * self.steps, seed=seed, length=self.length, batch=self.rows),
                validation=text(model, "search", max(self.held_out // 4, self.rows), length=self.length),
                steps=self.steps,
                learning_rate=rate,
                seed=seed,
                evaluate_every=self.steps,
                keep="last",
                progress=self.progress,
            )
            self._trained[arm, seed, rate] = model.eval(), trained.validation
        return self._trained[arm, seed, rate]
