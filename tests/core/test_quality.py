"""Quality against transformers' own losses, float64 by hand, and closed forms for the intervals."""

import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from actkit import zoo
from actkit.core.ground.errors import DataError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.estimate import Estimate
from actkit.core.measure import quality
from actkit.core.measure.quality import measure_quality, resampled_totals, task_of
from actkit.core.measure.tasks import predictions
from actkit.core.measure.tasks.language import Language
from actkit.data import Batches, load_data

VOCABULARY = 61


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    """Answers with given logits, one tensor per call, whatever the input."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.calls = logits, 0

    def forward(self, x):
        self.calls += 1
        return self.logits[(self.calls - 1) % len(self.logits)]


def packed():
    """Two rows: document 7 ends and 8 begins in the first, 8 goes on in the second, 9 is one token, then padding."""
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    owners = torch.tensor([[7] * 5 + [8] * 7, [8] * 6 + [9] + [-1] * 5])
    batch = {"input_ids": ids, "attention_mask": (owners >= 0).long()}
    return Batches([batch], [owners], "packed"), ids, owners


def by_hand(model, other, batches):
    """nll, kl and agreement summed over what counts, position by position in float64; and per document."""
    per_document = {}
    for batch, owners in zip(batches, batches.document_ids):
        with torch.no_grad():
            log, other_log = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
        for row in range(len(owners)):
            for t in range(owners.shape[1] - 1):
                owner = int(owners[row, t + 1])
                if owner < 0 or owner != owners[row, t]:
                    continue
                p, q = other_log[row, t], log[row, t]
                target = int(batch["input_ids"][row, t + 1])
                kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
                new = [1, -float(q[target]), -float(p[target]), kl, float(p.argmax() == q.argmax())]
                old = per_document.get(owner, [0] * 5)
                per_document[owner] = [a + b for a, b in zip(old, new)]
    return per_document


# -- language ----------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_transformers_loss_on_one_document():
    model = llama()
    ids = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(3))
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    found = measure_quality(model, Batches([{"input_ids": ids}]))
    assert measure_quality(model, {"input_ids": ids}).metrics == measure_quality(model, ids).metrics == found.metrics
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found.task, found.documents, found.tokens, found.loss) == ("language", 1, 19, None)
    # One document says nothing about others.
    assert (found.metrics["perplexity"].low, found.metrics["perplexity"].high) == (-math.inf, math.inf)


@pytest.mark.parametrize("chunk", [1 << 23, 3 * VOCABULARY])
def test_language_metrics_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(predictions, "CHUNK", chunk)  # three rows at a time must make no difference
    model, other = llama(0), llama(1)
    batches, _, _ = packed()
    found = measure_quality(model, batches, reference=other)
    per_document = by_hand(model, other, batches)
    assert set(per_document) == {7, 8}  # 9 has one token: nothing of it is predicted from itself
    count, nll, other_nll, kl, agree = (sum(column) for column in zip(*per_document.values()))
    assert (found.documents, found.tokens) == (2, count) == (2, 4 + 6 + 5)
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert values["perplexity_ratio"] == pytest.approx(math.exp((nll - other_nll) / count), rel=1e-5)
    assert values["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert values["agreement"] == pytest.approx(agree / count)
    assert found.loss.value == pytest.approx(values["perplexity_ratio"] - 1)
    # With two documents the resamples are (a, a), (a, b), (b, b); the ends are the extremes.
    ratios = [math.exp((d[1] - d[2]) / d[0]) for d in per_document.values()]
    ratio = found.metrics["perplexity_ratio"]
    assert (ratio.low, ratio.high) == (pytest.approx(min(ratios), rel=1e-4), pytest.approx(max(ratios), rel=1e-4))


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 200.0])
def test_small_and_large_divergences(size):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 40, 1000, generator=generator)
    changed = logits + size * torch.randn(1, 40, 1000, generator=generator)
    found = measure_quality(
        Logits(changed), [torch.arange(40)[None]], reference=Logits(logits), task="language"
    ).metrics["kl"]
    p, q = (each[:, :-1].double().log_softmax(-1) for each in (logits, changed))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.value == pytest.approx(expected, rel=5e-3 if size == 1e-3 else 1e-4)


def test_padding_on_either_side_counts_nothing():
    model, other = llama(0), llama(1)
    ids = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(5))
    alone = measure_quality(model, [{"input_ids": ids}], reference=other)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    right = measure_quality(model, [{"input_ids": padded, "attention_mask": mask}], reference=other)
    left = measure_quality(
        model,
        [{"input_ids": padded.roll(4, 1), "attention_mask": mask.roll(4, 1)}],
        reference=other,
    )
    for found in (right, left):
        assert found.tokens == alone.tokens == 8
        for name, estimate in alone.metrics.items():
            assert found.metrics[name].value == pytest.approx(estimate.value, rel=1e-4), name


def test_labels_leave_out_the_prompt():
    model = llama()
    ids = torch.randint(VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(6))
    labels = ids.clone()
    labels[:, :4] = -100
    loss = float(model(input_ids=ids, labels=labels).loss.detach())
    found = measure_quality(model, [{"input_ids": ids, "labels": labels}])
    assert found.tokens == 12
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)


def test_batching_does_not_matter():
    model, other = llama(0), llama(1)
    ids = torch.randint(VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(2))
    owners = torch.arange(6)[:, None].expand(6, 10) // 2
    whole = measure_quality(model, Batches([{"input_ids": ids}], [owners]), reference=other)
    parts = Batches([{"input_ids": ids[i : i + 1]} for i in range(6)], [owners[i : i + 1] for i in range(6)])
    split = measure_quality(model, parts, reference=other)
    assert whole.documents == split.documents == 3
    for name, estimate in whole.metrics.items():
        other_estimate = split.metrics[name]
        assert other_estimate.value == pytest.approx(estimate.value, rel=1e-4)
        assert other_estimate.low == pytest.approx(estimate.low, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_equals_itself_exactly(dtype):
    model = llama().to(dtype)
    for reference in (model, llama().to(dtype)):
        for data in (packed()[0], packed()[0][:1]):
            found = measure_quality(model, data, reference=reference)
            exact = {"perplexity_ratio": 1.0, "kl": 0.0, "agreement": 1.0}
            for name, value in exact.items():
                assert found.metrics[name] == Estimate(value, value, value)
            assert found.loss == Estimate(0.0, 0.0, 0.0)


def test_the_model_itself_is_called_once_and_its_interval_is_exact_for_one_document():
    ids = torch.tensor([[1, 2, 3]])
    model = Logits(torch.randn(1, 3, 7))
    found = measure_quality(model, [ids], reference=model, task="language")
    assert model.calls == 1 and found.loss == Estimate(0.0, 0.0, 0.0)


def test_zoo_language_model_reaches_its_card():
    model, tokenizer = zoo.load("swiglu"), zoo.tokenizer("swiglu")
    changed = zoo.load("swiglu", dtype=torch.bfloat16)
    data = load_data(None, model, tokenizer, split="test", sequences=12)
    model.train()
    found = measure_quality(changed, data, reference=model)
    assert model.training and not changed.training  # flags are put back
    stated = json.loads((zoo.path("swiglu") / "training.json").read_text())["measured"]["test_loss"]
    assert math.log(found.metrics["perplexity"].value) == pytest.approx(stated, rel=0.1)
    assert abs(found.loss.value) < 0.01 and 0 < found.metrics["kl"].value < 0.01
    assert found.loss.low <= found.loss.value <= found.loss.high
    # Paired, the interval is far narrower than that of either perplexity.
    perplexity = found.metrics["perplexity"]
    assert found.loss.high - found.loss.low < 0.1 * (perplexity.high - perplexity.low) / perplexity.value
    json.dumps(found.to_dict(), allow_nan=False)


def test_memory_stays_bounded_with_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(predictions, "CHUNK", 2 * 50_000)
    seen, original = [], torch.Tensor.log_softmax

    def spy(tensor, *args, **kwargs):
        seen.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", spy)
    logits = torch.randn(1, 9, 50_000, dtype=torch.bfloat16)
    measure_quality(Logits(logits), [torch.arange(9)[None]], task="language")
    assert seen == [2 * 50_000] * 4


# -- intervals ---------------------------------------------------------------------------------------------------------


def synthetic(documents, seed):
    """Counts, and sums whose noise is mostly shared by model and original."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(20, 200, (documents,), generator=generator).double()
    hard = 3 + 0.5 * torch.randn(documents, generator=generator, dtype=torch.float64)
    shift = 0.02 + 0.05 * torch.randn(documents, generator=generator, dtype=torch.float64)
    return {"count": count, "nll": count * (hard + shift), "other_nll": count * hard}


