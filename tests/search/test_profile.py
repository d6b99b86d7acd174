"""Planted properties are found, with values that numpy computes from the same activations."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from actkit.catalogue import papers
from actkit.core.ground import registry
from actkit.core.ground.errors import DataError, MemoryLimitError
from actkit.core.store.activation_store import harvest
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax, Density, Moments, Quantiles, Sample, Spectrum
from actkit.search.profile import SITES, find, in_blocks, profile, snr, spread
from actkit.search.results import Finding, Profile, SiteProfile, WeightProfile
from actkit.testing import tiny_batches, tiny_model

ROWS, CHANNELS = 400, 64


def planted(x: Tensor, weight: Tensor | None = None) -> tuple[SiteProfile, Profile]:
    """The profile of a model whose one linear layer reads exactly x [rows, channels], in two batches."""
    model = nn.Sequential(nn.Linear(x.shape[1], 8, bias=False))
    if weight is not None:
        model[0].weight.data = weight
    seen = profile(model, [x[: ROWS // 2], x[ROWS // 2 :]], progress=False)
    (site,) = seen.sites
    return site, seen


@pytest.fixture
def bell() -> Tensor:
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(0))


def suggestions(seen: Profile) -> str:
    return "\n".join(f"{finding.site}: {finding.what}: {finding.suggestion}" for finding in seen.findings)


def test_a_bell_curve_is_nothing_unusual(bell):
    site, seen = planted(bell)
    x = bell.double().numpy()
    size = np.abs(x)
    assert (site.site, site.rows, site.channels, seen.rows) == ("layer.input:0", ROWS, CHANNELS, ROWS)
    assert site.density == 1 and site.dead == () and site.outliers == () and not site.massive
    assert site.largest == pytest.approx(size.max(), rel=1e-6)
    assert site.largest_channel == size.max(axis=0).argmax()
    assert site.median == pytest.approx(np.median(size), rel=3e-3)
    assert site.ratio == pytest.approx(size.max() / np.median(size), rel=3e-3)
    assert site.scale == pytest.approx(np.quantile(size, 0.999), rel=1e-2)
    assert site.above_one_percent == pytest.approx((size > 0.01 * site.scale).mean(), abs=1e-3)
    for share in (0.25, 0.5, 0.7):
        assert site.thresholds[f"{share:.0%}"] == pytest.approx(np.quantile(size, share), rel=5e-3)
    centred = x - x.mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / (centred**2).mean(axis=0) ** 2
    assert site.kurtosis_max == pytest.approx(kurtosis.max(), rel=1e-5)
    assert kurtosis.min() < site.kurtosis_median < kurtosis.max()
    assert seen.findings == (Finding("the whole model", "nothing unusual", 0.0, "no method suggests itself"),)


def test_effective_rank_is_the_entropy_of_the_singular_values(bell):
    low = bell[:, :5] @ torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(1))
    site, seen = planted(low)
    values = np.linalg.svd(low.double().numpy(), compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    assert site.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=0.02)
    assert 3 < site.effective_rank <= 5.1
    assert "effective rank" in suggestions(seen)


def test_effective_rank_counts_the_mean(bell):
    x = bell + 20
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = values / values.sum()
    assert planted(x)[0].effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_orthogonal_directions_of_equal_size_count_fully():
    directions = torch.zeros(ROWS, CHANNELS)
    directions[torch.arange(ROWS), torch.arange(ROWS) % 8] = torch.where(torch.arange(ROWS) // 8 % 2 == 0, 2.0, -2.0)
    site, _ = planted(directions)
    assert site.effective_rank == pytest.approx(8, rel=1e-3)
    assert site.dead == tuple(range(8, CHANNELS))
    assert site.density == pytest.approx(1 / CHANNELS, abs=1e-9)


def test_known_sparsity_and_dead_unit(bell):
    x = bell.abs() + 0.5
    x.view(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))[: int(0.8 * x.numel())]] = 0
    x[:, 11] = 0
    site, seen = planted(x)
    assert site.density == pytest.approx((x.numpy() != 0).mean(), abs=1e-9)
    assert site.dead == (11,)
    assert site.ratio is None and not site.massive
    assert site.thresholds["70%"] == 0
    text = suggestions(seen)
    assert "teal or wina at 80 %" in text
    assert f"channels never active on the {ROWS} rows seen: 1" in text


def test_values_near_zero_are_told_from_zeros(bell):
    x = bell.clone()
    x[:, ::2] *= 1e-4
    site, seen = planted(x)
    assert site.density == 1
    assert site.above_one_percent == pytest.approx((x.abs().numpy() > 0.01 * site.scale).mean(), abs=1e-3)
    assert "below 1 % of the scale" in suggestions(seen)


def test_outlier_channels_are_listed(bell):
    x = bell.clone()
    x[:, [3, 40]] *= 30
    site, seen = planted(x)
    largest = np.abs(x.numpy()).max(axis=0)
    assert site.outliers == tuple(np.flatnonzero(largest > 6 * np.median(largest))) == (3, 40)
    assert "2 (3, 40): rtn at 8 bits" in suggestions(seen)  # awq finds nothing to scale in a traced model


def test_a_massive_activation_is_found_and_flagged_by_the_strict_rule(bell):
    x = bell.clone()
    x[17, 23] = 1500
    site, seen = planted(x)
    assert site.massive and site.largest == 1500 and site.largest_channel == 23
    assert site.ratio == pytest.approx(1500 / np.median(np.abs(x.numpy())), rel=3e-3)
    assert "massive" in suggestions(seen)
    x[17, 23] = 500
    assert planted(x)[0].ratio < 1000 and not planted(x)[0].massive
    x *= 0.05
    x[17, 23] = 99
    assert planted(x)[0].ratio > 1000 and not planted(x)[0].massive


def by_hand(x: np.ndarray, levels: int, largest: float) -> float:
    """Symmetric round-to-nearest with one scale, and its signal-to-noise ratio in dB."""
    scale = largest / levels
    noise = x - np.clip(np.round(x / scale), -levels - 1, levels) * scale
    return 10 * np.log10((x**2).sum() / (noise**2).sum())


def test_signal_to_noise_of_activations(bell):
    x = bell.double().numpy()  # fewer rows than the sample holds: it holds all
    site, _ = planted(bell)
    assert site.int8_snr == pytest.approx(by_hand(x, 127, np.abs(x).max()), abs=0.01)
    assert site.int4_snr == pytest.approx(by_hand(x, 7, np.abs(x).max()), abs=0.01)


def test_rounding_uses_the_largest_activation_though_the_sample_misses_it():
    x = torch.randn(6000, 16, generator=torch.Generator().manual_seed(3))
    x[1234, 5] = 40
    site = profile(nn.Sequential(nn.Linear(16, 4)), [x], progress=False).sites[0]
    rest = np.delete(x.double().numpy(), 1234, axis=0)
    assert site.int8_snr == pytest.approx(by_hand(rest, 127, 40.0), abs=1.5)  # on 512 of them
    assert site.int8_snr < by_hand(rest, 127, np.abs(rest).max()) - 10


def test_signal_to_noise_of_weights_per_group(bell):
    weight = torch.randn(8, CHANNELS * 2, generator=torch.Generator().manual_seed(4))
    weight[:, 0] *= 20  # spoils its own group only
    _, seen = planted(torch.cat((bell, bell), 1), weight)
    groups = weight.double().numpy().reshape(8, 2, 64)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.clip(-np.round(low / scale), 0, 15)
    rounded = (np.clip(np.round(groups / scale) + zero, 0, 15) - zero) * scale
    expected = 10 * np.log10((groups**2).sum() / ((groups - rounded) ** 2).sum())
    assert seen.weights[0].group_size == 64
    assert seen.weights[0].int4_snr == pytest.approx(expected, abs=0.02)


def test_rows_that_64_does_not_divide_are_one_group():
    weights = profile(nn.Sequential(nn.Linear(40, 8)), [torch.randn(30, 40)], progress=False).weights
    assert weights[0].group_size == -1


def test_snr_of_what_is_exact_or_silent():
    assert snr(torch.ones(3), torch.ones(3)) is None
    assert snr(torch.zeros(3), torch.ones(3)) is None
    assert snr(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20)


# models ---------------------------------------------------------------------------------------------------------------

DECODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 4, 3), nn.Linear(144, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.conv(x).relu().flatten(1)).relu())


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        "bert": lambda: BertModel(BertConfig(vocab_size=60, **ENCODER)),
        "vit": lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **ENCODER)),
        "cnn": Cnn,
    }
    return makers[kind]()


def batches(kind: str) -> list[Any]:
    torch.manual_seed(1)
    if kind in ("vit", "cnn"):
        return [
            {"pixel_values": torch.randn(6, 1, 8, 8)} if kind == "vit" else torch.randn(6, 1, 8, 8) for _ in range(2)
        ]
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    return [{"input_ids": torch.randint(0, 60, (4, 10)), "attention_mask": mask} for _ in range(2)]


def printed(seen: Profile) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(seen.table())
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "bert", "vit", "cnn"])
def test_every_family(kind):
    model = build(kind)
    modules = {name: type(module) for name, module in model.named_modules()}
    seen = profile(model, batches(kind), progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == modules  # experts are closed again
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    names = {site.name for site in seen.sites}
    gated = kind in ("llama", "mixtral")
    expected = {"layer.input"} if kind == "cnn" else set(SITES) - {"layer.input"} - (set() if gated else {"mlp.gate"})
    assert names == expected
    tokens = {"llama": 72, "mixtral": 72, "gpt2": 72, "bert": 72, "vit": 12 * 5, "cnn": 12 * 6 * 6}
    assert max(site.rows for site in seen.sites) in (tokens[kind], 12 * 8 * 8)  # the first convolution reads all pixels
    assert len({weight.path for weight in seen.weights}) == len(seen.weights) > 0
    assert seen.findings
    json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    text = printed(seen)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_a_store_is_profiled_as_a_forward_pass_is(kind, tmp_path):
    model, data = build(kind).eval(), batches(kind)
    wanted = ["block.output", "mlp.input", "mlp.hidden", "blocks.0.attention.mixed"]
    store = harvest(model, wanted, data, tmp_path / "acts", shard_rows=30, progress=False)
    whole = profile(model, data, progress=False)
    calls = model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    seen = profile(model, store=store, progress=False)
    calls.remove()
    direct = {site.site: site.__dict__ for site in whole.sites}
    unseen = {name for name in store.sites if name not in {site.site for site in seen.sites}}
    assert all(store.count(name) == 0 for name in unseen) and len(seen.sites) + len(unseen) == len(store.sites)
    for site in seen.sites:
        if site.name == "mlp.input" and "experts" in site.site:
            continue  # batches show what the block's experts read together
        for name, value in site.__dict__.items():
            given = direct[site.site][name]
            assert value == (pytest.approx(given, rel=1e-6) if isinstance(given, float) else given), (site.site, name)
    assert seen.weights == whole.weights and seen.rows == whole.rows
    assert seen.notes[0] == f"activations of a store, {len(store.sites)} sites"
    with pytest.raises(ValueError, match="batches or sites were given beside it"):
        profile(model, store=store, sites=["activation.output"])


def test_planted_properties_of_a_llama():
    """Against our own hooks and numpy, on the real tokens of padded batches."""
    model = build("llama").eval()
    layers = model.model.layers
    with torch.no_grad():
        layers[1].mlp.up_proj.weight[5] = 0
        layers[0].input_layernorm.weight[3] = 60
        model.model.embed_tokens.weight[7, 9] = 5000
    data = batches("llama")
    data[0]["input_ids"][0, 0] = 7
    seen = {site.site: site for site in profile(model, data, progress=False).sites}
    watched = {
        "blocks.0.attention.input": (layers[0].self_attn.q_proj, "input"),
        "blocks.0.block.output": (layers[0], "output"),
        "blocks.1.mlp.hidden": (layers[1].mlp.down_proj, "input"),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in watched}
    for name, (module, where) in watched.items():

        def keep(
            module: nn.Module, args: tuple[Tensor, ...], output: Any, name: str = name, where: str = where
        ) -> None:
            found[name].append((args[0] if where == "input" else output).detach().double().numpy())

        module.register_forward_hook(keep)
    for batch in data:
        with torch.no_grad():
            model(**batch)
    for name, arrays in found.items():
        x = np.concatenate([a[b["attention_mask"].numpy() == 1] for a, b in zip(arrays, data, strict=True)])
        site = seen[name]
        assert site.rows == len(x) == 72
        assert site.dead == tuple(np.flatnonzero((x == 0).all(axis=0)))
        largest = np.abs(x).max(axis=0)
        assert site.outliers == tuple(np.flatnonzero(largest > 6 * np.median(largest)))
        assert site.largest == pytest.approx(largest.max(), rel=1e-5)
        assert site.density == pytest.approx((x != 0).mean(), abs=1e-9)
        assert site.int8_snr == pytest.approx(by_hand(x, 127, largest.max()), abs=0.05)
    assert seen["blocks.1.mlp.hidden"].dead == (5,)
    assert 3 in seen["blocks.0.attention.input"].outliers and seen["blocks.0.attention.input"].scalable
    output = seen["blocks.0.block.output"]
    assert output.massive and output.largest_channel == 9


def test_what_experts_read_counts_as_read_and_takes_a_scale():
    model = build("mixtral")
    model.model.layers[1].post_attention_layernorm.weight.data[4] = 80
    seen = profile(model, batches("mixtral"), progress=False)
    (site,) = [site for site in seen.sites if site.site == "blocks.1.mlp.input"]
    assert site.outliers == (4,) and len(site.read_by) == 8 and site.scalable
    assert site.above_one_percent < 0.5  # beside so large a channel; no reason to call the others small
    found = [finding for finding in seen.findings if finding.site == "mlp.input of block 1"]
    assert "1 (4)" in found[0].what and "awq" in found[0].suggestion
    assert not any("below 1 %" in finding.what for finding in found)


def test_a_site_outside_of_all_blocks_is_recorded_too():
    """As by `record`, which runs the whole model."""
    model, data = build("llama"), batches("llama")
    seen = profile(model, data, sites=["layer.input:lm_head"], progress=False)
    (site,) = [site for site in seen.sites if site.site == "layer.input:lm_head"]
    expected = record(model, {"layer.input:lm_head": [AbsMax(), Density()]}, data, progress=False)
    largest, density = expected["layer.input:lm_head"]
    assert site.block is None and site.channels == 32
    assert site.largest == float(largest.overall) and site.density == float(density.density)
    assert len(seen.sites) == len(profile(model, data, progress=False).sites) + 1


def test_spectra_are_left_out_within_a_small_memory_and_that_is_said():
    model, data = build("llama"), batches("llama")
    full = profile(model, data, progress=False)
    assert full.notes == () and all(site.effective_rank for site in full.sites)
    with pytest.raises(MemoryLimitError):
        profile(model, data, max_memory=1000, progress=False)
    block = [site for site in full.sites if site.block == 0]
    parts = (AbsMax(), Moments(), Density(), Quantiles(), Sample(2048))
    others = sum(part.memory(site.channels) for site in block for part in parts)
    tight = profile(model, data, max_memory=others + 3 * Spectrum().memory(32), progress=False)
    assert [sum(s.effective_rank is not None for s in tight.sites if s.block == k) for k in (0, 1)] == [3, 3]
    with pytest.raises(MemoryLimitError):  # the sites of one block are held together
        profile(model, data, max_memory=others - 1, progress=False)
    assert "effective rank not measured at" in tight.notes[0]


def test_wide_sites_have_no_spectrum(monkeypatch):
    monkeypatch.setattr("actkit.search.profile.WIDEST_SPECTRUM", 40)
    seen = profile(build("llama"), batches("llama"), progress=False)
    assert {site.name for site in seen.sites if site.effective_rank is None} == {"mlp.gate", "mlp.hidden"}
    assert "effective rank not measured at" in seen.notes[0]
    json.dumps(seen.to_dict(), allow_nan=False)
    seen.table()


def test_a_long_table_has_medians_over_blocks(monkeypatch):
    monkeypatch.setattr("actkit.search.figures.LONGEST_TABLE", 8)
    text = printed(profile(build("llama"), batches("llama"), progress=False))
    assert "mlp.hidden (2)" in text and "0.mlp.hidden" not in text


def test_suggestions_name_registered_methods_only():
    everything = SiteProfile(
        site="blocks.0.mlp.hidden",
        name="mlp.hidden",
        block=0,
        rows=100,
        channels=10,
        density=0.13,
        above_one_percent=0.1,
        scale=1.0,
        dead=(1, 2),
        largest=2000.0,
        largest_channel=3,
        median=0.1,
        ratio=20000.0,
        massive=True,
        outliers=(3,),
        kurtosis_median=3.0,
        kurtosis_max=9.0,
        effective_rank=1.0,
        int8_snr=3.0,
        int4_snr=0.1,
        thresholds={"25%": 0.0, "50%": 0.0, "70%": 0.0},
        read_by=("a",),
        scalable=True,
    )
    dense = replace(everything, density=1.0, scalable=False, block=1)
    small = replace(dense, outliers=(), block=2)
    poor = WeightProfile("a", "down", 0, 64, 40.0, 9.0)
    findings = find([everything, dense, small], [poor])
    assert len(findings) == 9 and len({finding.what for finding in findings}) == 8
    words = set(re.findall(r"\w+", " ".join(finding.suggestion for finding in findings)))
    catalogue = {paper.slug for paper in papers()} | {"smoothquant", "gptq"}
    assert {"teal", "wina", "rtn", "awq"} == words & (catalogue | set(registry.method_names()))
    (zeros,) = [finding for finding in findings if "exactly 0" in finding.what]
    assert zeros.site == "mlp.hidden of block 0" and zeros.value == pytest.approx(87) and "80 %" in zeros.suggestion
    (massive,) = [finding for finding in findings if "massive" in finding.what]
    assert massive.site == "mlp.hidden of blocks 0-2" and "20,000 times" in massive.what


def test_a_figure_has_a_line_per_site_and_role():
    pytest.importorskip("plotly")
    seen = profile(build("mixtral"), batches("mixtral"), progress=False)
    figure = seen.figure()
    assert {trace.name for trace in figure.data} == {site.name for site in seen.sites} | {w.role for w in seen.weights}
    assert "<div" in figure.to_html(full_html=False, include_plotlyjs=False)


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    seen = Profile("M", "traced", 0, (), (), (), ())
    with pytest.raises(ImportError, match=r"actkit\[report\]"):
        seen.figure()


@pytest.mark.parametrize("given", [[], torch.zeros(2, 3), {"input_ids": torch.zeros(1, 2)}])
def test_batches_must_be_a_list_of_some(given):
    with pytest.raises(DataError, match="batches"):
        profile(nn.Sequential(nn.Linear(3, 2)), given)


def test_words():
    assert in_blocks([0, 1, 2, 5, None]) == " of blocks 0-2, 5"
    assert in_blocks([4]) == " of block 4" and in_blocks([None]) == ""
    assert spread([3, 3]) == "3" and spread([87.23, 80.1]) == "80.1-87.2" and spread([1234.5]) == "1,234"


def test_a_deep_model_has_spectra_in_blocks_that_are_evenly_spread():
    seen = profile(tiny_model("llama", num_hidden_layers=9), tiny_batches("llama"), progress=False)
    measured = {site.block for site in seen.sites if site.effective_rank is not None}
    assert measured == {0, 2, 4, 6, 8}
    assert seen.notes == ("effective rank measured in 5 of 9 blocks, evenly spread: 0, 2, 4, 6, 8",)
    assert all(site.effective_rank for site in seen.sites if site.block in measured)
