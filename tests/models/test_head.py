"""What a classifier ends in, of every kind: found, refused, and scored as plain autograd scores it."""

from collections import OrderedDict

import numpy as np
import oracle
import pytest
import torch
import torchvision
from architectures import Averaged, backbone, same_state
from safetensors.torch import load_file
from samples import pairs, tensors
from scores import scored
from torch import nn
from torch.nn import functional

from imu_ray import UnlearnConfig, plan, unlearn
from imu_ray.errors import ConfigError, UnsupportedModelError
from imu_ray.models.head import Ending, find_ending, find_head
from imu_ray.scopes.base import FORGET_VIEWS
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.workers import Workers
from imu_ray.updates.objectives import OBJECTIVES

EXAMPLE = tensors(2)[0]


def ended(*layers):
    """A fixed random body of 12 features, and layers after it."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=backbone(), end=nn.Sequential(*layers))).eval()


def conv1d():
    from transformers.pytorch_utils import Conv1D

    head = Conv1D(5, 12)
    nn.init.normal_(head.weight)
    return head


class Squeezed(nn.Module):
    """SqueezeNet's ending: a 1x1 convolution to the classes, a ReLU, and the mean over positions."""

    def __init__(self, pooled=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(pooled))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.classifier(self.body(x)).flatten(1)


def squeezed(pooled=3, up=0.0):
    torch.manual_seed(0)
    model = Squeezed(pooled).eval()
    with torch.no_grad():
        model.classifier[1].bias += up
    return model


HEADS = {
    "linear": lambda: ended(nn.Linear(12, 5)),
    "linear without bias": lambda: ended(nn.Linear(12, 5, bias=False)),
    "1x1 convolution": lambda: ended(nn.Unflatten(1, (12, 1, 1)), nn.Conv2d(12, 5, 1), nn.Flatten()),
    "1x1 convolution without bias": lambda: ended(nn.Unflatten(1, (12, 1)), nn.Conv1d(12, 5, 1, bias=False), nn.Flatten()),
    "transposed": lambda: ended(conv1d()),
}  # fmt: skip
PLACES = dict.fromkeys(HEADS, "end.0") | {"1x1 convolution": "end.1", "1x1 convolution without bias": "end.1"}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_every_kind_is_found(kind):
    assert find_ending(HEADS[kind](), EXAMPLE) == Ending(PLACES[kind], 5, True)
    assert find_head(HEADS[kind](), EXAMPLE, PLACES[kind]) == PLACES[kind]


