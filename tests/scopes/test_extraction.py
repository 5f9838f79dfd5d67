"""How the forward pass runs and how its features are kept."""

import threading

import numpy as np
import pytest
import torch
from architectures import named
from faults import failing_model
from samples import Pairs, tensors
from torch import nn

from imu_ray.config import ForgetSetConfig, InfluenceConfig
from imu_ray.data import open_source
from imu_ray.errors import ForgetSetError, NonFiniteError, StageFailedError, UnsupportedModelError
from imu_ray.models.layers import compile_around
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask


class Convolution(nn.Module):
    """Notes the memory format and the type that its layers work in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)
        self.seen = set()

    def forward(self, x):
        self.seen.add((x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous()))
        return self.fc(self.features(x))


def opened(model, inputs, labels, block_rows=8, task=None):
    """What ``extract_features`` takes first: source, shard of all blocks, part and model."""
    source = open_source(Pairs(inputs, labels), ForgetSetConfig())
    task = task or ClassificationTask.for_model(model, {"forget": source}, ForgetSetConfig())
    (shard,) = source.shards(block_rows, 8)
    return source, shard, Head.of(model, task), model, torch.device("cpu")


def extracted(model, settings=None, scale=1.0):
    inputs, labels = tensors(41)
    return extract_features(*opened(model, inputs * scale, labels), settings)[0]


class Between(nn.Module):
    """Changes the features in front of the head, in eval mode too."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = named("fc"), change

    def forward(self, x):
        return self.inner.fc(self.change(self.inner.body(x)))


UNSTEADY = {
    "dropout": (lambda x: nn.functional.dropout(x, 0.1), "when the same batch is run again; .*dropout, noise"),
    "small noise": (lambda x: x + 1e-4 * torch.randn(12), "when the same batch is run again"),
    "batch statistics": (nn.BatchNorm1d(12, track_running_stats=False).train(False), "when other rows .*; .*BatchNorm"),
    "the size of the batch": (lambda x: x / len(x), "when other rows stand beside them"),
}


# Small noise is lost in the rounding of bfloat16.
@pytest.mark.parametrize(
    ("case", "autocast"),
    [*((case, "none") for case in UNSTEADY), ("dropout", "bfloat16"), ("batch statistics", "bfloat16")],
)
def test_a_model_whose_features_change_with_the_call_or_the_batch_is_refused(case, autocast):
    change, message = UNSTEADY[case]
    given = opened(Between(change), *tensors(41), task=ClassificationTask(ForgetSetConfig(), "inner.fc", 5))
    with pytest.raises(UnsupportedModelError, match=f"features of the same rows differ by .*{message}"):
        extract_features(*given, InfluenceConfig(autocast=autocast))


