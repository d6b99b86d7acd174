"""The command line is frozen: a new, renamed or dropped option must change this table too."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from actkit.cli.main import app
from actkit.cli.options import share

DATA = {"--data", "--sequences", "--length", "--batch-size"}
MODEL = {"--device", "--dtype", "--trust-remote-code"}
RUN = {"--threads", "--seed", "--json"}
WRITE = {"--out", "--overwrite"}

OPTIONS = {
    "profile": DATA | MODEL | RUN | {"--store", "--figure", "--overwrite", "--max-memory"},
    "analyze": DATA | MODEL | RUN | WRITE | {"--html"},
    "harvest": DATA | MODEL | RUN | {"--out", "--tokens", "--max-disk"},
    "sae": RUN
    | WRITE
    | {"--site", "--kind", "--width", "--k", "--sparsity", "--steps", "--size", "--learning-rate", "--skip"}
    | {"--longest", "--held-out", "--figure", "--resume", "--device"},
    "latents": {"--site", "--text-of", "--count", "--longest", "--html", "--overwrite", "--threads", "--json"},
    "optimize": MODEL
    | RUN
    | WRITE
    | {
        "--data",
        "--max-loss",
        "--max-recipes",
        "--minutes",
        "--min-speedup",
        "--max-peak",
        "--max-disk",
        "--max-new-tokens",
        "--batch",
        "--mixes",
        "--recipe",
        "--speed",
        "--no-speed",
        "--prompt",
        "--prefill",
        "--resume",
        "--max-memory",
        "--target",
    },
    "apply": DATA
    | MODEL
    | RUN
    | WRITE
    | {"--recipe", "--min-coverage", "--proof", "--no-proof", "--max-memory", "--resume"},
    "evaluate": DATA
    | MODEL
    | RUN
    | {"--against", "--tasks", "--speed", "--no-speed", "--prompt", "--max-new-tokens", "--batch"}
    | {"--beyond-context"},
    "generate": MODEL
    | RUN
    | {
        "--chat",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--stop",
        "--cache",
        "--prompts",
        "--batch",
    },
    "show": MODEL | {"--data", "--json"},
    "export": DATA
    | RUN
    | {"--format", "--adapter", "--measure", "--proof", "--no-proof"}
    | {"--dtype", "--trust-remote-code", "--overwrite"},
    "train": DATA
    | MODEL
    | RUN
    | WRITE
    | {"--rule", "--steps", "--learning-rate", "--rate", "--accumulation", "--resume"}
    | {"--optimizer", "--trainable", "--score", "--schedule", "--warmup", "--beyond-context"}
    | {"--adapter", "--merge"},
    "compare-functions": RUN | WRITE | {"--on", "--equal", "--seeds", "--steps", "--width", "--resume"},
    "papers": {"--family", "--kind", "--status", "--year", "--text", "--json"},
    "reproduce": {"--subject", "--record", "--threads", "--json"},
}


def commands():
    return get_command(app).commands


def test_the_verbs_in_order_of_use():
    assert list(commands()) == list(OPTIONS)


@pytest.mark.parametrize("verb", [None, *OPTIONS])
def test_help_fits_80_columns(verb):
    words = ["--help"] if verb is None else [verb, "--help"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
    assert "Show this message" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_options(verb):
    found = {
        name
        for parameter in commands()[verb].params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name != "--help"
    }
    assert found == OPTIONS[verb]


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_option_explains_itself(verb):
    command = commands()[verb]
    assert command.help
    assert all(getattr(parameter, "help", None) for parameter in command.params)


@pytest.mark.parametrize(("text", "value"), [("0.02", 0.02), ("2%", 0.02), (" 0.5 % ", 0.005), ("0", 0.0), (0.1, 0.1)])
def test_a_share_is_read_as_it_is_said(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "two", "", "%", "inf", "nan"])
def test_what_is_no_share_is_named(text):
    result = CliRunner().invoke(app, ["optimize", "swiglu", f"--max-loss={text}"])
    assert result.exit_code == 2
    assert "give a share of 0 or more" in " ".join(result.output.replace("│", " ").split())
