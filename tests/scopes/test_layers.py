"""Layers inside a network against plain autograd on the whole model, one sample at a time, in float64."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import oracle
import pyarrow as pa
import pytest
import torch
import torchvision
from architectures import Attending, Grouped, Residual, lively, named
from samples import Pairs, pairs, tensors
from torch import nn
from torch.nn import functional

from imu_ray.audits.accuracy import output_change
from imu_ray.audits.base import predict_shard
from imu_ray.config import InfluenceConfig, UnlearnConfig
from imu_ray.data import ViewSource, open_source
from imu_ray.distributed.score_job import score_batches
from imu_ray.errors import UnsupportedModelError
from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.influence.curvature.kronecker import FactorSums, sampled_labels, uniform_draws
from imu_ray.influence.direction import fit_directions
from imu_ray.inputs import open_part, usable_batch
from imu_ray.models.choice import choose_layers
from imu_ray.models.cut import Cut, Plan
from imu_ray.models.head import find_head
from imu_ray.scopes.base import FORGET_VIEWS
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import Head
from imu_ray.scopes.layers import Layers, looks_back, shard_gradient
from imu_ray.scopes.measure import sum_blocks
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.objectives import OBJECTIVES

ROWS, VIEWS, CPU = 21, 2, torch.device("cpu")
NETS = {
    "plain": (lambda: named("fc"), ["body.0", "body.5", "fc"]),
    "residual": (lambda: lively(Residual), "last:2"),
    "attention": (lambda: lively(Attending), ["qkv", "proj", "fc*", "head"]),
    "groups": (lambda: lively(Grouped), ["depthwise", "grouped", "pointwise", "fc"]),
}


def config(scope, **more):
    return UnlearnConfig().with_overrides({"ascent.scope": scope, **more})


@functools.cache
def case(net, views=0):
    """A net, its layers in scope, and its samples: tensors, labels, and features in uneven shards and blocks."""
    make, scope = NETS[net]
    model, samples, settings = make().double(), pairs(ROWS, dtype=torch.float64), config(scope)
    source = open_source(samples, settings.forget_set)
    task = ClassificationTask.for_model(model, {"forget": source}, settings.forget_set)
    part = open_part(model, task, source, settings)
    assert part.cut.trivial == (net == "plain"), "its first layer is in scope"
    inputs, labels = samples.inputs, samples.labels
    if views:
        source = ViewSource(source, views, "crop_flip", 0)
        inputs, labels = task.collate(source.read(0, source.num_rows)).inputs, labels.repeat_interleave(views)
    return SimpleNamespace(model=model, part=part, source=source, inputs=inputs, labels=labels)


def shards_of(case, block_rows=4, blocks=2, part=None, source=None):
    source = source or case.source
    shards = source.shards(block_rows, blocks)
    return [extract_features(source, shard, part or case.part, case.model, CPU)[0] for shard in shards]


def moved(part, seed=1):
    """The same layers a little further."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: matrix + 0.05 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        for name, matrix in part.parameters.items()
    }


def own_parameters(model, part):
    return {name: list(model.get_submodule(name).parameters()) for name in part.parameters}


def plain_gradient(model, part, loss):
    """By autograd on the whole model: of each layer as a matrix."""
    own = own_parameters(model, part)
    found = iter(torch.autograd.grad(loss, [parameter for parameters in own.values() for parameter in parameters]))
    return {
        name: torch.cat([next(found).reshape(len(part.parameters[name]), -1) for _ in parameters], dim=1)
        for name, parameters in own.items()
    }