def closed_form(numerator, count):
    """Mean and standard error of a ratio of sums, by the delta method (Cochran 1977, section 6.4)."""
    n, ratio = len(count), numerator.sum() / count.sum()
    residual = numerator - ratio * count
    return float(ratio), float(residual.square().sum().mul(n / (n - 1)).sqrt() / count.sum())


def test_interval_equals_the_closed_form():
    sums = synthetic(400, 0)
    metrics, loss = quality._estimates(Language(), sums, False, 4000, 0)
    mean, error = closed_form(sums["nll"], sums["count"])
    perplexity = metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(mean))
    assert math.log(perplexity.low) == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert math.log(perplexity.high) == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    mean, error = closed_form(sums["nll"] - sums["other_nll"], sums["count"])
    assert loss.value == pytest.approx(math.expm1(mean))
    assert math.log1p(loss.low) == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert math.log1p(loss.high) == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_interval_covers_the_truth():
    trials, hits = 300, 0
    for seed in range(trials):
        _, loss = quality._estimates(Language(), synthetic(60, seed), False, 300, seed)
        hits += loss.low <= math.expm1(0.02) <= loss.high
    # 95 % of 300 is 285; three standard deviations of the binomial are 11, and 60 documents cost a little.
    assert 268 <= hits <= 299


