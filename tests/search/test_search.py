"""The search from end to end on a tiny random Llama: what it leaves, what it refuses, and resuming after kill -9."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from huggingface_hub import ModelCard
from made_up import a_speed, around, candidate, the_original
from rich.console import Console

import actkit
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.page import templating
from actkit.core.recipe.recipe import Recipe
from actkit.core.store import checkpoint
from actkit.quantization.rtn import RoundToNearest
from actkit.search.card import model_card
from actkit.search.figures import optimization_table
from actkit.search.journal import JournalError
from actkit.search.measured import Candidate
from actkit.search.report import render
from actkit.search.results import Answers, Proposal
from actkit.search.search import optimize
from actkit.search.speed_row import Row, SpeedRow, measure_speed_row
from actkit.search.verdict import Limits, decide

SECTIONS = {
    "verdict",
    "front",
    "candidates",
    "answers",
    "density",
    "speed-row",
    "profile",
    "coverage",
    "proof",
    "writing",
    "conditions",
    "reproduce",
}
HIDDEN, VOCABULARY = 64, 128
KEPT = {"journal.jsonl", "results.json", "index.html", "recipe.yaml", "best"}
# Ends itself as kill -9 would, in the middle of writing the third candidate's line.
KILLED = """
import os, signal, sys
from actkit.search import journal, search
count = 0
def write(self, entry, write=journal.Journal._write):
    global count
    count += entry["kind"] == "candidate"
    if count == 3:
        with self.path.open("ab") as file:
            file.write(b'{"kind": "candidate", "key": "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, entry)
journal.Journal._write = write
search.optimize(sys.argv[1], out=sys.argv[2], data="random", speed=False, max_recipes=5, threads=1, progress=False)
"""


class Page(HTMLParser):
    """Ids, links, and what would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if given.get("id") else set()
        self.links += [given[name] for name in ("href", "src", "srcset", "data", "action") if given.get(name)]
        assert tag not in ("link", "iframe", "img")
        if tag not in ("meta", "br", "input", "line", "circle", "rect", "polygon", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "circle", "rect", "polygon", "polyline"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "<llama>"  # a name that must be escaped
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = tiny_models.build("llama", **sizes)  # large enough that config files do not hide the weights
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def killed(llama, tmp_path_factory):
    """A search ended by kill -9, and the same search gone on with."""
    out = tmp_path_factory.mktemp("killed") / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(llama), str(out)], capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    before = (out / "journal.jsonl").read_bytes()
    options = {"data": "random", "speed": False, "max_recipes": 5, "threads": 1, "progress": False}
    result = optimize(str(llama), out=out, resume=True, **options)
    return result, out, before, options


def test_a_killed_search_goes_on_and_measures_nothing_twice(killed):
    result, out, before, _ = killed
    whole = before[: before.rindex(b"\n") + 1]
    after = (out / "journal.jsonl").read_bytes()
    assert whole != before and after.startswith(whole)
    lines = [json.loads(line) for line in after.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "original", *["candidate"] * 5]
    assert len({line["key"] for line in lines[2:]}) == 5
    assert len(result.candidates) == 5
    assert any("torn" in note for note in result.notes)


def test_what_is_left(killed, llama):
    result, out, *_ = killed
    assert {path.name for path in out.iterdir()} == KEPT
    best = result.candidate(result.verdict.best)
    assert result.best == out / "best" and result.proof.passed
    manifest = checkpoint.read_manifest(result.best)
    assert manifest["recipe"] == best.recipe and manifest["results"]["candidate"]["name"] == best.name
    card = (result.best / "README.md").read_text()
    assert best.name in card and "```yaml" in card and "Machine:" in card and "torch" in card
    results = ModelCard(card).data.eval_results
    assert {result.metric_type for result in results} >= {"perplexity", "kl"}
    assert {result.dataset_name for result in results} == {manifest["results"]["data"]}
    again = actkit.load(llama)
    batches = actkit.load_data("random", again, None, split="calibration", sequences=16, length=32)
    actkit.apply(again, out / "recipe.yaml", batches, progress=False)
    ids = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        assert torch.equal(actkit.load(result.best)(**ids).logits, again(**ids).logits)


def test_the_numbers_are_those_of_an_independent_count(killed, llama):
    result, *_ = killed
    assert result.original.loss.value == 0 and result.original.disk_bytes > 0
    for each in result.candidates:
        assert each.failed is None and each.search_loss is not None and each.seconds >= sum(each.parts.values())
        if each.stopped is not None:
            assert each.search_loss.high > 0.02 and each.loss is each.disk_bytes is each.proof is None
            continue
        assert each.proof.passed and each.passes > 0
        assert each.loss.low <= each.loss.value <= each.loss.high
        assert each.writes == ""
        assert each.loss.value == pytest.approx(math.expm1(each.metrics["kl"].value), rel=1e-9)  # random tokens
    best = result.candidate(result.verdict.best)
    assert best.loss.high <= 0.02 and best.search_loss.high <= 0.02
    assert best.disk_bytes <= 0.9 * result.original.disk_bytes
    model = actkit.load(llama)
    expected = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name) + HIDDEN * 4
    assert result.original.bytes_per_token == pytest.approx(expected)


