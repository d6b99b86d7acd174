"""Models that accelerate has dispatched are changed, saved and undone as others are; what cannot be is refused."""

import copy
import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_models import LAYERS, bits, build, run
from tiny_models import batches as inputs
from torch import nn
from transformers import LlamaForCausalLM

import actkit
from actkit.core.edit.edits import Set, shared_parameters
from actkit.core.ground import offload
from actkit.core.ground.errors import EditError, UnsupportedModelError
from actkit.core.ground.memory import parameter_bytes
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.evaluation import evaluate
from actkit.core.measure.proof import prove
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.training import train
from actkit.core.watch.capture import calls, live, plan_memory, record
from actkit.core.watch.statistics import AbsMax, Moments
from actkit.quantization.awq import Awq
from actkit.runtime.decoder import Decoder
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.sparsing_law.perplexity_sparsity import PerplexitySparsity
from actkit.sparsity.wina.rotate_columns import RotateColumns
from actkit.sparsity.wina.wina import Wina

MIXED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2.mlp": "disk",
    **{f"model.layers.2.{part}": "cpu" for part in ("self_attn", "input_layernorm", "post_attention_layernorm")},
    "model.norm": "cpu",
    "lm_head": "disk",
}
RECIPES = {
    "awq, wina": [Awq(group_size=8, n_grid=3), Wina(sparsity=0.4)],
    "rotate, r-sparse": [RotateColumns(), RSparse()],  # a module around another one, in-place changes, low rank
    "cats": [Cats(sparsity=0.5)],
}


def dispatched(how, folder):
    """The tiny llama, dispatched."""
    model = build("llama")
    if how == "memory":
        return cpu_offload(model, execution_device="cpu")
    if how == "whole blocks":
        return cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])
    if how == "disk":
        return disk_offload(model, tempfile.mkdtemp(dir=folder), execution_device="cpu")
    if how == "mixed":
        return dispatch_model(model, MIXED, offload_dir=tempfile.mkdtemp(dir=folder))
    if how == "auto":  # some blocks stay, the others go to disk
        model.save_pretrained(folder / "plain")
        room = {"cpu": parameter_bytes(model.model.layers)}
        places = {"device_map": "auto", "max_memory": room, "offload_folder": tempfile.mkdtemp(dir=folder)}
        found = LlamaForCausalLM.from_pretrained(folder / "plain", dtype="auto", **places).eval()
        assert {"cpu", "disk"} == {found.hf_device_map[f"model.layers.{index}"] for index in range(LAYERS)}
        return found
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def elsewhere(model):
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta}


@pytest.fixture(scope="module")
def expected():
    """By recipe: the outputs of the model that was changed as a whole, and its tensors."""
    found = {}
    for name, recipe in RECIPES.items():
        model = apply(build("llama"), recipe, inputs("llama"), min_coverage=0, progress=False).model
        found[name] = [run(model, batch) for batch in inputs("llama")], model.state_dict()
    return found


