import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from architectures import named
from ray import cloudpickle
from torch import nn
from torch.nn.functional import cross_entropy

from imu_ray.models.choice import choose_layers
from imu_ray.models.cut import Cut
from imu_ray.models.head import find_head
from tests.benchmarks.nets import PlainCNN, SmallResNet, SmallViT

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7)


def zoo(name):
    return torchvision.models.get_model(name, weights=None, num_classes=7)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CUTS = {  # what crosses, for one sample
    "resnet, head": (SmallResNet, "last:1", [(192,)]),
    "resnet, a residual branch": (SmallResNet, ["stage3.1.body.1"], [(192, 4, 4), (192, 4, 4)]),
    "resnet, a stage": (lambda: zoo("resnet18"), ["layer4"], [(256, 2, 2)]),
    "plain": (PlainCNN, "last:2", [(512,)]),
    # A block's input crosses, its normalised input is made again.
    "vit, a block": (lambda: SmallViT(depth=2), ["blocks.1"], [(64, 96)]),
    "vit, after attention": (lambda: SmallViT(depth=2), ["blocks.1.fc2"], [(64, 96), (64, 192)]),
    "vit with a class token": (vit, ["encoder.layers.encoder_layer_1.mlp"], [(17, 32)]),
    "mobilenet": (lambda: zoo("mobilenet_v3_small"), ["features.11", "classifier.0"], [(96, 1, 1)]),
    "convnext": (lambda: zoo("convnext_tiny"), "last:2", [(768, 1, 1), (1, 1, 3072)]),
}


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", CUTS)
def test_two_parts_give_the_models_logits_and_gradients_bit_for_bit(name):
    make, scope, shapes = CUTS[name]
    model = make().eval()
    layers = choose_layers(model, IMAGES, scope, find_head(model, IMAGES))
    cut = Cut.of(model, IMAGES, layers)
    assert (cut.reason, list(cut.shapes), cut.dtype) == ("", shapes, torch.float32)
    labels = torch.tensor([0, 3, 1, 6])
    own = [parameter for layer in layers for parameter in model.get_submodule(layer).parameters()]
    for images in (IMAGES, IMAGES[:1]):
        values = cut.prefix(images)
        assert torch.equal(cut.suffix(values), model(images))
        losses = [cross_entropy(logits, labels[: len(images)]) for logits in (model(images), cut.suffix(values))]
        whole, part = (torch.autograd.grad(loss, own) for loss in losses)
        assert all(map(torch.equal, whole, part))
        joined = cut.join(values)
        assert joined.shape == (len(images), cut.width)
        assert all(map(torch.equal, cut.split(joined), values))


def test_parameters_are_changed_by_name_or_in_place_and_hooks_run():
    model = SmallResNet().eval()
    cut = Cut.of(model, IMAGES, ["stage3.0.0", "fc"])
    values = cut.prefix(IMAGES)
    weight = 2 * model.stage3[0][0].weight.detach()
    changed = cut.suffix(values, {"stage3.0.0.weight": weight})
    assert not torch.equal(changed, model(IMAGES))
    seen = []
    model.fc.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].shape, output)))
    with torch.no_grad():
        model.stage3[0][0].weight.copy_(weight)
    assert torch.equal(cut.suffix(values), changed)
    assert seen[0][0] == (4, 192)
    assert torch.equal(seen[0][1], changed)
    assert torch.equal(model(IMAGES), changed)


@pytest.mark.parametrize("scope", ["last:3", "all"])
def test_a_cut_travels_and_is_made_again_from_its_plan(scope):
    model = SmallResNet().eval()
    cut = Cut.of(model, IMAGES, choose_layers(model, IMAGES, scope, "fc"))
    expected = model(IMAGES)
    sent = cloudpickle.loads(cloudpickle.dumps(cut))
    again = Cut(copy.deepcopy(model), cloudpickle.loads(cloudpickle.dumps(cut.plan)))
    for other in (sent, again):
        assert other.plan == cut.plan
        assert torch.equal(other.suffix(other.prefix(IMAGES)), expected)
        assert torch.equal(cut.suffix(other.prefix(IMAGES)), expected)


def test_all_modules_keep_their_mode_and_what_the_cut_makes_is_in_eval_mode():
    model = named("fc").train()
    example = torch.randn(3, 1, 6, 6)
    cut = Cut.of(model, example, ["fc"])
    assert all(module.training for module in model.modules())
    assert not cut.trivial
    model.eval()
    assert torch.equal(cut.suffix(cut.prefix(example)), model(example))