def test_the_report_is_one_page_with_all_sections(killed):
    result, out, *_ = killed
    page = Page((out / "index.html").read_text())
    assert not page.open and page.ids >= SECTIONS
    assert all(link.startswith("https://arxiv.org/abs/") for link in page.links)
    words = " ".join(page.words)
    assert result.verdict.headline in words and "<llama>" in words
    for each in result.candidates:
        assert each.name in words
    for each in result.left_out:
        assert each.reason in words
    assert "not measured: speed=False" in words
    content = json.loads((out / "results.json").read_text())
    assert content["verdict"]["best"] == result.verdict.best and len(content["candidates"]) == 5


def test_the_terminal_table_fits_80_columns(killed):
    console = Console(width=80, file=StringIO())
    console.print(killed[0].table())
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert killed[0].verdict.best in text


def test_names_are_whole_on_the_terminal():
    """Every name that the search itself gives stands in one line of 80 columns; a longer one is folded, not cut."""
    names = ("rtn 4 bit, groups of outputs", "wina 25% over awq 4 bit", "teal 90% on attention.output, mlp.down")
    wide = {"ratio": (10.29, 11.99), "disk": 0.37, "memory": 0.95}
    tried = [candidate(name, loss, 0.02, **wide) for name, loss in zip(names, (0.341, 0.95, 0.041))]
    verdict = decide(tried, the_original(), Limits(2.0))
    result = SimpleNamespace(original=the_original(), candidates=tried, verdict=verdict, front=(), speed_row=None)
    result.best = result.proof = None
    result.left_out = result.notes = ()
    result.answers = Answers()
    console = Console(width=80, file=StringIO())
    console.print(optimization_table(result))
    table = console.file.getvalue().partition("candidate  ")[2].partition("* on the front")[0]
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in table
    assert all(any(line.strip().startswith(name) for line in lines) for name in names[:2])
    assert any("34% [32, 36]" in line and "11.1 [10.3, 12.0]" in line for line in lines)
    assert "teal 90% on attention.output," in table and "mlp.down" in table


def test_the_same_journal_answers_for_another_target(killed, llama, tmp_path):
    """Nothing is measured again: the target decides over what is known."""
    _, out, _, options = killed
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = (copy / "journal.jsonl").read_bytes()
    result = optimize(str(llama), out=copy, resume=True, target="quality", **options)
    assert (copy / "journal.jsonl").read_bytes() == before
    pays = [each for each in result.candidates if result.verdict.of(each.name).pays]
    least = min(round(each.search_loss.value, 4) for each in pays)
    best = result.candidate(result.verdict.best)
    assert result.verdict.target == "quality" and round(best.search_loss.value, 4) == least
    assert result.best.is_dir() and "--target quality" in (copy / "index.html").read_text()


def test_another_search_does_not_resume_this_one(killed, llama):
    _, out, _, options = killed
    with pytest.raises(JournalError, match=r"settings\.seed was 0 and is 1"):
        optimize(str(llama), out=out, resume=True, **options, seed=1)
    with pytest.raises(ValueError, match=r"exists already.*--resume.*--overwrite"):
        optimize(str(llama), out=out, **options)
    assert (out / "best").is_dir()


