"""Class activation maps: where in an image a model finds a class, by gradients, by attention, or by class tokens.

    grad_cam     relu(sum_k w_k A_k),  w_k = mean over places of dy_c / dA_k
    grad_cam_pp  relu(sum_k w_k A_k),  w_k = sum of alpha relu(g),  alpha = g^2 / (2 g^2 + (sum of A_k) g^3)
    layer_cam    relu(sum_k relu(dy_c / dA_k) A_k)
    rollout      rows of class tokens of the product over blocks of (attention + 1) / 2
    class_tokens M = sqrt(A_c . relu(map_c)),  then M <- (attention of patches to patches) M

A is what stands at a site, y_c the logit of class c, A_c the attention of class token c to the patches. All are scaled
to 0 to 1 for each class and enlarged to the image without aligning corners.
When to use it: to see what a classifier looks at; `class_tokens` is what a ClassTokenViT is for.
Cost: a forward pass, and for the first three a backward pass for each class.
Settled here: the site of a vision transformer is what the attention of its last block reads, as the class token of a
plain one takes nothing from patches behind it; of other models the last convolution. `rollout` is one map for all
classes of a model with one class token. The attention of `class_tokens` is that of the last half of the blocks, and of
all in M's refinement. Grad-CAM++ sums A over the places of a channel, as its paper does; torchcam 0.5
multiplies gradient and A at each place instead. Its Grad-CAM and LayerCAM are ours to the bit on the zoo's CNN.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import arguments, first_tensor, main_input
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.model.anatomy import CONVOLUTIONS, Site, anatomy, has_row
from actkit.core.watch.capture import live
from actkit.interpretation.doei.class_token_vit import ClassTokenViTForImageClassification, shown_classes
from actkit.interpretation.doei.tokens import Tokens, between_0_and_1, weights_formed

Gradients = Literal["grad_cam", "grad_cam_pp", "layer_cam"]
Fuse = Literal["sqrt", "product", "attention", "patches"]


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [batch, classes, height, width] of an image's size.

    Args:
        maps: [batch, classes, rows, columns].
        size: height and width.
    """
    return nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)


# -- by gradients ------------------------------------------------------------------------------------------------------


def grad_cam(model: nn.Module, batch: Any, classes: Tensor, *, site: Site | str | None = None) -> Tensor:
    """Maps by mean gradients (2016, arXiv:1610.02391).

    Args:
        model: a classifier of images.
        batch: as the model takes it.
        classes: int64 [batch, classes], those of each image.
        site: where; None for the last convolution, or of a vision transformer what its last attention reads.

    Returns:
        [batch, classes, rows, columns], not below 0, on the places of the site.
    """
    return gradient_maps(model, batch, classes, "grad_cam", site=site)


def grad_cam_pp(model: nn.Module, batch: Any, classes: Tensor, *, site: Site | str | None = None) -> Tensor:
    """Maps by weighted positive gradients (Grad-CAM++, 2017, arXiv:1710.11063).

    Args:
        model: as of `grad_cam`.
        batch: as of `grad_cam`.
        classes: as of `grad_cam`.
        site: as of `grad_cam`.
    """
    return gradient_maps(model, batch, classes, "grad_cam_pp", site=site)


def layer_cam(model: nn.Module, batch: Any, classes: Tensor, *, site: Site | str | None = None) -> Tensor:
    """Maps by the positive gradient of each place (LayerCAM, 2021).

    Args:
        model: as of `grad_cam`.
        batch: as of `grad_cam`.
        classes: as of `grad_cam`.
        site: as of `grad_cam`.
    """
    return gradient_maps(model, batch, classes, "layer_cam", site=site)


