"""Multiple-choice questions for a language model: the choice of the largest log-likelihood is its answer.

As lm-eval scores them: a choice is appended to the question after a space, its log-likelihood is the sum over its
tokens, `acc` takes the largest sum and `acc_norm` the largest sum per character of the choice. Nothing is generated,
and only the logits of the choices' tokens are computed if the model's head allows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.forward.example import Inputs
from actkit.core.forward.hooks import evaluating
from actkit.core.forward.outputs import find_head, output_of
from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.ground.progress import track

BATCH_TOKENS = 2048  # tokens run at a time, padding included
_LOGITS = 1 << 23  # logits computed at a time: 32 MiB in float32


@dataclass(frozen=True)
class Question:
    """A question of a text and the choices that may follow it.

    Attributes:
        text: the question.
        choices: the texts that may follow.
        answer: which of them is right, counted from 0.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


def log_likelihoods(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, progress: bool = True
) -> Tensor:
    """Compute the log-likelihood of each choice after its question, in nats.

    Args:
        model: a language model that takes input_ids.
        tokenizer: its tokenizer.
        questions: each with the same number of choices.
        progress: show a bar.

    Returns:
        float64 [questions, choices].

    Raises:
        DataError: there is no question, their numbers of choices differ, or a choice has no token of its own.
        NonFiniteError: a logit is NaN or Inf.
    """
    counts = {len(question.choices) for question in questions}
    if len(counts) != 1:
        raise DataError(f"questions: they have {sorted(counts) or 'no'} choices; give questions with the same number.")
    context = Inputs.of(model).context
    rows = [
        row if context is None else (row[0][-(context + 1) :], row[1])
        for question in questions
        for row in encode(tokenizer, question)
    ]
    order = sorted(
        range(len(rows)), key=lambda index: -len(rows[index][0])
    )  # the longest first: no later batch is larger
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]][0]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    found = torch.zeros(len(rows), dtype=torch.float64)
    device = next(model.parameters()).device
    head: nn.Module | None = None
    with evaluating(model):
        for number, batch in enumerate(track(batches, "Answering questions", len(batches), progress)):
            longest = len(rows[batch[0]][0]) - 1  # the last token is predicted, not read
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # padding on the right is never looked at
            for place, index in enumerate(batch):
                ids[place, : len(rows[index][0]) - 1] = torch.tensor(rows[index][0][:-1])
            given = {"input_ids": ids.to(device)}
            if number == 0:
                head = find_head(model, given)
            output = output_of(model, given, head)
            where, targets, owners = _predicted([rows[index] for index in batch], longest)
            for part in torch.arange(len(where)).split(max(1, _LOGITS // output.shape[-1])):
                log = output.rows(where[part]).float().log_softmax(-1).cpu()
                values = log.gather(1, targets[part, None])[:, 0].double()
                found.index_add_(0, torch.tensor(batch)[owners[part]], values)
    if not bool(torch.isfinite(found).all()):
        wrong = int((~torch.isfinite(found)).nonzero()[0]) // counts.pop()
        raise NonFiniteError(f"the model's logits hold NaN or Inf in question {wrong}; check the weights of the model.")
    return found.view(len(questions), -1)


def encode(tokenizer: Any, question: Question) -> list[tuple[list[int], int]]:
    """Turn a question into tokens, with each of its choices.

    The tokens begin as the tokenizer begins a text. If a word goes across the end of the question, its tokens count as
    the question's up to as many as the question alone has, as lm-eval counts them.

    Args:
        tokenizer: of the model that is asked.
        question: and its choices.

    Returns:
        For each choice the tokens of question and choice, and how many of them, at the end, are the choice's.

    Raises:
        DataError: a choice has no token of its own.
    """
    before = tokenizer.encode(question.text)
    found = []
    for choice in question.choices:
        whole = tokenizer.encode(f"{question.text} {choice}")
        if len(whole) <= len(before):
            raise DataError(f"questions: the choice {choice!r} has no token of its own; give choices that hold text.")
        found.append((whole, len(whole) - len(before)))
    return found


def _predicted(rows: Sequence[tuple[list[int], int]], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [n] each: positions in the flattened batch whose logits are wanted, the token after each, and its row."""
    where: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (tokens, count) in enumerate(rows):
        count = min(count, len(tokens) - 1)
        end = row * longest + len(tokens) - 1
        where += range(end - count, end)
        targets += tokens[-count:]
        owners += [row] * count
    return torch.tensor(where), torch.tensor(targets), torch.tensor(owners)


def hits(questions: Sequence[Question], found: Tensor) -> dict[str, Tensor]:
    """Say whether each question is answered rightly, without and with length normalisation.

    Args:
        questions: as they were asked.
        found: what `log_likelihoods` found, [questions, choices].

    Returns:
        `acc` and `acc_norm`, float64 [questions] of 0 and 1 each.
    """
    lengths = np.array([[len(choice) for choice in question.choices] for question in questions], dtype=np.float64)
    answers = np.array([question.answer for question in questions])
    values = found.numpy()  # NumPy's argmax takes the first of equal ones, torch's may take any
    return {
        "acc": torch.from_numpy((values.argmax(1) == answers).astype(np.float64)),
        "acc_norm": torch.from_numpy(((values / lengths).argmax(1) == answers).astype(np.float64)),
    }
