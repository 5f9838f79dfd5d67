import pytest
import torch
from architectures import CosineLinear, Scaled, Twice, named
from samples import tensors
from torch import nn

from imu_ray.errors import ConfigError, UnsupportedModelError
from imu_ray.models.choice import choose_layers
from tests.benchmarks.nets import SmallResNet, SmallViT

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EXAMPLE = tensors(2)[0]


class Reversed(nn.Module):
    """Layers registered against the order in which they run."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.last = nn.ModuleDict({"b": nn.Linear(8, 4), "a": nn.Linear(8, 8)})
        self.first = nn.Linear(36, 8)

    def forward(self, x):
        return self.out(self.last["b"](self.last["a"](self.first(x.flatten(1)).relu()).relu()))


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("head", ["out"]),
        ("last:1", ["out"]),
        ("last:3", ["last.a", "last.b", "out"]),
        ("all", ["first", "last.a", "last.b", "out"]),
        (["last"], ["last.a", "last.b"]),
        (("out", "*.a", "last.a"), ["last.a", "out"]),
        (["*"], ["first", "last.a", "last.b", "out"]),
    ],
)
def test_layers_come_in_order_of_execution(scope, expected):
    model = Reversed().train()
    assert choose_layers(model, EXAMPLE, scope, "out") == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pattern_means_every_layer_below_a_module_and_no_name_that_only_starts_alike():
    model = SmallResNet()
    stage3 = ["stage3.0.0", "stage3.1.body.0.0", "stage3.1.body.1.0"]
    assert choose_layers(model, IMAGES, ["stage3"], "fc") == stage3
    assert choose_layers(model, IMAGES, ["stage?.1.body", "fc"], "fc") == [*stage3[1:], "fc"]
    with pytest.raises(
        ConfigError, match=r"ascent.scope names 'stage', which matches no layer of SmallResNet; did you mean stage"
    ):
        choose_layers(model, IMAGES, ["stage3", "stage"], "fc")


def test_layers_of_a_block_of_attention_are_chosen_by_a_glob():
    assert choose_layers(SmallViT(depth=2), IMAGES, ["*.qkv"], "head") == ["blocks.0.qkv", "blocks.1.qkv"]
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)  # which calls no layer of its own without gradients
    model = nn.Sequential(nn.Flatten(1, 2), encoder, nn.Flatten(), nn.Linear(36, 3))
    assert choose_layers(model, EXAMPLE, "last:3", "3") == ["1.linear1", "1.linear2", "3"]


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (
            "last:x",
            r"ascent.scope is 'last:x'; expected head, all, usable, adapters, last:N or a list of module patterns",
        ),
        ("last:0", r"ascent.scope is 'last:0'"),
        ("body", r"ascent.scope is 'body'"),
        ([], r"ascent.scope is \[\]"),
        (["body", ""], r"ascent.scope is \['body', ''\]"),
        ([3], r"ascent.scope is \[3\]"),
        (
            "last:4",
            r"ascent.scope is 'last:4'; expected at most last:3, because Named has 3 linear and convolutional layers",
        ),
        (["bdy"], r"ascent.scope names 'bdy', which matches no layer of Named; did you mean body"),
        (["body.1"], r"ascent.scope names 'body.1', but there is no linear or convolutional layer in body.1; expected"),
    ],
)
def test_a_scope_that_names_no_layers_is_refused(scope, message):
    with pytest.raises(ConfigError, match=message):
        choose_layers(named("fc"), EXAMPLE, scope, "fc")


@pytest.mark.parametrize("scope", ["all", "usable"])
def test_a_model_without_a_layer_that_can_be_changed_is_refused(scope):
    with pytest.raises(UnsupportedModelError, match="but Embedding has no layer that can be changed; expected layers"):
        choose_layers(nn.Embedding(5, 3).eval(), torch.zeros(2, 4, dtype=torch.int64), scope, "")


class Odd(nn.Module):
    """A layer of a kind that is given, before the head."""

    def __init__(self, odd, run=lambda self, x: self.odd(x)):
        super().__init__()
        self.odd, self.run, self.fc = odd, run, nn.Linear(36, 3)

    def forward(self, x):
        return self.fc(self.run(self, x).flatten(1))


def tied():
    model = Odd(nn.Linear(6, 6), lambda self, x: self.other(self.odd(x)))
    model.other = nn.Linear(6, 6)
    model.other.weight = model.odd.weight
    return model


def without_gradient(self, x):
    with torch.no_grad():
        return self.odd(x)


ODD = {
    "is called 0 times": Odd(nn.Linear(6, 6), lambda self, x: x),
    "is called 2 times": Odd(nn.Linear(6, 6), lambda self, x: self.odd(self.odd(x))),
    "shares its weight with other.weight": tied(),
    "has a computed weight": Odd(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
    "is a ConvTranspose2d": Odd(nn.ConvTranspose2d(1, 1, 1)),
    "is a Conv3d": Odd(nn.Conv3d(1, 1, 1), lambda self, x: self.odd(x[:, None])),
    "padding_mode='circular'": Odd(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
    "is a CosineLinear with a forward of its own": Odd(CosineLinear(6, 6)),
    "gets no gradient": Odd(nn.Linear(6, 6), without_gradient),
}


@pytest.mark.parametrize("reason", ODD)
def test_a_layer_that_cannot_be_changed_by_itself_is_refused_by_name_but_never_counted(reason):
    model = ODD[reason]
    for scope in ("all", ["odd"], ["fc", "o?d"]):
        with pytest.raises(UnsupportedModelError, match=f"'odd' .*{reason}"):
            choose_layers(model, EXAMPLE, scope, "fc")
    assert choose_layers(model, EXAMPLE, ["fc"], "fc") == choose_layers(model, EXAMPLE, "last:1", "fc") == ["fc"]
    with pytest.raises(ConfigError, match="expected at most last:1"):
        choose_layers(model, EXAMPLE, "last:2", "fc")


def test_a_head_that_cannot_be_changed_is_not_left_out_silently():
    with pytest.raises(ConfigError, match="expected at most last:0"):
        choose_layers(Twice(), EXAMPLE, "last:1", "inner.fc")
    assert choose_layers(Scaled(), EXAMPLE, "last:2", "inner.fc") == ["inner.body.5", "inner.fc"]


def test_a_layer_that_gets_its_input_by_keyword_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.relu(self.body(input=x)))

    with pytest.raises(UnsupportedModelError, match="'body' is called with its input as a keyword"):
        choose_layers(Named(), torch.randn(3, 4), "all", "head")
    assert choose_layers(Named(), torch.randn(3, 4), "last:1", "head") == ["head"]
