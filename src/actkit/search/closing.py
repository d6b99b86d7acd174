"""The last words of a search: what was gained, what it cost, how sure that is, where the files are, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from actkit.core.measure.quality import CONFIDENCE

if TYPE_CHECKING:
    from actkit.search.results import Optimization

# metric -> what a loss of it is a share of
COSTS = {
    "perplexity": "more perplexity on text",
    "fidelity": "less likeness of its embeddings, on sentences",
    "accuracy": "less accuracy, on examples",
}


def in_short(found: Optimization, folder: str | Path) -> str:
    """Say in one paragraph what was found, for a reader who never saw such a search.

    Args:
        found: what the search found.
        folder: where it wrote, as the user named it.

    Returns:
        Plain text, with the command that talks to the result if it is a language model.
    """
    folder = Path(folder)
    if found.best is None:
        return (
            f"In short: nothing that was tried makes {found.name} cheaper at this limit on the loss, so keep it as it "
            f"is. {folder / 'index.html'} shows what was measured, and why."
        )
    best = found.candidate(found.verdict.best or "")
    loss = best.loss
    assert loss is not None
    gains = ", ".join(found.verdict.of(best.name).gains.values())
    costs = next((words for metric, words in COSTS.items() if metric in best.metrics), "loss, on data")
    return (
        f"In short: {best.name} gives {gains}. It costs {max(0.0, loss.value):.2%} {costs} that no step of the search "
        f"saw ({CONFIDENCE:.0%} sure that it is at most {max(0.0, loss.high):.2%}). The model is in {folder / 'best'}, "
        f"loaded again and compared; the report is {folder / 'index.html'}." + _next(found, folder / "best")
    )


def _next(found: Optimization, best: Path) -> str:
    """The command that uses the model, if it writes text."""
    if found.prompt is None:
        return ""
    if (best / "chat_template.jinja").exists():
        return f'\nTalk to it: actkit generate {best} "What does a list comprehension do?" --chat'
    return f'\nLet it write: actkit generate {best} "{_start(found.prompt)}"'


def _start(prompt: str) -> str:
    """The first words of the text that the search let it go on from, as a shell takes them."""
    words = "".join(letter for letter in prompt if letter.isalnum() or letter in " ,.").split()
    return " ".join(words[:3]) or "Return the"
