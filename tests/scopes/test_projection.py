"""Logits that are made in slices of positions: everything as with logits that stand whole, in float64."""

import copy
import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pytest
import torch
from language import TOKENS, gpt2, lively, llama, lora
from torch.utils._python_dispatch import TorchDispatchMode

from imu_ray.audits.accuracy import divergence, output_change
from imu_ray.audits.base import predict_shard
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.influence.curvature.base import Moments
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.models.blocks import checkpoint_blocks
from imu_ray.models.choice import choose_layers
from imu_ray.models.copies import without_numbers
from imu_ray.models.layers import output_layer
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers, shard_gradient
from imu_ray.scopes.memory import memory_of
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.base import Batch
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.objectives import OBJECTIVES

IDS = pa.array(list("abcde"))
LABELS = TOKENS.roll(-1, 1).clone()
LABELS[:, -1] = LABELS[0, :3] = LABELS[3, 2] = LABELS[1, 4:] = -100


class More(torch.nn.Module):
    """A model that can be traced, and may do more with what its output layer gives."""

    def __init__(self, more=None):
        super().__init__()
        self.embedding, self.inner, self.out = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 13)
        self.more = more or torch.nn.Identity()

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        return self.more(self.out(hidden + torch.tanh(self.inner(hidden))))


def run_again():
    model = llama(use_cache=False)
    checkpoint_blocks(model)
    return model


MODELS = {
    "llama": (llama, "last:3", "lm_head"),
    "run again": (run_again, ["*.q_proj"], "lm_head"),
    "traced, with a bias": (lambda: lively(More(), torch.float64), ["inner"], "out"),
    "tied": (lambda: llama(tie_word_embeddings=True), ["*.v_proj", "*.down_proj"], "lm_head"),
    "gpt2": (gpt2, ["*.c_attn"], "lm_head"),
    "lora": (lambda: lora(llama()), "adapters", "base_model.model.lm_head"),
}


def part_of(model, scope, positions=7, classes=13, example=TOKENS):
    task = SequenceTask(ForgetSetConfig(), positions, classes)
    names = [name for name in choose_layers(model, example, scope, "") if name not in ("lm_head", "out")]
    return Layers.of_names(model, task, names, example, UnlearnConfig())


@pytest.fixture(params=MODELS)
def pair(request, monkeypatch):
    """The same layers with logits in slices of two positions, and with logits that stand whole."""
    make, scope, output = MODELS[request.param]
    model = make()
    whole = part_of(model, scope)
    monkeypatch.setattr("imu_ray.scopes.layers.OUTPUTS", 2 * 13)
    monkeypatch.setattr("imu_ray.influence.projection.OUTPUTS", 3 * 2 * 13)
    sliced = part_of(model, scope)
    assert (whole.output, sliced.output) == ("", output)
    assert len(sliced.outputs(shard(sliced), slice(0, 3))[0].parts()) > 2
    return sliced, whole


def shard(part):
    features = part.cut.join(part.cut.prefix(TOKENS)).double()
    return FeatureShard(features.numpy(), LABELS.numpy(), IDS, (3, 2))


def changed(part):
    generator = torch.Generator().manual_seed(2)
    return part.changed(
        {
            name: matrix + 0.1 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
            for name, matrix in part.parameters.items()
        }
    )


def close(found, expected, tolerance=1e-12):
    found, expected = (
        np.asarray(each.detach() if isinstance(each, torch.Tensor) else each) for each in (found, expected)
    )
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_scores_losses_and_norms_are_the_same(pair):
    directions = changed(pair[1]).parameters
    found, expected = (part.scores(shard(part), directions) for part in pair)
    for name in ("loss", "influence", "gradient_norm"):
        close(found[name].to_numpy(), expected[name].to_numpy())


