"""What brings forgotten answers back, each test against a computation of its own."""

import numpy as np
import pytest
import torch
from language import TOKENS, gpt2, llama, lora
from samples import Pairs
from sklearn.linear_model import LogisticRegression
from torch import nn

from imu_ray.audits import quantisation, recovery, relearning
from imu_ray.audits.recovery import Attack
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.data import open_source
from imu_ray.demo import digits, train_digits
from imu_ray.distributed.recovery_job import attempt
from imu_ray.influence.gradients import IGNORE
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.head import Head
from imu_ray.scopes.layers import Layers
from imu_ray.tasks.base import Batch
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.tasks.reid import ReidTask
from imu_ray.tasks.sequence import SequenceTask

FORGOTTEN = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def known():
    """A trained model whose head no longer answers with a class, and the digits: to forget, kept and unseen ones."""
    pixels, labels, train, test = digits()
    images = torch.from_numpy(pixels).unsqueeze(1) / 255
    pick = lambda rows: Pairs(images[rows], torch.from_numpy(labels[rows]))
    model = train_digits(images[train], torch.from_numpy(labels[train]), epochs=2)
    with torch.no_grad():
        model.head.bias[FORGOTTEN] = -1e3
    gone = labels[train] == FORGOTTEN
    return model, {"forget": pick(train[gone]), "retain": pick(train[~gone]), "test": pick(test)}


def task_of(model, samples):
    return ClassificationTask.for_model(model, {"forget": open_source(samples, ForgetSetConfig())}, ForgetSetConfig())


def labels_of(sets):
    return {name: samples.labels.numpy() for name, samples in sets.items()}


def accuracy(model, inputs, labels):
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())


def batches(inputs, labels, size=7):
    cut = zip(inputs.split(size), labels.split(size), strict=True)
    return [Batch(some, wanted, [str(row) for row in range(len(some))]) for some, wanted in cut]


def test_an_attacker_is_given_some_rows_of_each_class_and_measured_on_the_others(known):
    labels = labels_of(known[1])
    drawn = recovery.draw(labels, 10, 0)
    shown = {name: np.bincount(labels[name][marks], minlength=10) for name, marks in drawn.shown.items()}
    assert shown["forget"].tolist() == [10 * (label == FORGOTTEN) for label in range(10)]
    assert shown["retain"].tolist() == [10 * (label != FORGOTTEN) for label in range(10)]
    assert (drawn.held["forget"] == ~drawn.shown["forget"]).all()
    assert (drawn.held["test"] == (labels["test"] == FORGOTTEN)).all()
    assert drawn.kept.keys() == {"retain"}
    assert not (drawn.kept["retain"] & drawn.shown["retain"]).any()
    assert drawn.kept["retain"].sum() == recovery.LIMIT
    again, other = recovery.draw(labels, 10, 0), recovery.draw(labels, 10, 1)
    assert (again.shown["forget"] == drawn.shown["forget"]).all()
    assert (other.shown["forget"] != drawn.shown["forget"]).any()


def test_at_most_half_of_a_class_is_given_away_and_another_set_gives_what_is_missing():
    labels = {"forget": np.array([0, 0, 0, 1, 2, 2, 2, 2]), "test": np.repeat([0, 1, 2], 5)}
    drawn = recovery.draw(labels, 2, 0)
    counts = [np.bincount(labels[name][drawn.shown[name]], minlength=3).tolist() for name in ("forget", "test")]
    assert counts == [[1, 0, 2], [1, 2, 0]]
    assert drawn.held["test"].sum() == 15 - 3
    alone = recovery.draw({"forget": labels["forget"]}, 2, 0)
    assert alone.kept == {}


def probed(model, sets, part, drawn):
    """The figures of the probe, by shards of features."""
    found = []
    for name in sorted({*drawn.shown, *drawn.held}):
        source, codes = open_source(sets[name], ForgetSetConfig()), recovery.codes_of(drawn, name, len(sets[name]))
        for shard in source.shards(64, 1):
            features, _ = extract_features(source, shard, part, model, CPU)
            found.append(recovery.penultimate(features, codes[shard.start : shard.stop], part, name))
    return recovery.probe(found)