@pytest.mark.parametrize("how", ["memory", "whole blocks", "disk", "mixed", "auto", "in place"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_changed_saved_and_undone(how, recipe, expected, tmp_path):
    model = dispatched(how, tmp_path)
    before, given = elsewhere(model), inputs("llama")
    original = [run(build("llama"), batch) for batch in given]
    applied = apply(model, RECIPES[recipe], given, min_coverage=0, progress=False)

    outputs, state = expected[recipe]
    for _ in range(2):  # the weights are brought in place anew each time
        for batch, output in zip(given, outputs):
            assert torch.equal(run(model, batch), output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(offload.value_of(model, name, tensor), state[name])
    weights = {name for name in elsewhere(model) if name.endswith(("weight", "codes", "tensor", "left"))}
    if how in ("memory", "whole blocks", "disk"):
        assert weights == {name for name in state if name.endswith(("weight", "codes", "tensor", "left"))}
    assert (elsewhere(model) == set()) == (how == "in place")

    loaded = load(save(model, tmp_path / "saved"))
    assert torch.equal(run(loaded, given[1]), outputs[1])
    assert {name: bits(tensor) for name, tensor in loaded.state_dict().items()} == {
        name: bits(tensor) for name, tensor in state.items()
    }
    applied.undo()
    assert elsewhere(model) == before
    for batch, output in zip(given, original):
        assert torch.equal(run(model, batch), output)


def test_the_users_weights_are_not_written_to(tmp_path):
    model = build("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: bits(tensor) for name, tensor in state.items()}
    cpu_offload(model, execution_device="cpu", state_dict=state)
    apply(model, RECIPES["awq, wina"], inputs("llama"), undo="off", progress=False)
    assert {name: bits(tensor) for name, tensor in state.items()} == kept
    on_disk = dispatched("disk", tmp_path)
    folder = next(tmp_path.iterdir())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    apply(on_disk, RECIPES["awq, wina"], inputs("llama"), undo="off", progress=False)
    now = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name: path.read_bytes() for path in now} == files
    (own,) = (path for path in folder.iterdir() if path.is_dir())
    assert len(list(own.iterdir())) > 3 and own.name.startswith("actkit-")


def test_a_failure_midway_restores_the_model(tmp_path, monkeypatch):
    edit = Wina.edit

    def failing(self, block, seen):
        yield from edit(self, block, seen)
        if block.index == 1:
            yield Set("model.layers.1.input_layernorm.weight", torch.zeros(16))
            raise RuntimeError("midway")

    monkeypatch.setattr(Wina, "edit", failing)
    for how in ("memory", "disk", "whole blocks"):
        model, given = dispatched(how, tmp_path), inputs("llama")
        before, want = elsewhere(model), run(build("llama"), given[1])

        with pytest.raises(RuntimeError, match="midway"):
            apply(model, [Wina()], given, progress=False)
        assert elsewhere(model) == before and torch.equal(run(model, given[1]), want)


def test_reading_and_measuring(tmp_path):
    plain, given = build("llama"), inputs("llama")
    for how in ("memory", "mixed"):
        model = dispatched(how, tmp_path)
        seen = record(model, {"mlp.hidden": Moments()}, given, progress=False)
        for site, moments in record(plain, {"mlp.hidden": Moments()}, given, progress=False).items():
            assert torch.equal(seen[site].mean, moments.mean)
        assert measure_quality(model, given, reference=plain, progress=False).metrics["kl"].value == 0
        assert actkit.profile(model, given) == actkit.profile(plain, given)
        apply(model, RECIPES["awq, wina"], given, progress=False)
        changed = apply(copy.deepcopy(plain), RECIPES["awq, wina"], given, progress=False).model
        assert measure_cost(model, given, progress=False).layers == measure_cost(changed, given, progress=False).layers


def test_the_proof_of_an_offloaded_model(worker, tmp_path):
    model = dispatched("mixed", tmp_path)
    apply(model, RECIPES["awq, wina"], inputs("llama"), undo="off", progress=False)
    assert prove(model, save(model, tmp_path / "saved"), process=worker).bit_equal


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_ties_are_seen(how, tmp_path):
    model = build("llama", tie_word_embeddings=True)
    changed = apply(copy.deepcopy(model), RECIPES["cats"], inputs("llama"), min_coverage=0, progress=False).model
    if how == "memory":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    run(model, inputs("llama")[0])  # the two names have parameters of their own by now
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(set(found) == names for found in shared_parameters(model).values()) and shared_parameters(model)
    with pytest.raises(EditError, match="tied"):
        from actkit.core.edit.edits import apply_edit

        apply_edit(model, Set("lm_head.weight", torch.zeros(50, 16)))
    apply(model, RECIPES["cats"], inputs("llama"), min_coverage=0, progress=False)
    loaded = load(save(model, tmp_path / "saved"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(run(loaded, inputs("llama")[1]), run(changed, inputs("llama")[1]))


def test_what_needs_all_weights_in_place_is_refused(tmp_path):
    model, given = dispatched("memory", tmp_path), inputs("llama")
    mixtral = cpu_offload(build("mixtral"), execution_device="cpu")
    for use in (
        lambda: apply(model, [RSparse(alpha="search", generations=1, population=2)], given, progress=False),
        lambda: apply(model, [PerplexitySparsity()], given, progress=False),
        lambda: apply(model, [Wina()], given, inplace=False, progress=False),
        lambda: apply(mixtral, [Wina()], inputs("mixtral"), progress=False),
        lambda: record(mixtral, {"mlp.hidden": AbsMax()}, inputs("mixtral"), progress=False),
        lambda: train(model, given, validation=given, steps=1, progress=False),
        lambda: actkit.optimize(model, out=tmp_path / "out", data=given),
        lambda: Decoder(model),
    ):
        with pytest.raises(UnsupportedModelError, match="without offload"):
            use()
    empty = nn.Linear(2, 2, device="meta")
    with pytest.raises(UnsupportedModelError, match="meta device and has no values"):
        apply(empty, [Wina()], [torch.randn(1, 2)], progress=False)


# -- compiled and sharded models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one, for FSDP."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled_in_place():
    model = build("llama")
    model.compile(backend="eager")
    return model


def compiled_forward():
    model = build("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_block():
    model = build("llama")
    model.model.layers[1].compile(backend="eager")
    return model


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.model.layers[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = build("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
    return model


MODELS = {
    "compiled": (lambda: torch.compile(build("llama"), backend="eager"), "compile after"),
    "compiled in place": (compiled_in_place, "compile after"),
    "compiled forward": (compiled_forward, "compile after"),
    "one block compiled": (compiled_block, "model.layers.1 is compiled"),
    "FSDP": (lambda: fsdp(build("llama")), r"sharded \(FullyShardedDataParallel\)"),
    "FSDP of a block": (lambda: nn.Sequential(fsdp(build("llama"))), "0 is sharded"),
    "fully_shard": (lambda: fsdp2(build("llama")), r"sharded \(FSDPLlamaForCausalLM\)"),
    "tensor parallel": (tensor_parallel, "up_proj is in pieces"),
    "DDP": (lambda: nn.parallel.DistributedDataParallel(build("llama")), "its .module"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_entry_refuses_compiled_and_sharded_models(kind, group, tmp_path):
    make, text = MODELS[kind]
    model, given = make(), inputs("llama")

    def enter(context):
        with context:
            pass

    for use in (
        lambda: record(model, {"mlp.hidden": AbsMax()}, given, progress=False),
        lambda: plan_memory(model, {"mlp.hidden": AbsMax()}, given),
        lambda: enter(live(model, "mlp.hidden")),
        lambda: enter(calls(model, "")),
        lambda: anatomy(model),
        lambda: apply(model, [Wina()], given, progress=False),
        lambda: actkit.swap(model, "silu", "relu"),
        lambda: measure_quality(model, given, progress=False),
        lambda: evaluate(build("llama"), given, reference=model, progress=False),
        lambda: actkit.evaluate(model, given),
        lambda: actkit.profile(model, given),
        lambda: actkit.show(model, given),
        lambda: train(model, given, validation=given, steps=1, progress=False),
        lambda: save(model, tmp_path / "saved"),
        lambda: actkit.optimize(model, out=tmp_path / "out", data=given),
        lambda: Decoder(model),
    ):
        with pytest.raises(UnsupportedModelError, match=text):
            use()
    assert not list(tmp_path.iterdir())