def test_intervals_are_paired():
    sums = synthetic(200, 3)
    _, loss = quality._estimates(Language(), sums, False, 1000, 0)
    table = torch.stack(list(sums.values()), 1)
    one, two = resampled_totals(table, 1000, 0), resampled_totals(table, 1000, 1)
    unpaired = (one[:, 1] / one[:, 0] - two[:, 2] / two[:, 0]).expm1()
    low, high = torch.quantile(unpaired, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert loss.high - loss.low < 0.3 * (high - low)


def test_resampling_draws_whole_documents(monkeypatch):
    sums = torch.eye(5, dtype=torch.float64)
    totals = resampled_totals(sums, 50, 0)
    assert (totals == totals.round()).all() and (totals.sum(1) == 5).all() and (totals > 1).any()
    assert torch.equal(totals, resampled_totals(sums, 50, 0))
    assert not torch.equal(totals, resampled_totals(sums, 50, 1))
    many = resampled_totals(sums, 20_000, 0)
    assert torch.allclose(many.mean(0), torch.ones(5).double(), atol=0.03)
    assert torch.allclose(many.var(0), torch.full((5,), 0.8).double(), atol=0.05)  # binomial(5, 1/5)
    monkeypatch.setattr(quality, "_DRAWS", 1)  # less than one row fits: a row at a time
    assert resampled_totals(sums, 7, 0).shape == (7, 5)


def test_seed():
    model, other = llama(0), llama(1)
    ids = torch.randint(VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(2))
    runs = [measure_quality(model, [{"input_ids": ids}], reference=other, resamples=100, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0].loss.value == runs[2].loss.value


# -- embedding ---------------------------------------------------------------------------------------------------------


def test_fidelity_of_minilm_by_hand():
    model, tokenizer = zoo.load("minilm"), zoo.tokenizer("minilm")
    changed = zoo.load("minilm", dtype=torch.bfloat16)
    data = load_data(None, model, tokenizer, split="test", sequences=12, batch_size=5, length=64)
    found = measure_quality(changed, data, reference=model)
    cosines = []
    for batch in data:
        for row in range(len(batch["input_ids"])):  # one sentence at a time, without any padding
            size = int(batch["attention_mask"][row].sum())
            one = {key: value[row : row + 1, :size] for key, value in batch.items()}
            with torch.no_grad():
                a, b = (m(**one).last_hidden_state.double().mean(1)[0] for m in (model, changed))
            cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert found.task == "embedding" and found.documents == 12 and found.tokens == data.tokens
    assert found.metrics["fidelity"].value == pytest.approx(sum(cosines) / 12, abs=2e-5)
    assert 0 < found.loss.value == pytest.approx(1 - found.metrics["fidelity"].value, abs=1e-12)
    assert found.loss.low <= found.loss.value <= found.loss.high
    assert found.loss.high == pytest.approx(1 - found.metrics["fidelity"].low, abs=1e-12)
    assert measure_quality(model, data, reference=model).metrics["fidelity"] == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(DataError, match=r"reference: none was given.*encoder"):
        measure_quality(model, data)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 3, 2, 2)])
