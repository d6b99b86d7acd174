"""Names of arms: what each makes, near ones, twice the same, what fits no task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actkit.comparison.arms import MLPS, Arm, find, function, known_names, mlp, parse, pooling
from actkit.core.ground.errors import RecipeError
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.posets.pooling import PosetPool2d


def test_names_are_read() -> None:
    found = parse(" silu, crrelu,polynorm ,series:gelu,gr_kan,poset:12,max,lssar,softmax")
    assert [(arm.kind, arm.what) for arm in found] == [
        ("function", "silu"),
        ("function", "crrelu"),
        ("function", "poly_norm"),
        ("function", "series:gelu"),
        ("mlp", "gr_kan"),
        ("pooling", "12"),
        ("pooling", "max"),
        ("attention", "lssar"),
        ("attention", "softmax"),
    ]
    assert parse(["silu", "relu"])[0] == Arm("silu", "function", "silu")
    assert "actkit_rounded_cache" not in known_names()


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="give two names or more"):
        parse("silu,")
    with pytest.raises(ValueError, match="poly_norm and polynorm are the same"):
        parse("silu,polynorm,poly_norm")
    with pytest.raises(RecipeError, match=r"'sillu' is not known. Did you mean silu"):
        find("sillu")
    with pytest.raises(RecipeError, match=r"Did you mean series:silu"):
        find("series:sillu")
    with pytest.raises(RecipeError, match="'act_linear' cannot be compared as a function"):
        find("act_linear")
    with pytest.raises(RecipeError, match="'glu' cannot be compared"):
        find("glu")  # it halves its channels
    with pytest.raises(ValueError, match="poset"):
        find("poset:99")


def test_parts_are_what_their_names_say() -> None:
    x = torch.randn(3, 8, dtype=torch.float32)
    assert torch.equal(function("silu", 8)(x), nn.functional.silu(x))
    assert isinstance(function("crrelu", 8), CRReLU)
    images = torch.randn(2, 5, 8, 8)
    assert torch.equal(pooling(find("max"))(images), nn.functional.max_pool2d(images, 2).relu())
    poset = pooling(find("poset:12"))
    assert isinstance(poset, PosetPool2d) and poset(images).shape == (2, 5, 4, 4)
    assert function("series:relu", 5, 1)(images).shape == images.shape


@pytest.mark.parametrize("name", ["silu", "poly_relu", "series:silu", "group_rational", *MLPS])
def test_every_mlp_reads_and_gives_its_channels_and_learns(name: str) -> None:
    torch.manual_seed(0)
    made = mlp(find(name), 6, 16, 3)
    y = made(torch.randn(4, 7, 6))
    assert y.shape == (4, 7, 3)
    y.square().sum().backward()
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in made.parameters())
