"""Draw docs/assets/doei.png: scenes, their masks, and the maps of class tokens without and with DOEI.

python scripts/doei_picture.py    # trains the first two arms of the claim; some minutes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from actkit.claims.doei import EDITED, PLAIN, Arms, Sizes, in_batches
from actkit.data.digit_scenes import Scenes
from actkit.interpretation.doei.doei import DOEI
from actkit.interpretation.doei.maps import class_token_maps

TARGET = Path(__file__).parents[1] / "docs" / "assets" / "doei.png"
SHOWN, ENLARGED, GAP = 5, 2, 6  # scenes, pixels of a pixel, between cells


class Keeping(Arms):
    """Arms that keep the maps of the first test scenes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.maps: dict[bool, Tensor] = {}

    def _measured(self, model: nn.Module, rule: DOEI | None):
        few = Scenes(*(each[:SHOWN] for each in self.scenes("test")))
        (batch,) = in_batches(few)
        if rule is None:
            self.maps.setdefault(False, class_token_maps(model, batch, batch["labels"], refine=False))
        else:
            with rule.on(model):
                self.maps[True] = class_token_maps(model, batch, batch["labels"], refine=False)
        return super()._measured(model, rule)


def draw(scenes: Scenes, maps: Mapping[str, Tensor]) -> Image.Image:
    """The picture: a column for each scene; below it the mask of its first class, and that class's maps."""
    size = scenes.pixel_values.shape[-1] * ENLARGED
    names = ("scene", "one class", *maps)
    width, height = (size + GAP) * SHOWN + 100, (size + GAP) * len(names) + GAP
    picture = Image.new("RGB", (width, height), "white")
    words = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        words.text((4, GAP + row * (size + GAP) + size // 2), name, fill="black")
    for column in range(SHOWN):
        shown = int(scenes.labels[column].argmax())
        cells = [scenes.pixel_values[column], (scenes.masks[column] == shown + 1).float()]
        cells += [each[column, shown] for each in maps.values()]
        for row, cell in enumerate(cells):
            values = cell if cell.dim() == 3 else cell.expand(3, *cell.shape)
            pixels = (255 * values.clamp(0, 1)).byte().permute(1, 2, 0).numpy()
            picture.paste(
                Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST),
                (100 + column * (size + GAP), GAP + row * (size + GAP)),
            )
    return picture


if __name__ == "__main__":
    torch.set_num_threads(1)
    arms = Keeping(Sizes())
    arms.found(PLAIN, 0)
    before = arms.maps.pop(False)
    arms.found(EDITED, 0)
    few = Scenes(*(each[:SHOWN] for each in arms.scenes("test")))
    draw(few, {"plain": before, "DOEI": arms.maps[True]}).save(TARGET, optimize=True)