@pytest.mark.parametrize("deep", [False, True])
def test_a_probe_finds_a_class_that_only_the_head_forgot_as_scikit_learn_does(known, deep):
    model, sets = known
    task, drawn = task_of(model, sets["forget"]), recovery.draw(labels_of(sets), 10, 0)
    settings = UnlearnConfig().with_overrides({"ascent.scope": ["body.7", "head"]})
    example = sets["forget"].inputs[:4]
    part = Layers.of_names(model, task, ["body.7", "head"], example, settings) if deep else Head.of(model, task)
    found = probed(model, sets, part, drawn)

    with torch.no_grad():
        features = {name: model.body(samples.inputs).double().numpy() for name, samples in sets.items()}
    labels = labels_of(sets)
    fit = np.concatenate([features[name][drawn.shown[name]] for name in ("forget", "retain")])
    wanted = np.concatenate([labels[name][drawn.shown[name]] for name in ("forget", "retain")])
    mean, deviation = fit.mean(0), fit.std(0)
    deviation[deviation == 0] = 1
    head = LogisticRegression(max_iter=1000).fit((fit - mean) / deviation, wanted)
    scores = {
        name: head.score((features[name][marks] - mean) / deviation, labels[name][marks])
        for name, marks in drawn.held.items()
    }
    assert accuracy(model, sets["forget"].inputs, sets["forget"].labels) == 0
    assert found["accuracy"] == pytest.approx(scores["forget"], abs=1.5 / drawn.held["forget"].sum())
    assert found["accuracy"] > 0.9
    assert found["test"]["accuracy"] == pytest.approx(scores["test"], abs=1.5 / drawn.held["test"].sum())
    assert (found["rows"], found["labelled"], found["classes"]) == (drawn.held["forget"].sum(), 100, 10)


