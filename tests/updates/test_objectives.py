"""Every objective against autograd of its written-out loss, in float64."""

import math

import pytest
import torch

from imu_ray.updates.objectives import NPO, OBJECTIVES

C = 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, ORIGINAL = (3 * torch.randn(8, C, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = torch.arange(8) % C


def one(values):
    return torch.tensor(values, dtype=torch.float64)


def cross_entropy(z):
    return torch.nn.functional.cross_entropy(z, LABELS, reduction="none")


def npo_loss(z):
    log_ratio = -cross_entropy(z) + cross_entropy(ORIGINAL)
    return 2 / 4.0 * torch.nn.functional.softplus(4.0 * log_ratio)


def masked_loss(z):
    """The log-probability of the label, where the other logits stand still."""
    own = LABELS.unsqueeze(1)
    return -cross_entropy(LOGITS.scatter(1, own, z.gather(1, own)))


LOSSES = {
    "ascent": lambda z: -cross_entropy(z),
    "bounded_ascent": lambda z: -cross_entropy(z).clamp_max(math.log(C)),
    "npo": npo_loss,
    "renormalise": lambda z: (
        -(torch.softmax(ORIGINAL.scatter(1, LABELS.unsqueeze(1), -math.inf), 1) * torch.log_softmax(z, 1)).sum(1)
    ),
    "row_mask": masked_loss,
    "simnpo": lambda z: 2 / 2.5 * torch.nn.functional.softplus(-2.5 * cross_entropy(z)),
    "uniform_target": lambda z: -torch.log_softmax(z, 1).mean(1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_logit_gradient_is_that_of_its_loss(name):
    z = LOGITS.clone().requires_grad_()
    LOSSES[name](z).sum().backward()
    torch.testing.assert_close(OBJECTIVES[name](LOGITS, LABELS, ORIGINAL), z.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("log10_ratio", [-6, -4, -2, -0.5, 0])
def test_a_step_along_npo_raises_the_forget_loss(log10_ratio):
    original = torch.zeros(1, C, dtype=torch.float64)
    probability = 10.0**log10_ratio / C
    own = math.log(probability * (C - 1) / (1 - probability))
    logits = one([[own, 0, 0, 0]])
    labels = torch.tensor([0])
    step = -NPO()(logits, labels, original)
    z = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(z, labels).backward()
    assert float((z.grad * step).sum()) > 0


def test_renormalise_is_finite_on_a_sample_that_is_all_but_certain():
    confident = one([[math.log(1e12), -1.0, 0.0, -2.0]])  # p_y = 1 - 1e-12 or so
    gradient = OBJECTIVES["renormalise"](confident, torch.tensor([0]), confident)
    assert torch.isfinite(gradient).all()
    rest = torch.softmax(one([-1.0, 0.0, -2.0]), 0)
    torch.testing.assert_close(gradient[0, 1:], -rest, rtol=1e-9, atol=1e-11)


def test_bounded_ascent_leaves_alone_what_is_past_a_uniform_guess():
    logits = one([[0.0, 3.0, 0.0, 0.0]])
    assert not OBJECTIVES["bounded_ascent"](logits, torch.tensor([0]), logits).any()
