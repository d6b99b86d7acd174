"""How often the original and the candidates that matter answer questions rightly, for the report of a search.

The questions are the first of the task `documentation` (`actkit.data.tasks`), scored by `core.measure.multiple_choice`:
lm-eval is not needed. The original is asked first, then the best and others of the front, as far as the minutes go. If
the original answers no better than by chance, no candidate is asked: there is nothing that it could lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from actkit.core.ground.progress import step
from actkit.core.layers.weights import widened
from actkit.core.measure.multiple_choice import Question, encode, hits, log_likelihoods
from actkit.core.measure.task_scores import TaskScore, score
from actkit.core.store import checkpoint
from actkit.data.tasks import documentation
from actkit.search.budget import Budget
from actkit.search.journal import Journal
from actkit.search.measured import Candidate
from actkit.search.results import Answers
from actkit.search.workshop import Broken, Workshop, transforms_key

QUESTIONS = 100  # of 500: for a vocabulary of 49,152 some 13,000 tokens, a third of the test split
ASKED = 3  # candidates
PADDED = 1.5  # of the seconds that as many tokens take in full rows

Hits = dict[str, Tensor]  # by metric, float64 [questions] of 0 and 1


def ask(
    shop: Workshop,
    candidates: Sequence[Candidate],
    journal: Journal,
    budget: Budget,
    folder: Callable[[Candidate], Path],
) -> Answers:
    """Ask the original and candidates, and pair their answers.

    Args:
        shop: holds the original and its tokenizer.
        candidates: those to ask, the most important first; at most `ASKED` are.
        journal: what it holds is not asked again.
        budget: says whether there is time for another one.
        folder: where a candidate is saved.

    Returns:
        The scores of those that were asked, and why others were not.
    """
    why_not = _why_not(shop)
    if why_not is not None:
        return Answers(notes=(f"not asked: {why_not}",))
    questions = documentation(QUESTIONS)
    chance = 1 / len(questions[0].choices)
    tokens = sum(len(row) for question in questions for row, _ in encode(shop.tokenizer, question))
    seconds = PADDED * budget.pass_seconds * tokens / max(1, shop.splits.test.tokens)
    known = {entry["key"]: entry["hits"] for entry in journal.find("answers")}
    scores: dict[str, tuple[TaskScore, ...]] = {}
    notes: list[str] = []
    original: Hits | None = None
    for candidate in (Candidate("original"), *candidates[:ASKED]):
        key = transforms_key(candidate.recipe)
        over = None if key in known else budget.over(seconds + budget.rest, f"asking {candidate.name}")
        if over is not None:
            notes.append(f"{candidate.name} was not asked: minutes={budget.minutes:g}: {over}")
            break
        try:
            found = _hits(known[key]) if key in known else _asked(shop, candidate, folder, questions)
        except Broken as error:
            notes.append(f"{candidate.name} was asked, and failed: {type(error).__name__}: {error}")
            if original is None:
                break
            continue
        if key not in known:
            journal.add("answers", key=key, hits={metric: values.int().tolist() for metric, values in found.items()})
            step(f"{candidate.name}: {found['acc_norm'].mean():.0%} of {QUESTIONS} questions", shop.progress)
        scores[candidate.name] = tuple(
            score("documentation", metric, values, None if original is None else original[metric], by="actkit")
            for metric, values in found.items()
        )
        if original is None:
            original = found
            if all(each.value.low <= chance for each in scores[candidate.name]):
                notes.append(
                    f"no candidate was asked: the original does not answer better than by chance, {chance:.0%}"
                )
                break
    return Answers(scores, tuple(notes), QUESTIONS, chance)


def _why_not(shop: Workshop) -> str | None:
    if shop.task != "language":
        return "questions are text, and this model is no language model"
    if shop.tokenizer is None:
        return "questions are text, and this model has no tokenizer"
    if shop.by_divergence:
        return "the data are random tokens, as for a model that knows no text"
    return None


def _asked(
    shop: Workshop, candidate: Candidate, folder: Callable[[Candidate], Path], questions: Sequence[Question]
) -> Hits:
    model: nn.Module = shop.model
    if candidate.recipe:
        model = checkpoint.load(folder(candidate), base=shop.base)
    with widened(model):
        found = log_likelihoods(model, shop.tokenizer, questions, progress=shop.progress)
    return hits(questions, found)


def _hits(entry: dict[str, list[int]]) -> Hits:
    return {metric: torch.tensor(values, dtype=torch.float64) for metric, values in entry.items()}
