"""Token sequences of uneven lengths against plain autograd on each row by itself, in float64."""

import functools
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from architectures import Reader, Untraced
from figures import check_metrics
from oracle import layer_factors
from torch.nn import functional

import imu_ray
from imu_ray.audits.base import predict_shard
from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.errors import ConfigError, ForgetSetError, UnsupportedModelError
from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.influence.curvature.kronecker import FactorSums, sampled_labels, uniform_draws
from imu_ray.influence.projection import position_slices
from imu_ray.inputs import open_part
from imu_ray.models.choice import choose_layers
from imu_ray.recipes import resolve_settings
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.layers import LayersScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import OUTPUTS, rows_at_once
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.objectives import OBJECTIVES

VOCABULARY, CPU = 11, torch.device("cpu")
SCOPE = ("proj", "mlp.2", "out")


def rows_of(count=9, seed=0, most=9):
    random = np.random.default_rng(seed)
    tokens = [random.integers(0, VOCABULARY, random.integers(3, most + 1)).tolist() for _ in range(count)]
    tokens[0] = tokens[0] + [1] * (most - len(tokens[0]))
    labels = [[-100, -100, *row[2:]] for row in tokens]  # the first two are a prompt
    return pa.table({"id": [f"r{i}" for i in range(count)], "tokens": tokens, "answer": labels})


def made(net):
    torch.manual_seed(0)
    return net().double().eval()


class Case:
    """A net, its layers in scope, and the features of the rows."""

    def __init__(self, net=Reader, block_rows=4, answers=True, **settings):
        answer = {"forget_set.token_labels_column": "answer"} if answers else {}
        self.config = UnlearnConfig().with_overrides({"ascent.scope": SCOPE, **answer, **settings}).forget_set
        self.table, self.model = rows_of(), made(net)
        source = open_source(self.table, self.config, fields=SequenceTask.fields(self.config))
        task = SequenceTask.for_model(self.model, {"forget": source}, self.config)
        self.part = open_part(self.model, task, source, UnlearnConfig().with_overrides({"ascent.scope": SCOPE}))
        shards = source.shards(block_rows, 1)
        self.shards = [extract_features(source, shard, self.part, self.model, CPU)[0] for shard in shards]
        self.labels = self.table["answer" if answers else "tokens"].to_pylist()

    def loss(self, row, model=None):
        """Mean cross-entropy of the labelled tokens of one row, without padding."""
        return self.losses(row, model).mean()

    def losses(self, row, model=None):
        """Cross-entropy of each labelled token of one row."""
        tokens, labels = (torch.tensor(column[row]) for column in (self.table["tokens"].to_pylist(), self.labels))
        output = (model or self.model)(tokens[None, :-1])
        each = functional.cross_entropy(getattr(output, "logits", output)[0], labels[1:], reduction="none")
        return each[labels[1:] != -100]

    def gradients(self):
        """Of every row: by layer ``[B, C, D]``."""
        found = {name: [] for name in SCOPE}
        for row in range(len(self.labels)):
            for name in SCOPE:
                own = list(self.model.get_submodule(name).parameters())
                grads = torch.autograd.grad(self.loss(row), own)
                found[name].append(torch.cat([grad.reshape(len(own[0]), -1) for grad in grads], 1))
        return {name: torch.stack(grads) for name, grads in found.items()}


@functools.cache
def case(net=Reader, answers=True):
    return Case(net, answers=answers)


def close(found, expected, tolerance=1e-10):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("net", [Reader, Untraced])
def test_moments_scores_and_losses_are_those_of_each_row_by_itself(net, answers):
    it = case(net, answers)
    assert it.part.cut.trivial == (net is Untraced)
    gradients = it.gradients()
    kinds = dict.fromkeys(SCOPE, Moments.of)
    moments = merge_tree(it.part.statistics(shard, kinds) for shard in it.shards).parts
    directions = {name: torch.randn(each.shape[1:], dtype=torch.float64) for name, each in gradients.items()}
    for name, each in gradients.items():
        close(moments[name].mean_gradient_CD, each.mean(0))
        close(moments[name].fisher_CD, each.square().mean(0))
    table = pa.concat_tables([it.part.scores(shard, directions) for shard in it.shards])
    influence = -sum((each * directions[name]).sum((1, 2)) for name, each in gradients.items())
    close(torch.from_numpy(table["influence"].to_numpy()), influence)
    losses = torch.stack([it.loss(row).detach() for row in range(len(it.labels))])
    close(torch.from_numpy(table["loss"].to_numpy()), losses)
    close(
        torch.from_numpy(table["gradient_norm"].to_numpy()),
        sum(each.square().sum((1, 2)) for each in gradients.values()).sqrt(),
    )
    metrics = [predict_shard(shard, it.part).metrics for shard in it.shards]
    close(torch.from_numpy(np.concatenate([each["probability"] for each in metrics])), torch.exp(-losses))


