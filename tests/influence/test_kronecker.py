"""K-FAC of layers inside a network, in float64: against written-out loops, dense algebra and curvlinops."""

import copy
import pickle

import numpy as np
import oracle
import pytest
import torch
from scipy.linalg import block_diag
from torch import nn

from imu_ray.errors import NonFiniteError
from imu_ray.influence import layer_io as layer_io_module
from imu_ray.influence.curvature.base import Damping, merge_tree
from imu_ray.influence.curvature.ggn import damped_inverse, scaled_inverse
from imu_ray.influence.curvature.kronecker import (
    DampedKronecker,
    Eigenbasis,
    FactorSums,
    factor_bytes,
    sampled_labels,
    solve_bytes,
    uniform_draws,
)
from imu_ray.influence.layer_io import kind_of, matrix_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
DAMPING = Damping(0.01, relative=True)


@pytest.fixture(params=oracle.LAYERS)
def seen(request):
    return oracle.called_layer(request.param)


def test_factors_are_those_of_a_loop_over_samples_and_positions(seen):
    sums = FactorSums.of_layer(*seen)
    outputs, inputs = oracle.layer_factors(*seen)
    np.testing.assert_allclose(sums.outputs_CC.reshape(outputs.shape) / sums.count, outputs, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(sums.inputs_DD.reshape(inputs.shape) / sums.positions, inputs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_damped_inverse_is_that_of_the_dense_kronecker_product(seen, zeros):
    if zeros:  # an input and an output that are 0 in every sample
        layer, inputs, grads = seen
        channel = -1 if isinstance(layer, nn.Linear) else 1
        seen = layer, inputs.index_fill(channel, torch.tensor(0), 0), grads.index_fill(channel, torch.tensor(1), 0)
    dense = block_diag(*(np.kron(*pair) for pair in zip(*oracle.layer_factors(*seen), strict=True)))
    gradient = torch.randn_like(matrix_of(seen[0]))
    fitted = pickle.loads(pickle.dumps(DampedKronecker.of(FactorSums.of_layer(*seen), DAMPING)))
    damped = dense + 0.01 * np.diag(dense).mean() * np.eye(len(dense))
    expected = np.linalg.solve(damped, gradient.flatten().numpy()).reshape(gradient.shape)
    assert np.abs(fitted.apply_inverse(gradient).numpy() - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("diagonal", [[0, 2, 0, 3], [0, 0]])
def test_what_is_zero_in_every_sample_is_left_out_of_the_solve(diagonal):
    diagonal = torch.tensor(diagonal, dtype=torch.float64)
    found, used = Eigenbasis.of(diagonal.diag(), 2), diagonal.nonzero().squeeze(1)
    assert torch.equal(found.places_K, used)
    assert found.basis_KK.shape == (len(used), len(used))
    assert torch.equal(found.eigenvalues_K, diagonal[used] / 2)


def test_how_samples_are_cut_into_blocks_and_pieces_changes_nothing(seen, monkeypatch):
    layer, inputs, grads = seen
    whole = FactorSums.of_layer(layer, inputs, grads)
    for rows, piece in ((1, 2**24), (3, 2**24), (7, 1)):
        monkeypatch.setattr(layer_io_module, "PIECE", piece)
        blocks = zip(inputs.split(rows), grads.split(rows), strict=True)
        parts = merge_tree(FactorSums.of_layer(layer, *block) for block in blocks)
        assert (parts.count, parts.positions) == (whole.count, whole.positions)
        for found, expected in ((parts.inputs_DD, whole.inputs_DD), (parts.outputs_CC, whole.outputs_CC)):
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_float32_products_are_added_in_float64():
    layer, inputs, grads = oracle.called_layer("groups")
    found = FactorSums.of_layer(layer, inputs.float(), grads.float())
    expected = FactorSums.of_layer(layer, inputs, grads)
    assert found.inputs_DD.dtype == found.outputs_CC.dtype == torch.float64
    assert (found.inputs_DD - expected.inputs_DD).abs().max() <= 1e-5 * expected.inputs_DD.abs().max()


class Tokens(nn.Module):
    """Convolutions, a linear layer at several positions, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, (2, 3), stride=2, dilation=(1, 2), bias=False)
        self.mixer = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        tokens = self.second(self.first(x).tanh()).tanh().flatten(2).transpose(1, 2)
        return self.head(self.mixer(tokens).tanh().mean(1))


@pytest.fixture(scope="module")
def network():
    """A net, samples, labels drawn from its predictions, and what each of its layers saw."""
    torch.manual_seed(0)
    model, inputs, seen = Tokens().double(), torch.randn(23, 2, 6, 9, dtype=torch.float64), {}
    layers = {name: layer for name, layer in model.named_children() if kind_of(layer)}
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, output, name=name: seen.update({name: (layer, args[0], output)})
        )
        for name, layer in layers.items()
    ]
    logits = model(inputs)
    for hook in hooks:
        hook.remove()
    labels = sampled_labels(logits, uniform_draws(list(map(str, range(len(inputs)))), 5))
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    grads = torch.autograd.grad(loss, [output for *_, output in seen.values()])
    seen = {name: (layer, x.detach(), g) for (name, (layer, x, _)), g in zip(seen.items(), grads, strict=True)}
    return model, inputs, labels, seen


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of what curvlinops imports
def test_products_equal_those_of_curvlinops(network):
    """Its empirical Fisher with our drawn labels; under a loss that is a sum it adds over samples where we average."""
    from curvlinops import KFACLinearOperator

    model, inputs, labels, seen = network
    model = copy.deepcopy(model)
    operator = KFACLinearOperator(
        model, nn.CrossEntropyLoss(reduction="sum"), list(model.parameters()), [(inputs, labels)],
        fisher_type="empirical", kfac_approx="expand", separate_weight_and_bias=False,
    )  # fmt: skip
    vectors = [torch.randn_like(parameter) for parameter in model.parameters()]
    products = iter(operator @ vectors)
    given = iter(vectors)
    for layer, *rest in seen.values():
        vector, expected = (
            torch.cat([next(parts).reshape(len(layer.weight), -1) for _ in layer.parameters()], dim=1)
            for parts in (given, products)
        )
        sums = FactorSums.of_layer(layer, *rest)
        found = sums.means.outputs_CC @ vector @ sums.means.inputs_DD
        torch.testing.assert_close(found, expected.detach() / len(inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_drawn_label_is_the_first_class_whose_cumulated_probability_exceeds_the_draw(shape):
    logits = torch.tensor([7.0, 7.0, -torch.inf, 7.0, 7.0]).expand(*shape, 5)  # a quarter each, exactly
    draws = {0.0: 0, 0.2499: 0, 0.25: 1, 0.4999: 1, 0.5: 3, 0.75: 4, 1 - 2.0**-53: 4}
    for draw, label in draws.items():
        found = sampled_labels(logits, torch.full(shape, draw, dtype=torch.float64))
        assert found.shape == shape
        assert (found == label).all()


def test_drawn_labels_follow_the_probabilities():
    p = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
    draws = uniform_draws(list(map(str, range(50_000))), 3)
    counts = torch.bincount(sampled_labels(p.log().expand(50_000, 5), draws), minlength=5)
    assert float(((counts - 50_000 * p) ** 2 / (50_000 * p)).sum()) <= 18.5, "0.1 % of the chi-square with 4 degrees"


def test_draws_depend_on_seed_and_sample_alone():
    ids = [f"{row}#{view}" for row in range(40) for view in range(3)]
    draws = uniform_draws(ids, 7)
    assert draws.dtype == torch.float64
    assert len(set(draws.tolist())) == 120
    assert torch.equal(uniform_draws(ids[50:60], 7), draws[50:60])
    assert not torch.isin(uniform_draws(ids, 8), draws).any()


def test_an_inverse_beside_other_layers_keeps_its_scale():
    blocks = torch.randn(3, 4, 9, dtype=torch.float64)
    blocks = blocks @ blocks.mT
    mean = blocks.diagonal(dim1=1, dim2=2).mean()
    expected = torch.linalg.inv(blocks + 0.01 * mean * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(damped_inverse(blocks, 0.01), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(damped_inverse(5 * blocks, 0.01), expected / 5, rtol=1e-10, atol=0)
    scaled = scaled_inverse(blocks, 0.01)
    torch.testing.assert_close(scaled, expected / expected.diagonal(dim1=1, dim2=2).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(damped_inverse(0 * blocks, 0.5)[0], 2 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factors_that_are_not_finite_are_refused(value):
    layer, inputs, grads = oracle.called_layer("groups")
    inputs[3, 2, 1, 1] = value
    with pytest.raises(NonFiniteError, match="Kronecker factor of size 19 is NaN or infinite"):
        DampedKronecker.of(FactorSums.of_layer(layer, inputs, grads), DAMPING)


def test_the_memory_named_is_that_of_the_factors_and_of_their_copies():
    layer, inputs, grads = oracle.called_layer("groups")
    sums, (rows, width) = FactorSums.of_layer(layer, inputs, grads), matrix_of(layer).shape
    bytes_of = [part.numel() * 8 for part in (sums.outputs_CC, sums.inputs_DD)]
    assert factor_bytes(rows, width, layer.groups) == sum(bytes_of)
    assert solve_bytes(rows, width, layer.groups) == 5 * (sum(bytes_of) + 8 * rows * width)
