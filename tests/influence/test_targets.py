"""Soft labels, several labels and class weights against torch's own losses, differentiated one sample at a time."""

import math

import numpy as np
import oracle
import pytest
import torch
from torch.nn import functional

from imu_ray.influence import targets
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.curvature.ggn import block_ggn_sum, full_ggn_sum
from imu_ray.influence.curvature.hessian import diagonal_sum, product_sum
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.influence.gradients import LayerIO, output_gradient
from imu_ray.influence.scores import relative_losses, sample_losses
from imu_ray.influence.targets import target_of
from imu_ray.updates.objectives import NPO, OBJECTIVES, OF_CLASSES, SimNPO

N, C, D = 9, 4, 3
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, ORIGINAL = (3 * torch.randn(N, C, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = {
    "class": torch.arange(N) % C,
    "soft": torch.softmax(2 * torch.randn(N, C, generator=GENERATOR, dtype=torch.float64), 1),
    "multi_label": torch.randint(0, 2, (N, C), generator=GENERATOR).double(),
}
WEIGHTS = {"plain": None, "weighted": (0.5, 3.0, 1.0, 0.125)}
KINDS = [(kind, weights) for kind in LABELS for weights in WEIGHTS]


def close(found, expected, tolerance=1e-12):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_loss_gradient_and_hessian_are_those_of_torchs_own_loss(kind, weights):
    labels, loss = LABELS[kind], oracle.target_loss(kind, WEIGHTS[weights])
    target = target_of(labels, kind, WEIGHTS[weights])
    z = LOGITS.clone().requires_grad_()
    expected = torch.stack([loss(z[i : i + 1], labels[i : i + 1]) for i in range(N)])
    close(sample_losses(LOGITS, target), expected.detach())
    close(output_gradient(LOGITS, target), torch.autograd.grad(expected.sum(), z)[0])
    if target.is_floating_point():
        variances, diagonal, factor = targets.hessian(LOGITS, target)
        hessians = oracle.logit_hessians(LOGITS, labels, loss)
        close(torch.diag_embed(diagonal) - factor.unsqueeze(2) * factor.unsqueeze(1), hessians)
        close(variances, hessians.diagonal(dim1=1, dim2=2))


def test_the_mean_over_rows_is_that_of_torch_with_its_usual_reduction():
    for kind in ("soft", "multi_label"):
        for weights in WEIGHTS.values():
            own = None if weights is None else torch.tensor(weights, dtype=torch.float64)
            whole = functional.cross_entropy(LOGITS, LABELS["soft"], own)
            if kind == "multi_label":
                whole = functional.binary_cross_entropy_with_logits(LOGITS, LABELS[kind], pos_weight=own)
            found = sample_losses(LOGITS, target_of(LABELS[kind], kind, weights)).mean()
            assert float(found) == pytest.approx(float(whole), rel=1e-12)


def test_one_hot_soft_labels_are_hard_ones_to_the_bit():
    classes = LABELS["class"]
    for logits in (LOGITS, 30 * LOGITS):  # up to where p rounds to 1
        soft = target_of(functional.one_hot(classes, C).double(), "soft", None)
        assert torch.equal(sample_losses(logits, soft), sample_losses(logits, classes))
        assert torch.equal(output_gradient(logits, soft), output_gradient(logits, classes))
        for name in set(OBJECTIVES) - OF_CLASSES:
            found, expected = (OBJECTIVES[name](logits, labels, ORIGINAL) for labels in (soft, classes))
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("kind", LABELS)
def test_weights_of_ones_are_none_to_the_bit(kind):
    weighted, plain = (target_of(LABELS[kind], kind, weights) for weights in ((1.0,) * C, None))
    assert torch.equal(sample_losses(LOGITS, weighted), sample_losses(LOGITS, plain))
    assert torch.equal(output_gradient(LOGITS, weighted), output_gradient(LOGITS, plain))
    for name in OBJECTIVES if kind == "class" else set(OBJECTIVES) - OF_CLASSES:
        found, expected = (OBJECTIVES[name](LOGITS, target, ORIGINAL) for target in (weighted, plain))
        assert torch.equal(found, expected), name


def test_gradients_keep_their_digits_where_a_row_is_fitted_beyond_the_last():
    logits = torch.tensor([[0.0, 80.0, 0.0, 0.0]], dtype=torch.float64)
    soft = target_of(torch.tensor([1]), "class", WEIGHTS["weighted"])
    assert float(output_gradient(logits, soft)[0, 1]) == pytest.approx(-9 * math.exp(-80), rel=1e-12)
    right = target_of(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), "multi_label", WEIGHTS["weighted"])
    assert float(output_gradient(logits, right)[0, 1]) == pytest.approx(-3 / C * math.exp(-80), rel=1e-12)


def written_out(kind, weights, z):
    """By objective the loss whose gradient it is: s times that of the loss in units of s."""
    labels, loss = LABELS[kind], oracle.target_loss(kind, weights)
    target = target_of(labels, kind, weights)
    scale = target.flatten(1).sum(1) if target.is_floating_point() else torch.ones(N).double()
    of = lambda z: torch.stack([loss(z[i : i + 1], labels[i : i + 1]) for i in range(N)]) / scale
    uniform = -torch.log_softmax(z, 1).mean(1)
    if kind == "multi_label":
        uniform = -(functional.logsigmoid(z) + functional.logsigmoid(-z)).mean(1) / 2
    bound = math.log(2 if kind == "multi_label" else C)
    return {
        "ascent": scale * -of(z),
        "bounded_ascent": scale * -of(z).clamp_max(bound),
        "npo": scale * 2 / NPO.beta * functional.softplus(NPO.beta * (of(ORIGINAL) - of(z))),
        "simnpo": scale * 2 / SimNPO.beta * functional.softplus(-SimNPO.beta * of(z) - SimNPO.gamma),
        "uniform_target": scale * uniform,
    }


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - OF_CLASSES))
@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_an_objective_is_the_gradient_of_its_loss(kind, weights, name):
    z = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(written_out(kind, WEIGHTS[weights], z)[name].sum(), z)
    found = OBJECTIVES[name](LOGITS, target_of(LABELS[kind], kind, WEIGHTS[weights]), ORIGINAL)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", sorted(OF_CLASSES))
