"""Preprocessing by name: what a model is given is what the library of that name makes of the image."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
import torchvision
from PIL import Image
from samples import SMALL, halved, image_table, paper, png

from imu_ray import ConfigError, ForgetSetError, ModelSpec, score
from imu_ray.config import ForgetSetConfig
from imu_ray.data import Rows, ViewSource, open_source
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.tasks.preprocessing import find_preprocessing, named_for


def photo(seed=0, size=(40, 52)):
    return png(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def collate(value, **settings):
    return ClassificationTask(ForgetSetConfig(**settings), "fc", 5).collate(Rows(["a"], np.array([0]), [value]))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """A folder with an image processor."""
    from transformers import ViTImageProcessor

    made = ViTImageProcessor(size={"height": 24, "width": 20}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    folder = tmp_path_factory.mktemp("processor")
    made.save_pretrained(folder)
    return folder


def by_hand(name):
    if name.startswith("torchvision:"):
        return torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    if name.startswith("timm:"):
        settings = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("mixer_b16_224").to_dict())
        return timm.data.create_transform(**settings)

    def scaled(image):
        resized = np.asarray(image.resize((20, 24), Image.Resampling.BILINEAR), np.float64) / 255
        return torch.from_numpy((resized - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).permute(2, 0, 1)

    return scaled


@pytest.mark.parametrize("name", ["torchvision:ResNet18_Weights.DEFAULT", "timm:mixer_b16_224", "hf:"])
def test_an_input_is_what_the_library_makes_of_the_image(name, processor):
    made = collate(photo(), transform=f"hf:{processor}" if name == "hf:" else name).inputs[0]
    wanted = by_hand(name)(Image.open(io.BytesIO(photo())))
    # Its own resize rounds to 8 bits otherwise than Pillow's: one level of 255, over the smallest deviation.
    torch.testing.assert_close(made, wanted.float(), rtol=0, atol=1.01 / 255 / 0.5 if name == "hf:" else 0)


def test_a_callable_of_ones_own_is_given_the_image_in_the_mode_that_is_set():
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    made = collate(png(pixels), transform="samples:halved", image_mode="L").inputs
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made[0, 0], pixels / 510, rtol=1e-6)


def test_views_are_drawn_of_the_image_and_then_prepared():
    rows = ViewSource(open_source(image_table(3), ForgetSetConfig()), 8, "flip", 0).read(0, 24)
    settings = {"image_mode": "L", "transform": "samples:halved"}
    prepared = ClassificationTask(ForgetSetConfig(**settings), "fc", 5).collate(rows).inputs
    plain = ClassificationTask(ForgetSetConfig(image_mode="L"), "fc", 5).collate(rows).inputs
    torch.testing.assert_close(prepared, plain / 2, rtol=0, atol=1e-7)
    assert len(torch.unique(prepared[:8], dim=0)) == 2


def test_the_models_own_is_told_from_what_it_is(processor):
    own = ForgetSetConfig(transform="model")
    net = torchvision.models.resnet18()
    for weights in ("DEFAULT", "IMAGENET1K_V1", torchvision.models.ResNet18_Weights.DEFAULT):
        spec = ModelSpec("resnet18", kwargs={"weights": weights})
        assert named_for(own, spec, net).transform == "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    other = timm.create_model("resnet18.a1_in1k", num_classes=3)
    assert named_for(own, None, other).transform == "timm:resnet18.a1_in1k"
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.0, 0.0, 0.0)}
    with pytest.raises(ConfigError, match="settings of this model are not those that timm has for 'resnet18.a1_in1k'"):
        named_for(own, None, other)
    net.name_or_path = str(processor)
    assert named_for(own, None, net).transform == f"hf:{processor}"
    with pytest.raises(ConfigError, match="'model', but Linear does not say what its preprocessing is; expected a"):
        named_for(own, ModelSpec("resnet18"), torch.nn.Linear(1, 1))
    assert named_for(ForgetSetConfig(transform="samples:halved"), None, net).transform == "samples:halved"


NAMES = {
    "plain": ("halved", "forget_set.transform is 'halved'; expected 'torchvision:"),
    "unknown weights": ("torchvision:ResNet18_Weights.IMAGENET1K_V3", "did you mean .*ResNet18_Weights.IMAGENET1K_V1"),
    "an unknown model": ("timm:resnet19", "'timm:resnet19'; did you mean resnet"),
    "a folder without a processor": ("hf:/nowhere", "'hf:/nowhere', from which no image processor can be read"),
    "what cannot be imported": ("samples:nothing", "forget_set.transform 'samples:nothing' cannot be imported"),
    "no callable": ("samples:LIST", "'samples:LIST' is a list; expected a callable PIL image -> tensor"),
    "one that raises": ("samples:raising", "raised ValueError in .*samples.py, line .* mode RGB and 52 x 40 pixels"),
    "one that gives a text": ("samples:words", "'samples:words' gave a str; expected a dense floating tensor"),
    "one that gives whole numbers": ("samples:whole_numbers", "gave torch.uint8; expected a dense floating tensor"),
}


@pytest.mark.parametrize("case", NAMES)
def test_what_cannot_prepare_an_image_is_refused_without_its_content(case):
    name, message = NAMES[case]
    with pytest.raises(ConfigError, match=message) as caught:
        collate(photo(), transform=name)
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(("name", "package", "extra"), [("timm:x", "timm", "timm"), ("hf:x", "transformers", "hf")])
def test_a_missing_extra_is_named(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"expected the extra: pip install imu-ray\[{extra}\]"):
        find_preprocessing.__wrapped__(name)


def test_an_array_and_a_missing_image_are_bad_rows():
    for value, what in ((np.ones((3, 4, 4)), "a ndarray"), (None, "missing"), (b"no", "does not decode")):
        with pytest.raises(ForgetSetError, match=f"row 'a': .*{what}"):
            collate(value, transform="samples:halved")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 5))


def for_model(**settings):
    config = ForgetSetConfig(image_mode="L", **settings)
    return ClassificationTask.for_model(net(), {"forget": open_source(image_table(4), config)}, config)


def test_a_preprocessing_that_draws_random_numbers_or_has_others_beside_it_is_refused():
    assert for_model(transform="samples:halved").shape == (1, 6, 6)
    with pytest.raises(
        ConfigError, match="'samples:drawn' gives another input for the same image when it is run again"
    ):
        for_model(transform="samples:drawn")
    with pytest.raises(ConfigError, match="is 'samples:halved', with image_size, mean beside it; expected it alone"):
        for_model(transform="samples:halved", image_size=6, mean=[0.5])


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_prepares_by_name_on_its_workers_and_the_record_names_the_models_own(tmp_path):
    table = image_table(12)
    arrays = [halved(Image.open(io.BytesIO(cell.as_py()))).float().tolist() for cell in table["image"]]
    settings = SMALL | {"forget_set.image_mode": "L"}
    named = score(net(), table, config=paper(settings, forget_set__transform="samples:halved"))
    given = score(net(), table.set_column(1, "image", pa.array(arrays)), config=paper(settings))
    assert named.equals(given)
    model = timm.create_model("test_vit.r160_in1k", num_classes=5).eval()
    score(model, table, config=paper(SMALL, forget_set__transform="model"), run_dir=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert record["forget_set"]["settings"] == {"transform": "timm:test_vit.r160_in1k"}
