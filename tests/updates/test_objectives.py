"""Every objective against its written-out formula in float64, and by gradcheck where a loss exists."""

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


def softmax(z):
    return [math.exp(v - max(z)) / sum(math.exp(u - max(z)) for u in z) for v in z]


def loss(z, y):
    return -math.log(softmax(z)[y])


FORMULAS = {
    "ascent": lambda z, y, z0: [(c == y) - p for c, p in enumerate(softmax(z))],
    "bounded_ascent": lambda z, y, z0: [((c == y) - p) * (loss(z, y) < math.log(C)) for c, p in enumerate(softmax(z))],
    "npo": lambda z, y, z0: [((c == y) - p) * npo_weight(z, y, z0) for c, p in enumerate(softmax(z))],
    "renormalise": lambda z, y, z0: [
        p - (0 if c == y else softmax(z0)[c] / (1 - softmax(z0)[y])) for c, p in enumerate(softmax(z))
    ],
    "row_mask": lambda z, y, z0: [(1 - p) if c == y else 0.0 for c, p in enumerate(softmax(z))],
    "uniform_target": lambda z, y, z0: [p - 1 / C for p in softmax(z)],
}


def npo_weight(z, y, z0, beta=4.0):
    ratio = (softmax(z)[y] / softmax(z0)[y]) ** beta
    return 2 * ratio / (1 + ratio)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_logit_gradient_is_the_written_out_formula(name):
    expected = one(
        [FORMULAS[name](z.tolist(), int(y), z0.tolist()) for z, y, z0 in zip(LOGITS, LABELS, ORIGINAL, strict=True)]
    )
    torch.testing.assert_close(OBJECTIVES[name](LOGITS, LABELS, ORIGINAL), expected, rtol=1e-11, atol=1e-13)


def cross_entropy(z):
    return torch.nn.functional.cross_entropy(z, LABELS, reduction="none")


def npo_loss(z):
    log_ratio = -cross_entropy(z) + cross_entropy(ORIGINAL)
    return 2 / 4.0 * torch.nn.functional.softplus(4.0 * log_ratio)


LOSSES = {
    "ascent": lambda z: -cross_entropy(z),
    "bounded_ascent": lambda z: -cross_entropy(z).clamp_max(math.log(C)),
    "npo": npo_loss,
    "renormalise": lambda z: (
        -(torch.softmax(ORIGINAL.scatter(1, LABELS.unsqueeze(1), -math.inf), 1) * torch.log_softmax(z, 1)).sum(1)
    ),
    "uniform_target": lambda z: -torch.log_softmax(z, 1).mean(1),
}


class Wrapped(torch.autograd.Function):
    """A loss whose backward is the objective's gradient, so that gradcheck compares the two."""

    @staticmethod
    def forward(context, z, name):
        context.save_for_backward(z)
        context.name = name
        return LOSSES[name](z).sum()

    @staticmethod
    def backward(context, upstream):
        (z,) = context.saved_tensors
        return upstream * OBJECTIVES[context.name](z, LABELS, ORIGINAL), None


@pytest.mark.parametrize("name", LOSSES)
def test_the_logit_gradient_is_that_of_its_loss(name):
    assert (cross_entropy(LOGITS) - math.log(C)).abs().min() > 1e-3, "away from the kink of bounded_ascent"
    assert torch.autograd.gradcheck(lambda z: Wrapped.apply(z, name), LOGITS.clone().requires_grad_())


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
    assert torch.equal(
        OBJECTIVES["bounded_ascent"](logits, torch.tensor([0]), logits), torch.zeros(1, C, dtype=torch.float64)
    )