def test_an_objective_of_a_class_counts_by_its_weight(name):
    weights = torch.tensor(WEIGHTS["weighted"], dtype=torch.float64)[LABELS["class"]].unsqueeze(1)
    found = OBJECTIVES[name](LOGITS, target_of(LABELS["class"], "class", WEIGHTS["weighted"]), ORIGINAL)
    torch.testing.assert_close(found, weights * OBJECTIVES[name](LOGITS, LABELS["class"], ORIGINAL), rtol=1e-11, atol=0)


@pytest.mark.parametrize(("kind", "weights"), [each for each in KINDS if each != ("class", "plain")])
def test_the_curvature_of_a_head_is_the_mean_of_the_samples_hessians(kind, weights):
    target = target_of(LABELS[kind], kind, WEIGHTS[weights])
    inputs = torch.randn(N, 1, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = targets.position_hessian(LOGITS, target)
    whole = LayerIO(inputs, output_gradient(LOGITS, target).unsqueeze(1), hessian)
    parts = [slice(start, start + 4) for start in range(0, N, 4)]
    blocks = [
        LayerIO(inputs[part], whole.output_grads_BTC[part], targets.LogitHessian(*(each[part] for each in hessian)))
        for part in parts
    ]
    of_logits = oracle.logit_hessians(LOGITS, LABELS[kind], oracle.target_loss(kind, WEIGHTS[weights])).numpy()
    pairs = list(zip(of_logits, inputs[:, 0].numpy(), strict=True))
    expected = torch.from_numpy(sum(np.kron(each, np.outer(h, h)) for each, h in pairs) / N)
    reduce = lambda statistics: merge_tree(map(statistics, blocks))
    close(reduce(full_ggn_sum).mean, expected)
    of_rows = expected.view(C, D, C, D)
    close(reduce(block_ggn_sum).mean, torch.stack([of_rows[c, :, c] for c in range(C)]))
    close(reduce(diagonal_sum).mean, expected.diagonal().view(C, D))
    vector = torch.randn(C, D, generator=GENERATOR, dtype=torch.float64)
    close(reduce(lambda block: product_sum(block, vector)).mean, (expected @ vector.flatten()).view(C, D))
    factors = reduce(FactorSums.of).means
    close(factors.outputs_CC, torch.from_numpy(of_logits.mean(0)))
    close(factors.inputs_DD, torch.from_numpy(oracle.second_moment(inputs.numpy())))


@pytest.mark.parametrize(("kind", "weights"), [each for each in KINDS if each != ("class", "plain")])
def test_the_second_moment_of_drawn_pulls_is_the_hessian(kind, weights):
    labels, loss = LABELS[kind][:1], oracle.target_loss(kind, WEIGHTS[weights])
    target = target_of(labels, kind, WEIGHTS[weights])
    logits, expected = LOGITS[:1], oracle.logit_hessians(LOGITS[:1], labels, loss)[0]
    if kind == "multi_label":  # every outcome with its probability, in place of draws
        outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * C).double()
        chances = (outcomes * torch.sigmoid(logits) + (1 - outcomes) * torch.sigmoid(-logits)).prod(1)
    else:
        outcomes, chances = torch.arange(C), torch.softmax(logits[0], 0)
    count = len(outcomes)
    pulls = targets.drawn_gradient(logits.expand(count, C), target.expand(count, *target.shape[1:]), outcomes)
    close((chances.unsqueeze(1) * pulls).sum(0) + 1, torch.ones(C, dtype=torch.float64))
    close(pulls.T @ (chances.unsqueeze(1) * pulls), expected)


@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_a_uniform_guess_has_the_bound_of_the_loss_whatever_the_weights(kind, weights):
    target = target_of(LABELS[kind], kind, WEIGHTS[weights])
    found = relative_losses(torch.zeros(N, C), target)
    close(found, torch.full((N,), targets.guess_loss(target, C), dtype=torch.float64))