def test_fidelity_of_any_output(shape):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    found = measure_quality(Logits(a), [torch.zeros(4, 9)], reference=Logits(b), task="embedding")
    pool = {2: lambda x: x, 3: lambda x: x.mean(1), 4: lambda x: x.mean((2, 3))}[len(shape)]
    expected = nn.functional.cosine_similarity(pool(a.double()), pool(b.double())).mean()
    assert found.metrics["fidelity"].value == pytest.approx(float(expected), abs=1e-12)


def test_an_embedding_of_zeros_is_like_nothing_else():
    zeros, other = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    found = measure_quality(Logits(zeros), [torch.zeros(2, 9)], reference=Logits(other), task="embedding")
    assert found.metrics["fidelity"].value == 0.5


# -- classification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_accuracy_of_the_zoo(name):
    model = zoo.load(name)
    data = load_data(None, model, split="test", batch_size=64)
    alone = measure_quality(model, data)
    stated = json.loads((zoo.path(name) / "training.json").read_text())["measured"]
    assert alone.task == "classification" and alone.documents == alone.tokens == stated["test_images"]
    assert alone.metrics["accuracy"].value == pytest.approx(stated["test_accuracy"], abs=0.005)
    # The interval of a share, by the normal approximation.
    p, n = alone.metrics["accuracy"].value, alone.documents
    width = alone.metrics["accuracy"].high - alone.metrics["accuracy"].low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / n), rel=0.3)

    torch.manual_seed(0)
    noisy = zoo.load(name)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.3 * parameter.std(unbiased=False) * torch.randn_like(parameter)
    found = measure_quality(noisy, data, reference=model)
    hits = other_hits = agree = total = 0
    kl = 0.0
    for batch in data:
        with torch.no_grad():
            outputs = [m(batch["pixel_values"]) for m in (noisy, model)]
        log, other = ((o if isinstance(o, torch.Tensor) else o.logits).double().log_softmax(-1) for o in outputs)
        hits += int((log.argmax(-1) == batch["labels"]).sum())
        other_hits += int((other.argmax(-1) == batch["labels"]).sum())
        agree += int((log.argmax(-1) == other.argmax(-1)).sum())
        kl += float(nn.functional.kl_div(log, other, reduction="sum", log_target=True))
        total += len(log)
    assert found.metrics["accuracy"].value == hits / total
    assert found.metrics["agreement"].value == agree / total
    assert found.metrics["kl"].value == pytest.approx(kl / total, rel=1e-4)
    assert found.loss.value == pytest.approx((other_hits - hits) / total, abs=1e-12)


def test_classes_of_sequences_and_of_tokens():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2]])
    tokens = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}

    class Classifier(Logits):
        def forward(self, input_ids):
            return super().forward(input_ids)

    labels = torch.tensor([0, 1])
    found = measure_quality(Classifier(logits), [{**tokens, "labels": labels}], task="classification")
    assert found.metrics["accuracy"].value == 0.5 and found.tokens == found.documents == 2
    per_token = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = per_token.argmax(-1)
    labels[0, :2] = -100
    labels[1, 4] = (labels[1, 4] + 1) % 3
    found = measure_quality(Classifier(per_token), [{**tokens, "labels": labels}], task="classification")
    assert found.tokens == 8 and found.documents == 2 and found.metrics["accuracy"].value == 7 / 8


# -- which task, bad input, tables -------------------------------------------------------------------------------------


def test_task_of():
    assert {name: task_of(zoo.load(name)) for name in ("swiglu", "minilm", "vit", "cnn")} == {
        "swiglu": "language",
        "minilm": "embedding",
        "vit": "classification",
        "cnn": "classification",
    }
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert task_of(BertForSequenceClassification(BertConfig(vocab_size=9, **small))) == "classification"
    assert task_of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))) == "language"
    assert task_of(nn.Sequential(nn.Linear(4, 2))) == "classification"
    t5 = T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="T5Model is an encoder-decoder"):
        task_of(t5)


