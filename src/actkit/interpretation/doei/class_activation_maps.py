"""Class activation maps of a classifier of images, as an analysis by name.

    actkit analyze vit class_activation_maps --html maps.html

When to use it: to see where a model finds the classes that it names, on images of yours.
Cost: a forward pass for each batch, and what the method takes (`maps.py` says how each is made).
Settled here: the maps are of the classes with the largest logits, on the places of the site, each from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor, forward, main_input, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.model.sites import Site
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import FAINT, FULL, grid
from actkit.interpretation.doei.maps import Gradients, attention_rollout, class_token_maps, gradient_maps
from actkit.interpretation.doei.tokens import between_0_and_1

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Method = Literal["grad_cam", "grad_cam_pp", "layer_cam", "rollout", "class_tokens"]
HALF = 0.5


@dataclass(frozen=True)
class ClassMap:
    """Where a model finds a class in an image.

    Attributes:
        image: its number.
        class_index: of the class.
        logit: of the class.
        area: share of the places where the map is above one half.
        peak: row and column of its largest value.
        values: of the map, rows of columns from 0 to 1.
    """

    image: int
    class_index: int
    logit: float
    area: float
    peak: tuple[int, int]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ClassActivationMaps:
    """Maps of several images.

    Attributes:
        method: how they were made.
        maps: by image, then by class, the surest first.
    """

    method: str
    maps: tuple[ClassMap, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = [
            {**asdict(each), "peak": list(each.peak), "values": [list(row) for row in each.values]}
            for each in self.maps
        ]
        return {"method": self.method, "maps": found}

    def table(self) -> Table:
        """A row per map."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Class activation maps by {self.method}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("image", "class", "logit", "area above half", "peak at"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.maps:
            place = f"{each.peak[0]}, {each.peak[1]}"
            table.add_row(str(each.image), str(each.class_index), f"{each.logit:.3g}", f"{each.area:.0%}", place)
        return table

    def figure(self) -> Figure:
        """Draw the maps side by side.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        subplots = plotly().subplots
        titles = [f"image {each.image}, class {each.class_index}" for each in self.maps]
        figure = subplots.make_subplots(rows=1, cols=len(self.maps), subplot_titles=titles)
        for at, each in enumerate(self.maps):
            figure.add_trace(graph_objects.Heatmap(z=each.values, zmin=0, zmax=1, showscale=False), row=1, col=at + 1)
        return figure.update_yaxes(autorange="reversed").update_layout(title=f"Maps by {self.method}")

    def page(self) -> Page:
        """Each map as a grid of its places, and a table."""
        pictures = [
            Picture(f"Image {each.image}, class {each.class_index}, logit {each.logit:.3g}", _drawn(each))
            for each in self.maps
        ]
        rows = [[each.image, each.class_index, each.logit, each.area, *each.peak] for each in self.maps]
        names = ("image", "class", "logit", "area above half", "peak row", "peak column")
        about = f"{len(self.maps)} maps by {self.method}; each cell is a place of the image, the stronger the surer."
        return Page(
            "Class activation maps", about, (Pictures("Maps", pictures, small=True), Sorted("In numbers", names, rows))
        )


def _drawn(found: ClassMap) -> str:
    """One map as a grid."""

    def cell(row: int, column: int) -> tuple[str, float, str, bool]:
        value = found.values[row][column]
        return "c0", FAINT + (FULL - FAINT) * value, f"row {row}, column {column}: {value:.2f}", False

    names = [str(at) for at in range(max(len(found.values), len(found.values[0])))]
    label = f"image {found.image}, class {found.class_index}"
    return grid(names[: len(found.values)], names[: len(found.values[0])], label, cell)


def class_activation_maps(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "grad_cam",
    site: Site | str | None = None,
    classes: int = 1,
    images: int = 8,
    progress: bool = True,
) -> ClassActivationMaps:
    """Map the surest classes of images.

    Args:
        model: a classifier of images; as it was afterwards.
        batches: images, or what it takes.
        method: how maps are made; 'rollout' and 'class_tokens' are for vision transformers.
        site: of the first three methods; None for the last convolution, or of a vision transformer what its last
            attention reads.
        classes: of an image.
        images: how many, from the first on.
        progress: show a bar.

    Returns:
        The maps.

    Raises:
        ValueError: a setting is out of bounds.
        DataError: no batch, or the model gives no logits of images.
        UnsupportedModelError: the method is not for this model.
    """
    if method not in get_args(Method) or classes < 1 or images < 1:
        raise ValueError(
            f"method, classes, images: {method!r}, {classes}, {images} were given; give one of "
            f"{', '.join(get_args(Method))}, and 1 or more of each."
        )
    if site is not None and method not in get_args(Gradients):
        raise ValueError(f"site: {site} was given, and {method} is made of attention; leave it out.")
    given = sequence_of(batches)
    if not len(given):
        raise DataError("batches: 0 were given; pass at least one.")
    maps: list[ClassMap] = []
    seen = 0
    for batch in track(given, "Mapping classes", len(given), progress):
        if seen >= images:
            break
        with evaluating(model), torch.no_grad():
            logits = first_tensor(forward(model, batch))
        if logits.dim() != 2 or main_input(batch, model).dim() != 4:
            raise DataError(
                f"batches: images {list(main_input(batch, model).shape)} gave logits {list(logits.shape)}; give a "
                f"classifier [batch, channels, height, width] -> [batch, classes]."
            )
        chosen = logits.topk(min(classes, logits.shape[1]), -1).indices
        found = _made(model, batch, chosen, method, site)
        for row in range(min(len(found), images - seen)):
            for at, values in enumerate(found[row]):
                index = int(chosen[row, at])
                maps.append(_class_map(seen + row, index, float(logits[row, index]), values))
        seen += len(found)
    return ClassActivationMaps(method, tuple(maps))


def _made(model: nn.Module, batch: Any, chosen: Tensor, method: Method, site: Site | str | None) -> Tensor:
    """Maps [batch, classes, rows, columns] from 0 to 1."""
    if method == "rollout":
        found = _chosen(attention_rollout(model, batch), chosen)
    elif method == "class_tokens":
        found = _chosen(class_token_maps(model, batch, enlarge=False), chosen)
    else:
        found = gradient_maps(model, batch, chosen, method, site=site)
    return between_0_and_1(found.flatten(2)).view_as(found)


def _chosen(maps: Tensor, chosen: Tensor) -> Tensor:
    """Maps of the chosen classes; a single one is that of all classes."""
    index = torch.zeros_like(chosen) if maps.shape[1] == 1 else chosen
    return maps.gather(1, index[..., None, None].expand(*index.shape, *maps.shape[2:]))


def _class_map(image: int, index: int, logit: float, values: Tensor) -> ClassMap:
    peak = divmod(int(values.argmax()), values.shape[1])
    area = float((values > HALF).double().mean())
    rows = tuple(tuple(row) for row in values.double().tolist())
    return ClassMap(image, index, logit, area, peak, rows)