@pytest.mark.parametrize("scope", ["auto", "last:1"])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_of_a_head_of_every_kind_are_those_of_plain_autograd(kind, scope):
    model, samples = HEADS[kind]().double(), pairs(21, dtype=torch.float64)
    found = scored(model, samples, ascent__scope=scope)
    expected = oracle.influence(model, PLACES[kind], samples.inputs, samples.labels)
    gradients = oracle.per_sample_gradients(model, PLACES[kind], samples.inputs, samples.labels)
    assert (found.part.deep, found.config.ascent.deep) == (scope != "auto",) * 2
    assert np.abs(found.influence - expected).max() <= 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(found.gradient_norm, gradients.norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_moved_is_put_into_the_model_and_nothing_else_changes(kind):
    model = HEADS[kind]()
    part = scored(model, pairs(9)).part
    moved = part.changed({part.name: part.matrix_CD + 0.5})
    changed, place = moved.apply(model), PLACES[kind]
    differ = {key for key, value in model.state_dict().items() if not torch.equal(value, changed.state_dict()[key])}
    assert differ == {f"{place}.{key}" for key, _ in model.get_submodule(place).named_parameters()}
    features = model.body(EXAMPLE)
    torch.testing.assert_close(moved.logits(features).float(), changed(EXAMPLE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pooled", "up"), [(3, 0.0), (1, 0.0), (1, 100.0)])
def test_a_convolution_with_a_relu_after_it_is_no_head_also_where_every_logit_is_positive(pooled, up):
    model = squeezed(pooled, up)
    assert (up == 0) or bool((model(EXAMPLE) > 0).all())
    assert find_ending(model, EXAMPLE) == Ending("classifier.1", 5, False)
    with pytest.raises(UnsupportedModelError, match=r"no linear head: its last layer 'classifier.1' is a convolution"):
        find_head(model, EXAMPLE)


@pytest.mark.parametrize("pooled", [1, 3])
def test_auto_is_the_last_layer_of_such_a_model_and_its_scores_are_those_of_plain_autograd(pooled):
    model, samples = squeezed(pooled).double(), pairs(21, dtype=torch.float64)
    found = scored(model, samples)
    assert (found.config.ascent.scope, list(found.part.parameters)) == ("last:1", ["classifier.1"])
    assert (found.task.head, found.task.num_classes) == ("", 5)
    assert not found.part.cut.trivial, "what comes before the layer is computed once"
    expected = oracle.influence(model, "classifier.1", samples.inputs, samples.labels)
    assert np.abs(found.influence - expected).max() <= 1e-10 * np.abs(expected).max()


def test_the_gradient_of_an_ascent_on_such_a_model_is_that_of_plain_autograd():
    model, samples = squeezed().double(), pairs(21, dtype=torch.float64)
    found = scored(model, samples)
    weights = np.random.default_rng(0).random(21)
    scope = found.part.scope({"forget": FeatureStore(found.shards)}, Workers())
    assert FORGET_VIEWS not in scope.sets
    step = scope.batch_gradient(scope.parameters(), np.arange(21), weights, OBJECTIVES["ascent"], 5)
    losses = functional.cross_entropy(model(samples.inputs), samples.labels, reduction="none")
    layer = model.classifier[1]
    loss = -(torch.tensor(weights) * losses).sum() / weights.sum()
    expected = oracle.gradient_matrix(layer, torch.autograd.grad(loss, [layer.weight, layer.bias]))
    torch.testing.assert_close(step["classifier.1"], expected, rtol=1e-10, atol=1e-12)


def test_the_scope_head_of_such_a_model_is_refused_with_what_serves_it():
    message = "ascent.scope is 'head', but Squeezed ends in a convolution .* expected last:1, which auto chooses"
    with pytest.raises(ConfigError, match=message):
        scored(squeezed(), pairs(9), ascent__scope="head")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("influence__compile", True, "influence.compile is true with ascent.scope 'last:1'; expected false"),
        ("ascent__preconditioner", "full_ggn", "ascent.preconditioner is 'full_ggn' with ascent.scope 'last:1'"),
    ],
)
def test_settings_of_a_head_are_refused_where_auto_is_the_last_layer(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        scored(squeezed(), pairs(9), **{setting: value})


@pytest.mark.parametrize("size", [32, 64])
def test_torchvisions_squeezenet_ends_in_its_last_convolution_at_any_size(size):
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=5).eval()
    assert find_ending(model, torch.randn(1, 3, size, size)) == Ending("classifier.1", 5, False)


def test_a_mean_after_a_convolution_is_served_as_a_last_layer_too():
    assert find_ending(Averaged(), EXAMPLE) == Ending("conv", 5, False)


class Otherwise(nn.Module):
    """Ends in a convolution that is not 1x1, that has other outputs than the classes, or in one before another layer."""

    def __init__(self, kind):
        super().__init__()
        kernel, outputs = {"kernel": (3, 5), "outputs": (1, 10), "another": (1, 5)}[kind]
        self.conv = nn.Conv2d(1, outputs, kernel)
        self.after = nn.Conv2d(outputs, 5, 3) if kind == "another" else nn.Identity()

    def forward(self, x):
        return self.after(self.conv(x)).relu().mean((2, 3))[:, :5]


@pytest.mark.parametrize("kind", ["kernel", "outputs", "another"])
def test_a_model_that_ends_otherwise_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match=r"no linear layer gives the output of Otherwise .*layers: none"):
        find_ending(Otherwise(kind), EXAMPLE)


def test_a_named_head_that_is_followed_by_more_is_refused():
    with pytest.raises(UnsupportedModelError, match="no linear layer gives the output of Squeezed itself"):
        find_ending(squeezed(), EXAMPLE, "classifier.1")


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_such_a_model_says_what_auto_chose_and_goes_on_by_the_same_settings(tmp_path, caplog):
    model, evaluation = squeezed(), {"test": pairs(60, seed=2)}
    settings = UnlearnConfig.from_recipe("samples").with_overrides(
        {"ascent.stop.targets": {"forget.loss": 1.7}, "ascent.preconditioner_rows": 64}
    )
    with caplog.at_level("INFO", "imu_ray"):
        result = unlearn(model, pairs(40), evaluation=evaluation, config=settings, run_dir=tmp_path / "run")
    assert result.status == "reached"
    assert "scope chosen: scope=last:1 reason=" in caplog.text
    assert (result.record.config["ascent"]["scope"], result.record.model.layers) == ("last:1", ["classifier.1"])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    differ = {key for key, value in model.state_dict().items() if not torch.equal(value, saved[key])}
    assert differ == {"classifier.1.weight", "classifier.1.bias"}
    again = unlearn(model, pairs(40), evaluation=evaluation, config=settings, run_dir=tmp_path / "run")
    assert same_state(again.model, saved)
    assert plan(model, pairs(40), config=settings)["peak_bytes"]["object_store"] > 40 * 8 * 9 * 4
