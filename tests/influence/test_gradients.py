import numpy as np
import oracle
import pytest
import torch
from architectures import named
from samples import tensors

from imu_ray.influence.gradients import (
    LayerIO,
    gradient_norms,
    gradient_sum,
    layer_inputs,
    output_gradient,
    squared_gradient_sum,
)
from imu_ray.influence.scores import influence_scores


@pytest.mark.parametrize("positions", [1, 2, 5, 6])
def test_sums_norms_and_scores_are_those_of_explicit_per_sample_gradients(positions):
    inputs, _, output_grads, _ = oracle.random_layer(7, positions, 3, 4)
    io, each = (
        LayerIO(torch.from_numpy(inputs), torch.from_numpy(output_grads)),
        oracle.layer_gradients(inputs, output_grads),
    )
    np.testing.assert_allclose(gradient_sum(io), each.sum(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(squared_gradient_sum(io), (each**2).sum(0), rtol=1e-13, atol=1e-13)
    grads = io.output_grads_BTC - io.output_grads_BTC.mean(1, keepdim=True)  # which cancel where the inputs are alike
    assert 0 <= squared_gradient_sum(LayerIO(io.inputs_BTD[:, [0] * positions], grads)).min() < 1e-25
    np.testing.assert_allclose(gradient_norms(io), np.linalg.norm(each, axis=(1, 2)), rtol=1e-13)
    np.testing.assert_allclose(
        influence_scores(io, torch.from_numpy(each[0])), -(each * each[0]).sum((1, 2)), rtol=1e-12, atol=1e-13
    )


def test_output_gradient_equals_autograd_of_the_cross_entropy():
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % 4
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(output_gradient(logits.detach(), labels), logits.grad, rtol=1e-12, atol=1e-14)


def test_output_gradient_keeps_its_digits_where_p_minus_one_rounds_to_zero():
    margin = 60.0  # p_y - 1 = -e^-60 is below the float64 spacing at 1
    gradient = output_gradient(torch.tensor([[margin, 0.0]]), torch.tensor([0]))
    expected = torch.exp(torch.tensor(-margin, dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.stack([-expected, expected]).unsqueeze(0), rtol=1e-12, atol=0)


def test_head_gradients_equal_autograd_through_the_whole_model():
    model = named("fc").double()
    inputs, labels = tensors(6, dtype=torch.float64)
    expected = oracle.per_sample_gradients(model, "fc", inputs, labels).sum(0)
    features = layer_inputs(model.body(inputs).detach(), has_bias=True)
    io = LayerIO(features.unsqueeze(1), output_gradient(model(inputs).detach(), labels).unsqueeze(1))
    total = gradient_sum(io)
    torch.testing.assert_close(torch.cat([total[:, :-1].reshape(-1), total[:, -1]]), expected, rtol=1e-11, atol=1e-13)