def sample_gradients(case, model, labels):
    """Of each sample's cross-entropy, one at a time: by layer ``[B, C, D]``."""
    rows = [
        plain_gradient(model, case.part, functional.cross_entropy(model(x.unsqueeze(0)), y.reshape(1)))
        for x, y in zip(case.inputs, labels, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in case.part.parameters}


def close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def npo(outputs, labels, before):
    ratio = functional.cross_entropy(before, labels, reduction="none") - functional.cross_entropy(
        outputs, labels, reduction="none"
    )
    return 2 / 4.0 * functional.softplus(4.0 * ratio)


def renormalise(outputs, labels, before):
    wanted = torch.softmax(before.scatter(1, labels.unsqueeze(1), -math.inf), 1)
    return functional.cross_entropy(outputs, wanted, reduction="none")


LOSSES = {
    "ascent": lambda outputs, labels, _: -functional.cross_entropy(outputs, labels, reduction="none"),
    "npo": npo,
    "renormalise": renormalise,
}


@pytest.mark.parametrize("views", [0, VIEWS])
@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_gradients_of_an_objective_are_those_of_the_whole_model(net, objective, views):
    it, each = case(net, views), views or 1
    weights = np.random.default_rng(3).random(ROWS)
    weights[[2, 8, 9, 10, 11]] = 0  # of a whole block too
    of_rows, batch = np.repeat(weights, each), np.flatnonzero(weights)
    of_rows.flags.writeable = False  # as it comes from the object store
    here = it.part.changed(moved(it.part))
    model = here.apply(it.model)
    with torch.no_grad():
        before = it.model(it.inputs)
    losses = LOSSES[objective](model(it.inputs), it.labels, before)
    expected = plain_gradient(model, it.part, (torch.tensor(of_rows) * losses).sum() / of_rows.sum())

    shards, start, parts = shards_of(it), 0, []
    for shard in shards:
        part = of_rows[start : start + len(shard.ids)]
        parts.append(shard_gradient(shard, part, here, it.part, OBJECTIVES[objective]))
        start += len(shard.ids)
    found = {name: each.total / of_rows.sum() for name, each in merge_tree(parts).parts.items()}
    close(found, expected)

    sets = {FORGET_VIEWS: FeatureStore(shards)} if views else {}
    scope = it.part.scope({"forget": FeatureStore(shards_of(case(net))), **sets}, Workers())
    for pieces in (3, 100):
        found = scope.batch_gradient(moved(it.part), batch, weights, OBJECTIVES[objective], pieces)
        close(found, expected)


def test_gradients_at_the_original_parameters_take_their_own_outputs_as_the_original_ones():
    it = case("residual")
    (shard,), weights = shards_of(it, 4, 8), np.ones(ROWS)
    for objective in (OBJECTIVES["npo"], OBJECTIVES["renormalise"]):
        found, expected = (shard_gradient(shard, weights, it.part, part, objective).parts for part in (None, it.part))
        assert all(torch.equal(found[name].total, each.total) for name, each in expected.items())


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, "none", 1e-5), (torch.float32, "bfloat16", 0.05), (torch.bfloat16, "none", 0.05)],
)
def test_gradients_in_lower_precision_are_near_those_of_float64(dtype, autocast, tolerance):
    it = case("residual")
    model, settings = lively(Residual).to(dtype), config("last:2", **{"influence.autocast": autocast})
    source = open_source(pairs(ROWS), settings.forget_set)
    task = ClassificationTask.for_model(model, {"forget": source}, settings.forget_set)
    part = open_part(model, task, source, settings)
    shard = extract_features(source, source.shards(4, 8)[0], part, model, CPU, settings.influence)[0]
    sums = shard_gradient(shard, np.ones(ROWS), part, None, OBJECTIVES["ascent"]).parts
    scope = part.scope({"forget": FeatureStore([shard])}, Workers())
    means = scope.batch_gradient(part.parameters, np.arange(ROWS), np.ones(ROWS), OBJECTIVES["ascent"], 5)
    loss = -functional.cross_entropy(it.model(it.inputs), it.labels, reduction="sum")
    for name, expected in plain_gradient(it.model, it.part, loss).items():
        for found in (sums[name].total, means[name] * ROWS):
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("net", NETS)
def test_a_scope_measures_what_the_whole_model_gives(net):
    it = case(net)
    scope = it.part.scope({name: FeatureStore(shards_of(it)) for name in ("forget", "test")}, Workers())
    parameters = moved(it.part)
    record = scope.measure(parameters)
    with torch.no_grad():
        outputs = it.part.changed(parameters).apply(it.model)(it.inputs)
    assert record["forget.loss"] == pytest.approx(float(functional.cross_entropy(outputs, it.labels)), rel=1e-12)
    assert record["test.accuracy"] == float((outputs.argmax(1) == it.labels).double().mean())
    assert record["membership.auc"] == 0.5
    classes, (shard,) = np.unique(it.labels.numpy()), shards_of(it, 4, 8)
    classes.flags.writeable = False
    sums = sum_blocks([(shard, slice(0, ROWS))], it.part.outputs, it.part.task, classes, CPU)
    assert sums[len(it.part.task.metrics) :].sum() == ROWS
    assert scope.measure(parameters, ["forget"]) == {k: v for k, v in record.items() if k.startswith("forget.")}


def reduce_over(part, shards):
    def reduce(statistics):
        by_layer = dict.fromkeys(part.parameters, statistics)
        return merge_tree(part.statistics(shard, by_layer) for shard in shards).parts

    return reduce