def gradient_maps(
    model: nn.Module, batch: Any, classes: Tensor, method: Gradients, *, site: Site | str | None = None
) -> Tensor:
    """Maps by gradients of logits at a site.

    Args:
        model: a classifier of images; its gradients are left as they were.
        batch: as the model takes it.
        classes: int64 [batch, classes], those of each image.
        method: how gradients weigh channels.
        site: as of `grad_cam`.

    Returns:
        [batch, classes, rows, columns], not below 0, on the places of the site.

    Raises:
        ValueError: the method is unknown, or the site holds no places of an image.
        DataError: the classes are not those of the images.
        UnsupportedModelError: the model has no convolution and is no vision transformer, and no site was given.
    """
    if method not in get_args(Gradients):
        raise ValueError(f"method: {method!r} was given, allowed are {', '.join(get_args(Gradients))}.")
    images = main_input(batch, model)
    site = _site(model) if site is None else site
    with evaluating(model), torch.enable_grad(), live(model, site, anatomy(model, batch)) as found:
        args, kwargs = arguments(model, batch)
        # Inputs get a gradient, so that a model without trainable parameters has a graph too.
        logits = first_tensor(model(*map(_leaf, args), **{name: _leaf(value) for name, value in kwargs.items()}))
        if logits.dim() != 2 or classes.shape[:1] != logits.shape[:1] or classes.dim() != 2:
            raise DataError(
                f"classes: {list(classes.shape)} were given for logits {list(logits.shape)}; give int64 "
                f"[batch, classes]."
            )
        values = next(iter(found.values()))[-1]
        chosen = logits.gather(1, classes.to(logits.device))
        grads = [
            torch.autograd.grad(chosen[:, at].sum(), values, retain_graph=True, allow_unused=True)[0]
            for at in range(classes.shape[1])
        ]
    places = _places(model, values.detach(), tuple(images.shape[-2:]))  # type: ignore[arg-type]
    maps = []
    for grad in grads:
        slope = torch.zeros_like(values) if grad is None else grad
        maps.append(_weighed(places, _places(model, slope, tuple(images.shape[-2:])), method))  # type: ignore[arg-type]
    return torch.stack(maps, 1)


def _weighed(values: Tensor, slopes: Tensor, method: Gradients) -> Tensor:
    """One map [batch, rows, columns] of values and gradients [batch, channels, rows, columns]."""
    if method == "layer_cam":
        return (slopes.relu() * values).sum(1).relu()
    if method == "grad_cam":
        weights = slopes.mean((2, 3), keepdim=True)
    else:
        total = values.sum((2, 3), keepdim=True)
        below = 2 * slopes.square() + total * slopes.pow(3)
        alpha = torch.where(below != 0, slopes.square() / below.where(below != 0, 1), 0)
        weights = (alpha * slopes.relu()).sum((2, 3), keepdim=True)
    return (weights * values).sum(1).relu()


def _places(model: nn.Module, values: Tensor, image: tuple[int, int]) -> Tensor:
    """What stands at a site as [batch, channels, rows, columns]."""
    if values.dim() == 4:
        return values
    if values.dim() != 3:
        raise ValueError(
            f"site: {list(values.shape)} stands there, which is no [batch, channels, rows, columns] and no tokens; "
            f"name a convolution, or a site of a vision transformer."
        )
    tokens = Tokens(model)
    return values[:, tokens.classes :].mT.unflatten(2, tokens.grid(image, values.shape[1]))


