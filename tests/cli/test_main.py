"""The verbs from the command line, on a small random model with a real tokenizer."""

import json
import sys

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import actkit
from actkit.cli.main import main

RECIPE = {"actkit": 1, "transforms": [{"rtn": {"bits": 8, "group_size": 32}}, {"wina": {"sparsity": 0.4}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("models") / "random"
    LlamaForCausalLM(config).save_pretrained(path)
    actkit.load_tokenizer("swiglu").save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["actkit", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_apply_saves_what_show_and_evaluate_read(run, folder, recipe, tmp_path):
    out = tmp_path / "changed"
    code, text, err = run(
        "apply", folder, "--recipe", recipe, "--out", out, "--sequences", 4, "--length", 32, "--json", "--no-proof"
    )
    assert code == 0, err
    result = json.loads(text)
    assert len(result["report"]["changed"]) == 2 * 7 * 2 and result["proof"] is None
    code, text, err = run("show", out, "--json")
    shown = json.loads(text)
    assert code == 0 and [next(iter(entry)) for entry in shown["recipe"]] == ["rtn", "wina"]
    assert shown["linears"] == {"8-bit, groups of 32 along the input, inputs selected by threshold": 14}
    code, text, err = run("evaluate", out, "--against", folder, "--sequences", 4, "--length", 32, "--json")
    assert code == 0, err
    measured = json.loads(text)
    assert measured["quality"]["metrics"]["kl"]["value"] > 0
    assert measured["cost"]["bytes_per_token"] < measured["original_cost"]["bytes_per_token"]
    assert measured["cost"]["density"] == pytest.approx(0.6, abs=0.1)
    code, text, _ = run("generate", out, "The", "--max-new-tokens", 5, "--json")
    written = json.loads(text)
    assert code == 0 and isinstance(written["text"], str) and written["engine"].startswith("decoder, ")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(path)
    actkit.load_tokenizer("swiglu").save_pretrained(path)
    return path


def test_export_writes_what_others_read(run, folder, recipe, tmp_path):
    changed = actkit.apply(
        folder, {"actkit": 1, "transforms": [{"rtn": {"bits": 8, "group_size": 32}}]}, progress=False
    )
    actkit.save(changed.model, tmp_path / "changed")
    code, out, err = run("export", tmp_path / "changed", tmp_path / "out", "--format", "gguf", "--no-proof", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["dense"]) == 15 and "8 bits with zero points" in result["dense"]["model.layers.0.mlp.up_proj"]
    assert (tmp_path / "out" / "out.gguf").stat().st_size < result["disk_bytes"]
    code, out, err = run("export", tmp_path / "changed", tmp_path / "out", "--no-proof", "--overwrite", "--threads", 1)
    assert code == 0, err
    assert "14 layers" in out and "lm_head: not quantized" in " ".join(out.split())
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "out.gguf").exists()
    code, out, err = run("export", folder, tmp_path / "other")
    assert code == 1 and "nothing on it is quantized; apply rtn or awq first" in err


def test_generate_says_which_engine_wrote(run, folder, gpt2):
    arguments = ("The", "--max-new-tokens", 6, "--threads", 1)
    code, text, err = run("generate", folder, *arguments)
    assert code == 0 and "engine: decoder, 1 thread" in err and "engine" not in text
    code, found, err = run("generate", folder, *arguments, "--json")
    assert code == 0 and "engine" not in err
    assert json.loads(found) == {"prompt": "The", "text": text[:-1], "engine": "decoder, 1 thread"}
    drawn = [run("generate", folder, *arguments, "--temperature", 1.5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    why = "transformers (its model_type is 'gpt2'; docs/architectures.md lists what the decoder takes)"
    code, text, err = run("generate", gpt2, *arguments)
    assert code == 0 and f"engine: {why}" in err and "engine" not in text
    code, found, _ = run("generate", gpt2, *arguments, "--json")
    assert code == 0 and json.loads(found) == {"prompt": "The", "text": text[:-1], "engine": why}


def test_a_file_of_prompts(run, folder, tmp_path):
    prompts, arguments = tmp_path / "prompts.txt", ("--max-new-tokens", 6, "--threads", 1)
    prompts.write_text("The\nReturn the\n")
    alone = [run("generate", folder, prompt, *arguments)[1][:-1] for prompt in ("The", "Return the")]
    code, found, err = run("generate", folder, "--prompts", prompts, *arguments)
    assert code == 0 and found == f"[1] The{alone[0]}\n[2] Return the{alone[1]}\n"
    assert "at a time (tokens/s of 1: " in " ".join(err.split())
    code, found, _ = run("generate", folder, "--prompts", prompts, *arguments, "--batch", 2, "--json")
    assert code == 0 and [each["text"] for each in json.loads(found)["texts"]] == alone
    code, _, err = run("generate", folder, *arguments)
    assert code == 1 and "neither was given" in err


def test_the_plan_is_told_before_work(run, folder, recipe, tmp_path):
    code, _, err = run(
        "apply", folder, "--recipe", recipe, "--out", tmp_path / "a", "--sequences", 2, "--length", 16, "--no-proof"
    )
    assert code == 0 and "touches" in err and "memory beside the model" in err and "time: about" in err


def test_profile(run, folder):
    code, text, err = run("profile", folder, "--sequences", 2, "--length", 32, "--json")
    assert code == 0, err
    assert {"sites", "weights", "findings"} <= set(json.loads(text))
    code, text, _ = run("profile", folder, "--sequences", 2, "--length", 32)
    assert code == 0 and "mlp.hidden" in text


def test_analyze(run, folder, tmp_path):
    html, out = tmp_path / "a.html", tmp_path / "a.json"
    data = ("--data", "random", "--sequences", 2, "--length", 32)
    code, text, err = run(
        "analyze", folder, "neuron_activity:threshold=0.1", *data, "--html", html, "--out", out, "--json"
    )
    assert code == 0 and f"written: {out}" in " ".join(err.split()), err
    found = json.loads(text)
    assert found["threshold"] == 0.1 and json.loads(out.read_text()) == found
    written = html.read_text()
    assert "<html lang=" in written and "plotly" not in written and len(written) < 100_000
    new = tmp_path / "not" / "there" / "a.json"
    assert run("analyze", folder, "neuron_activity", *data, "--out", new)[0] == 0 and new.is_file()
    code, _, err = run("analyze", folder, "neuron_activity", *data, "--out", out)
    assert code == 1 and "out: " in err and "exists already" in err
    code, text, _ = run("analyze", folder, "neuron_activity", *data, "--out", out, "--overwrite")
    assert code == 0 and "Neurons on" in text and json.loads(out.read_text())["threshold"] == 0


def test_harvest(run, folder, tmp_path):
    out = tmp_path / "acts"
    words = (
        "harvest",
        folder,
        "block.output,mlp.hidden",
        "--out",
        out,
        "--tokens",
        100,
        "--length",
        32,
        "--data",
        "random",
    )
    code, text, err = run(*words, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["rows"]["blocks.0.block.output"] == 128 and found["shards"] == 1
    code, text, err = run(*words)
    assert code == 0 and "128 rows" in text
    code, _, err = run(*words, "--seed", 1)
    assert code == 1 and "was begun with other data" in err
    code, _, err = run(*words, "--sequences", 3)
    assert code == 1 and "tokens: 100 was given" in err


def test_sae(run, folder, tmp_path):
    acts, out = tmp_path / "acts", tmp_path / "sae"
    data = ("--tokens", 400, "--length", 32, "--data", "random")
    assert run("harvest", folder, "blocks.0.block.output", "--out", acts, *data)[0] == 0
    words = ("sae", acts, "--out", out, "--kind", "topk", "--width", 40, "--k", 3, "--steps", 3, "--size", 16)
    code, text, err = run(*words, "--figure", tmp_path / "often.html")
    assert code == 0, err
    assert "explained variance" in text and (tmp_path / "often.html").exists()
    assert json.loads((out / "cfg.json").read_text())["architecture"] == "topk"
    page = tmp_path / "latents.html"
    code, text, err = run("latents", out, acts, "--html", page)
    assert code == 0 and "fires in" in text and "of which never fire" in page.read_text(encoding="utf-8"), err
    code, _, err = run("latents", out, acts, "--html", page)
    assert code == 1 and "html: " in err and "exists already" in err
    code, _, err = run("latents", out, acts, "--site", "blocks.1.block.output")
    assert code == 1 and "blocks.1.block.output" in err
    code, _, err = run("latents", acts, out)
    assert code == 1 and "error" in err.lower()
    code, _, err = run(*words)
    assert code == 1 and "exists already" in err
    code, text, err = run(*words, "--overwrite", "--json")
    assert code == 0 and json.loads(text)["report"]["latents"] == 40
    code, _, err = run(*words, "--overwrite", "--sparsity", 1)
    assert code == 1 and "settings: " in err


def test_papers(run):
    code, text, _ = run("papers", "--family", "sparsity", "--json")
    assert code == 0 and "wina" in [entry["slug"] for entry in json.loads(text)]
    code, text, _ = run("papers", "wina")
    assert code == 0 and "2505.19427" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nothing-here"], "there is no folder 'nothing-here'; give a folder, a hub id"),
        (["show", "owner/name"], "Check the id and the network, or give a local folder"),
        (["apply", "FOLDER", "--recipe", "awk", "--out", "OUT"], "'awk' is not known. Did you mean awq"),
        (["apply", "FOLDER", "--recipe", "nothing.yaml", "--out", "OUT"], "there is no file nothing.yaml"),
        (["apply", "FOLDER", "--recipe", "rtn", "--out", "FOLDER"], "exists already"),
        (["apply", "FOLDER", "--recipe", "UNEVEN", "--out", "OUT"], "does not divide"),
        (["apply", "FOLDER", "--recipe", "wina", "--out", "OUT", "--length", "512"], "context is 64"),
        (["apply", "FOLDER", "--recipe", "wina", "--out", "OUT", "--data", "no.txt"], "'no.txt' does not exist"),
        (
            ["apply", "FOLDER", "--recipe", "wina", "--out", "OUT", "--length", "32", "--max-memory", "1KB"],
            "max_memory",
        ),
        (["evaluate", "FOLDER", "--dtype", "int3"], "allowed are float32, bfloat16 and float16"),
        (["generate", "vit", "Hello"], "tokenizer"),
        (["generate", "FOLDER", "Hello", "--max-new-tokens", "100"], "exceed the model's context of 64"),
        (["generate", "FOLDER", "Hello", "--top-k", "3"], "top_k: 3 was given with temperature 0"),
        (["analyze", "FOLDER", "nothing"], "analyses: 'nothing' is not known"),
        (["analyze", "FOLDER", "eafo:a=1", "--out", "OUT"], "a: no such setting"),
        (["papers", "--family", "nothing"], "family: 'nothing' is not known"),
        (["reproduce", "nothing"], "'nothing' is not in the catalogue"),
        (["reproduce", "urhand"], "urhand"),
        (["reproduce", "wina", "--subject", "nothing"], "no claim of 'wina' is about it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, folder, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    uneven = tmp_path / "uneven.yaml"
    uneven.write_text("actkit: 1\ntransforms:\n  - rtn: {group_size: 7}\n")
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "UNEVEN": uneven}
    filled = [places.get(argument, argument) for argument in arguments]
    code, text, err = run(*filled)
    assert (code, text) == (1, "") and words in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_wrong_option_is_a_usage_error(run):
    code, _, err = run("apply", "swiglu", "--recipe", "awq")
    assert code == 2 and "--out" in err
