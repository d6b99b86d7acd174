"""Text in tables is text, whatever a module or a file is called."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

import actkit
from actkit.core.ground.tables import PlainTable


def printed(what: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()


def test_markup_stays_text_and_colours_are_given_as_text():
    table = PlainTable("name", "[b]", title="of [/x] [bold]y", caption="[z]")
    table.add_row("[/x]", Text("green", style="green"))
    found = printed(table)
    assert "[/x]" in found and "[bold]y" in found and "[z]" in found and "[b]" in found and "green" in found


def test_a_module_with_a_name_like_markup_is_shown_evaluated_and_profiled():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("[/x]", nn.Linear(4, 8))
            self.add_module("[bold]", nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.children()
            return second(torch.relu(first(x)))

    torch.manual_seed(0)
    model, batches = Named().eval(), [{"x": torch.randn(6, 4), "labels": torch.zeros(6, dtype=torch.long)}]
    assert "[/x]" in printed(actkit.profile(model, batches).table(), 160)
    assert "Named" in printed(actkit.show(model, batches).table())
    evaluated = actkit.evaluate(model, batches, against=model, speed=False)
    assert "accuracy" in printed(evaluated.table())