@pytest.mark.parametrize("net", [Reader, Untraced])
def test_influences_of_tokens_are_those_of_their_own_losses_and_add_up(net):
    it = case(net)
    directions = {name: torch.randn_like(matrix) for name, matrix in it.part.parameters.items()}
    made = [it.part.token_scores(shard, directions) for shard in it.shards]
    found = [np.concatenate(each) for each in zip(*made, strict=True)]
    influence, losses = map(torch.from_numpy, found)
    for row, labels in enumerate(it.labels):
        places = [place for place, label in enumerate(labels[1:]) if label != -100]
        assert (~influence[row].isnan()).nonzero()[:, 0].tolist() == places
        each = it.losses(row)
        for place, loss in zip(places, each, strict=True):
            wanted = 0.0
            for name in SCOPE:
                own = list(it.model.get_submodule(name).parameters())
                grads = torch.autograd.grad(loss, own, retain_graph=True)
                grad = torch.cat([part.reshape(len(own[0]), -1) for part in grads], 1)
                wanted = wanted - (grad * directions[name]).sum() / len(places)
            close(influence[row, place], wanted, 1e-9)
        close(losses[row, places], each.detach())
    table = pa.concat_tables([it.part.scores(shard, directions) for shard in it.shards])
    close(influence.nansum(1), torch.from_numpy(table["influence"].to_numpy()))


def test_a_step_weighs_the_tokens_of_a_row_one_by_one():
    it = case()
    scope = LayersScope(it.part, {"forget": FeatureStore(it.shards)}, Workers())
    weights = np.full((9, it.part.task.positions), np.nan)
    for row, labels in enumerate(it.labels):
        places = [place for place, label in enumerate(labels[1:]) if label != -100]
        weights[row, places] = np.random.default_rng(row).random(len(places))
    batch = np.array([0, 2, 3, 7])
    found = scope.batch_gradient(scope.parameters(), batch, weights, OBJECTIVES["ascent"], 3)
    loss = 0.0
    for row in batch:
        own = torch.from_numpy(weights[row][~np.isnan(weights[row])])
        loss = loss - (own * it.losses(row)).mean()
    loss = loss / np.nanmean(weights[batch], axis=1).sum()
    for name in SCOPE:
        own = list(it.model.get_submodule(name).parameters())
        grads = torch.autograd.grad(loss, own, retain_graph=True)
        close(found[name], torch.cat([grad.reshape(len(own[0]), -1) for grad in grads], 1))


def npo(loss, before, tokens):
    return 2 / (0.1 * tokens) * functional.softplus(0.1 * (before - loss) * tokens)


LOSSES = {
    "ascent": lambda loss, before, tokens: -loss,
    "bounded_ascent": lambda loss, before, tokens: -loss.clamp_max(math.log(VOCABULARY)),
    "npo": npo,
    "simnpo": lambda loss, before, tokens: 2 / 2.5 * functional.softplus(-2.5 * loss),
}


@pytest.mark.parametrize("net", [Reader, Untraced])
@pytest.mark.parametrize("objective", LOSSES)
def test_a_step_follows_the_gradient_of_its_loss_over_whole_rows(net, objective):
    it = case(net)
    scope = LayersScope(it.part, {"forget": FeatureStore(it.shards)}, Workers())
    weights, batch = np.linspace(0.1, 1, 9), np.array([0, 2, 3, 7])
    moved = {name: 1.1 * matrix for name, matrix in it.part.parameters.items()}
    found = scope.batch_gradient(moved, batch, weights, OBJECTIVES[objective], 3)
    model = it.part.changed(moved).apply(it.model)
    tokens = [sum(label != -100 for label in labels[1:]) for labels in it.labels]
    loss = sum(
        weights[row] * LOSSES[objective](it.loss(row, model), it.loss(row).detach(), tokens[row]) for row in batch
    )
    for name in SCOPE:
        own = list(model.get_submodule(name).parameters())
        grads = torch.autograd.grad(loss / weights[batch].sum(), own, retain_graph=True)
        close(found[name], torch.cat([grad.reshape(len(own[0]), -1) for grad in grads], 1))