def dense_direction(it, model, name, mean, damping):
    """The inverse of the damped Kronecker product, written out, of the mean gradient of a layer."""
    draws = uniform_draws([str(row) for row in range(len(it.labels))], it.part.seed)
    seen, layer = [], model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    outputs = model(it.inputs)
    hook.remove()
    loss = functional.cross_entropy(outputs, sampled_labels(outputs, draws), reduction="sum")
    (inputs, output) = seen[0]
    pull = torch.autograd.grad(loss, output)[0]
    if name == it.part.task.head:
        ones = torch.ones(len(inputs), 1, 1, dtype=torch.float64)
        rows = torch.cat([inputs.unsqueeze(1), ones], 2).detach().numpy()
        pair = oracle.kronecker_factors(rows, torch.softmax(outputs, 1).detach().unsqueeze(1).numpy())
        factors = [pair]
    else:
        factors = list(zip(*oracle.layer_factors(layer, inputs.detach(), pull.detach()), strict=True))
    solved = []
    for rows, (of_outputs, of_inputs) in zip(mean.chunk(len(factors)), factors, strict=True):
        dense = np.kron(of_outputs, of_inputs) + damping * np.eye(rows.numel())
        solved.append(torch.from_numpy(np.linalg.solve(dense, rows.flatten().numpy())).reshape(rows.shape))
    return torch.cat(solved)


@pytest.mark.parametrize("net", NETS)
def test_moments_and_influence_are_those_of_single_samples_and_add_up_over_layers(net):
    it, shards, damping = case(net), shards_of(case(net)), 0.01
    gradients = sample_gradients(it, it.model, it.labels)
    reduce = reduce_over(it.part, shards)
    moments = reduce(Moments.of)
    assert {each.count for each in moments.values()} == {ROWS}
    means = {name: each.mean(0) for name, each in gradients.items()}
    squares = {name: each.square().mean(0) for name, each in gradients.items()}
    close({name: each.mean_gradient_CD for name, each in moments.items()}, means)
    close({name: each.fisher_CD for name, each in moments.items()}, squares)

    expected = {
        "identity": means,
        "diagonal_fisher": {name: mean / (squares[name] + damping) for name, mean in means.items()},
        "kfac": {name: dense_direction(it, it.model, name, mean, damping) for name, mean in means.items()},
    }
    norms = sum(each.flatten(1).square().sum(1) for each in gradients.values()).sqrt()
    for curvature, directions in expected.items():
        settings = InfluenceConfig(curvature=curvature, damping=damping)
        found, figures = fit_directions(settings, list(directions), reduce, None, lambda _: 0.0)
        close(found, directions, 1e-9)
        assert set(figures["layers"]) == set(directions)
        scores = sum(-(each * directions[name]).flatten(1).sum(1) for name, each in gradients.items()).numpy()
        start = 0
        for shard in shards:
            table, rows = it.part.scores(shard, found), slice(start, start + len(shard.ids))
            start = rows.stop
            assert np.abs(table["influence"].to_numpy() - scores[rows]).max() <= 1e-9 * np.abs(scores).max()
            np.testing.assert_allclose(table["gradient_norm"], norms[rows], rtol=1e-10)
            np.testing.assert_allclose(it.part.norms(shard), norms[rows], rtol=1e-10)
            with torch.no_grad():
                losses = functional.cross_entropy(it.model(it.inputs[rows]), it.labels[rows], reduction="none")
            np.testing.assert_allclose(table["loss"], losses, rtol=1e-10)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("net", NETS)
def test_a_batch_is_its_own_reference_whatever_the_shards(net, blocks):
    it, damping = case(net), 0.01
    gradients = sample_gradients(it, it.model, it.labels)
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for rows in (slice(start, start + 4) for start in range(0, ROWS, 4)):
        for own in (each[rows] for each in gradients.values()):
            direction = own.mean(0) / (own.square().mean(0) + damping)
            expected[rows] -= (own * direction).flatten(1).sum(1)
    made = [score_batches(shard, it.part, InfluenceConfig(damping=damping)) for shard in shards_of(it, 4, blocks)]
    found = torch.from_numpy(np.concatenate([table["influence"].to_numpy() for table, _ in made]))
    close({"influence": found}, {"influence": expected}, 1e-9)
    assert [each["rows"] for _, figures in made for each in figures] == [4, 4, 4, 4, 4, 1]