def test_nan_and_inf_name_the_document():
    batches, _, _ = packed()
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(2, 12, VOCABULARY)
        logits[1, 2, 5] = value
        bad, good = Logits(logits), Logits(torch.zeros(2, 12, VOCABULARY))
        with pytest.raises(NonFiniteError, match="the model's logits hold NaN or Inf in document 8"):
            measure_quality(BatchModel(bad), batches, task="language")
        with pytest.raises(NonFiniteError, match="the reference's logits hold NaN or Inf in document 8"):
            measure_quality(BatchModel(good), batches, reference=BatchModel(bad), task="language")
    vectors = torch.ones(2, 3)
    vectors[1, 0] = math.nan
    with pytest.raises(NonFiniteError, match="document 1"):
        measure_quality(Logits(vectors), [torch.zeros(2, 3)], reference=Logits(torch.ones(2, 3)), task="embedding")


class BatchModel(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids)


def test_nan_on_padding_is_not_an_error():
    batches, _, owners = packed()
    logits = torch.zeros(2, 12, VOCABULARY)
    logits[owners < 0] = math.nan
    found = measure_quality(BatchModel(Logits(logits)), batches, task="language")
    assert found.metrics["perplexity"].value == pytest.approx(VOCABULARY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches: 0 were given"),
        ({"task": "speech"}, "task: 'speech' was given, allowed are classification, embedding, language, regression"),
        ({"resamples": 0}, "resamples: 0 was given"),
        ({"batches": [torch.tensor([[3]])]}, "no document has two tokens"),
        ({"batches": [torch.zeros(1, 3)]}, "holds no token ids"),
        ({"batches": [torch.tensor([[1, 2, 9]])]}, "hold token 9, the model predicts 0 to 6"),
        ({"reference": Logits(torch.zeros(1, 3, 8))}, r"reference: its output has shape \[1, 3, 8\]"),
        ({"task": "classification"}, "labels: none are in the data"),
    ],
)
def test_bad_input(change, message):
    wanted = {"batches": [torch.tensor([[1, 2, 3]])], "task": "language"} | change
    length = wanted["batches"][0].shape[1] if wanted["batches"] else 3
    batches = wanted.pop("batches")
    with pytest.raises(ValueError, match=message):
        measure_quality(Logits(torch.zeros(1, length, 7)), batches, **wanted)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels: none are in the data"),
        (torch.zeros(3), r"labels: float32 \[3\]"),
        (torch.zeros(3, 2, dtype=torch.int64), r"labels: int64 \[3, 2\] were given for an output of shape \[3, 10\]"),
        (torch.tensor([0, 1, 10]), "class 10 was given, the model knows 0 to 9"),
    ],
)
def test_bad_labels(labels, message):
    batch = {"pixel_values": torch.zeros(3, 1, 8, 8)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(DataError, match=message):
        measure_quality(zoo.load("cnn"), [batch], reference=zoo.load("cnn"))


def test_document_ids_of_another_shape():
    batches = Batches([{"input_ids": torch.zeros(2, 4, dtype=torch.int64)}], [torch.zeros(2, 3, dtype=torch.int64)])
    with pytest.raises(DataError, match=r"document_ids: shape \[2, 3\] was given for a batch of shape \[2, 4\]"):
        measure_quality(llama(), batches)


def test_a_hopeless_model_gives_finite_words():
    logits = torch.zeros(2, 3, 7)
    logits[:, :, 0] = 5000.0
    found = measure_quality(
        Logits(logits), [torch.tensor([[1, 2, 3]] * 2)], reference=Logits(logits / 5000), task="language"
    )
    assert found.loss.value == math.inf and found.loss.high == math.inf and not found.loss.high <= 0.02
    assert found.to_dict()["loss"] == {"value": None, "low": None, "high": None}


def test_table_and_dict():
    model, other = llama(0), llama(1)
    ids = torch.randint(VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(2))
    found = measure_quality(model, Batches([{"input_ids": ids}], description="six rows"), reference=other)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    text = console.export_text()
    for part in (
        "six rows; 6 documents, 42 predicted tokens",
        "perplexity ratio",
        "95 % interval",
        "agreement",
        "loss",
    ):
        assert part in text
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["metrics"]["kl"]["value"] == found.metrics["kl"].value
    assert Estimate(1.5, 1.25, 2.0).text(".2f") == "1.50 [1.25, 2.00]"
    assert Estimate(1.5, -math.inf, math.inf).text(".1f") == "1.5 [unknown]"