@pytest.mark.parametrize("changed", [{"forget_set.max_length": 16}, {"block_rows": 9}, {"block_rows": 1}])
@pytest.mark.parametrize("net", [Reader, Untraced])
def test_padding_and_block_size_change_nothing(net, changed):
    one, other = case(net), Case(net, **changed)
    kinds = dict.fromkeys(SCOPE, FactorSums.of)
    for shards in (one.shards, other.shards):
        assert sum(len(shard.ids) for shard in shards) == 9
    found, expected = (
        {
            **merge_tree(it.part.statistics(shard, kinds) for shard in it.shards).parts,
            "scores": pa.concat_tables([it.part.scores(shard, it.part.parameters) for shard in it.shards]),
        }
        for it in (other, one)
    )
    for name in SCOPE:
        close(found[name].means.inputs_DD, expected[name].means.inputs_DD)
        close(found[name].means.outputs_CC, expected[name].means.outputs_CC)
    for column in ("loss", "influence", "gradient_norm"):
        np.testing.assert_allclose(found["scores"][column].to_numpy(), expected["scores"][column].to_numpy(), 1e-9)


def test_factors_leave_out_what_stands_behind_the_last_label():
    it, name = case(), "mlp.2"
    sums = merge_tree(it.part.statistics(shard, dict.fromkeys(SCOPE, FactorSums.of)) for shard in it.shards).parts
    layer, (inputs_DD, outputs_CC), positions = it.model.get_submodule(name), (0, 0), 0
    for row, tokens in enumerate(it.table["tokens"].to_pylist()):
        labels = torch.tensor(it.labels[row][1:])
        caught = []
        hook = layer.register_forward_hook(lambda _, inputs, output, caught=caught: caught.extend((*inputs, output)))
        logits = it.model(torch.tensor(tokens)[None, :-1])
        hook.remove()
        drawn = sampled_labels(logits, uniform_draws([f"r{row}"], 0, len(labels)))[0]
        loss = functional.cross_entropy(logits[0], drawn.where(labels != -100, -100))
        (grad,) = torch.autograd.grad(loss, caught[1])
        (pull_CC,), (seen_DD,) = layer_factors(layer, caught[0].detach(), grad)
        inputs_DD, outputs_CC = inputs_DD + seen_DD * len(labels), outputs_CC + pull_CC
        positions += len(labels)
    inputs_DD, outputs_CC = torch.from_numpy(inputs_DD), torch.from_numpy(outputs_CC)
    close(sums[name].means.inputs_DD, inputs_DD / positions)
    close(sums[name].means.outputs_CC, outputs_CC / len(it.labels))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([[1, 2], [3]], "row 'r1': its tokens are no list of two"),
        ([[1, 2], [3, 99]], "row 'r1': a token is outside the vocabulary of 11"),
        ([[1, 2], [3, -1]], "row 'r1': a token is outside the vocabulary"),
        ([[1, 2], [1, 2, 3, 4]], "row 'r1': it has 4 tokens; forget_set.max_length is 3"),
        ([[1, 2], None], "row 'r1': its tokens are no list"),
    ],
)
def test_a_row_that_is_no_sequence_is_refused_by_name(tokens, reason):
    table = pa.table({"id": ["r0", "r1"], "tokens": tokens})
    config = UnlearnConfig().with_overrides({"forget_set.max_length": 3}).forget_set
    source = open_source(table, config, fields=SequenceTask.fields(config))
    task = SequenceTask.for_model(made(Reader), {"forget": source}, config)
    with pytest.raises(ForgetSetError, match=reason):
        task.collate(source.read(0, 2))


def test_a_model_without_logits_for_each_token_is_refused():
    config = UnlearnConfig().forget_set
    source = open_source(rows_of(), config, fields=SequenceTask.fields(config))
    with pytest.raises(UnsupportedModelError, match="expected logits for each token"):
        SequenceTask.for_model(torch.nn.Flatten(), {"forget": source}, config)


def test_classes_cannot_be_asked_for_where_there_are_none():
    with pytest.raises(ConfigError, match="recipe is 'classes' with task 'sequence', whose samples are of no class"):
        resolve_settings("classes", None, "sequence")


@pytest.mark.parametrize(("key", "value"), [("ascent.scope", "head"), ("ascent.views", 2), ("audit.views", 2)])
def test_settings_of_images_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} is {value!r} with task 'sequence'"):
        resolve_settings(None, UnlearnConfig().with_overrides({key: value}), "sequence")