def test_a_gradient_is_clipped_at_its_norm_over_all_layers():
    it, shards = case("attention"), shards_of(case("attention"))
    gradients = sample_gradients(it, it.model, it.labels)
    norms = sum(each.flatten(1).square().sum(1) for each in gradients.values()).sqrt()
    limit = float(norms.quantile(0.4))
    scale = (limit / norms).clamp_max(1).view(-1, 1, 1)
    found = reduce_over(it.part, shards)(functools.partial(Moments.of, clip=limit))
    close(
        {name: each.mean_gradient_CD for name, each in found.items()},
        {name: (scale * each).mean(0) for name, each in gradients.items()},
    )
    close(
        {name: each.fisher_CD for name, each in found.items()},
        {name: (scale * each).square().mean(0) for name, each in gradients.items()},
    )


def factors_of(it, shards):
    kinds = dict.fromkeys(it.part.parameters, FactorSums.of)
    return merge_tree(it.part.statistics(shard, kinds) for shard in shards).parts


def turned(shard):
    """The same samples in another order."""
    order = np.random.default_rng(4).permutation(ROWS)
    return FeatureShard(shard.features_nF[order], shard.labels_n[order], shard.ids.take(pa.array(order)), (9, 0, 12))


@pytest.mark.parametrize("net", NETS)
def test_factors_under_drawn_labels_depend_neither_on_cuts_nor_on_where_a_row_stands(net):
    it = case(net)
    whole = factors_of(it, shards_of(it, ROWS, 1))
    for shards in (shards_of(it, 1, 4), shards_of(it, 5, 1), [turned(*shards_of(it, ROWS, 1))]):
        for name, found in factors_of(it, shards).items():
            assert (found.count, found.positions) == (whole[name].count, whole[name].positions)
            for part in ("outputs_CC", "inputs_DD"):
                expected = getattr(whole[name], part)
                assert (getattr(found, part) - expected).abs().max() <= 1e-12 * expected.abs().max(), (name, part)


def test_drawn_labels_differ_with_the_seed_and_between_views_of_a_row():
    draws = uniform_draws([f"{row}#{view}" for row in range(30) for view in range(2)], 0)
    assert len(set(draws.tolist())) == 60
    assert not torch.isin(uniform_draws([f"{row}#0" for row in range(30)], 1), draws).any()


def test_samples_that_were_left_out_leave_empty_blocks_and_shards():
    it, inputs = case("residual"), tensors(ROWS, dtype=torch.float64)[0].clone()
    inputs[[1, 2, *range(4, 8), *range(8, 16)]] = torch.nan
    settings = config("last:2", **{"forget_set.on_bad_row": "skip"})
    source = open_source(Pairs(inputs, it.labels), settings.forget_set)
    part = dataclasses.replace(it.part, task=dataclasses.replace(it.part.task, config=settings.forget_set))
    shards = shards_of(it, 4, 2, part=part, source=source)
    assert [shard.block_sizes for shard in shards] == [(2, 0), (0, 0), (4, 1)]
    by_layer = {name: (FactorSums.of if name == "conv" else Moments.of) for name in part.parameters}
    found = merge_tree(part.statistics(shard, by_layer) for shard in shards).parts
    assert found["conv"].count == found["fc"].count == 7
    weights = [np.ones(len(shard.ids)) for shard in shards]
    sums = merge_tree(
        shard_gradient(shard, each, part, None, OBJECTIVES["ascent"])
        for shard, each in zip(shards, weights, strict=True)
    )
    kept = ~torch.isnan(inputs).flatten(1).any(1)
    loss = -functional.cross_entropy(it.model(it.inputs[kept]), it.labels[kept], reduction="sum")
    close({name: each.total for name, each in sums.parts.items()}, plain_gradient(it.model, part, loss))
    assert [len(part.scores(shard, part.parameters)) for shard in shards] == [2, 0, 5]
    head = Head.of(it.model, part.task)
    for before, of in ((part, shards), (head, shards_of(it, 4, 2, part=head, source=source))):
        assert [len(output_change(shard, before, before)) for shard in of] == [2, 0, 5]
        assert [len(predict_shard(shard, before).labels) for shard in of] == [2, 0, 5]
        moments = merge_tree(before.statistics(shard, dict.fromkeys(before.parameters, Moments.of)) for shard in of)
        assert moments.parts["fc"].count == 7


