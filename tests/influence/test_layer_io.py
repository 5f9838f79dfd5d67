"""Layers inside a network: what they saw, and their factors, against loops over samples and positions; float64."""

import numpy as np
import oracle
import pytest
import torch

from imu_ray.influence import layer_io as module
from imu_ray.influence.layer_io import directional_scores, layer_io, matrix_of, run_layer, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(params=oracle.LAYERS)
def seen(request):
    return oracle.called_layer(request.param)


def test_what_a_layer_saw_is_what_indexing_finds(seen):
    io = layer_io(*seen)
    groups = getattr(seen[0], "groups", 1)
    for found, expected in zip((io.inputs_BTD, io.output_grads_BTC), oracle.layer_positions(*seen), strict=True):
        assert found.ndim == (4 if groups > 1 else 3)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_rows_and_gradients_of_positions_make_the_gradients_of_autograd(seen):
    io = layer_io(*seen)
    gradients = (io.output_grads_BTC.mT @ io.inputs_BTD).reshape(
        -1, 7, *io.output_grads_BTC.shape[-1:], io.inputs_BTD.shape[-1]
    )
    expected = oracle.layer_sample_gradients(*seen)
    torch.testing.assert_close(gradients.transpose(0, 1).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_directional_scores_are_products_with_the_gradients_of_autograd(seen):
    direction = torch.randn_like(matrix_of(seen[0]))
    expected = -(oracle.layer_sample_gradients(*seen) * direction).sum((1, 2))
    torch.testing.assert_close(directional_scores(*seen, direction), expected, rtol=1e-12, atol=1e-12)


def test_a_matrix_holds_the_layers_parameters_and_gives_them_back(seen):
    layer, inputs, _ = seen
    matrix = matrix_of(layer)
    state = layer.state_dict()
    parts = weights_of(layer, matrix)
    assert list(parts) == list(state)
    assert all(torch.equal(parts[name], state[name]) for name in state)
    # The last bit depends on how memory is aligned: a transposed weight is multiplied from a part of the matrix.
    torch.testing.assert_close(run_layer(layer, inputs, matrix), layer(inputs), rtol=1e-14, atol=1e-14)
    changed = {name: part + 1 for name, part in parts.items()}
    expected = torch.func.functional_call(layer, changed, inputs)
    torch.testing.assert_close(run_layer(layer, inputs, matrix + 1), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, matrix_of(layer)), "a copy"


def test_half_precision_is_raised_and_float32_is_kept():
    layer, inputs, grads = oracle.called_layer("groups")
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        io = layer_io(layer, inputs.to(given), grads.to(given))
        assert io.inputs_BTD.dtype == io.output_grads_BTC.dtype == expected
    assert directional_scores(layer, inputs.float(), grads.float(), matrix_of(layer)).dtype == torch.float64


def test_pieces_hold_few_samples_and_lose_none(seen, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1)
    parts = list(module.pieces(*seen))
    assert [part.inputs_BTD.shape[-3] for part in parts] == [1] * 7
    assert torch.equal(torch.cat([part.inputs_BTD for part in parts], dim=-3), layer_io(*seen).inputs_BTD)


def test_a_transposed_weight_is_a_layer_only_of_the_very_kind():
    layer, *_ = oracle.called_layer("transposed linear over tokens")
    assert module.kind_of(layer) is type(layer)
    assert [module.kind_of(other) for other in (torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2))] == [
        torch.nn.Linear,
        None,
    ]


@pytest.mark.parametrize("grams", [0, 1e9])
@pytest.mark.parametrize("numbers", [1, 150, 2**18])
def test_scores_and_norms_are_those_of_the_gradients_of_autograd_either_way(seen, grams, numbers, monkeypatch):
    monkeypatch.setattr(module, "GRAMS", grams)
    monkeypatch.setattr(module, "GRADIENTS", numbers)
    direction, expected = torch.randn_like(matrix_of(seen[0])), oracle.layer_sample_gradients(*seen)
    influence, squares = module.layer_scores(*seen, direction)
    torch.testing.assert_close(influence, -(expected * direction).sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares, expected.square().sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.squared_gradient_norms(*seen), squares, rtol=1e-12, atol=1e-12)
    found = torch.cat([each.clone() for each in module.sample_gradients(*seen)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def by_position(layer, output_grads):
    """A view ``[B, T, C]``."""
    if hasattr(layer, "kernel_size"):
        return output_grads.flatten(2).mT
    return output_grads.view(len(output_grads), -1, output_grads.shape[-1])


@pytest.mark.parametrize("numbers", [1, 2**18])
def test_samples_end_where_they_have_no_more_gradients_and_a_sample_may_have_none(seen, numbers, monkeypatch):
    monkeypatch.setattr(module, "GRAMS", 0)
    monkeypatch.setattr(module, "GRADIENTS", numbers)
    layer, _, grads = seen
    for sample, pull in enumerate(by_position(layer, grads)):
        pull[(sample + 4) % 7 :] = 0.0
    grads[2].clamp_(max=0)  # as before a rectifier: the largest is 0
    direction, expected = torch.randn_like(matrix_of(layer)), oracle.layer_sample_gradients(*seen)
    influence, squares = module.layer_scores(*seen, direction)
    torch.testing.assert_close(influence, -(expected * direction).sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(squares, expected.square().sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert influence[3] == squares[3] == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_last_gradient_that_is_not_finite_shows(seen, wrong, monkeypatch):
    monkeypatch.setattr(module, "GRAMS", 0)
    monkeypatch.setattr(module, "GRADIENTS", 1)
    layer, _, grads = seen
    by_position(layer, grads)[3, -1] = wrong
    for found in module.layer_scores(*seen, torch.ones_like(matrix_of(layer))):
        assert found.isfinite().tolist() == [True] * 3 + [False] + [True] * 3