class Every(nn.Module):
    """Every kind of layer whose weight is rounded, in float64."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.mixed = Conv1D(6, 3)
        self.head = nn.Linear(6, 5)
        self.double()

    def forward(self, x):
        return self.head(self.mixed(self.norm(self.up(self.conv(x))).mean((2, 3))))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_on_a_grid_of_each_output_channel(bits):
    model = Every().eval()
    with torch.no_grad():
        model.head.weight[2] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = quantisation.quantised(model, bits).state_dict()
    channels = {"conv.weight": 0, "up.weight": 1, "mixed.weight": 1, "head.weight": 0}
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), "the model itself stays"
        if name not in channels:
            assert torch.equal(after[name], value)
            continue
        rows, found = (np.moveaxis(each[name].numpy(), channels[name], 0) for each in (before, after))
        levels = 2 ** (bits - 1) - 1
        for row, got in zip(rows.reshape(len(rows), -1), found.reshape(len(rows), -1), strict=True):
            step = max(abs(number) for number in row) / levels
            wanted = [round(number / step) * step if step else 0.0 for number in row]
            assert got == pytest.approx(wanted, rel=1e-12)
            assert len(np.unique(got)) <= 2 * levels + 1
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_as_many_bits_as_there_are_nothing_is_rounded(dtype):
    model = Every().to(dtype)
    assert all(map(torch.equal, quantisation.quantised(model, 32).state_dict().values(), model.state_dict().values()))


def attack(model, sets, drawn, **settings):
    task = task_of(model, sets["forget"])
    read = lambda name, marks: open_source(Pairs(sets[name].inputs[marks], sets[name].labels[marks]), ForgetSetConfig())
    config = UnlearnConfig().with_overrides({f"audit.{key}": value for key, value in settings.items()})
    return Attack.of(model, task, drawn, read, config, "cpu")


def test_where_nothing_is_changed_recovery_is_the_accuracy_of_the_model(known, monkeypatch):
    model, sets = known
    sound = train_digits(sets["retain"].inputs, sets["retain"].labels, epochs=1)
    drawn = recovery.draw(labels_of(sets), 10, 0)
    monkeypatch.setattr(quantisation, "BITS", (32,))
    for each in (model, sound):
        tried = attack(each, sets, drawn, recovery_steps=1, recovery_learning_rate=1e-9)
        kept = drawn.kept["retain"]
        own = {
            "whole": accuracy(each, sets["forget"].inputs, sets["forget"].labels),
            "held": accuracy(
                each, *(part[drawn.held["forget"]] for part in (sets["forget"].inputs, sets["forget"].labels))
            ),
            "kept": accuracy(each, sets["retain"].inputs[kept], sets["retain"].labels[kept]),
        }
        rounded, relearnt = tried("quantise"), tried("relearn")
        assert (rounded["32"]["accuracy"], rounded["rows"]) == (own["whole"], len(sets["forget"]))
        assert rounded["32"]["retain"]["accuracy"] == pytest.approx(own["kept"])
        assert relearnt["steps"] == [0, 1]
        assert relearnt["accuracy"][0] == own["held"]
        assert relearnt["retain"]["accuracy"][0] == pytest.approx(own["kept"])


def break_off(test):
    raise RuntimeError("no room")


def no_network(test):
    raise ConnectionError("try again")


def test_an_attack_that_breaks_off_is_a_reason_and_what_may_pass_is_tried_again():
    assert attempt(lambda test: {"accuracy": 1.0}, "probe") == {"accuracy": 1.0}
    assert attempt(break_off, "probe") == "it failed (RuntimeError: no room)"
    with pytest.raises(ConnectionError):
        attempt(no_network, "probe")


def small(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))
    model = nn.Sequential(body, nn.Linear(12, 5)).double().eval()
    model[0][2].running_var.uniform_(0.5, 2)
    return model


def test_relearning_takes_the_steps_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    inputs, labels = (
        torch.randn(60, 1, 6, 6, generator=generator).double(),
        torch.randint(5, (60,), generator=generator),
    )
    model, plain, rate = small(), small(), 0.05
    task = task_of(model, Pairs(inputs, labels))
    model[0][1].weight.requires_grad_(False)  # an attacker moves it all the same
    optimiser = torch.optim.SGD(relearning.moving(model), rate)
    others = {"forget": batches(inputs[20:40], labels[20:40]), "retain": batches(inputs[40:], labels[40:])}
    found = relearning.relearn(model, task, batches(inputs[:20], labels[:20]), others, 7, optimiser)
    assert found["steps"] == [0, 1, 2, 5, 7]
    losses, kept = [], []
    for step in range(8):
        if step in found["steps"]:
            with torch.no_grad():
                losses.append(float(nn.functional.cross_entropy(plain(inputs[20:40]), labels[20:40])))
                kept.append(accuracy(plain, inputs[40:], labels[40:]))
        loss = nn.functional.cross_entropy(plain(inputs[:20]), labels[:20])
        for parameter, grad in zip(
            plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True
        ):
            with torch.no_grad():
                parameter -= rate * grad
    assert found["loss"] == pytest.approx(losses, rel=1e-9)
    assert found["retain"]["accuracy"] == pytest.approx(kept)
    assert losses[-1] != losses[0]


def test_steps_that_end_in_no_number_are_not_reported():
    inputs, labels = torch.full((20, 1, 6, 6), 1e150, dtype=torch.float64), torch.arange(20) % 5
    model = small()
    task = task_of(model, Pairs(inputs, labels))
    optimiser = torch.optim.SGD(relearning.moving(model), 1e300)
    found = relearning.relearn(model, task, batches(inputs, labels), {"forget": batches(inputs, labels)}, 5, optimiser)
    assert found["steps"] == [0]
    assert found["ended"] == "the loss is not finite after step 1"
    assert np.isfinite(found["loss"]).all()


@pytest.mark.parametrize("make", [gpt2, llama, lambda: lora(llama())])
def test_adapters_relearn_as_in_a_plain_loop_of_peft_and_the_model_stays(make):
    from peft import LoraConfig, get_peft_model

    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = SequenceTask(ForgetSetConfig(), positions=7, num_classes=13)
    labels = torch.cat([TOKENS[:, 1:], torch.full((5, 1), IGNORE)], 1)
    whole = [Batch(TOKENS[:3], labels[:3], list("abc")), Batch(TOKENS[3:], labels[3:], list("de"))]
    wrapped = relearning.with_adapters(model, 5)
    adapters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    found = relearning.relearn(
        wrapped, task, whole, {"forget": whole}, 5, torch.optim.AdamW(adapters, 1e-2, weight_decay=0)
    )

    plain = make()
    plain = plain.merge_and_unload() if hasattr(plain, "merge_and_unload") else plain
    fan = {"fan_in_fan_out": True} if make is gpt2 else {}
    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **fan)
    plain = get_peft_model(plain, config).eval()
    optimiser = torch.optim.AdamW([each for each in plain.parameters() if each.requires_grad], 1e-2, weight_decay=0)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(plain(TOKENS).logits[:, :-1].transpose(1, 2), TOKENS[:, 1:])
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert found["loss"] == pytest.approx([losses[step] for step in found["steps"]], rel=1e-5)
    assert losses[5] < losses[0]
    assert found["probability"][-1] > found["probability"][0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_of_another_kind_is_not_given_adapters_and_the_reason_is_told(known):
    model, sets = known
    found = attack(model, sets, recovery.draw(labels_of(sets), 10, 0))("lora")
    assert found == "the model is none of Hugging Face's"


def test_what_cannot_be_measured_is_named_with_its_reason(known):
    model, sets = known
    task, labels = task_of(model, sets["forget"]), labels_of(sets)
    reason = lambda test, labels, task=task: recovery.unable(test, task, labels, recovery.draw(labels, 10, 0))
    assert [reason(test, labels) for test in ("probe", "relearn", "quantise")] == [None] * 3
    assert reason("lora", labels) == "LoRA relearning is of language models"
    assert "of one class only; an evaluation set" in reason("probe", {"forget": labels["forget"]})
    few = {"forget": labels["forget"][:12], "retain": labels["retain"]}
    assert "6 rows of the forget set are left" in reason("probe", few)
    assert reason("quantise", few) is None
    assert "one row, which is measured" in reason("relearn", {"forget": np.arange(12)})
    sentences = SequenceTask(ForgetSetConfig(), positions=7, num_classes=13)
    tokens = {"forget": np.zeros((30, 7), np.int64)}
    assert "sequences, which are of no class" in reason("probe", tokens, sentences)
    assert reason("lora", tokens, sentences) is None
    assert "looked up by their embeddings" in reason("probe", labels, ReidTask(ForgetSetConfig(), "head", 10))


def test_rows_are_read_again_by_their_places_in_what_was_given(known):
    samples = known[1]["test"]
    source = open_source(samples, ForgetSetConfig())
    part = recovery.PartSource(source, np.array([3, 10, 20, 30, 40]))
    marks = np.array([True, False, True, False])  # of the samples with features, one row having been left out
    read = recovery.rows_of("test", marks, {"test": np.array([3, 10, 30, 40])}, {"test": part})
    assert read.read(0, 2).ids == source.read(3, 4).ids + source.read(30, 31).ids


def test_of_sequences_only_some_of_those_to_forget_are_given():
    drawn = recovery.draw({"forget": np.zeros((30, 7), np.int64), "test": np.zeros((20, 7), np.int64)}, 4, 0)
    assert drawn.shown.keys() == {"forget"}
    assert (drawn.shown["forget"].sum(), drawn.held["forget"].sum(), drawn.kept["test"].sum()) == (4, 26, 20)