def test_the_layers_that_can_move_do_where_others_cannot():
    class Mixed(Reader):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, ids):
            x = self.embedding(ids)
            mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
            return self.out(self.mlp(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]))

    model, tokens = made(Mixed), torch.arange(8).reshape(2, 4)
    assert choose_layers(model, tokens, resolve_settings(None, None, "sequence").ascent.scope, "") == [
        "mlp.0",
        "mlp.2",
        "out",
    ]
    with pytest.raises(UnsupportedModelError, match=r"'attention.out_proj' .*'all'|'all', but .*attention.out_proj"):
        choose_layers(model, tokens, "all", "")


def test_few_rows_are_taken_at_once_where_outputs_are_many():
    task = SequenceTask(UnlearnConfig().forget_set, positions=512, num_classes=128_256)
    assert rows_at_once(256, task) == 1
    assert rows_at_once(256, SequenceTask(task.config, positions=20, num_classes=10)) == 256
    assert rows_at_once(256, SequenceTask(task.config, 64, 4096)) == OUTPUTS // (64 * 4096)


@pytest.mark.parametrize("size", [1, 40])
def test_slices_of_positions_change_nothing_and_outputs_stay_in_their_type(size, monkeypatch):
    whole = case()
    monkeypatch.setattr("imu_ray.influence.projection.SLICE", size)
    task, labels = whole.part.task, torch.from_numpy(whole.shards[0].labels_n)
    outputs = torch.randn(*labels.shape, VOCABULARY, generator=torch.Generator().manual_seed(0))
    assert len(position_slices(outputs.shape, size)) > 1
    sliced = task.output_gradient(outputs, labels), task.sample_metrics(outputs, labels)["loss"]
    monkeypatch.undo()
    exact = outputs.double().requires_grad_()
    loss = task.sample_metrics(exact, labels)["loss"]
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    assert (sliced[0].dtype, sliced[1].dtype) == (torch.float32, torch.float64)
    close(sliced[0], gradient, 1e-6)
    close(sliced[1], loss.detach())


@pytest.mark.usefixtures("ray_cluster")
def test_tokens_have_intensities_of_their_own_which_a_table_carries_to_the_update(tmp_path):
    more = {"influence.unit": "token", "intensity.scheme": "imu", "ascent.scope": SCOPE, "ascent.objective": "ascent"}
    more |= {"influence.block_rows": 4, "influence.blocks_per_shard": 1, "forget_set.token_labels_column": "answer"}
    more |= {"ascent.stop.targets": {"forget.loss": 20.0}}
    runs = {
        workers: imu_ray.unlearn(
            made(Reader), rows_of(), task="sequence", run_dir=tmp_path / str(workers),
            config=UnlearnConfig.from_recipe("samples").with_overrides(more | {"resources.workers": workers}),
        )
        for workers in (1, 2)
    }  # fmt: skip
    assert check_metrics(tmp_path / "1") == runs[1].metrics
    table = runs[1].intensities
    assert table.equals(runs[2].intensities)
    assert runs[1].manifest["model"]["hash_after"] == runs[2].manifest["model"]["hash_after"]
    for row in table.to_pylist():
        influence, weights = ([x for x in row[f"token_{name}"] if x is not None] for name in ("influence", "intensity"))
        assert row["influence"] == pytest.approx(sum(influence), rel=1e-9)
        assert row["intensity"] == pytest.approx(np.mean(weights))
        assert [value > 0 for value in weights] == [value < 0 for value in influence]
    config = UnlearnConfig.from_recipe("samples").with_overrides(more)
    settings = {"task": "sequence", "config": config}
    again = imu_ray.ascend(made(Reader), rows_of(), table, run_dir=tmp_path / "again", **settings)
    assert again.manifest["model"]["hash_after"] == runs[1].manifest["model"]["hash_after"]
    wrong = table.set_column(
        table.column_names.index("token_intensity"),
        "token_intensity",
        table["token_influence"].slice(0).take(list(range(9))[::-1]),
    )
    with pytest.raises(ForgetSetError, match="token_intensity has other tokens than token_influence"):
        imu_ray.ascend(made(Reader), rows_of(), wrong, run_dir=tmp_path / "wrong", **settings)


def test_tokens_are_refused_where_samples_have_none():
    with pytest.raises(ConfigError, match="influence.unit is 'token' with task 'classification'"):
        resolve_settings(None, UnlearnConfig().with_overrides({"influence.unit": "token"}), "classification")
