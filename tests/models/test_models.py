import json
import pickle
import sys

import pytest
import torch
import torchvision
from architectures import LogProbabilities, Named, NoHead, named
from safetensors.torch import save_file
from samples import tensors
from torch import nn

from imu_ray.config import ForgetSetConfig
from imu_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from imu_ray.models.checkpoint import load_checkpoint, model_hash
from imu_ray.models.head import find_head
from imu_ray.models.spec import ModelSpec
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask

EXAMPLE = tensors(2)[0]


@pytest.mark.parametrize("name", ["fc", "classifier.6", "heads.head", "head"])
def test_the_head_is_found_under_any_name(name):
    assert find_head(named(name), EXAMPLE) == name


TORCHVISION = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "densenet121": "classifier", "efficientnet_b0": "classifier.1",
    "googlenet": "fc",
    "maxvit_t": "classifier.5", "mnasnet0_5": "classifier.1", "mobilenet_v2": "classifier.1", "mobilenet_v3_small": "classifier.3",
    "regnet_y_400mf": "fc", "resnet18": "fc", "shufflenet_v2_x0_5": "fc", "swin_t": "head", "vgg11": "classifier.6",
    "vit_b_32": "heads.head",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", TORCHVISION)
def test_the_head_of_torchvision_classifiers_is_found(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    assert find_head(model, torch.randn(1, 3, 224, 224)) == TORCHVISION[name]


def test_a_head_registered_before_the_backbone_is_found():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 3)
            self.first = nn.Linear(36, 4)

        def forward(self, x):
            return self.out(self.first(x.flatten(1)).relu())

    assert find_head(Reversed(), EXAMPLE) == "out"


def test_a_model_without_linear_layer_is_refused():
    with pytest.raises(UnsupportedModelError, match="no linear layer gives the output of NoHead itself.*layers: none"):
        find_head(NoHead(), EXAMPLE)


def test_a_model_with_something_after_its_head_is_refused_and_its_layers_listed():
    with pytest.raises(
        UnsupportedModelError, match=r"no linear layer gives the output.*body.5 \(32 -> 12\), fc \(12 -> 5\)"
    ):
        find_head(LogProbabilities(), EXAMPLE)


def test_a_named_head_is_checked_too():
    assert find_head(named("fc"), EXAMPLE, "fc") == "fc"
    with pytest.raises(UnsupportedModelError, match="no linear layer gives the output"):
        find_head(named("fc"), EXAMPLE, "body.5")
    with pytest.raises(UnsupportedModelError, match="model.head is 'fcc'.*did you mean fc"):
        find_head(named("fc"), EXAMPLE, "fcc")


def test_a_head_that_shares_its_weight_is_refused():
    model = named("fc", classes=12)
    model.spare = nn.Linear(12, 12)
    model.spare.weight = model.fc.weight
    with pytest.raises(UnsupportedModelError, match=r"shares its weight with spare\.weight"):
        find_head(model, EXAMPLE)


def test_a_model_that_returns_no_logits_is_refused():
    model = named("fc")
    model.fc = nn.Sequential(model.fc, nn.Unflatten(1, (5, 1)))
    with pytest.raises(UnsupportedModelError, match=r"returned \[2, 5, 1\]; expected logits"):
        find_head(model, EXAMPLE)


@pytest.mark.parametrize("bias", [True, False])
def test_a_changed_head_changes_the_heads_tensors_and_nothing_else(bias):
    model = named("heads.head", bias=bias)
    head = Head.of(model, ClassificationTask(ForgetSetConfig(), "heads.head", 5))
    changed = head.changed({head.name: head.matrix_CD + 1}).apply(model)
    differ = [key for key, value in model.state_dict().items() if not torch.equal(value, changed.state_dict()[key])]
    assert differ == ["heads.head.weight"] + (["heads.head.bias"] if bias else [])
    assert torch.equal(head.apply(model).heads.head.weight, model.heads.head.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_features_are_those_of_the_model(bias):
    model = named("fc", bias=bias).double()
    inputs = EXAMPLE.double()
    torch.testing.assert_close(
        Head.of(model, ClassificationTask(ForgetSetConfig(), "fc", 5)).logits(model.body(inputs)),
        model(inputs),
        rtol=1e-13,
        atol=1e-14,
    )


def spec(path, **options):
    return ModelSpec("architectures:named", kwargs={"name": "fc"}, checkpoint=str(path), **options)


@pytest.mark.parametrize("form", ["safetensors", "plain", "nested"])
def test_a_checkpoint_is_loaded_bit_by_bit(tmp_path, form):
    model = named("fc", seed=5)
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict() if form == "plain" else {"state_dict": model.state_dict(), "epoch": 3}, path)
    assert model_hash(spec(path).build()) == model_hash(model)


