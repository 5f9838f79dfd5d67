"""Soft labels, several labels and class weights in every scope, against plain autograd one sample at a time."""

import functools
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from architectures import Residual, lively, named
from models.test_head import HEADS, PLACES
from samples import Labelled, labels_of, tensors
from scores import scored
from sklearn.metrics import f1_score
from torch.nn import functional

from imu_ray.audits.accuracy import divergence
from imu_ray.config import InfluenceConfig
from imu_ray.influence import targets
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.curvature.kronecker import FactorSums, sampled_labels, uniform_draws
from imu_ray.influence.direction import fit_directions
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.workers import Workers
from imu_ray.updates.objectives import OBJECTIVES

ROWS, CLASSES = 21, 5
WEIGHTS = (0.5, 3.0, 1.0, 0.125, 2.0)
KINDS = [("class", WEIGHTS), *((kind, weights) for kind in ("soft", "multi_label") for weights in (None, WEIGHTS))]


def samples_of(kind):
    return Labelled(tensors(ROWS, dtype=torch.float64)[0], labels_of(kind, ROWS))


def score(model, kind, weights, samples=None, **settings):
    settings = {"forget_set__target": kind, "forget_set__class_weights": weights, **settings}
    return scored(model, samples or samples_of(kind), **settings)


@pytest.mark.parametrize("scope", ["auto", "last:1"])
@pytest.mark.parametrize(("kind", "weights"), KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_scores_of_a_head_are_those_of_plain_autograd(head, kind, weights, scope):
    model, samples, loss = HEADS[head]().double(), samples_of(kind), oracle.target_loss(kind, weights)
    found = score(model, kind, weights, ascent__scope=scope)
    gradients = oracle.target_gradients(model, PLACES[head], samples.inputs, samples.labels, loss)
    expected = oracle.damped_influence(gradients)
    assert np.abs(found.influence - expected).max() <= 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(found.gradient_norm, gradients.flatten(1).norm(dim=1), rtol=1e-10)
    with torch.no_grad():
        outputs = model(samples.inputs)
    losses = [float(loss(z.unsqueeze(0), y.unsqueeze(0))) for z, y in zip(outputs, samples.labels, strict=True)]
    np.testing.assert_allclose(found.loss, losses, rtol=1e-10)


def test_one_hot_soft_labels_score_as_hard_ones_and_weights_of_ones_as_none():
    model, (inputs, labels) = named("fc").double(), tensors(ROWS, dtype=torch.float64)
    plain = scored(model, Labelled(inputs, labels))
    soft = score(model, "soft", None, Labelled(inputs, functional.one_hot(labels, CLASSES)))
    ones = score(model, "class", (1,) * CLASSES, Labelled(inputs, labels))
    for other in (soft, ones):
        for name in ("loss", "influence", "gradient_norm"):
            np.testing.assert_array_equal(getattr(other, name), getattr(plain, name))
    assert np.isnan(soft.label).all(), "they are of no class"
    assert (ones.label == plain.label).all()


@functools.cache
def deep(kind, weights):
    """Layers of a residual net, and each sample's gradients in them by autograd."""
    samples, model = samples_of(kind), lively(Residual).double()
    it = score(model, kind, weights, ascent__scope="last:2", influence__curvature="identity")
    loss = oracle.target_loss(kind, weights)
    gradients = {
        name: oracle.target_gradients(model, name, samples.inputs, samples.labels, loss) for name in it.part.parameters
    }
    return SimpleNamespace(**vars(it), model=model, samples=samples, loss_of=loss, gradients=gradients)


@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_kfac_of_layers_is_that_of_labels_drawn_from_the_model(kind, weights):
    it = deep(kind, weights)
    reduce = lambda statistics: (
        merge_tree(
            it.part.statistics(shard, dict.fromkeys(it.part.parameters, statistics)) for shard in it.shards
        ).parts
    )
    inner, head = it.part.parameters
    target = targets.target_of(it.samples.labels, kind, weights)
    ids = [str(row) for row in range(ROWS)]
    layer, caught = it.model.get_submodule(inner), []
    hook = layer.register_forward_hook(lambda _, args, output: caught.append((args[0], output)))
    outputs = it.model(it.samples.inputs)
    hook.remove()
    # The loss of each sample's drawn label, times the root of its scale; of several labels of each by itself.
    if kind == "multi_label":
        drawn = uniform_draws(ids, 0, CLASSES) < torch.sigmoid(outputs.detach())
        each = functional.binary_cross_entropy_with_logits(outputs, drawn.double(), reduction="none")
        losses = (each * target.sum(-1).sqrt()).sum(1)
    else:
        drawn = sampled_labels(outputs, uniform_draws(ids, 0))
        losses = functional.cross_entropy(outputs, drawn, reduction="none") * target.sum(1).sqrt()
    inputs, output = caught[0]
    pull = torch.autograd.grad(losses.sum(), output)[0]
    (of_outputs,), (of_inputs,) = oracle.layer_factors(layer, inputs.detach(), pull)
    found = reduce(FactorSums.of)
    means = found[inner].means
    np.testing.assert_allclose(means.outputs_CC, of_outputs, atol=1e-11 * np.abs(of_outputs).max())
    np.testing.assert_allclose(means.inputs_DD, of_inputs, atol=1e-11 * np.abs(of_inputs).max())
    exact = oracle.logit_hessians(outputs.detach(), it.samples.labels, it.loss_of).mean(0)
    np.testing.assert_allclose(found[head].means.outputs_CC, exact, atol=1e-11)


@pytest.mark.parametrize("curvature", ["identity", "diagonal_fisher"])
@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_influence_adds_up_over_layers(kind, weights, curvature):
    it = deep(kind, weights)
    reduce = lambda statistics: (
        merge_tree(
            it.part.statistics(shard, dict.fromkeys(it.part.parameters, statistics)) for shard in it.shards
        ).parts
    )
    directions, _ = fit_directions(
        InfluenceConfig(curvature=curvature), list(it.gradients), reduce, None, lambda _: 1.0
    )
    found = np.concatenate([it.part.scores(shard, directions)["influence"].to_numpy() for shard in it.shards])
    expected = 0
    for each in it.gradients.values():
        divisor = each.square().mean(0) + 0.01 if curvature == "diagonal_fisher" else 1.0
        expected = expected - (each * (each.mean(0) / divisor)).flatten(1).sum(1).numpy()
    assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("scope", ["auto", "last:2"])
@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_the_gradient_of_an_ascent_is_that_of_plain_autograd(kind, weights, scope):
    samples, loss = samples_of(kind), oracle.target_loss(kind, weights)
    model = lively(Residual).double()
    it = score(model, kind, weights, ascent__scope=scope)
    share = np.random.default_rng(1).random(ROWS)
    share[[2, 8, 9, 10, 11]] = 0
    of = it.part.scope({"forget": FeatureStore(it.shards)}, Workers())
    for pieces in (3, 100):
        found = of.batch_gradient(it.part.parameters, np.flatnonzero(share), share, OBJECTIVES["ascent"], pieces)
        for name, matrix in found.items():
            gradients = oracle.target_gradients(model, name, samples.inputs, samples.labels, loss)
            expected = -(torch.from_numpy(share / share.sum()).view(-1, 1, 1) * gradients).sum(0)
            assert (matrix - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("scope", ["auto", "last:2"])
@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_a_check_measures_what_the_whole_model_gives(kind, weights, scope):
    samples, loss, model = samples_of(kind), oracle.target_loss(kind, weights), lively(Residual).double()
    it = score(model, kind, weights, ascent__scope=scope)
    of = it.part.scope(dict.fromkeys(("forget", "test"), FeatureStore(it.shards)), Workers())
    record = of.measure(of.parameters())
    with torch.no_grad():
        outputs = model(samples.inputs)
    losses = [float(loss(z.unsqueeze(0), y.unsqueeze(0))) for z, y in zip(outputs, samples.labels, strict=True)]
    assert record["forget.loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert record["membership.auc"] == 0.5
    labels = samples.labels
    if kind == "multi_label":
        predicted = outputs > 0
        assert record["forget.label_accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
        expected = f1_score(labels.numpy(), predicted.numpy(), average="samples", zero_division=1.0)
        assert record["forget.f1"] == pytest.approx(expected)
        assert "forget.accuracy" not in record
    else:
        own = labels if kind == "class" else labels.argmax(1)
        assert record["forget.accuracy"] == float((outputs.argmax(1) == own).double().mean())


def test_the_divergence_of_several_labels_is_that_of_each_by_itself():
    it = score(named("fc").double(), "multi_label", None)
    name, matrix = next(iter(it.part.parameters.items()))
    other = it.part.changed({name: matrix + 0.3 * torch.randn(matrix.shape, dtype=torch.float64)})
    (shard, *_), rows = it.shards, slice(0, 8)
    found = divergence(shard, shard, it.part, other)
    p, q = (torch.sigmoid(part.outputs(shard, rows)[0]).numpy() for part in (it.part, other))
    bernoulli = lambda a, b: a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    middle = (p + q) / 2
    np.testing.assert_allclose(found[:, 0], bernoulli(q, p).mean(1), rtol=1e-9)
    np.testing.assert_allclose(found[:, 1], ((p > 0.5) == (q > 0.5)).mean(1))
    js = (bernoulli(p, middle) + bernoulli(q, middle)) / 2
    np.testing.assert_allclose(found[:, 2], js.mean(1), rtol=1e-9)


def test_empty_blocks_of_samples_without_one_class_have_outputs_of_no_row():
    it = score(lively(Residual).double(), "soft", None, ascent__scope="last:2")
    outputs, labels = it.part.outputs(it.shards[0], slice(3, 3))
    assert (outputs.shape, labels.shape, labels.dtype) == ((0, CLASSES), (0, CLASSES), torch.float64)
