"""The fresh process: what it computes against the model in memory, and that nothing of it is ever left over."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Perceptron
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actkit.core.edit.edits import Replace, apply_edit, describe
from actkit.core.ground.errors import FreshProcessError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.measure.fresh import FreshProcess, import_name
from actkit.core.store.checkpoint import save
from actkit.core.store.pretrained import record
from actkit.zoo.cnn import DigitsCNN

VOCABULARY = 50


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def select_inputs(model: nn.Module, threshold: float) -> nn.Module:
    """A copy whose down projections and heads' outputs read large inputs only."""
    model = copy.deepcopy(model)
    edits = []
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(("down_proj", "o_proj", "fc1")):
            edit = Replace(path, ActLinear.of(module, select=Threshold(threshold)))
            apply_edit(model, edit)
            edits.append(describe(edit))
    record(model, edits, [], "test")
    return model


def noisy() -> nn.Module:
    """A factory that writes to the stdout of its process, from Python and from below it."""
    sys.stdout.write("from Python\n")
    os.write(1, b"from below\n")
    return DigitsCNN()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("fresh") / "llama")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = DigitsCNN().eval()
    return model, save(model, tmp_path_factory.mktemp("fresh") / "cnn")


def alive(pid: int) -> bool:
    """Whether a process exists, as a zombie too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- what it computes --------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_model_in_memory(worker: FreshProcess, folder: Path) -> None:
    ids = torch.randint(VOCABULARY, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "output_hidden_states": False}
    loaded = worker.load(folder)
    assert (loaded["model_class"], loaded["dtype"], loaded["packed"]) == ("LlamaForCausalLM", "float32", 0)
    assert loaded["threads"] == worker.threads == torch.get_num_threads()
    assert loaded["weight_bytes"] == sum(p.nbytes for p in llama().parameters())
    with torch.no_grad():
        expected = llama()(input_ids=ids, attention_mask=mask).logits
    found = worker.outputs(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    assert worker.load(folder, torch.bfloat16)["dtype"] == "bfloat16"  # another load in the same process
    with torch.no_grad():
        expected = llama(torch.bfloat16)(input_ids=ids).logits.float()
    torch.testing.assert_close(worker.outputs({"input_ids": ids}), expected, atol=0.05, rtol=0.05)


def test_own_modules_take_a_factory(worker: FreshProcess, cnn: tuple[nn.Module, Path]) -> None:
    model, folder = cnn
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = model(images)
    for base in ("actkit.zoo.cnn:DigitsCNN", DigitsCNN, noisy):
        worker.load(folder, base=base)
        for batch in (images, (images,), {"pixel_values": images}):
            torch.testing.assert_close(worker.outputs(batch), expected)
    assert worker.time_forward(images) > 0
    started = time.perf_counter()
    assert worker.time_forward(images, at_least=0.1) > 0 and time.perf_counter() - started > 0.1
    worker.load(folder)  # its class is registered
    torch.testing.assert_close(worker.outputs(images), expected)


def test_own_modules_that_are_not_registered_need_one(worker: FreshProcess, tmp_path: Path) -> None:
    with pytest.raises(FreshProcessError, match=r"CheckpointError: .*Perceptron.* pass base="):
        worker.load(save(Perceptron(), tmp_path / "mlp"))


def test_decoding_equals_the_whole_sequence_again(worker: FreshProcess, folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(VOCABULARY, (2, 5))
    sparse = select_inputs(llama(), 0.2)
    for model, path, packed in ((llama(), folder, 0), (sparse, save(sparse, tmp_path / "sparse"), 4)):
        assert worker.load(path, decode=True)["packed"] == packed
        assert worker.pack() == {
            "engine": "transformers",
            "reason": "it was not asked for",
            "threads": worker.threads,
            "packed": packed,
        }
        timed = worker.time_decode(ids, 6)
        assert timed["engine"] == "transformers"
        sequence: Tensor = ids
        with torch.no_grad():
            for _ in range(6):
                following = model(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1)
                sequence = torch.cat([sequence, following[:, None]], dim=1)
        assert timed["tokens"] == sequence[:, 5:].tolist()
        assert timed["first_token_seconds"] > 0 and len(timed["token_seconds"]) == 5
        assert timed["tokens_per_second"] == pytest.approx(2 * 5 / sum(timed["token_seconds"]))
    with pytest.raises(ValueError, match="new_tokens: 1 was given"):
        worker.time_decode(ids, 1)


@pytest.mark.slow(reason="it compiles the decoder's kernels, unless an earlier run has left them")
def test_one_row_decodes_through_a_decoder(worker: FreshProcess, folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(VOCABULARY, (1, 5))
    sparse = select_inputs(llama(), 0.2)
    for model, path in ((llama(), folder), (sparse, save(sparse, tmp_path / "sparse"))):
        worker.load(path, decode=True)
        packed = worker.pack(capacity=11)
        assert (packed["engine"], packed["reason"], packed["packed"]) == ("decoder", "", 0)
        assert 1 <= packed["threads"] <= worker.threads
        sequence: Tensor = ids
        with torch.no_grad():
            for _ in range(6):
                following = model(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1)
                sequence = torch.cat([sequence, following[:, None]], dim=1)
        for _ in range(2):  # the second round starts anew
            timed = worker.time_decode(ids, 6)
            assert timed["engine"] == "decoder" and timed["tokens"] == sequence[:, 5:].tolist()
            assert timed["first_token_seconds"] > 0 and len(timed["token_seconds"]) == 5
            assert timed["tokens_per_second"] == pytest.approx(5 / sum(timed["token_seconds"]))
        assert timed["compiled"] is False  # which is done once
    assert worker.time_decode(ids.repeat(2, 1), 3)["engine"] == "transformers"
    with pytest.raises(FreshProcessError, match="capacity: the cache holds 11 tokens"):
        worker.time_decode(ids, 9)
    worker.load(folder)
    assert worker.time_decode(ids, 3)["engine"] == "transformers"  # a load drops the decoder


def test_why_there_is_no_decoder(worker: FreshProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    worker.load(save(gpt2, tmp_path / "gpt2"))
    packed = worker.pack(capacity=8)
    assert packed["engine"] == "transformers" and "its model_type is 'gpt2'" in packed["reason"]
    assert worker.time_decode(torch.ones(1, 3, dtype=torch.int64), 3)["engine"] == "transformers"


def test_the_peak_is_that_since_the_load(worker: FreshProcess, cnn: tuple[nn.Module, Path]) -> None:
    _, folder = cnn
    worker.load(folder, base=DigitsCNN)
    before = worker.memory()
    assert before["peak_bytes"] >= before["resident_bytes"] > before["before_bytes"] / 2 > 0
    worker.outputs(torch.rand(20000, 1, 8, 8))  # the first convolution alone gives 82 MB
    after = worker.memory()
    assert after["peak_bytes"] > before["resident_bytes"] + 80e6
    worker.load(folder, base=DigitsCNN)
    again = worker.memory()
    if Path("/proc/self/clear_refs").exists():
        assert again["peak"] == "VmHWM"
        assert again["peak_bytes"] < after["peak_bytes"] - 40e6
    else:
        assert again["peak"] == "ru_maxrss"


def test_threads_can_be_changed(worker: FreshProcess, folder: Path) -> None:
    before = worker.threads
    worker.use_threads(1)
    assert worker.load(folder)["threads"] == worker.threads == 1
    worker.use_threads(before)
    with pytest.raises(ValueError, match="threads: 0 was given"):
        FreshProcess(threads=0)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_reported_error_leaves_the_worker_usable(worker: FreshProcess, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FreshProcessError, match=r"load: the fresh process reports CheckpointError: .*missing"):
        worker.load(tmp_path / "missing")
    with pytest.raises(FreshProcessError, match="no model is loaded"):
        worker.memory() and worker.outputs({"input_ids": torch.ones(1, 2, dtype=torch.int64)})
    worker.load(folder)
    with pytest.raises(
        FreshProcessError, match=r"outputs: .*IndexError.*\nIts last lines:(.|\n)*return torch\.embedding"
    ):
        worker.outputs({"input_ids": torch.full((1, 3), VOCABULARY + 1)})
    assert list(worker._folder.iterdir()) == []  # what crossed is gone, also after errors
    assert worker.outputs({"input_ids": torch.ones(1, 3, dtype=torch.int64)}).shape == (1, 3, VOCABULARY)
    assert list(worker._folder.iterdir()) == []
    with pytest.raises(ValueError, match="batch: Object of type set"):
        worker.outputs({"input_ids": {1}})


def test_a_worker_that_dies_is_named_and_reaped() -> None:
    with FreshProcess() as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(FreshProcessError, match=r"memory: the fresh process died \(SIGKILL, most often for want"):
            process.memory()
        assert process.closed and not alive(process.pid) and not process._folder.exists()
        with pytest.raises(FreshProcessError, match="was closed; start another"):
            process.memory()
    process.close()


def test_a_slow_worker_is_ended() -> None:
    process = FreshProcess(timeout=0.05)  # it takes longer to import torch
    with pytest.raises(FreshProcessError, match=r"did not answer within 0\.05 s"):
        process.memory()
    assert process.closed and not alive(process.pid) and not process._folder.exists()


def test_control_c_ends_the_worker() -> None:
    process = FreshProcess()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        process.memory()
    timer.join()
    assert process.closed and not alive(process.pid) and not process._folder.exists()


def test_a_forgotten_worker_goes_with_its_object() -> None:
    process = FreshProcess()
    pid, folder = process.pid, process._folder
    assert os.getpgid(pid) == pid != os.getpgid(0)
    del process
    assert not alive(pid) and not folder.exists()


def test_a_killed_parent_leaves_nothing() -> None:
    script = (
        "import os, signal; from actkit.core.measure.fresh import FreshProcess; p = FreshProcess(); p.memory(); "
        "print(p.pid, p._folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid, folder = done.stdout.split()
    wait_until(lambda: not Path(folder).exists())
    wait_until(lambda: not alive(int(pid)) or is_zombie(int(pid)))  # whoever adopted it may be slow to collect it


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def test_names_that_a_fresh_process_can_import() -> None:
    assert import_name(DigitsCNN) == "actkit.zoo.cnn:DigitsCNN"
    assert import_name("a.b:c") == "a.b:c"
    for bad in ("a.b", "a.b:", ":c", "a.b:c.d"):
        with pytest.raises(ValueError, match=r"base: .* was given; write"):
            import_name(bad)
    with pytest.raises(ValueError, match="cannot be imported by a fresh process"):
        import_name(lambda: nn.Linear(1, 1))