def test_a_checkpoint_that_does_not_fit_lists_what_is_wrong(tmp_path):
    state = named("fc").state_dict()
    state["fc.weight"] = torch.zeros(7, 12)
    state["extra"] = state.pop("fc.bias")
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"missing: fc.bias; unexpected: extra; misshapen: fc.weight \[7, 12\] instead of \[5, 12\]",
    ):
        load_checkpoint(named("fc"), tmp_path / "x.safetensors")


STATES = {
    "keys that are no names": {1: torch.ones(2)},
    "a sparse tensor": {"fc.weight": torch.eye(5, 12).to_sparse()},
    "a meta tensor": {"fc.weight": torch.ones(5, 12, device="meta")},
    "no mapping": [torch.ones(2)],
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("case", STATES)
def test_a_checkpoint_that_is_no_mapping_of_names_to_dense_tensors_is_refused(case, tmp_path):
    torch.save(STATES[case], tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match="x.pt holds no state dict; expected a mapping from parameter names to dense tensors"
    ):
        load_checkpoint(named("fc"), tmp_path / "x.pt")


def test_complex_weights_do_not_lose_their_imaginary_part(tmp_path):
    save_file({**named("fc").state_dict(), "fc.weight": torch.ones(5, 12) * 1j}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"misshapen: fc.weight \[5, 12\] complex instead of \[5, 12\]"):
        load_checkpoint(named("fc"), tmp_path / "x.safetensors")


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "foo://x", "/tmp"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(CheckpointError, match="cannot be read: .*File name too long|does not exist|cannot be opened"):
        load_checkpoint(named("fc"), path)


class Exploit:
    def __reduce__(self):
        return (open, ("/tmp/imu_ray_exploit", "w"))


def test_a_checkpoint_with_pickled_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"fc.weight": Exploit()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(CheckpointError, match="holds pickled code, which is never run"):
            load_checkpoint(named("fc"), tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_broken_or_missing_checkpoint_is_refused_by_name(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name} does not exist"):
        load_checkpoint(named("fc"), tmp_path / name)
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(named("fc"), tmp_path / name)


def refuse():
    raise KeyError("size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "nowhere.at_all:model"}, "cannot be imported"),
        ({"factory": "architectures:nobody"}, "cannot be imported"),
        ({"factory": "resnet81"}, "did you mean"),
        ({"factory": "architectures:named", "kwargs": {"colour": 1}}, "refused kwargs"),
        ({"factory": "architectures:tensors"}, "cannot be imported"),
        ({"factory": "builtins:dict"}, "returned dict; expected a torch.nn.Module"),
        ({"factory": ":x"}, "cannot be imported .ValueError: Empty module name"),
        ({"factory": refuse}, r"model.factory '.*test_models:refuse' refused kwargs \{\}: KeyError"),
        ({"factory": 3}, "model.factory is 3; expected text or a callable"),
        ({"factory": named, "kwargs": [1]}, r"model.kwargs is \[1\]; expected a mapping"),
        ({"factory": named, "checkpoint": 3}, "model.checkpoint is 3; expected a path or URI"),
        ({"factory": named, "head": ["fc"]}, r"model.head is \['fc'\]; expected the name of a layer"),
    ],
)
def test_a_spec_that_builds_no_model_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec(**options).build()


def test_a_torchvision_name_builds_with_its_keyword_arguments():
    assert ModelSpec("resnet18", kwargs={"num_classes": 3}).build().fc.out_features == 3


def test_a_callable_builds_and_is_recorded_by_its_name():
    spec = ModelSpec(
        named, {"name": "fc", "seed": 3, "widths": (1, 2), "dtype": torch.float32, "scale": float("nan")}, "x.pt", "fc"
    )
    described = {"name": "fc", "seed": 3, "widths": [1, 2], "dtype": "dtype", "scale": "NaN"}
    assert spec.describe() == {
        "factory": "architectures:named",
        "kwargs": described,
        "checkpoint": "x.pt",
        "head": "fc",
        "merge_adapter": False,
        "gradient_checkpointing": False,
    }
    json.dumps(spec.describe(), allow_nan=False)
    assert model_hash(ModelSpec(named, {"name": "fc", "seed": 3}).build()) == model_hash(named("fc", seed=3))
    assert ModelSpec("architectures:Named", {"name": "fc"}).describe()["factory"] == "architectures:Named"


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "nets_of_this_folder.py").write_text(
        "import torch\nclass Nets:\n    small = staticmethod(lambda: torch.nn.Linear(3, 2))"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert ModelSpec("nets_of_this_folder:Nets.small").build().out_features == 2


def test_a_head_of_one_class_is_refused():
    with pytest.raises(
        UnsupportedModelError,
        match="the head 'fc' has 12 inputs and 1 outputs; expected features, and 2 classes or more",
    ):
        find_head(named("fc", classes=1), EXAMPLE)


def test_the_hash_sees_every_tensor():
    model = named("fc")
    before = model_hash(model)
    model.body[1].running_mean[0] += 1e-6
    assert model_hash(model) != before
    assert model_hash(Named("fc")) != before
