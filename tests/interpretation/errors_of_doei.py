"""How a user meets the errors of class tokens and their maps: one function per way, which raises it."""

from __future__ import annotations

from typing import Any

import torch

from actkit.data.digit_scenes import digit_scenes
from actkit.interpretation.doei.class_activation_maps import class_activation_maps
from actkit.interpretation.doei.class_token_vit import ClassTokenViTConfig, shown_classes
from actkit.interpretation.doei.doei import DOEI
from actkit.interpretation.doei.maps import class_token_maps, gradient_maps
from actkit.interpretation.doei.seeds import cam_miou, miou_at_best_threshold
from actkit.interpretation.doei.tokens import Tokens, weights_formed
from actkit.testing import tiny_batches, tiny_model
from error_proofs import Place, proof

IMAGES = tiny_batches("vit")
FIRST = torch.zeros(3, 1, dtype=torch.long)


def eager(kind: str = "class_token_vit") -> Any:
    return tiny_model(kind, attn_implementation="eager")


proof(lambda p: ClassTokenViTConfig(image_size=8, patch_size=3))


proof(lambda p: ClassTokenViTConfig(rank_decay=0.0))


proof(lambda p: eager()(torch.zeros(1, 3, 16, 16)))


proof(lambda p: shown_classes(torch.tensor([3]), 3))


@proof
def nothing_that_says_what_belongs_together(p: Place) -> None:
    with DOEI(hfa_weights=(0, 0, 0)).on(model := eager()):
        model(**IMAGES[0])


@proof
def edits_without_weights(p: Place) -> None:
    with DOEI().on(tiny_model("class_token_vit")):
        pass


@proof
def no_such_block(p: Place) -> None:
    with DOEI(layers=(2,)).on(eager()):
        pass


@proof
def no_vision_transformer(p: Place) -> None:
    with DOEI().on(tiny_model("bert")):
        pass


@proof
def two_tokens_before_the_patches(p: Place) -> None:
    with DOEI().on(eager("deit")):
        pass


proof(lambda p: Tokens(eager()).grid((8, 8), 6))


@proof
def an_attention_that_forms_no_weights(p: Place) -> None:
    with weights_formed(tiny_model("vit", attn_implementation="flex_attention")):
        pass


proof(lambda p: gradient_maps(tiny_model("vit"), IMAGES[0], FIRST, "cam"))  # type: ignore[arg-type]


proof(lambda p: gradient_maps(tiny_model("vit"), IMAGES[0], FIRST[:1], "grad_cam"))


proof(lambda p: gradient_maps(tiny_model("vit"), IMAGES[0], FIRST, "grad_cam", site="layer.output:classifier"))


proof(lambda p: gradient_maps(tiny_model("mlp"), tiny_batches("mlp")[0], FIRST, "grad_cam"))


proof(lambda p: class_token_maps(tiny_model("vit"), IMAGES[0]))


proof(lambda p: class_token_maps(eager(), IMAGES[0], fuse="sum"))  # type: ignore[arg-type]


proof(lambda p: cam_miou(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5, dtype=torch.long), 0.5))


proof(lambda p: cam_miou(torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 3), 0.5))


proof(lambda p: miou_at_best_threshold(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), ()))


proof(lambda p: class_activation_maps(tiny_model("vit"), IMAGES, classes=0))


proof(lambda p: class_activation_maps(tiny_model("vit"), IMAGES, method="rollout", site="blocks.0.block.output"))


proof(lambda p: class_activation_maps(tiny_model("vit"), []))


proof(lambda p: class_activation_maps(tiny_model("llama"), tiny_batches("llama")))


proof(lambda p: digit_scenes(1, size=30))