class Net(nn.Module):
    """Three layers around a forward pass that is given."""

    def __init__(self, run):
        super().__init__()
        self.first, self.mid, self.fc, self.token = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            nn.Parameter(torch.ones(1, 6)),
        )
        self.run = run

    def forward(self, x, features=False):
        x = self.run(self, x)
        return x if features else self.fc(x)


def in_place(self, x):
    x = self.first(x)
    return x.add_(self.mid(2 * x))


def in_place_and_not_traced(self, x):
    return self.mid(x.mul_(2)) if x.sum() > -1e9 else x


def class_token(self, x):
    token = self.token.expand(x.shape[0], -1)
    return torch.stack([token, self.mid(self.first(x))], 1).mean(1)


def centred(self, x):
    x = self.first(x)
    return self.mid(x - x.mean(0))


def branches(self, x):
    return self.mid(x) if x.sum() > 0 else self.first(x)


def computed_weight(self, x):
    x = self.first(x)
    return self.mid(x) + x @ (2 * next(self.mid.parameters()))  # a constant for the tracer


def late_change(self, x):
    x = self.first(x)
    y = self.mid(x)
    return y + x.mul_(2)


def masked(self, x):
    x = self.first(x)
    return torch.where(x > 0, self.mid(x), x)


def mixed_types(self, x):
    x = self.first(x)
    return (self.mid(x) + x.sin().double()).float()


FALLBACKS = {
    centred: "depends on the other samples",
    branches: "TraceError: symbolically traced variables cannot be used as inputs to control flow",
    computed_weight: "other logits than the model",
    late_change: "other logits than the model",
    masked: "no tensor of floating-point numbers",
    mixed_types: "several types",
    (lambda self, x: self.mid(x)): "nothing crosses but the model's input",
}


@pytest.mark.parametrize("run", FALLBACKS)
def test_a_model_that_cannot_be_cut_is_cut_at_its_input(run):
    model = Net(run).eval()
    cut = Cut.of(model, ROWS, ["mid"])
    assert cut.trivial
    assert FALLBACKS[run] in cut.reason
    assert cut.shapes == ((6,),)
    assert cut.prefix(ROWS)[0] is ROWS
    weight = torch.eye(6)
    changed = cut.suffix((ROWS,), {"mid.weight": weight})
    with torch.no_grad():
        model.mid.weight.copy_(weight)
    assert torch.equal(changed, model(ROWS))


@pytest.mark.parametrize("run", [in_place, in_place_and_not_traced])
def test_values_are_not_changed_by_a_suffix_that_works_in_place(run):
    model = Net(run).eval()
    cut = Cut.of(model, ROWS, ["mid"])
    values = cut.prefix(ROWS.clone())
    first = cut.suffix(values)
    assert cut.plan.copied
    assert torch.equal(cut.suffix(values), first)
    assert torch.equal(first, model(ROWS.clone()))


def test_what_does_not_depend_on_a_sample_does_not_cross():
    model = Net(class_token).eval()
    cut = Cut.of(model, ROWS, ["mid"])
    assert cut.shapes == ((6,),)
    assert not cut.trivial
    assert cut.plan.sizes == {"getattr_1": (None, 6)}
    assert torch.equal(cut.suffix(cut.prefix(ROWS)), model(ROWS))


def test_one_sample_is_enough_of_an_example():
    assert not Cut.of(SmallViT(depth=2).eval(), IMAGES[:1], ["blocks.1.fc2"]).trivial


def test_nothing_is_kept_for_parameters_that_do_not_move():
    model = SmallViT(depth=4).eval()
    layers = [f"blocks.3.{name}" for name in ("fc1", "fc2")]
    moved = {f"{name}.weight": model.get_submodule(name).weight.detach().requires_grad_() for name in layers}
    trivial = Cut(model, replace(Cut.of(model, IMAGES, layers).plan, reason="not cut", shapes=((3, 32, 32),)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits = trivial.suffix((IMAGES,), moved)
        some, kept[:] = len(kept), []
        trivial.suffix((IMAGES,))
    assert some < len(kept) / 3, "only what follows the first of the layers"
    own = list(model.parameters())
    assert torch.autograd.grad(logits.sum(), own, allow_unused=True) == (None,) * len(own)
    assert all(parameter.requires_grad for parameter in own), "the model is as it was"
