"""A model whose class is code in its folder: trusted once, it is changed, saved with its code and proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from actkit.cli.main import app
from actkit.core.ground.errors import CheckpointError
from actkit.core.store.checkpoint import load

CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own_of_the_folder"

    def __init__(self, vocab_size=20, hidden_size=8, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 16)
        self.act = nn.ReLU()
        self.down = nn.Linear(16, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.down(self.act(self.up(self.embedding(input_ids)))))
"""
ARGUMENTS = ["--data", "random", "--sequences", "2", "--length", "8", "--min-coverage", "0", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # for the fresh process
    path = tmp_path / "own"
    path.mkdir()
    (path / "own_code.py").write_text(CODE)
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    settings = {"model_type": "own_of_the_folder", "architectures": ["OwnModel"], "auto_map": names}
    (path / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    shapes = {"embedding.weight": (20, 8), "up.weight": (16, 8), "up.bias": (16,), "down.weight": (20, 16)}
    tensors = {name: torch.randn(shape) for name, shape in (shapes | {"down.bias": (20,)}).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_apply_on_the_command_line_proves_what_it_saved(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("actkit: 1\ntransforms:\n  - rtn: {bits: 8, group_size: -1}\n")
    out = tmp_path / "out"
    arguments = ["apply", str(folder), "--recipe", str(recipe), "--out", str(out), *ARGUMENTS]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, CheckpointError) and "code in the repository" in str(refused.exception)
    assert "--trust-remote-code" in str(refused.exception) and not out.exists()

    done = CliRunner().invoke(app, [*arguments, "--trust-remote-code", "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout[done.stdout.index("{") :])["proof"]["bit_equal"]
    assert (out / "own_code.py").read_text() == CODE

    with pytest.raises(CheckpointError, match=r"code in the repository; .*--trust-remote-code"):
        load(out)
    ids = torch.arange(8)[None]
    original, changed = (load(path, trust_remote_code=True) for path in (folder, out))
    scale = original(ids).logits.abs().max()
    assert 0 < (original(ids).logits - changed(ids).logits).abs().max() < 0.02 * scale
    (out / "own_code.py").write_text(CODE + "\n")
    with pytest.raises(CheckpointError, match=r"own_code\.py: the file is damaged, truncated or was changed"):
        load(out, trust_remote_code=True)
