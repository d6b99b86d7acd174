"""lm-eval on our models: its own numbers are the oracle, and what we do before it is tested without it."""

import json
import socket
import sys

import pytest
import torch
import yaml
from huggingface_hub import constants

import actkit
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.measure import harness
from actkit.core.measure.multiple_choice import hits, log_likelihoods
from actkit.data.tasks import FOLDER, TASKS, documentation
from actkit.zoo.loading import open_model

ITEMS = 16
OWN = {"documentation": TASKS["documentation"]}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A task file with a few of our questions beside it, far from the working directory; caches of its own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = (FOLDER / "documentation.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]
    (folder / "documentation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = yaml.safe_load((FOLDER / "documentation.yaml").read_text(encoding="utf-8")) | {"task": "few"}
    (folder / "few.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "few.yaml"


@pytest.fixture(scope="module")
def models():
    original, tokenizer = open_model("swiglu", dtype="float32")
    changed = actkit.apply("swiglu", "rtn", dtype="float32").model
    return original, changed, tokenizer


# -- with lm-eval ------------------------------------------------------------------------------------------------------


def test_our_scorer_gives_what_lm_eval_gives(small, models):
    """Log-likelihoods and answers, of a changed model and its original; both are left as they were."""
    pytest.importorskip("lm_eval", reason="lm-eval (the extra 'eval') is not installed")
    original, changed, tokenizer = models
    before = [model_fingerprint(each) for each in (original, changed)]
    padding = tokenizer.pad_token
    tasks = harness.load_tasks(small, TASKS)
    found = {each.metric: each for each in harness.run_tasks(tasks, changed, tokenizer, original=original)}
    assert [model_fingerprint(each) for each in (original, changed)] == before and tokenizer.pad_token == padding
    questions = documentation(ITEMS)
    ours = [
        hits(questions, log_likelihoods(each, tokenizer, questions, progress=False)) for each in (changed, original)
    ]
    assert set(found) == {"acc", "acc_norm"}
    for metric, score in found.items():
        mine, theirs = (each[metric] for each in ours)
        assert (score.value.value, score.original.value) == (float(mine.mean()), float(theirs.mean()))
        assert score.difference.value == pytest.approx(float((mine - theirs).mean()))
        assert score.items == ITEMS and score.by.startswith("lm-eval ")
    run = harness._run(tasks, changed, tokenizer, 8, 0)
    samples = sorted(run["samples"]["few"], key=lambda each: each["doc_id"])
    theirs = torch.tensor([[float(choice[0]) for choice in each["filtered_resps"]] for each in samples])
    expected = log_likelihoods(changed, tokenizer, questions, progress=False)
    torch.testing.assert_close(theirs.double(), expected, rtol=1e-5, atol=1e-4)
    error = run["results"]["few"]["acc_stderr,none"]  # lm-eval's own
    assert found["acc"].value.high - found["acc"].value.value == pytest.approx(1.96 * error)


def test_evaluate_runs_tasks_beside_the_rest(small, models):
    pytest.importorskip("lm_eval", reason="lm-eval (the extra 'eval') is not installed")
    found = actkit.evaluate("swiglu", against="swiglu", tasks=small, sequences=2, length=64)
    assert [(each.task, each.metric, each.difference.value) for each in found.tasks] == [
        ("few", "acc", 0),
        ("few", "acc_norm", 0),
    ]
    assert found.quality.tokens > 0
    json.dumps(found.to_dict())
    found.table()


def test_a_broken_task_file_is_named(small):
    pytest.importorskip("lm_eval", reason="lm-eval (the extra 'eval') is not installed")
    small.write_text("task: broken\ndataset_path: json\noutput_type: nothing\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lm-eval cannot load .*few\.yaml"):
        harness.load_tasks(small, TASKS)


def test_an_answer_in_words_and_a_broken_item(small, models, monkeypatch):
    """What a task generates is scored too; an item that breaks names the task."""
    pytest.importorskip("lm_eval", reason="lm-eval (the extra 'eval') is not installed")
    monkeypatch.chdir(small.parent)
    words = "include: few.yaml\ntask: words\noutput_type: generate_until\ndoc_to_choice: null\n"
    words += "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {max_gen_toks: 2, until: ['.']}\n"
    (small.parent / "words.yaml").write_text(words + "metric_list: [{metric: exact_match}]\n", encoding="utf-8")
    (small.parent / "broken.yaml").write_text(words.replace("choice: null", "choice: '{{choices}}'"), encoding="utf-8")
    original, changed, tokenizer = models
    found = harness.run_tasks(harness.load_tasks("words.yaml,few.yaml", TASKS), changed, tokenizer, original=original)
    assert [(each.task, each.metric, each.items) for each in found] == [
        ("words", "exact_match", ITEMS),
        ("few", "acc", ITEMS),
        ("few", "acc_norm", ITEMS),
    ]
    with pytest.raises(DataError, match="lm-eval fails on words"):
        harness.run_tasks(harness.load_tasks("broken.yaml", TASKS), changed, tokenizer)


# -- without it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(monkeypatch):
    """As if lm-eval were installed and there were no network."""
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", refuse)


def test_names_and_files_with_commas():
    assert harness.names_of("documentation, mine.yaml,arc_easy", OWN) == [OWN["documentation"], "mine.yaml", "arc_easy"]
    assert harness.names_of([OWN["documentation"], "documentation"], OWN) == [OWN["documentation"]]
    for nothing in ("", "a,,b", []):
        with pytest.raises(ValueError, match=r"tasks: .* names no task"):
            harness.names_of(nothing, OWN)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ImportError, match=r"pip install 'actkit\[eval\]'"):
        harness.load_tasks("documentation", OWN)


def test_the_hub_is_missed_at_once_and_by_name(there, tmp_path):
    with pytest.raises(DataError, match=r"tasks: 'arc_easy' is no task of actkit \(documentation\).*no route"):
        harness.load_tasks("documentation,arc_easy", OWN)
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mine\ndataset_path: allenai/ai2_arc\ndoc_to_text: !function utils.text\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.yaml reads the data set 'allenai/ai2_arc' of the hub"):
        harness.load_tasks(mine, OWN)
    outer = tmp_path / "outer.yaml"
    outer.write_text("include: mine.yaml\ntask: outer\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"outer\.yaml reads the data set 'allenai/ai2_arc' of the hub"):
        harness.load_tasks(str(outer), OWN)


def test_where_the_hub_is_looked_for(monkeypatch):
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    harness._reach("x")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    harness._reach("x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    harness._reach("x")
    assert asked == [("hub.example", 443), ("proxy.example", 3128)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "there is no file"),
        ("task: [a", "is not valid YAML"),
        ("- a\n- b\n", "names no task: or group:"),
        ("dataset_path: json\n", "names no task: or group:"),
        ("task: a\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n", "there is no data file gone.jsonl"),
    ],
)
def test_bad_task_files(there, monkeypatch, tmp_path, text, error):
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    sys.modules["lm_eval"].__version__ = "0"
    fake = type(sys)("lm_eval.tasks")
    fake.TaskManager = lambda **_: None
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", fake)
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=error):
        harness.load_tasks(tmp_path / "mine.yaml", OWN)


def test_data_files_are_found_here_or_beside_the_task_file(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for name in ("here.jsonl", "there/beside.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = {"test": ["here.jsonl", "beside.jsonl"], "train": "https://data.example/x.jsonl"}
    found = harness._beside(given, tmp_path / "there")
    assert found == {**given, "test": ["here.jsonl", str(tmp_path / "there" / "beside.jsonl")]}


def test_what_is_no_language_model_is_refused():
    model, tokenizer = open_model("swiglu")
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        harness.check_model(model, None)
    with pytest.raises(UnsupportedModelError, match="no language model"):
        harness.check_model(torch.nn.Linear(2, 2), tokenizer)
