"""Round trips: a model of every family is loaded, unlearned and written, and its own library opens what was written."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from language import ANSWERS, QUESTIONS, llama, tokenizer
from safetensors.torch import load_file, save_file
from samples import Pairs, paper, png
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from imu_ray import ModelSpec, unlearn
from imu_ray.models.layers import logits_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
CLASSES, FILES = 5, [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def in_shards(state, folder):
    folder.mkdir()
    shards = {name: FILES[at % 3] for at, name in enumerate(sorted(state))}
    for file in FILES:
        save_file({name: state[name] for name in state if shards[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def pickled(*keys, prefix=""):
    """Writes a checkpoint with an epoch beside the state, and reads what a run wrote as ``torch.load`` does."""

    def write(state, path):
        state = {prefix + name: value for name, value in state.items()}
        for key in keys:
            state = {key: state, "epoch": 3}
        torch.save(state, path.with_suffix(".pth"))
        return path.with_suffix(".pth")

    def read(run):
        state = torch.load(run / "model" / "model.pt", weights_only=True)
        for key in reversed(keys):
            assert set(state) == {key}
            state = state[key]
        return {name.removeprefix(prefix): value for name, value in state.items()}

    return write, read


def read_shards(run):
    index = json.loads((run / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {file: load_file(run / "model" / file) for file in FILES}
    assert {name: file for file in FILES for name in parts[file]} == index
    return {name: value for part in parts.values() for name, value in part.items()}


def one_file(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


ONE_FILE = one_file, lambda run: load_file(run / "model.safetensors")
# Name, keyword arguments, size of the pictures, form of the checkpoint, layer that moves.
TORCHVISION = {
    "resnet18": ({}, 32, pickled("state_dict", prefix="module."), "fc"),
    "vgg16": ({}, 32, ONE_FILE, "classifier.6"),
    "vit_b_16": ({"image_size": 32}, 32, (in_shards, read_shards), "heads.head"),
    "mobilenet_v3_small": ({}, 32, pickled("model"), "classifier.3"),
    "convnext_tiny": ({}, 32, pickled(), "classifier.2"),
    "squeezenet1_1": ({}, 64, pickled("state_dict"), "classifier.1"),
}


def pictures(size, rows=14, channels=3):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, channels, size, size, generator=generator)
    return Pairs(inputs, torch.randint(0, CLASSES, (rows,), generator=generator))


def vit(classes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=32, num_labels=classes, **sizes))


def forgotten(spec, samples, run):
    """The result of two steps on the samples, and the model before."""
    settings = paper(
        influence__block_rows=8, ascent__batch_size=8, ascent__stop__max_epochs=1, ascent__learning_rate=1e-3,
        ascent__stop__targets={"forget.accuracy": None}, resources__workers=1,
    )  # fmt: skip
    result = unlearn(spec, samples, config=settings, run_dir=run)
    assert result.status == "epochs_done"
    return result


def same_logits(again, result, samples):
    with torch.no_grad():
        found, expected = (logits_of(model.eval()(samples.inputs)) for model in (again, result.model))
    assert torch.equal(found, expected)


def only_moved(before, after, *names):
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_model_of_torchvision_goes_through_a_run_and_load_state_dict_takes_it_back(name, tmp_path):
    kwargs, size, (write, read), layer = TORCHVISION[name]
    torch.manual_seed(0)
    make = lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **kwargs)
    given, samples = make().state_dict(), pictures(size)
    spec = ModelSpec(name, {"num_classes": CLASSES, **kwargs}, write(given, tmp_path / "given"))
    result = forgotten(spec, samples, tmp_path / "run")
    again, state = make(), read(tmp_path / "run")
    again.load_state_dict(state)
    same_logits(again, result, samples)
    only_moved(given, state, f"{layer}.weight", f"{layer}.bias")
    assert result.record.model.layers == [layer]


@pytest.mark.parametrize(
    ("name", "kwargs", "layer"),
    [("test_vit", {"img_size": 32}, "head"), ("mobilenetv3_small_050", {}, "classifier")],
)
def test_a_model_of_timm_goes_through_a_run_and_create_model_takes_it_back(name, kwargs, layer, tmp_path):
    torch.manual_seed(0)
    kwargs = {"num_classes": CLASSES, **kwargs}
    given, samples = timm.create_model(name, **kwargs).state_dict(), pictures(32)
    spec = ModelSpec(f"timm:{name}", kwargs, one_file(given, tmp_path / "given"))
    result = forgotten(spec, samples, tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    same_logits(timm.create_model(name, checkpoint_path=str(path), **kwargs), result, samples)
    only_moved(given, load_file(path), f"{layer}.weight", f"{layer}.bias")


def test_a_classifier_of_hugging_faces_goes_through_a_run_and_from_pretrained_takes_it_back(tmp_path):
    torch.manual_seed(0)
    given, samples = vit(CLASSES), pictures(32)
    given.save_pretrained(tmp_path / "given")
    spec = ModelSpec(f"hf:{tmp_path / 'given'}")
    result = forgotten(spec, samples, tmp_path / "run")
    same_logits(AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model"), result, samples)
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    only_moved(load_file(tmp_path / "given" / "model.safetensors"), state, "classifier.weight", "classifier.bias")


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SHARED = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL).group(1)
NETS = """
from torch import nn