def test_sums_do_not_depend_on_how_many_blocks_a_shard_has():
    it, weights = case("residual"), np.random.default_rng(0).random(ROWS)
    weights[4:9] = 0

    def bits(blocks):
        shards = shards_of(it, 2, blocks)
        parts, start = [], 0
        for shard in shards:
            of_shard = weights[start : start + len(shard.ids)]
            parts.append(shard_gradient(shard, of_shard, it.part, None, OBJECTIVES["ascent"]))
            start += len(shard.ids)
        gradient = {name: each.total for name, each in merge_tree(parts).parts.items()}
        return {**gradient, **{name + " factor": each.inputs_DD for name, each in factors_of(it, shards).items()}}

    expected = bits(1)
    for blocks in (2, 4, 16):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in bits(blocks).items())


def test_a_cut_at_the_input_gives_the_same_numbers():
    for net in ("residual", "attention", "groups"):
        it = case(net)
        plan = Plan(tuple(it.part.parameters), (tuple(it.inputs.shape[1:]),), torch.float64, reason="by hand")
        whole = dataclasses.replace(it.part, cut=Cut(it.model, plan))
        assert whole.cut.trivial
        found = []
        for part in (it.part, whole):
            shards = shards_of(it, 4, 8, part=part)
            factors = factors_of(SimpleNamespace(part=part), shards)
            gradient = shard_gradient(shards[0], np.ones(ROWS), part, None, OBJECTIVES["ascent"]).parts
            scores = part.scores(shards[0], moved(part))
            found.append(
                {name: each.total for name, each in gradient.items()}
                | {f"{name} factor": each.outputs_CC for name, each in factors.items()}
                | {"influence": torch.tensor(scores["influence"].to_numpy())}
            )
        close(*found, 1e-12)


MODELS = {
    "resnet": (lambda: zoo("resnet18"), ["layer4", "fc"]),
    "resnet, last": (lambda: zoo("resnet18"), "last:3"),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7), ["*_layer_1.mlp", "heads"]),
    "mobilenet": (lambda: zoo("mobilenet_v3_small"), ["features.1*", "classifier"]),
}  # fmt: skip


def zoo(name):
    return torchvision.models.get_model(name, weights=None, num_classes=7)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_scope_moves(name):
    make, scope = MODELS[name]
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(4, 3, 32, 32)
    task = ClassificationTask(UnlearnConfig().forget_set, find_head(model, images), 7)
    names = choose_layers(model, images, scope, task.head)
    part = Layers.of_names(model, task, names, images, config(scope))
    original = {key: value.clone() for key, value in model.state_dict().items()}
    here = part.changed(moved(part))
    changed = here.apply(model.train()).state_dict()
    own = {f"{layer}.{key}" for layer in names for key, _ in model.get_submodule(layer).named_parameters()}
    assert changed.keys() == original.keys()
    assert {key for key, value in original.items() if not torch.equal(changed[key], value)} == own
    assert all(torch.equal(model.state_dict()[key], value) for key, value in original.items()), "the caller's"

    given_back = part.of_model(here.apply(model)).parameters
    for layer, matrix in here.parameters.items():
        assert torch.equal(given_back[layer], matrix.float().double())
    again = part.apply(here.apply(model)).state_dict()
    assert all(torch.equal(again[key], value) for key, value in original.items()), "there and back"


def test_a_model_is_traced_with_the_first_samples_that_can_be_used():
    inputs, labels = tensors(ROWS, dtype=torch.float64)
    inputs[:12] = torch.nan
    settings = config("last:2", **{"forget_set.on_bad_row": "skip"})
    source = open_source(Pairs(inputs, labels), settings.forget_set)
    model = lively(Residual).double()
    task = ClassificationTask.for_model(model, {"forget": source}, settings.forget_set)
    assert usable_batch(task, source, 8).ids == ["12", "13", "14", "15"]
    assert not open_part(model, task, source, settings).cut.trivial


class Noisy(nn.Module):
    """Drops features in eval mode too, behind the layers that may move."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(36, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(nn.functional.dropout(torch.relu(self.body(x.flatten(1))), training=True))


def test_a_model_that_is_random_behind_the_cut_is_refused():
    samples, settings = pairs(ROWS), config("all")
    source, model = open_source(samples, settings.forget_set), Noisy().eval()
    task = ClassificationTask(settings.forget_set, "head", 5)
    names = ["body", "head"]
    part = Layers.of_names(model, task, names, samples.inputs[:4], settings)
    with pytest.raises(UnsupportedModelError, match="when the same batch is run again"):
        extract_features(source, source.shards(8, 4)[0], part, model, CPU)


def test_the_objectives_that_need_the_outputs_before_unlearning_are_told_from_the_others():
    assert {name for name, objective in OBJECTIVES.items() if looks_back(objective)} == {"npo", "renormalise"}
