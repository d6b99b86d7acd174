"""Multiple-choice questions: against a token-by-token sum in float64, and against lm-eval where it is installed."""

import pytest
import torch
from scipy.stats import binom
from tiny_models import build

from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.measure.multiple_choice import BATCH_TOKENS, Question, encode, hits, log_likelihoods
from actkit.core.measure.task_scores import TaskScore, mean, paired_difference, score
from actkit.data.tasks import documentation
from actkit.zoo.loading import open_model


@pytest.fixture(scope="module")
def swiglu():
    return open_model("swiglu", dtype="float32")


def brute_force(model, tokenizer, question):
    """One pass per choice without padding, all logits, log-probabilities and sums in float64."""
    found = []
    for choice in question.choices:
        ids = tokenizer.encode(f"{question.text} {choice}")
        first = len(tokenizer.encode(question.text))
        log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(float(sum(log[at - 1, ids[at]] for at in range(first, len(ids)))))
    return found


@torch.no_grad()
def test_log_likelihoods_are_those_of_single_passes(swiglu):
    model, tokenizer = swiglu
    questions = documentation(24)
    assert sum(len(row) for each in questions for row, _ in encode(tokenizer, each)) > BATCH_TOKENS  # several batches
    found = log_likelihoods(model, tokenizer, questions, progress=False)
    expected = torch.tensor([brute_force(model, tokenizer, each) for each in questions], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_question_longer_than_the_context_loses_its_beginning(swiglu):
    model, tokenizer = swiglu
    context = model.config.max_position_embeddings
    question = Question("alpha beta gamma " * context, ("delta", "epsilon"), 0)
    found = log_likelihoods(model, tokenizer, [question], progress=False)
    for index, (ids, count) in enumerate(encode(tokenizer, question)):
        kept = ids[-(context + 1) :]
        log = model(torch.tensor([kept[:-1]])).logits[0].double().log_softmax(-1)
        expected = sum(float(log[at - 1, kept[at]]) for at in range(len(kept) - count, len(kept)))
        assert float(found[0, index]) == pytest.approx(expected, rel=1e-5)


def test_hits_take_the_largest_sum_and_the_largest_per_character():
    questions = [Question("", ("ab", "abcd"), 0), Question("", ("ab", "abcd"), 1), Question("", ("ab", "cd"), 1)]
    found = hits(questions, torch.tensor([[-2.0, -3.0], [-2.0, -3.0], [-1.0, -1.0]], dtype=torch.float64))
    assert found["acc"].tolist() == [1, 0, 0]  # of equal ones the first
    assert found["acc_norm"].tolist() == [0, 1, 0]


def test_scores_against_closed_forms():
    values, others = torch.tensor([1.0] * 30 + [0.0] * 10).double(), torch.tensor([1.0] * 20 + [0.0] * 20).double()
    found = mean(values)
    error = (0.75 * 0.25 / 39) ** 0.5  # the sample's standard deviation over the root of 40
    assert (found.value, found.high - found.value) == pytest.approx((0.75, 1.96 * error))
    apart = paired_difference(values, others, resamples=20_000)
    # Of resampled items as many differ by 1 as a binomial distribution says. It has steps of 1 / 40.
    ends = binom.ppf([0.025, 0.975], 40, 0.25) / 40
    assert (apart.value, apart.low, apart.high) == pytest.approx((0.25, *ends), abs=1.01 / 40)
    assert paired_difference(values, values).high == 0
    whole = score("a", "acc", values, others, by="x 1")
    assert TaskScore.from_dict(whole.to_dict()) == whole
    single = score("a", "acc", values[:1], by="x 1")
    assert TaskScore.from_dict(single.to_dict()) == single


def test_bad_questions_are_refused(swiglu):
    model, tokenizer = swiglu
    with pytest.raises(DataError, match="same number"):
        log_likelihoods(model, tokenizer, [Question("a", ("b",), 0), Question("a", ("b", "c"), 0)])
    with pytest.raises(DataError, match="same number"):
        log_likelihoods(model, tokenizer, [])
    broken = build("llama")
    broken.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="question 0"):
        log_likelihoods(broken, Letters(), [Question("abc", ("def", "g"), 0)], progress=False)


class Letters:
    """One token per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 16 for letter in text]


def test_a_choice_without_a_token_is_refused():
    class Blind(Letters):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.rstrip())

    with pytest.raises(DataError, match="no token of its own"):
        encode(Blind(), Question("abc", ("", "d"), 0))
