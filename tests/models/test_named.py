"""Classifiers of timm and of Hugging Face: built, headed, scored and written so that their own library opens them."""

import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from samples import pairs
from scores import scored
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from imu_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from imu_ray.models.head import find_head
from imu_ray.models.layers import logits_of
from imu_ray.models.pretrained import save_pretrained
from imu_ray.models.spec import ModelSpec
from imu_ray.run.directory import RunDirectory

TIMM = {"num_classes": 5, "in_chans": 1, "img_size": 32}
PREPROCESSOR = '{"image_mean": [0.5], "image_processor_type": "ViTImageProcessor", "size": {"height": 6, "width": 6}}'


def vit(labels=5, **settings):
    """A vision transformer of Hugging Face's for the pictures of the tests."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"image_size": 6, "patch_size": 2, "num_channels": 1, "num_labels": labels, **sizes, **settings}
    model = ViTForImageClassification(ViTConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """Writes a classifier, and the settings of its preprocessing beside it."""

    def write(model, name="source"):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(PREPROCESSOR)
        return str(tmp_path / name)

    return write


def test_a_model_of_timm_is_built_with_random_weights_and_its_head_is_found():
    model = ModelSpec("timm:test_vit", TIMM).build()
    assert find_head(model, torch.randn(2, 1, 32, 32)) == "head"
    assert (model.head.out_features, model.training, model.pretrained_cfg["tag"]) == (5, False, "r160_in1k")
    assert ModelSpec("timm:test_vit", TIMM).describe()["factory"] == "timm:test_vit"


def test_the_weights_of_a_model_of_timm_come_from_a_checkpoint_and_go_back_to_timm(tmp_path):
    given = timm.create_model("test_vit", **TIMM).eval()
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    model = ModelSpec("timm:test_vit", TIMM, tmp_path / "given.safetensors").build()
    with torch.no_grad():
        model.head.weight += 1
    RunDirectory(tmp_path / "run").write_model("model.safetensors", model)
    again = timm.create_model("test_vit", checkpoint_path=str(tmp_path / "run" / "model.safetensors"), **TIMM).eval()
    inputs = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(inputs), model(inputs))
    assert torch.equal(again.patch_embed.proj.weight, given.patch_embed.proj.weight)
    assert not torch.equal(again(inputs), given(inputs))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("timm:test_vitt", {}, r"'timm:test_vitt', which timm [\d.]+ does not have; did you mean test_vit"),
        ("timm:qqqqqqqqqq", {}, r"does not have; expected one of timm.list_models\(\)"),
        ("timm:test_vit", {"colour": 1}, "model.factory 'timm:test_vit' refused kwargs {'colour': 1}: TypeError"),
    ],
)
def test_a_model_that_timm_does_not_have_or_build_is_refused(name, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec(name, kwargs).build()


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"'timm:test_vit', which cannot be built: .*timm.*pip install imu-ray\[timm\]"
    ):
        ModelSpec("timm:test_vit").build()


def test_a_classifier_of_hugging_faces_is_read_and_written_with_its_preprocessing(folder, tmp_path):
    given = vit()
    model = ModelSpec(f"hf:{folder(given)}").build()
    inputs = torch.randn(3, 1, 6, 6)
    assert isinstance(model, ViTForImageClassification)
    assert torch.equal(model(inputs).logits, given(inputs).logits)
    assert find_head(model, inputs) == "classifier"
    with torch.no_grad():
        model.classifier.weight += 1
    RunDirectory(tmp_path / "run").write_folder("model", lambda path: save_pretrained(model, path))
    written = tmp_path / "run" / "model"
    again = AutoModelForImageClassification.from_pretrained(written)
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert AutoImageProcessor.from_pretrained(written, backend="pil").image_mean in ([0.5], (0.5,))
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "source", written))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"classifier.weight"}
    assert before.keys() == after.keys()


def headless(folder):
    """A folder of which the classifier's tensors were lost."""
    path = folder(vit())
    state = load_file(f"{path}/model.safetensors")
    kept = {name: value for name, value in state.items() if "classifier" not in name}
    save_file(kept, f"{path}/model.safetensors", {"format": "pt"})
    return path


def of_architecture(folder, name):
    config = Path(folder(vit())) / "config.json"
    config.write_text(config.read_text().replace("ViTForImageClassification", name))
    return config.parent


@pytest.mark.parametrize(
    ("path", "settings", "error", "message"),
    [
        (headless, {}, CheckpointError, "holds no classifier.bias, classifier.weight of ViTForImageClassification"),
        (lambda folder: folder(vit()), {"num_labels": 7, "ignore_mismatched_sizes": True}, CheckpointError, "holds no"),
        (lambda folder: folder(vit()), {"trust_remote_code": True}, ConfigError, "runs code from the model's folder"),
        (lambda folder: of_architecture(folder, "ViTForMaskedImageModeling"), {}, ConfigError, "architecture ViTForMasked"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_whole_classifier_is_refused(path, settings, error, message, folder):
    with pytest.raises(error, match=message):
        ModelSpec(f"hf:{path(folder)}", settings).build()


def test_a_folder_of_settings_without_weights_has_no_skeleton_because_its_head_is_told_from_numbers(tmp_path):
    config = vit().config
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    assert ModelSpec(f"hf:{tmp_path}").skeleton() is None


class Logits(nn.Module):
    """The logits of a model that gives them in an object."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs).logits


def test_scores_of_a_classifier_of_hugging_faces_are_those_of_plain_autograd():
    model, samples = vit().double(), pairs(11, dtype=torch.float64)
    found = scored(model, samples)
    assert (found.task.head, found.task.num_classes) == ("classifier", 5)
    expected = oracle.influence(Logits(model), "inner.classifier", samples.inputs, samples.labels)
    assert np.abs(found.influence - expected).max() <= 1e-10 * np.abs(expected).max()


def test_a_model_that_gives_neither_logits_nor_an_object_with_them_is_refused():
    with pytest.raises(UnsupportedModelError, match="the model returned tuple; expected a tensor, or logits in it"):
        logits_of((torch.zeros(1, 2),))
