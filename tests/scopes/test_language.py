"""Layers of Hugging Face's language models against autograd on the whole model, one sample at a time, in float64."""

import dataclasses
import functools
import weakref
from types import SimpleNamespace

import numpy as np
import oracle
import pyarrow as pa
import pytest
import torch
from language import TOKENS, gpt2, llama, lora
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.errors import UnsupportedModelError
from imu_ray.influence.curvature.base import Moments
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.influence.gradients import output_gradient
from imu_ray.influence.layer_io import directional_scores, sample_gradients, squared_gradient_norms
from imu_ray.models.blocks import checkpoint_blocks
from imu_ray.models.choice import choose_layers
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.seen import weigh
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.objectives import OBJECTIVES

LABELS = TOKENS.roll(-1, 1)
CASES = {
    "gpt2": (gpt2, ["*.attn", "*.1.mlp"], 6),
    "gpt2, sdpa": (lambda: gpt2(attn_implementation="sdpa"), ["*.c_attn"], 2),
    "llama": (llama, ["*.?_proj"], 8),
    "llama, all": (llama, "all", 15),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), "last:6", 6),
    "lora": (lambda: lora(llama()), "adapters", 8),
    "lora, fresh, tied": (lambda: lora(llama(tie_word_embeddings=True), fresh=True), ["*.q_proj"], 4),
    "lora of gpt2": (lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True), "last:3", 3),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    make, scope, count = CASES[request.param]
    model = make()
    task = SimpleNamespace(
        head="", positions=7, num_classes=13, output_gradient=lambda outputs, labels: pull(outputs, labels)
    )
    head = "" if "gpt2" in request.param or request.param != "llama, all" else "lm_head"
    names = choose_layers(model, TOKENS, scope, head)
    part = Layers.of_names(model, task, names, TOKENS, UnlearnConfig())
    assert len(names) == count
    assert part.cut.trivial
    return SimpleNamespace(model=model, part=part, names=names)


def pull(outputs, labels):
    """Gradient of the cross-entropy, summed over the positions of a sample."""
    return torch.softmax(outputs, -1) - functional.one_hot(labels, outputs.shape[-1])


def gradients_one_by_one(model, names):
    """By layer ``[B, C, D]``."""
    layers, found = {name: model.get_submodule(name) for name in names}, {name: [] for name in names}
    for tokens, labels in zip(TOKENS, LABELS, strict=True):
        output = model(tokens[None])
        loss = functional.cross_entropy(getattr(output, "logits", output)[0], labels, reduction="sum")
        grads = iter(torch.autograd.grad(loss, [own for layer in layers.values() for own in layer.parameters()]))
        for name, layer in layers.items():
            found[name].append(oracle.gradient_matrix(layer, [next(grads) for _ in layer.parameters()]))
    return {name: torch.stack(rows) for name, rows in found.items()}


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-10 * max(expected.abs().max(), 1e-3)