def test_scores_of_tokens_are_the_same(pair):
    directions = changed(pair[1]).parameters
    found, expected = (part.token_scores(shard(part), directions) for part in pair)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.isnan(one), np.isnan(other))
        # Hugging Face's RMSNorm works in float32, and rounds otherwise from one form of a product to another.
        close(np.nan_to_num(one), np.nan_to_num(other), 1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_every_objective_are_the_same(pair, objective):
    weights = np.array([0.5, 1.0, 0.0, 2.0, 0.25])
    for tokens in (False, True):
        shares = np.tile(weights[:, None], 7) * np.arange(1, 8) if tokens else weights
        found, expected = (
            shard_gradient(shard(part), shares, changed(part), part, OBJECTIVES[objective]).parts for part in pair
        )
        for name, each in expected.items():
            close(found[name].total, each.total, 1e-10)
        assert any(each.total.any() for each in expected.values()) or objective == "bounded_ascent"


@pytest.mark.parametrize("statistic", [Moments.of, FactorSums.of])
def test_moments_and_factors_are_the_same(pair, statistic):
    found, expected = (part.statistics(shard(part), dict.fromkeys(part.parameters, statistic)).parts for part in pair)
    for name, sums in expected.items():
        for key, tensor in vars(sums).items():
            close(getattr(found[name], key), tensor, 1e-10)


def test_what_is_measured_is_the_same(pair):
    found, expected = (predict_shard(shard(part), part) for part in pair)
    assert set(expected.metrics) > {"loss", "accuracy", "extraction_strength"}
    for name, values in expected.metrics.items():
        close(found.metrics[name], values)
    for of in (lambda part: output_change(shard(part), part, changed(part)),
               lambda part: divergence(shard(part), shard(part), part, changed(part))):  # fmt: skip
        close(*map(of, pair), 1e-10)
    scopes = [part.scope({"forget": FeatureStore([shard(part)])}, Workers()) for part in pair]
    records = [scope.measure(changed(scope.part).parameters) for scope in scopes]
    assert records[0] == pytest.approx(records[1], rel=1e-12)


def test_a_forward_pass_gives_the_same_losses(pair):
    found, expected = (part.forward(part.cut.model, Batch(TOKENS, LABELS, list("abcde"))) for part in pair)
    close(found.logits_BC, expected.logits_BC)


@pytest.mark.parametrize("kind", ["model", "autocast"])
def test_half_precision_rounds_as_with_whole_logits(kind, monkeypatch):
    model = llama(torch.bfloat16 if kind == "model" else torch.float32)
    whole = dataclasses.replace(part_of(model, ["*.v_proj"]), autocast="bfloat16" if kind == "autocast" else "none")
    monkeypatch.setattr("imu_ray.influence.projection.OUTPUTS", 5 * 2 * 13)
    sliced = dataclasses.replace(whole, output="lm_head")
    logits = sliced.logits(sliced.run(sliced.weights(), (TOKENS,)))
    assert logits[:, :2].dtype == whole.run(whole.weights(), (TOKENS,)).dtype == torch.bfloat16
    found, expected = (
        shard_gradient(shard(part), np.ones(5), changed(part), part, OBJECTIVES["npo"]).parts
        for part in (sliced, whole)
    )
    for name, each in expected.items():
        assert (found[name].total - each.total).norm() <= 0.02 * each.total.norm()


class Widest(TorchDispatchMode):
    """Notes the numbers of the largest tensor of any type that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple) else [found]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return found


def test_no_tensor_is_as_large_as_the_logits_of_a_row(monkeypatch):
    vocabulary = 4096
    for module in ("scopes.layers", "influence.projection"):
        monkeypatch.setattr(f"imu_ray.{module}.OUTPUTS", vocabulary)
    length, sizes = 64, {"vocab_size": vocabulary, "hidden_size": 8, "max_position_embeddings": 64}
    tokens = TOKENS.flatten().repeat(2)[:length].unsqueeze(0)
    part = part_of(llama(torch.float32, **sizes), ["*.q_proj"], length, vocabulary, tokens)
    one = FeatureShard(tokens.numpy().astype(np.float32), tokens.roll(-1, 1).numpy(), IDS[:1], (1,))
    with Widest() as widest:
        part.scores(one, part.parameters)
        part.statistics(one, dict.fromkeys(part.parameters, FactorSums.of))
        for objective in OBJECTIVES.values():
            shard_gradient(one, np.ones(1), part, part, objective)
        predict_shard(one, part)
    assert vocabulary <= widest.numbers < length * vocabulary / 4, "the output layer itself has an eighth of a row's"


def test_an_output_layer_is_told_only_where_its_outputs_are_the_models():
    def told(more, outputs=13):
        return output_layer(More(more), TOKENS, outputs)

    assert told(lambda logits: logits) == told(lambda logits: logits.double()) == "out"
    assert told(lambda logits: 2 * logits) == told(lambda logits: 30 * torch.tanh(logits / 30)) == ""
    assert told(lambda logits: logits, outputs=12) == ""
    model = llama()
    before = copy.deepcopy(model.state_dict())
    assert output_layer(model, TOKENS, 13) == "lm_head"
    assert type(model.lm_head) is torch.nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_numbers_an_output_layer_is_told_by_what_the_model_gives():
    for more, expected in ((None, "out"), (lambda logits: 30 * torch.tanh(logits / 30), "")):
        model, mode = without_numbers(More(more))
        with mode:
            assert output_layer(model, TOKENS, 13) == expected


def test_what_needs_whole_logits_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("imu_ray.scopes.layers.OUTPUTS", 1)
    part = part_of(llama(), ["*.v_proj"])
    logits = part.outputs(shard(part), slice(0, 2))[0]
    with pytest.raises(AttributeError, match=r"have no 'topk': they never stand whole; expected of_positions or"):
        logits.topk(2)


def test_the_logits_of_an_output_layer_that_moves_stand_whole(monkeypatch):
    monkeypatch.setattr("imu_ray.scopes.layers.OUTPUTS", 1)
    model, task = llama(), SequenceTask(ForgetSetConfig(), 7, 13)
    part = Layers.of_names(model, task, choose_layers(model, TOKENS, "all", ""), TOKENS, UnlearnConfig())
    assert "lm_head" in part.parameters
    assert part.output == ""


def test_the_count_of_memory_has_a_slice_of_the_logits_alone():
    model = llama(torch.float32, vocab_size=2**15, max_position_embeddings=1024)
    long = part_of(model, ["*.q_proj"], positions=1024, classes=2**15)
    count = functools.partial(memory_of, settings=UnlearnConfig().ascent, rows=1)
    assert long.output == "lm_head"
    whole = count(dataclasses.replace(long, output=""))
    assert count(long).outputs < 0.6 * whole.outputs
    assert count(long).weights == whole.weights