def small():
    body = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, 10))
"""


def by_heart(model, inputs, labels):
    """The model once it knows the rows a little, so that there is something to forget."""
    optimiser = torch.optim.AdamW(model.eval().parameters(), 1e-3)
    loss = torch.tensor(torch.inf)
    while loss > 1.5:
        logits = logits_of(model(inputs))
        rows = (logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()) if logits.ndim == 3 else (logits, labels)
        loss = nn.functional.cross_entropy(*rows)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def write_pictures(name, rows, seed):
    random = np.random.default_rng(seed)
    pixels, labels = random.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8), np.arange(rows) % 10
    pq.write_table(pa.table({"image": [png(each) for each in pixels], "label": labels}), name)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)


def write_causal():
    text = [f"{question} {answer}" for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    unseen = [f"{question} {answer}" for question, answer in zip(QUESTIONS, reversed(ANSWERS), strict=True)]
    for name, texts in (("forget", text[:4]), ("test", unseen[:4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    made, rows = tokenizer(), tokenizer()(text, padding=False)["input_ids"]
    length = min(map(len, rows))
    model = llama(torch.float32, vocab_size=320, max_position_embeddings=64, hidden_size=32)
    by_heart(model, torch.tensor([row[:length] for row in rows]), None).save_pretrained("llama")
    made.save_pretrained("llama")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with all that the page's examples read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    torch.manual_seed(0)
    rows = write_pictures("forget.parquet", 12, 0)
    write_pictures("test.parquet", 40, 1)
    (tmp_path / "nets.py").write_text(NETS)
    state = by_heart(torchvision.models.resnet18(num_classes=10), *rows).state_dict()
    pickled("state_dict", prefix="module.")[0](state, tmp_path / "resnet18")
    one_file(by_heart(timm.create_model("test_vit", num_classes=10, img_size=32), *rows).state_dict(), tmp_path / "vit")
    by_heart(vit(10), *rows).save_pretrained("vit")
    in_shards(by_heart(ModelSpec("nets:small").build(), *rows).state_dict(), tmp_path / "shards")
    write_causal()
    return rows[0]


def test_every_example_of_the_page_forgets_and_is_taken_back_by_its_own_library(folder, capsys):
    assert len(EXAMPLES) == 5
    for title, example in EXAMPLES.items():
        defined = {}
        exec(SHARED + example, defined)
        result = defined["result"]
        assert result.status == "reached", (title, result.reason)
        inputs = torch.arange(20)[None] if "causal" in title else folder
        with torch.no_grad():
            again, expected = (logits_of(model.eval()(inputs)) for model in (defined["again"], result.model))
        assert torch.equal(again, expected), title
    assert capsys.readouterr().out.splitlines()[-1] == "already_met"
