"""ClassTokenViT: a vision transformer with one token for each class, trained on which classes an image shows.

    x = [t_1 .. t_C, patches] + positions  ->  blocks  ->  x_c, x_p
    class_logits_c = mean of x_c over its features
    map_c = 3 x 3 convolution of x_p on the grid of patches,   patch_logits_c = sum_r w^r map_c(r) / sum_r w^r
    logits = (class_logits + patch_logits) / 2,   loss = BCE(class_logits) + BCE(patch_logits)

r is the rank of a patch in its map, the largest first, and w = 0.996. The attention of a class token to the patches and
the map of its class are what class activation maps are made of (`class_activation_maps.py`). The blocks are those of
transformers' ViT, so that every site and method of a ViT is there; there is no norm behind the last block.

When to use it: to find out where in an image the classes are that it is labelled with, without a mask.
Cost: a ViT of C - 1 more tokens.
Settled here: it is the base of the DOEI paper (MCTformer+, whose released code we read for the formulas) without its
loss on how unlike the class tokens are.
Our own reading: the weights w^r are those of the sheet; the published file averages the map over all patches instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTModel, ViTPatchEmbeddings, ViTPreTrainedModel
from transformers.utils import ModelOutput

from actkit.core.ground.errors import DataError
from actkit.core.store import pretrained


@strict
class ClassTokenViTConfig(ViTConfig):
    """Sizes of a ClassTokenViT: those of transformers' ViT; `num_labels` are its classes.

    Attributes:
        rank_decay: the weight of a patch over that of the next smaller one in its map.

    Raises:
        ValueError: patches do not divide the image, or rank_decay is not above 0 and at most 1.
    """

    model_type = "class_token_vit"
    rank_decay: float = 0.996

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        (height, width), (high, wide) = sides(self.image_size), sides(self.patch_size)
        if height % high or width % wide:
            raise ValueError(
                f"patch_size: {high} x {wide} was given for images of {height} x {width}; give a divisor of both."
            )
        if not 0 < self.rank_decay <= 1:
            raise ValueError(f"rank_decay: {self.rank_decay} was given; give a number above 0 and at most 1.")


def classes_of(config: ClassTokenViTConfig) -> int:
    """Return how many classes there are.

    Args:
        config: of a model.
    """
    return int(config.num_labels or 0)


def sides(size: Any) -> tuple[int, int]:
    """Return height and width of a size in a config, which is a number or both.

    Args:
        size: of an image or a patch.
    """
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class ClassTokenEmbeddings(nn.Module):
    """Class tokens in front of the patches of an image, and a position for each of them.

    Args:
        config: of the model.
    """

    def __init__(self, config: ClassTokenViTConfig) -> None:
        super().__init__()
        self.patch_embeddings = ViTPatchEmbeddings(config)
        count, width = classes_of(config), config.hidden_size
        self.class_tokens = nn.Parameter(torch.randn(1, count, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, count + self.patch_embeddings.num_patches, width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """Return tokens [batch, classes + patches, features] of images [batch, channels, height, width]."""
        given, wanted = tuple(pixel_values.shape[-2:]), sides(self.patch_embeddings.image_size)
        if given != wanted:
            raise DataError(
                f"pixel_values: images of {given[0]} x {given[1]} were given, and the model was made for {wanted[0]} x "
                f"{wanted[1]}; resize them."
            )
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.class_tokens.expand(len(patches), -1, -1), patches), 1)
        return self.dropout(tokens + self.position_embeddings)


class ClassTokenViTPreTrainedModel(ViTPreTrainedModel):
    """What both classes share."""

    config: ClassTokenViTConfig
    config_class = ClassTokenViTConfig
    _no_split_modules: ClassVar[Any] = ["ClassTokenEmbeddings", "ViTLayer"]  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassTokenEmbeddings):
            for parameter in (module.class_tokens, module.position_embeddings):
                init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)


class ClassTokenViTModel(ClassTokenViTPreTrainedModel, ViTModel):
    """The blocks without the maps.

    Args:
        config: its sizes.
    """

    def __init__(self, config: ClassTokenViTConfig) -> None:
        ViTModel.__init__(self, config, add_pooling_layer=False)
        self.embeddings = ClassTokenEmbeddings(config)  # type: ignore[assignment]
        self.layernorm = nn.Identity()  # type: ignore[assignment]
        self.post_init()


@dataclass
class ClassTokenOutput(ModelOutput):
    """What the model gives.

    Attributes:
        loss: of both logits, if there were labels.
        logits: [batch, classes], the mean of the two.
        class_logits: of the class tokens.
        patch_logits: of the maps.
        maps: [batch, classes, rows, columns] on the grid of patches.
        hidden_states: as in transformers.
        attentions: as in transformers.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    class_logits: Tensor | None = None
    patch_logits: Tensor | None = None
    maps: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ClassTokenViTForImageClassification(ClassTokenViTPreTrainedModel):
    """Images -> logits and maps of all classes.

    Args:
        config: its sizes.
    """

    def __init__(self, config: ClassTokenViTConfig) -> None:
        super().__init__(config)
        self.vit = ClassTokenViTModel(config)
        self.map_head = nn.Conv2d(config.hidden_size, classes_of(config), 3, padding=1)
        self.post_init()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (high, wide) = sides(self.config.image_size), sides(self.config.patch_size)
        return height // high, width // wide

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ClassTokenOutput:
        """Find the classes of images.

        Args:
            pixel_values: [batch, channels, height, width].
            labels: [batch, classes], 1 for what an image shows; or int64 [batch], its only class.
            kwargs: as of transformers' ViT.

        Returns:
            Logits and maps.

        Raises:
            DataError: images or labels have another shape.
        """
        found = self.vit(pixel_values, **kwargs)
        count = classes_of(self.config)
        tokens = found.last_hidden_state
        class_logits = tokens[:, :count].mean(-1)
        maps = self.map_head(tokens[:, count:].mT.unflatten(2, self.grid))
        ranked = maps.flatten(2).sort(-1, descending=True).values
        weights = self.config.rank_decay ** torch.arange(ranked.shape[-1], device=ranked.device, dtype=ranked.dtype)
        patch_logits = ranked @ weights / weights.sum()
        loss = None
        if labels is not None:
            shown = shown_classes(labels, count).to(class_logits.dtype)
            bce = nn.functional.binary_cross_entropy_with_logits
            loss = bce(class_logits, shown) + bce(patch_logits, shown)
        return ClassTokenOutput(
            loss=loss,
            logits=(class_logits + patch_logits) / 2,
            class_logits=class_logits,
            patch_logits=patch_logits,
            maps=maps,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return self.config.to_dict()

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Make one with random weights."""
        return cls(ClassTokenViTConfig.from_dict(spec))


def shown_classes(labels: Tensor, count: int) -> Tensor:
    """Return labels as bool [batch, classes].

    Args:
        labels: [batch, classes], 1 for what an image shows; or int64 [batch], its only class.
        count: of classes.

    Raises:
        DataError: they have another shape, or name other classes.
    """
    if labels.dim() == 2 and labels.shape[1] == count and bool(((labels == 0) | (labels == 1)).all()):
        return labels.bool()
    if labels.dim() == 1 and not labels.is_floating_point() and bool(((labels >= 0) & (labels < count)).all()):
        return nn.functional.one_hot(labels.long(), count).bool()
    raise DataError(
        f"labels: {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)} were given for {count} classes; give "
        f"[batch, {count}] of 0 and 1, or int64 [batch] of classes from 0."
    )


AutoConfig.register(ClassTokenViTConfig.model_type, ClassTokenViTConfig, exist_ok=True)
AutoModel.register(ClassTokenViTConfig, ClassTokenViTModel, exist_ok=True)
AutoModelForImageClassification.register(ClassTokenViTConfig, ClassTokenViTForImageClassification, exist_ok=True)
pretrained.register((ClassTokenViTConfig.model_type,))