@pytest.mark.parametrize("rows", [1, 2, 70])
def test_the_check_of_the_first_block_leaves_the_features_as_they_are(rows):
    model = named("fc").double()
    inputs, labels = tensors(rows, dtype=torch.float64)
    task = ClassificationTask(ForgetSetConfig(), "fc", 5, torch.float64)
    for settings in (InfluenceConfig(), InfluenceConfig(compile=True)):
        made, _ = extract_features(*opened(model, inputs, labels, 70, task), settings)
        with torch.inference_mode():
            np.testing.assert_array_equal(made.features_nF, model.body(inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kept_features_are_rounded_once_and_take_half_the_room(dtype):
    exact, kept = extracted(named("fc")), extracted(named("fc"), InfluenceConfig(feature_dtype=dtype))
    assert kept.features_nF.nbytes * 2 == exact.features_nF.nbytes
    expected = torch.from_numpy(exact.features_nF).to(getattr(torch, dtype)).double()
    assert torch.equal(kept.read(slice(3, 30))[0], expected[3:30])
    assert np.array_equal(kept.features(np.array([1, 5])), expected[[1, 5]].numpy())


def test_features_that_float16_cannot_hold_are_refused():
    model = Convolution()
    with pytest.raises(NonFiniteError, match="beyond the range of float16"):
        extracted(model, InfluenceConfig(feature_dtype="float16"), scale=1e7)
    extracted(model, InfluenceConfig(feature_dtype="bfloat16"), scale=1e7)


def test_autocast_runs_the_forward_pass_in_its_type_whatever_the_callers():
    model = Convolution()
    plain, cast = extracted(model), extracted(model, InfluenceConfig(autocast="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(extracted(model).features_nF, plain.features_nF)
        assert torch.is_autocast_enabled("cpu")
    assert not np.array_equal(cast.features_nF, plain.features_nF)
    np.testing.assert_allclose(cast.features_nF, plain.features_nF, atol=0.02)


class CastBack(Convolution):
    """Its output is float32 even where autocast ran the head in bfloat16."""

    def forward(self, x):
        return self.fc(50 * self.features(x)).float()


def test_a_head_that_autocast_ran_in_half_precision_is_still_a_plain_head():
    assert len(extracted(CastBack(), InfluenceConfig(autocast="bfloat16")).ids) == 41


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.fc = nn.Linear(4, 2)


def test_members_of_a_list_of_modules_are_compiled():
    model = Listed()
    compile_around(model, "fc")
    assert all(layer._compiled_call_impl is not None for layer in model.layers)
    assert model.fc._compiled_call_impl is None


def test_channels_last_reaches_the_model_and_changes_nothing_else():
    # With one channel both formats are the same bytes: two channels tell them apart.
    model = Convolution()
    model.features[0] = nn.Conv2d(2, 8, 3)
    inputs = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    given, found = opened(model, inputs, torch.arange(16) % 5), {}
    for channels_last in (False, True):
        model.seen.clear()
        made, _ = extract_features(*given, InfluenceConfig(channels_last=channels_last))
        found[channels_last] = made.features_nF
        assert model.seen == {(channels_last, not channels_last)}
    np.testing.assert_allclose(found[True], found[False], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_model_gives_the_same_features():
    plain, model = extracted(Convolution()), Convolution()
    compile_around(model, "fc")
    assert model.features._compiled_call_impl is not None
    assert model.fc._compiled_call_impl is None
    np.testing.assert_allclose(extracted(model).features_nF, plain.features_nF, rtol=1e-4, atol=1e-6)


class Decoding:
    """A task that notes the thread in which each block was decoded and in which the model ran."""

    def __init__(self, task):
        self.task, self.decoded, self.forwarded = task, [], []
        self.head = task.head

    def reading(self, settings):
        return self

    def collate(self, rows):
        self.decoded.append((rows.ids[0], threading.get_ident()))
        return self.task.collate(rows)

    def forward(self, model, batch):
        self.forwarded.append((batch.ids[0], threading.get_ident(), len(self.decoded)))
        return self.task.forward(model, batch)


class NotedPairs(Pairs):
    """Pairs that note the thread in which each row is read."""

    read = ()

    def __getitem__(self, row):
        self.read = (*self.read, (row, threading.get_ident()))
        return super().__getitem__(row)


def test_blocks_are_read_and_decoded_ahead_of_the_model_in_order():
    samples = NotedPairs(*tensors(32))
    _, shard, head, model, cpu = opened(named("fc"), *tensors(32))
    task, source = Decoding(head.task), open_source(samples, ForgetSetConfig())
    made, _ = extract_features(source, shard, Head.of(model, task), model, cpu)
    assert [first for first, _ in task.decoded] == ["0", "8", "16", "24"]
    ran = ["0", "0", "0", "8", "16", "24"]
    assert [first for first, *_ in task.forwarded] == ran, "a part of the first block is run twice"
    forwarding = {thread for _, thread, _ in task.forwarded}
    assert {thread for _, thread in task.decoded}.isdisjoint(forwarding)
    assert [row for row, _ in samples.read] == list(range(32))
    assert len({thread for _, thread in samples.read} - forwarding) == 1, "one thread, which is not the model's"
    assert made.ids.to_pylist() == [str(row) for row in range(32)]


def test_an_error_in_a_block_that_was_decoded_ahead_comes_out_as_it_is():
    inputs, labels = tensors(32)
    labels[20] = 99
    with pytest.raises(ForgetSetError, match="label 99"):
        extract_features(*opened(named("fc"), inputs, labels))


def test_what_a_model_raises_on_a_block_is_a_failure_that_says_so():
    with pytest.raises(
        StageFailedError, match=r"cannot take 8 samples of shape \[1, 6, 6\]: RuntimeError: out of luck"
    ):
        extracted(failing_model(name="fc"))