def _site(model: nn.Module) -> Site | str:
    """Where maps are made if nothing is said."""
    if has_row(model):
        return f"blocks.{len(anatomy(model).blocks) - 1}.attention.input"
    found = [path for path, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    if not found:
        raise UnsupportedModelError(
            f"model: a {type(model).__name__} without a convolution was given; name a site that holds places of an "
            f"image."
        )
    return f"layer.output:{found[-1]}"


def _leaf(value: Any) -> Any:
    """A float tensor with a gradient of its own; others as they are."""
    return value.detach().requires_grad_(True) if isinstance(value, Tensor) and value.is_floating_point() else value


# -- by attention ------------------------------------------------------------------------------------------------------


def attention_of(model: nn.Module, batch: Any, labels: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return the attention of all blocks, mean over heads [blocks, batch, tokens, tokens], and what the model gives.

    Args:
        model: a vision transformer.
        batch: as the model takes it.
        labels: that it is called with; None for none.
    """
    args, kwargs = arguments(model, batch)
    more = {} if labels is None else {"labels": labels}
    with evaluating(model), torch.no_grad(), weights_formed(model), live(model, "attention.weights") as found:
        output = model(*args, **kwargs, **more)
    return torch.stack([each[-1].mean(1) for each in found.values()]), output


def attention_rollout(model: nn.Module, batch: Any) -> Tensor:
    """Maps by attention that is followed through all blocks (2020, arXiv:2005.00928).

    Args:
        model: a vision transformer.
        batch: as it takes it.

    Returns:
        [batch, class tokens, rows, columns].
    """
    tokens = Tokens(model)
    attention, _ = attention_of(model, batch)
    one = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    total = one.expand_as(attention[0])
    for each in attention:
        total = (each + one) / 2 @ total
    image: Any = tuple(main_input(batch, model).shape[-2:])
    return total[:, : tokens.classes, tokens.classes :].unflatten(2, tokens.grid(image, total.shape[-1]))


def class_token_maps(
    model: nn.Module,
    batch: Any,
    labels: Tensor | None = None,
    *,
    fuse: Fuse = "sqrt",
    refine: bool = True,
    layers: int | None = None,
    enlarge: bool = True,
) -> Tensor:
    """Maps by class tokens, from 0 to 1.

    Args:
        model: a ClassTokenViT.
        batch: images, or a dict with `pixel_values`.
        labels: what images show, whose other maps are 0, as `shown_classes` takes them; None for all classes.
        fuse: of attention and map: the root of their product, the product, or one of the two.
        refine: spread maps by the attention of patches to each other.
        layers: how many of the last blocks, whose attention is taken; None for half of them.
        enlarge: to the size of the images; else they stay on the grid of patches.

    Returns:
        [batch, classes, height, width].

    Raises:
        ValueError: `fuse` is unknown, or there are not so many blocks.
        UnsupportedModelError: the model is no ClassTokenViT.
        DataError: as `shown_classes`.
    """
    if not isinstance(model, ClassTokenViTForImageClassification):
        raise UnsupportedModelError(
            f"model: a {type(model).__name__} was given, which has no map for each class; give a ClassTokenViT."
        )
    depth = model.config.num_hidden_layers
    layers = max(1, depth // 2) if layers is None else layers
    if fuse not in get_args(Fuse) or not 1 <= layers <= depth:
        raise ValueError(
            f"fuse, layers: {fuse!r}, {layers} were given; give one of {', '.join(get_args(Fuse))}, and 1 to {depth}."
        )
    attention, output = attention_of(model, batch, labels)
    maps = fused(attention, output.maps, fuse=fuse, refine=refine, layers=layers)
    if labels is not None:
        maps = maps * shown_classes(labels, maps.shape[1])[..., None, None]
    image: Any = tuple(main_input(batch, model).shape[-2:])
    return enlarged(maps, image) if enlarge else maps


def fused(attention: Tensor, maps: Tensor, *, fuse: Fuse, refine: bool, layers: int) -> Tensor:
    """Return maps of classes from 0 to 1, [batch, classes, rows, columns].

    Args:
        attention: mean over heads, [blocks, batch, tokens, tokens].
        maps: of the patches, [batch, classes, rows, columns].
        fuse: as of `class_token_maps`.
        refine: as of `class_token_maps`.
        layers: as of `class_token_maps`.
    """
    count, grid = maps.shape[1], tuple(maps.shape[2:])
    seen = attention[-layers:].mean(0)[:, :count, count:]
    patches = maps.flatten(2).relu()
    found = {"attention": seen, "patches": patches}.get(fuse, seen * patches)
    if fuse == "sqrt":
        found = found.sqrt()
    if refine:
        found = found @ attention.mean(0)[:, count:, count:].mT
    return between_0_and_1(found).unflatten(2, grid)
