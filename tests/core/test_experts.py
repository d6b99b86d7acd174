"""ExpertList against the stock modules that hold their experts as 3-D parameters."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model import llama_rows
from actkit.core.model.anatomy import anatomy
from actkit.core.model.architecture_rows import ExpertsRow
from actkit.core.model.experts import ExpertList

ROW = llama_rows.MIXTRAL.experts
GPT_OSS = llama_rows.GPT_OSS.experts
CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2}


def experts(kind: str) -> tuple[nn.Module, ExpertsRow]:
    torch.manual_seed(0)
    if kind == "mixtral":
        module, row = MixtralExperts(MixtralConfig(**CONFIG, experts_implementation="eager")), ROW
    else:
        module, row = GptOssExperts(GptOssConfig(**CONFIG, experts_implementation="eager")), GPT_OSS
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, row


def call(tokens: int = 11) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    weights, index = torch.rand(tokens, 5).topk(2)
    index[:, 0][index[:, 0] == 3] = 5  # expert 5 stands for none
    return torch.randn(tokens, 16), index.where(index != 3, 5), weights


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_list_computes_what_the_stock_module_computes(kind: str) -> None:
    module, row = experts(kind)
    states, index, weights = call()
    if kind == "gpt_oss":  # its eager code counts without the sentinel
        index = index.where(index != 5, 0)
    opened = ExpertList.of(module, row)
    with torch.no_grad():
        torch.testing.assert_close(opened(states, index, weights), module(states, index, weights), atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(
            opened.double()(states.double(), index, weights.double()).float(),
            stock64(module, states, index, weights),
            atol=0,
            rtol=1e-6,
        )


def stock64(module: nn.Module, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(module).double()(states.double(), index, weights.double()).float()


def test_logits_of_mixtral_stay() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**CONFIG, vocab_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ).eval()
    ids = torch.randint(0, 50, (3, 9))
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.experts = ExpertList.of(layer.mlp.experts, ROW)
        after = model(ids).logits
    assert (after - before).norm() <= 1e-6 * before.norm()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_layers_are_views_of_the_parameters(kind: str) -> None:
    module, row = experts(kind)
    opened = ExpertList.of(module, row)
    owners = {module.gate_up_proj.untyped_storage().data_ptr(), module.down_proj.untyped_storage().data_ptr()}
    for expert in opened:
        assert {x.weight.untyped_storage().data_ptr() for x in (expert.gate, expert.up, expert.down)} == owners
    with torch.no_grad():
        opened[2].down.weight.zero_()
    assert module.down_proj[2].abs().sum() == 0
    assert module.down_proj[1].abs().sum() > 0


def test_each_expert_says_which_tokens_it_gets() -> None:
    module, row = experts("mixtral")
    states, index, weights = call()
    opened = ExpertList.of(module, row)
    seen: dict[int, Any] = {}
    for e, expert in enumerate(opened):
        expert.register_forward_pre_hook(lambda _, args, e=e: seen.update({e: args}))
    opened(states, index, weights)
    assert 3 not in seen
    for e, (x, rows) in seen.items():
        assert torch.equal(rows, (index == e).any(-1).nonzero()[:, 0])
        assert torch.equal(x, states[rows])
    assert len({id(expert.activation) for expert in opened}) == len(opened)


def test_gradients_flow_through_replaced_layers() -> None:
    module, row = experts("mixtral")
    opened = ExpertList.of(module, row)
    opened[1].down = ActLinear.of(opened[1].down, select=Threshold(0.0))
    states, index, weights = call()
    opened(states, index, weights).sum().backward()
    module(states, index, weights).sum().backward()
    torch.testing.assert_close(opened[1].down.storage.tensor.grad, module.down_proj.grad[1], atol=1e-4, rtol=1e-5)


def test_spec_rebuilds_the_structure() -> None:
    module, row = experts("gpt_oss")
    opened = ExpertList.of(module, row)
    spec = json.loads(json.dumps(opened.spec()))
    assert {key: spec[key] for key in ("count", "hidden", "intermediate")} == {
        "count": 5,
        "hidden": 16,
        "intermediate": 24,
    }
    with torch.device("meta"):
        original = GptOssExperts(GptOssConfig(**CONFIG))
    rebuilt = ExpertList.from_spec(spec, original)
    assert {name: p.shape for name, p in rebuilt.named_parameters()} == {
        name: p.shape for name, p in opened.named_parameters()
    }
    assert all(p.is_meta for p in rebuilt.parameters())
    rebuilt.load_state_dict(opened.state_dict(), assign=True)
    states, index, weights = call()
    index = index.where(index != 5, 0)
    assert torch.equal(rebuilt(states, index, weights), opened(states, index, weights))
    with torch.device("meta"):
        smaller = GptOssExperts(GptOssConfig(**{**CONFIG, "num_local_experts": 4}))
    with pytest.raises(ValueError, match="base model has"):
        ExpertList.from_spec(spec, smaller)


def test_wrong_rows_are_refused() -> None:
    module, _ = experts("mixtral")
    with pytest.raises(ValueError, match="Correct the architecture's row"):
        ExpertList.of(module, ExpertsRow("mlp", path="mlp.experts", router="mlp.gate", transposed=True))
    with pytest.raises(ValueError, match="no 3-D parameter 'gate_up'"):
        ExpertList.of(module, ExpertsRow("mlp", path="mlp.experts", router="mlp.gate", gate_up="gate_up"))


def test_experts_share_the_parameters_of_their_activation() -> None:
    module, _ = experts("mixtral")
    module.act_fn = nn.PReLU()
    acts = [expert.activation for expert in ExpertList.of(module, ROW)]
    assert acts[0] is not acts[1] and acts[0].weight is acts[1].weight is module.act_fn.weight


def test_the_anatomy_opens_what_it_found() -> None:
    model = MixtralForCausalLM(
        MixtralConfig(**CONFIG, vocab_size=50, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    )
    found = anatomy(model).blocks[0].experts
    assert (found.count, found.members, found.router) == (5, (), "model.layers.0.mlp.gate")
    model.model.layers[0].mlp.experts = ExpertList.of(found.module, found.row)
    members = anatomy(model).blocks[0].experts.members
    assert [member.path for member in members] == [f"model.layers.0.mlp.experts.{e}" for e in range(5)]
    assert members[3].activation == "model.layers.0.mlp.experts.3.activation"
