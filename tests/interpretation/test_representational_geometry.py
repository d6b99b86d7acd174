"""Geometry: exact cases, brute force, scikit-learn, and tasks whose kernels are what was asked for."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn

from actkit.interpretation.representational_geometry.dichotomies import (
    balanced_dichotomies,
    ccgp,
    decodability,
    parallelism,
    shattering,
)
from actkit.interpretation.representational_geometry.kernels import cka, kernel, participation_ratio
from actkit.interpretation.representational_geometry.representational_geometry import representational_geometry
from actkit.interpretation.representational_geometry.tasks import CubeTask, KernelTask, NudgedXor, cube_dichotomies
from actkit.testing import tiny_batches, tiny_model

CUBE = np.array(list(product((-1.0, 1.0), repeat=3)))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_cka_is_the_cosine_of_centred_kernels_and_ignores_rotation_and_scale():
    one, other = random(9, 5), random(9, 7, seed=1)
    centre = np.eye(9) - 1 / 9
    a, b = (centre @ z @ z.T @ centre for z in (one, other))
    wanted = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert cka(kernel(one), kernel(other)) == pytest.approx(wanted, abs=1e-12)
    turned = 3 * one @ np.linalg.qr(random(5, 5, seed=2))[0] + 4
    assert cka(kernel(turned), kernel(one)) == pytest.approx(1, abs=1e-12)


def test_the_unbiased_estimate_is_that_of_its_definition_and_0_for_independent_ones():
    """HSIC by sums over all quadruples of different conditions."""
    a, b = (z @ z.T for z in (random(6, 3), random(6, 4, seed=1)))

    def hsic(k, m):
        total, count = 0.0, 0
        for i, j, q, r in permutations(range(6), 4):
            total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
            count += 1
        return total / count

    wanted = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert cka(a, b, debiased=True) == pytest.approx(wanted, abs=1e-10)
    kernels = [random(8, 200, seed=seed) for seed in range(60)]
    found = [cka(x @ x.T, y @ y.T, debiased=True) for x, y in zip(kernels[::2], kernels[1::2], strict=True)]
    plain = [cka(kernel(x), kernel(y)) for x, y in zip(kernels[::2], kernels[1::2], strict=True)]
    assert abs(np.mean(found)) < 0.1 < 0.5 < np.mean(plain)


def test_dimensions_of_exact_cases():
    assert participation_ratio(np.eye(7)) == pytest.approx(6)
    assert participation_ratio(CUBE) == pytest.approx(3)
    assert participation_ratio(np.outer(np.arange(5.0), np.ones(4))) == pytest.approx(1)


# -- dichotomies -------------------------------------------------------------------------------------------------------


def test_balanced_dichotomies_are_all_of_them_once():
    found = {tuple(each) for each in balanced_dichotomies(8)}
    assert len(found) == 35 and all(sum(each) == 4 and each[0] for each in found)
    drawn = balanced_dichotomies(16, 20, seed=1)
    assert len({tuple(each) for each in drawn}) == 20 and all(each.sum() == 8 for each in drawn)


def brute(z, dichotomy):
    positive, negative = z[dichotomy], z[~dichotomy]
    best = -2.0
    for order in permutations(range(len(negative))):
        v = positive - negative[list(order)]
        cosines = [
            v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j])
            for i in range(len(v))
            for j in range(i + 1, len(v))
        ]
        best = max(best, float(np.mean(cosines)))
    return best


def test_parallelism_by_brute_force_and_in_exact_cases():
    z = random(8, 5)
    for dichotomy in balanced_dichotomies(8)[::5]:
        assert parallelism(z, dichotomy).score == pytest.approx(brute(z, dichotomy), abs=1e-12)
    axis = CUBE[:, 0] > 0
    assert parallelism(CUBE, axis) == (pytest.approx(1), 0)
    assert parallelism(np.eye(8), axis).score == pytest.approx(0)  # one state for each: nothing is shared
    assert parallelism(CUBE, axis, "assignment").score == pytest.approx(1)
    assert parallelism(z, axis, "assignment").score <= parallelism(z, axis, "exact").score + 1e-12


def test_equal_states_have_no_direction_and_are_counted():
    z = CUBE.copy()
    axis = z[:, 0] > 0
    z[0] = z[4]  # a positive and a negative one
    found = parallelism(z, axis, "assignment")
    assert found.dropped == 1 and found.score == pytest.approx(1)


def noisy(points, count=400, noise=0.1, seed=0):
    draw = np.random.default_rng(seed)
    owner = draw.integers(0, len(points), count)
    return points[owner] + noise * draw.standard_normal((count, points.shape[1])), owner


def test_a_cube_generalises_and_single_states_do_not():
    axis = CUBE[:, 0] > 0
    # two and two conditions may differ in a second axis too, so that not every split generalises
    assert ccgp(*noisy(CUBE), axis, splits=36) > 0.85 and decodability(*noisy(CUBE), axis) == 1.0
    assert ccgp(*noisy(np.eye(8)), axis) == pytest.approx(0.5, abs=0.1) and decodability(*noisy(np.eye(8)), axis) == 1.0
    parity = CUBE.prod(1) > 0
    assert decodability(*noisy(CUBE), parity) < 0.65  # no plane does
    alone, cube = (shattering(*noisy(points), trained=[axis], limit=34) for points in (np.eye(8), CUBE))
    assert alone > 0.99 > 0.9 > cube


def test_ccgp_by_loops_over_all_splits_with_scikit_learn():
    from sklearn.svm import LinearSVC

    x, owner = noisy(random(8, 4), 160, 0.5)
    axis = np.arange(8) < 4
    scores = []
    for one in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        for other in [(4, 5), (4, 6), (4, 7), (5, 6), (5, 7), (6, 7)]:
            fitted = np.isin(owner, one + other)
            svm = LinearSVC(random_state=0, max_iter=5000).fit(x[fitted], axis[owner[fitted]])
            scores.append(svm.score(x[~fitted], axis[owner[~fitted]]))
    assert ccgp(x, owner, axis, splits=36) == pytest.approx(np.mean(scores))


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [0.0, 0.5])
@pytest.mark.parametrize(("conditions", "number"), [(16, 1), (16, 4), (32, 5)])
def test_the_alignment_is_what_was_asked_for(conditions, number, spectrum):
    most = np.sqrt(number / (conditions - 1))
    for alignment in (0.0, most / 2, most):
        task = KernelTask(conditions, number, alignment, spectrum=spectrum, seed=3)
        assert task.reached == pytest.approx(alignment, abs=1e-6)
        plain = task.inputs @ task.inputs.T / task.dim
        np.testing.assert_allclose(plain, kernel(task.inputs) / task.dim, atol=1e-8)  # centred by construction
        assert np.trace(plain) == pytest.approx(conditions)
        assert ((task.targets == 0).sum(0) == conditions // 2).all()
    low = KernelTask(conditions, number, 0.0, rank=conditions.bit_length() - 1)
    assert np.linalg.matrix_rank(low.input_kernel) == conditions.bit_length() - 1


def test_isotropic_inputs_have_the_largest_alignment():
    task = KernelTask(16, 1, float(np.sqrt(1 / 15)))
    np.testing.assert_allclose(np.linalg.eigvalsh(task.input_kernel / task.dim)[1:], 16 / 15, atol=1e-9)


def test_samples_are_conditions_with_noise():
    task = KernelTask(16, 2, noise=0.5)
    x, y, condition = task.sample(20000, seed=1)
    residual = x - task.clean[condition]
    assert float(residual.std()) == pytest.approx(0.5, rel=0.01) and len(condition.unique()) == 16
    assert torch.equal(y, torch.from_numpy(task.targets).float()[condition])
    assert torch.equal(task.sample(50, seed=1).x, task.sample(50, seed=1).x)


def test_a_nudge_makes_xor_separable():
    for epsilon, separable in ((0.0, False), (1.0, True)):
        task = NudgedXor(epsilon, noise=0.01)
        x, y, _ = task.sample(400)
        from sklearn.svm import LinearSVC

        score = LinearSVC().fit(x.numpy(), y[:, 0].numpy()).score(x.numpy(), y[:, 0].numpy())
        assert (score == 1.0) is separable


def test_the_cube_has_six_types_of_dichotomies():
    found = cube_dichotomies()
    near = np.abs(CUBE[:, None] - CUBE[None]).sum(-1) == 2
    cut = [int(near[each][:, ~each].sum()) for each in found]
    assert len(found) == 6 and cut[0] == 4 and cut[-1] == 12
    assert CubeTask(5).reached == pytest.approx(0, abs=1e-9) and CubeTask(0).reached == pytest.approx(np.sqrt(1 / 3))


# -- the report --------------------------------------------------------------------------------------------------------


def test_a_net_that_passes_its_inputs_on_has_their_geometry():
    task = KernelTask(16, 1, noise=0.3)
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(100))
    x, _, condition = task.sample(600)
    found = representational_geometry(
        model,
        [x[:300], x[300:]],
        sites=("activation.input:1",),
        conditions=condition,
        targets=torch.from_numpy(task.targets),
        clean=[task.clean],
        progress=False,
    )
    (site,) = found.sites
    assert site.input_alignment == pytest.approx(1, abs=1e-5) and site.target_alignment == pytest.approx(0, abs=1e-5)
    assert site.participation_ratio == pytest.approx(14, abs=1e-3) and site.units == 100
    assert site.targets[0].parallelism == pytest.approx(
        parallelism(task.inputs, task.targets[:, 0] > 0.5).score, abs=1e-4
    )
    assert found.input_decodability == (site.targets[0].decodability,)


def test_by_name_labels_are_the_conditions_and_tokens_have_no_numbers():
    model = tiny_model("llama")
    batches = [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 2} for batch in tiny_batches("llama")]
    found = representational_geometry(model, batches, sites=("block.output",), progress=False)
    assert len(found.sites) == 2 and found.conditions == 2 and found.sites[0].input_alignment is None
    assert found.sites[0].target_alignment == pytest.approx(1)  # two points are like any two