def test_bad_settings_and_places_are_refused_before_any_work(llama, tmp_path, monkeypatch):
    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            optimize(str(llama), **{"out": tmp_path / "out", "data": "random", **options})
        assert not (tmp_path / "out").exists()

    refused("max_loss: -1", max_loss=-1)
    refused("target: 'speed' was given, allowed are latency, throughput, memory, disk, quality", target="speed")
    refused("target: 'latency' was given, which is measured with the speed", target="latency", speed=False)
    refused("max_recipes: 0", max_recipes=0)
    refused("seed: -1", seed=-1)
    refused("threads: 0", threads=0)
    refused("prompt: 0 was given; give the tokens before those that are timed", prompt=0)
    refused(r"prompt: 99 was given with speed=False \(--no-speed\)", prompt=99, speed=False)
    refused("prompt: 31 was given; give 1 to 30, as the model's context is 32", prompt=31)
    refused("max_new_tokens: 32 was given; give 2 to 31", max_new_tokens=32)
    refused("batch: 0 was given; give the rows", batch=0)
    refused("target: 'throughput' was given, which is measured with the speed", target="throughput", speed=False)
    refused("max_peak: .*'much'", max_peak="much")
    refused("max_peak: 300MB was given with speed=False", max_peak="300MB", speed=False)
    refused("max_disk: 0 was given; give more than 0", max_disk=0)
    refused("prefill: 'none' was given, allowed are sparse, dense", prefill="none")
    refused("prefill: 'dense' was given with recipes=", prefill="dense", recipes=["teal"])
    refused("not known", RecipeError, recipes=["nothing"])
    refused("--data random", DataError, data=None)  # no tokenizer beside the model
    refused("2 batches were given", DataError, data=[{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}] * 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for options in ({"overwrite": True}, {"resume": True}):
        refused("nothing in it is touched", out=tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    monkeypatch.setattr(templating.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'actkit\[report\]'", ImportError)


def test_own_models_need_a_way_to_be_built(tmp_path):
    with pytest.raises(ValueError, match="base: Perceptron is not a transformers model"):
        optimize(tiny_models.build("mlp"), out=tmp_path / "out", data="random")


def test_a_candidate_that_breaks_is_recorded_and_nothing_pays(llama, tmp_path, monkeypatch):
    """A model in memory, given batches, one recipe that raises: the refusal, in words; the model is as it was."""
    model = checkpoint.load(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(VOCABULARY, (4, 16), generator=generator)} for _ in range(4)]
    result = optimize(
        model,
        out=tmp_path / "out",
        data=data,
        recipes=[{"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 7}}]}],
        speed=False,
        progress=False,
    )
    assert not result.verdict.pays and result.best is None and result.front == ("original",)
    assert "group_size: 7 does not divide the 64 inputs" in result.candidates[0].failed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl", "results.json", "index.html"}
    assert "Nothing pays here" in (tmp_path / "out" / "index.html").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_prompts_of_what_selects_inputs_can_be_left_dense(llama, tmp_path, monkeypatch):
    both = [Proposal("wina", Recipe.of("wina"), "why"), Proposal("rtn", Recipe([RoundToNearest(group_size=16)]), "why")]
    monkeypatch.setattr("actkit.search.search.propose", lambda *args, **options: (both, []))
    result = optimize(
        str(llama), out=tmp_path / "out", data="random", speed=False, prefill="dense", threads=1, progress=False
    )
    recipes = {each.name: each.recipe for each in result.candidates}
    assert recipes["wina"][0]["wina"]["prefill"] == "dense" and "prefill" not in recipes["rtn"][0]["rtn"]
    assert result.candidate("wina").why == "why; prompts are read dense" and result.candidate("rtn").why == "why"
    assert "--prefill dense" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow(reason="two processes that load and decode a model")
def test_speed_is_measured_behind_the_text_that_was_asked_for(llama, tmp_path):
    result = optimize(
        str(llama),
        out=tmp_path / "out",
        data="random",
        recipes=["quantize_cache"],
        max_loss=10.0,
        prompt=20,
        max_new_tokens=6,
        batch=2,
        max_disk=10,
        speed_row=False,
        threads=1,
        progress=False,
    )
    (cached,) = result.candidates
    assert cached.speed is not None, (cached.failed, cached.stopped, cached.speed_failed)
    assert (cached.speed.prompt, cached.speed.new_tokens, cached.speed.batch) == (20, 6, 2)
    assert result.original.speed.prompt == 20
    assert not result.verdict.pays and "Asked for: disk of at most 10 B. Nearest:" in result.verdict.headline
    assert cached.speed.engine == "transformers" and "2 rows at a time" in cached.speed.engine_reason
    page = (tmp_path / "out" / "index.html").read_text()
    assert "--max-disk 10 --prompt 20 --max-new-tokens 6 --batch 2" in page and "the first after" in page


def test_the_speed_row_at_a_small_shape():
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    row = measure_speed_row(shape, rounds=2, progress=False)
    per_block = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    assert row.parameters == 2 * per_block + 64 * 100 + 64 and row.weight_bytes == 2 * row.parameters
    assert [(each.share, each.engine) for each in row.rows] == [
        (0.0, "decoder"),
        (0.5, "decoder"),
        (0.7, "decoder"),
        (0.0, "transformers"),
    ]
    dense, half, most, plain = row.rows
    assert dense.ratio is None and dense.density is None and half.ratio is not None
    assert plain.ratio is not None and plain.density is None and plain.bytes_per_token == dense.bytes_per_token
    assert abs(half.density - 0.5) < 0.1 and abs(most.density - 0.3) < 0.1
    assert "speed only" in row.about
    assert SpeedRow.from_dict(json.loads(json.dumps(row.to_dict()))) == replace(row)
    content = row.to_dict()
    for each in content["rows"]:
        del each["engine"]  # of a journal from before there was a decoder
    assert {each.engine for each in SpeedRow.from_dict(content).rows} == {"transformers"}


def a_row(share, rate, ratio, engine):
    return Row(share, around(rate), ratio, 1 - share if share else None, 1e9, engine)


def test_speeds_are_shown_with_what_they_were_measured_with(killed):
    rows = (
        a_row(0.0, 30.0, None, "decoder"),
        a_row(0.5, 45.0, around(1.5), "decoder"),
        a_row(0.0, 15.0, around(0.5), "transformers"),
    )
    first, second, *others = killed[0].candidates
    through = replace(a_speed(around(1.1)), engine="transformers", engine_reason="it has a hook")
    result = replace(
        killed[0],
        original=replace(killed[0].original, speed=a_speed(None)),
        candidates=(
            first.with_speed(a_speed(around(1.2)), a_speed(None)),
            second.with_speed(through, through),
            *others,
        ),
        speed_row=SpeedRow(10**9, 2 * 10**9, rows, "bfloat16", 2, 16, 12, 5, 9.0),
    )
    console = Console(width=200, file=StringIO())
    console.print(result.table())
    page = " ".join(" ".join(Page(render(result)).words).split())
    text = console.file.getvalue()
    assert "speed through: decoder" in [line.strip() for line in text.splitlines()]
    for words in (
        "speed through: transformers (it has a hook)",
        "50% of the inputs dropped: 1.50x (1.50 to 1.50) as fast",
        "dense, through transformers: 0.50x (0.50 to 0.50) as fast",
    ):
        assert words in text
    for words in (
        "decoder; transformers (it has a hook)",
        "dense, decoder 30.0 tokens/s",
        "50% of the inputs dropped, decoder 45.0 tokens/s, 1.50x",
        "dense, transformers 15.0 tokens/s, 0.50x",
        "55 tokens/s, the first after 0.1 s transformers",  # beside the candidate, as they differ
    ):
        assert words in page, words
    card = model_card(result, result.candidates[0])
    assert "60 tokens/s through decoder, 1.20x (1.20 to 1.20) the original's" in card
    assert Candidate.from_dict(result.candidates[1].to_dict()).speed == through