def test_what_layers_saw_gives_the_gradients_scores_and_norms_of_single_samples(case):
    expected = gradients_one_by_one(case.model, case.names)
    seen = []
    outputs = case.part.seen(
        case.part.cut.split(TOKENS),
        lambda z: case.part.task.output_gradient(z, LABELS),
        lambda each, _: seen.append(each),
    )
    assert len(seen) == len(case.names)
    assert torch.equal(outputs, case.model(TOKENS).logits)
    scores, squares, wanted = torch.zeros(5).double(), torch.zeros(5).double(), torch.zeros(5).double()
    for each in seen:
        own = expected[each.name]
        direction = torch.randn(own.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        grads = sample_gradients(each.layer, each.inputs, each.output_grads)
        close(torch.cat([grad.clone() for grad in grads]), own)
        scores += directional_scores(each.layer, each.inputs, each.output_grads, direction)
        squares += squared_gradient_norms(each.layer, each.inputs, each.output_grads)
        wanted -= (own * direction).sum((1, 2))
    close(scores, wanted)
    close(squares, sum(own.square().sum((1, 2)) for own in expected.values()))


def test_tokens_are_scored_in_one_pass_with_their_outputs(case):
    """Also where attention, adapters and shared weights stand between."""
    directions = {name: torch.randn_like(matrix) for name, matrix in case.part.parameters.items()}
    task = SimpleNamespace(positions=7, num_classes=13, head="", output_gradient=output_gradient)
    part = dataclasses.replace(case.part, task=task)
    shard = FeatureShard(TOKENS.numpy().astype(np.float32), LABELS.numpy(), pa.array(list("abcde")), (3, 2))
    influence, _ = part.token_scores(shard, directions)
    expected = gradients_one_by_one(case.model, case.names)
    wanted = -sum((own * directions[name]).sum((1, 2)) for name, own in expected.items()) / 7
    # Hugging Face's RMSNorm works in float32, and rounds otherwise on the way back.
    assert (torch.from_numpy(influence).sum(1) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_gradients_of_a_batch_add_up_to_matrices_and_only_those_layers_move(case):
    total = {}
    case.part.add_gradient(total, case.part.weights(), (TOKENS,), lambda outputs: pull(outputs, LABELS))
    for name, own in gradients_one_by_one(case.model, case.names).items():
        close(case.part.matrices(total)[name], own.sum(0))
    moved = {name: matrix + 0.1 for name, matrix in case.part.parameters.items()}
    changed = case.part.changed(moved).apply(case.model)
    before, after = case.model.state_dict(), changed.state_dict()
    other = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert {key.rpartition(".")[0] for key in other} == set(case.names)
    with torch.no_grad():
        outputs = case.part.run(case.part.weights(moved), (TOKENS,))
    assert torch.equal(outputs, changed(TOKENS).logits)
    assert not torch.equal(outputs, case.model(TOKENS).logits)


class Widest(TorchDispatchMode):
    """Notes the numbers of the largest float64 tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple) else [found]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                self.numbers = max(self.numbers, each.numel())
        return found


def test_logits_never_stand_whole_in_float64(monkeypatch):
    monkeypatch.setattr("imu_ray.influence.projection.SLICE", 2048)
    model = llama(torch.float32, vocab_size=1024)
    task = SequenceTask(ForgetSetConfig(), 7, 1024)
    part = Layers.of_names(model, task, choose_layers(model, TOKENS, ["*.q_proj"], ""), TOKENS, UnlearnConfig())
    with Widest() as widest:
        part.seen((TOKENS,), lambda z: part.task.output_gradient(z, LABELS), lambda *_: None)
        share = torch.ones(5)
        part.add_gradient(
            {}, part.weights(), (TOKENS,), lambda z: weigh(OBJECTIVES["bounded_ascent"](z, LABELS, z), share)
        )
        task.sample_metrics(part.run(part.weights(), (TOKENS,)).detach(), LABELS)
    assert 0 < widest.numbers <= 5 * 1024


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gradients_are_clipped_in_the_type_of_the_model(kind):
    part = Layers.of_names(llama(kind), SequenceTask(ForgetSetConfig(), 7, 13), ["model.layers.1.mlp.up_proj"], TOKENS, UnlearnConfig())  # fmt: skip
    shard = FeatureShard(TOKENS.numpy().astype(np.float32), LABELS.numpy(), pa.array(list("abcde")), (3, 2))
    limit = float(np.median(part.norms(shard)))
    for clip, count in ((limit, 5), (1e9, 5)):
        statistic = functools.partial(Moments.of, clip=clip)
        (found,) = part.statistics(shard, dict.fromkeys(part.parameters, statistic)).parts.values()
        squares = np.minimum(part.norms(shard), clip) ** 2
        assert found.count == count
        assert float(found.squared_sum_CD.sum()) == pytest.approx(squares.sum(), rel=0.02)


class InPlace(torch.nn.Module):
    """Changes what its first layer gives in place, as fused activations do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = torch.nn.Embedding(13, 6), torch.nn.Linear(6, 8), torch.nn.Linear(8, 13)

    def forward(self, tokens):
        hidden = self.first(self.embedding(tokens))
        return self.last(hidden.mul_(0.5).relu_())


class InPlaceWithGradients(InPlace):
    """Does so only where gradients are taken, which no look at it beforehand shows."""

    def forward(self, tokens):
        hidden = self.first(self.embedding(tokens))
        late = tokens.min() >= 0 and torch.is_grad_enabled()  # which no trace follows
        return self.last(hidden.relu_() if late else hidden.relu())


@pytest.mark.parametrize("kind", [InPlace, InPlaceWithGradients])
def test_outputs_that_are_changed_in_place_have_the_gradients_before_the_change(kind):
    model = kind().double()
    task = SequenceTask(ForgetSetConfig(), 7, 13)
    part = Layers.of_names(model, task, ["first", "last"], TOKENS, UnlearnConfig())
    seen = []
    part.seen(part.cut.prefix(TOKENS), lambda z: pull(z, LABELS), lambda each, _: seen.append(each))
    assert [each.name for each in seen] == ["last", "first"]
    expected = gradients_one_by_one(model, ["first", "last"])
    for each in seen:
        close(torch.cat([one.clone() for one in sample_gradients(each.layer, each.inputs, each.output_grads)]),
              expected[each.name])  # fmt: skip


def test_what_a_layer_saw_is_not_kept_for_the_others():
    model = torch.nn.Sequential(
        torch.nn.Embedding(13, 6), *(torch.nn.Linear(6, 6) for _ in range(4)), torch.nn.Linear(6, 13)
    )
    names = [str(index) for index in range(1, 6)]
    part = Layers.of_names(model, SequenceTask(ForgetSetConfig(), 7, 13), names, TOKENS, UnlearnConfig())
    grads, inputs = [], []

    def take(each, _):
        assert not any(kept() is not None for kept in grads[1:])  # the first one is the pull on the outputs
        assert all(kept.expired() for kept in inputs)
        grads.append(weakref.ref(each.output_grads))
        inputs.append(StorageWeakRef(each.inputs.untyped_storage()))

    part.seen(part.cut.prefix(TOKENS), lambda z: pull(z, LABELS), take)
    assert len(grads) == 5


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora"])
def test_scores_and_sums_are_the_same_where_blocks_are_run_again(name):
    make, patterns, _ = CASES[name]
    shard = FeatureShard(TOKENS.numpy().astype(np.float32), LABELS.numpy(), pa.array(list("abcde")), (3, 2))
    found = []
    for again in (False, True):
        model = make()
        if again:
            checkpoint_blocks(model)
        task = SequenceTask(ForgetSetConfig(), 7, 13)
        part = Layers.of_names(model, task, choose_layers(model, TOKENS, patterns, ""), TOKENS, UnlearnConfig())
        drawn = torch.Generator().manual_seed(4)
        directions = {key: torch.randn(each.shape, generator=drawn).double() for key, each in part.parameters.items()}
        table = part.scores(shard, directions)
        sums = part.statistics(shard, dict.fromkeys(part.parameters, FactorSums.of))
        found.append((table, sums))
    assert found[0][0].equals(found[1][0])
    for layer, sums in found[0][1].parts.items():
        for field in dataclasses.fields(sums):
            one, other = (getattr(each, field.name) for each in (sums, found[1][1].parts[layer]))
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Skips(InPlace):
    """Passes a layer by for some tokens."""

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        first = self.first(hidden)
        return self.last(first if tokens[0, 0] == TOKENS[0, 0] else torch.nn.functional.pad(hidden, (0, 2)))


def test_a_layer_that_takes_no_part_is_an_error_that_names_it():
    part = Layers.of_names(Skips(), SequenceTask(ForgetSetConfig(), 7, 13), ["first", "last"], TOKENS, UnlearnConfig())
    tokens = TOKENS.clone()
    tokens[0, 0] = TOKENS[0, 0] + 1
    with pytest.raises(UnsupportedModelError, match="first took no part"):
        part.seen((tokens,), lambda z: pull(z, LABELS), lambda *_: None)
