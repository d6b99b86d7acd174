"""How a user meets the errors of core, the room `measure`: one function per way, which raises it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import HIDDEN, batches, build
from torch import nn

from actkit import verbs, zoo
from actkit.core.ground import registry
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.measure import decoding, evaluation, fresh, generation, harness, texts
from actkit.core.measure.cost import _chosen, folder_bytes
from actkit.core.measure.multiple_choice import Question, log_likelihoods
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.measure.speed import _check_memory, measure_speed
from actkit.data.tasks import TASKS
from error_proofs import HOST, IDS, Place, Words, _t5, beside, overflowing, points, proof

proof(
    lambda p: (
        points(p, registry.DECODERS, ("mute_x", "builtins:object")),
        decoding.choose_engine(build("llama"), capacity=4),
    )
)


proof(lambda p: measure_quality(_narrow(), [HOST], progress=False))


proof(lambda p: generation.generate_ids(build("llama"), IDS))


proof(lambda p: measure_quality(build("llama"), [{"input_ids": IDS[:, :1]}], progress=False))


proof(lambda p: _chosen(build("llama")))


proof(lambda p: folder_bytes(p.path / "nowhere"))


proof(lambda p: measure_speed({"a": p.path / "nowhere"}))


proof(lambda p: measure_quality(build("vit"), batches("vit"), progress=False))


proof(lambda p: measure_quality(build("bert"), batches("bert"), task="embedding", progress=False))


proof(lambda p: measure_quality(build("vit"), batches("vit"), task="language", progress=False))


proof(lambda p: generation._encode(SimpleNamespace(config=None), Words(), ""))


proof(lambda p: next(generation.generate(build("llama"), Words(), "word", max_new_tokens=99)))


proof(lambda p: decoding.choose_engine(build("bert"), capacity=8, cache="bfloat16"))


proof(lambda p: verbs.generate_all(build("llama"), [], tokenizer=Words()))


proof(lambda p: verbs.generate_all(build("llama"), ["word"], tokenizer=Words(), batch=0))


@proof
def no_decoder_for_several(p: Place) -> None:
    p.patch.setattr(texts, "choose_engine", lambda *_, **__: decoding.Engine(None, "none is installed"))
    verbs.generate_all(build("llama"), ["word"], tokenizer=Words(), max_new_tokens=2, batch=2)


proof(lambda p: evaluation._prompts(build("llama"), [{**HOST, "attention_mask": IDS * 0}]))


def _narrow() -> Any:
    """A model that predicts fewer tokens than the data hold."""
    model = build("llama")
    model.lm_head = nn.Linear(HIDDEN, 1)
    return model


proof(lambda p: verbs.generate("swiglu", "x", chat=True))


@proof
def a_broken_template(p: Place) -> None:
    tokenizer = zoo.tokenizer("swiglu")
    tokenizer.chat_template = "{{ raise_exception('two turns please') }}"
    verbs.generate("swiglu", "x", chat=True, tokenizer=tokenizer)


proof(lambda p: measure_quality(overflowing(), batches("llama"), progress=False))


proof(lambda p: list(generation.generate_ids(overflowing(), [1, 2], max_new_tokens=2)))


proof(lambda p: generation.check_generation(build("llama"), IDS[0], max_new_tokens=2, reference=overflowing()))


proof(lambda p: next(generation.generate(build("bert"), Words(), "word")))


proof(lambda p: list(generation.generate_ids(_wide(), [1], max_new_tokens=3)))


@proof
def a_dense_prompt_that_is_read_again(p: Place) -> None:
    model: Any = build("llama")
    select = Threshold(0.5)
    select.prefill = "dense"
    mlp = model.model.layers[0].mlp
    mlp.up_proj = ActLinear.of(mlp.up_proj, select=select)
    model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    list(generation.generate_ids(model, IDS[0], max_new_tokens=3))


proof(lambda p: task_of(_t5()))


def _wide() -> Any:
    model = build("llama", num_hidden_layers=1)
    model.lm_head = nn.Linear(HIDDEN, 80, bias=False)
    with torch.no_grad():
        model.lm_head.weight[79] = 9 * model.model.norm.weight
        model.lm_head.weight[:79] = 0
    model.lm_head.forward = lambda x: torch.nn.functional.one_hot(torch.full(x.shape[:-1], 79), 80).float()
    return model


proof(lambda p: _check_memory({"a": p.copy()}, None, 10, False))


def a_process(p: Place, script: str, **settings: Any) -> fresh.FreshProcess:
    """A worker that does something else than ours."""
    path = p.file(f"#!/bin/sh\n{script}\n", "python")
    path.chmod(0o755)
    p.patch.setattr(fresh.sys, "executable", str(path))
    return fresh.FreshProcess(**settings)


proof(lambda p: (p.patch.setattr(fresh.sys, "executable", str(p.path / "python")), fresh.FreshProcess()))


proof(lambda p: ((worker := a_process(p, "sleep 1")).close(), worker.load(p.path)))


proof(lambda p: a_process(p, 'read line; echo \'{"error": "no model"}\'; sleep 1').load(p.path))


proof(lambda p: a_process(p, "sleep 1", timeout=0.05).load(p.path))


proof(lambda p: a_process(p, "exit 3").load(p.path))


proof(lambda p: (beside(p), measure_quality(build("llama"), [HOST], stop=bool, progress=False)))


def load_tasks(p: Place, tasks: str, text: str | None = None) -> Any:
    """As where lm-eval is installed, knows no task and reads no file, and where there is no network."""

    class TaskManager:
        all_tasks = ()

        def __init__(self, **_: Any) -> None: ...

        def load(self, _: Any) -> Any:
            raise ValueError("output_type: nothing")

    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError("no route to the host")

    p.patch.setattr("importlib.util.find_spec", lambda *_: object())
    p.patch.setitem(sys.modules, "lm_eval", SimpleNamespace(__version__="0"))
    p.patch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    p.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", tasks == "offline")
    p.patch.setattr("socket.create_connection", no_network)
    if text is not None:
        p.file(text, tasks)
    return harness.load_tasks(str(p.path / tasks) if "." in tasks else tasks, TASKS)


def answer(*choices: tuple[str, ...], broken: bool = False) -> Any:
    model = build("llama")
    if broken:
        model.lm_head.weight.data[0] = torch.nan
    letters = SimpleNamespace(encode=lambda text: [ord(letter) % 16 for letter in text.rstrip()])
    return log_likelihoods(model, letters, [Question("ab", each, 0) for each in choices], progress=False)


proof(lambda p: load_tasks(p, "documentation,,arc_easy"))


proof(lambda p: load_tasks(p, "offline"))


proof(lambda p: load_tasks(p, "arc_easy"))


proof(lambda p: load_tasks(p, "gone.yaml"))


proof(lambda p: load_tasks(p, "mine.yaml", "task: [a"))


proof(lambda p: load_tasks(p, "mine.yaml", "dataset_path: json\n"))


proof(lambda p: load_tasks(p, "mine.yaml", "task: a\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n"))


proof(lambda p: load_tasks(p, "mine.yaml", "task: a\ndataset_path: json\n"))


proof(lambda p: (p.patch.setattr("importlib.util.find_spec", lambda *_: None), harness.load_tasks("a", TASKS)))


proof(lambda p: harness.check_model(build("vit"), None))


@proof
def an_item_that_its_template_does_not_fit(p: Place) -> None:
    def evaluate(**_: Any) -> Any:
        raise KeyError("question")

    wrapper = SimpleNamespace(HFLM=lambda **_: None)
    p.patch.setitem(sys.modules, "lm_eval", SimpleNamespace(evaluate=evaluate))
    p.patch.setitem(sys.modules, "lm_eval.models.huggingface", wrapper)
    harness.run_tasks(harness.Tasks({"tasks": {}}, "lm-eval 0"), build("llama"), object())


proof(lambda p: harness.check_model(build("llama"), None))


proof(lambda p: answer(("c",), ("c", "d")))


proof(lambda p: answer(("c", "")))


proof(lambda p: answer(("c", "d"), broken=True))


proof(lambda p: evaluation.evaluate(build("llama"), [HOST], speed=True))
