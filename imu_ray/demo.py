"""The demo: a small CNN on scikit-learn's handwritten digits forgets one class, and forgets 5 % random samples."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from imu_ray.api import audit, unlearn
from imu_ray.config import UnlearnConfig
from imu_ray.models.spec import ModelSpec
from imu_ray.run.result import UnlearnResult

FORGOTTEN_CLASS = 3
FORGOTTEN_SHARE = 0.05
SETTINGS = {"forget_set.image_mode": "L", "influence.block_rows": 64, "influence.blocks_per_shard": 1}
ROWS = ("forget", "retain", "test", "forgotten class in test", "membership inference")


def digits_cnn() -> nn.Module:
    """Two convolutions with BatchNorm and a linear head ``64 -> 10``, for 8x8 grey images; the factory in the spec."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(64, 10)))


def train_digits(images: Tensor, labels: Tensor, *, epochs: int = 4, seed: int = 0) -> nn.Module:
    """Train the CNN on images ``[N, 1, 8, 8]`` in [0, 1] and labels ``[N]``; deterministic in ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = digits_cnn()
        fit_digits(model, images, labels, seed, epochs=epochs)
    return model.eval()


def fit_digits(model: nn.Module, images: Tensor, labels: Tensor, seed: int, *, epochs: int = 4) -> None:
    """Train a new model in place; batches are drawn from torch's random numbers, which ``seed`` has set."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), 64):
            if len(rows) < 2:  # BatchNorm cannot train on one sample
                continue
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images ``[N, 8, 8]`` uint8, labels ``[N]``, and the rows of the training and the test part (4 : 1)."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return pixels, labels.astype(np.int64), train, test


def write_digits(path: Path, rows: npt.NDArray[np.int64]) -> Path:
    """Some digits as Parquet: ``id``, ``image`` (PNG bytes), ``label``."""
    pixels, labels, *_ = digits()
    encoded = []
    for row in rows:
        png = io.BytesIO()
        Image.fromarray(pixels[row]).save(png, format="PNG")
        encoded.append(png.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"digit-{row:04d}" for row in rows]
    pq.write_table(pa.table({"id": ids, "image": encoded, "label": labels[rows]}), path)
    return path


def train_and_save(path: Path, rows: npt.NDArray[np.int64]) -> ModelSpec:
    """Train on some digits and write the checkpoint; the spec that loads it."""
    pixels, labels, *_ = digits()
    model = train_digits(torch.from_numpy(pixels[rows]).unsqueeze(1) / 255, torch.from_numpy(labels[rows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return ModelSpec("imu_ray.demo:digits_cnn", checkpoint=str(path))


def run_demo(out: Path) -> dict[str, Any]:
    """Train, forget and compare with retraining, twice; prints tables and returns run directories and metrics."""
    _, labels, train, test = digits()
    print(f"training the original on {len(train)} digits ...", flush=True)
    original = train_and_save(out / "original.safetensors", train)
    chosen = np.random.default_rng(0).choice(train, round(FORGOTTEN_SHARE * len(train)), replace=False)
    masks = {"class": labels[train] == FORGOTTEN_CLASS, "random": np.isin(train, chosen)}
    parts = {name: {"forget": train[mask], "retain": train[~mask], "test": test} for name, mask in masks.items()}
    print(f"\nforget one class: the digit {FORGOTTEN_CLASS}")
    result = {"class": _forget(out / "class", original, parts["class"], "classes")}
    print(f"\nforget {FORGOTTEN_SHARE:.0%} random samples")
    result["random"] = _forget(out / "random", original, parts["random"], "samples")
    print(
        "\nWhere this is weak: only the head is changed. Ascent lowers the accuracy on forgotten random samples and\n"
        "on retained ones together, because a head cannot tell them apart, and a forgotten class is still in the\n"
        "features: a new head would find it.\n"
        f"\nmodel:   {out}/original.safetensors\nsamples: {out}/{{class,random}}/data/{{forget,retain,test}}.parquet"
    )
    return result


def _forget(folder: Path, original: ModelSpec, parts: dict[str, npt.NDArray[np.int64]], recipe: str) -> dict[str, Any]:
    evaluation = {part: str(write_digits(folder / "data" / f"{part}.parquet", rows)) for part, rows in parts.items()}
    forget = evaluation.pop("forget")
    config = UnlearnConfig.from_recipe(recipe).with_overrides(SETTINGS)
    unlearned = unlearn(original, forget, evaluation=evaluation, config=config, run_dir=folder / "run")
    retrained = train_and_save(folder / "retrained.safetensors", parts["retain"])
    reference = audit(retrained, forget, evaluation=evaluation, config=config)["after"]
    _print_table(unlearned, reference, str(FORGOTTEN_CLASS) if recipe == "classes" else None)
    return {"run_dir": str(unlearned.run_dir), "metrics": {**unlearned.metrics, "retrained": reference}}


def _print_table(unlearned: UnlearnResult, reference: dict[str, Any], forgotten: str | None) -> None:
    sides = (unlearned.metrics["before"], unlearned.metrics["after"], reference)
    print(f"{'':<26}{'before':>10}{'after':>10}{'retrained':>12}")
    for row in ROWS:
        if row == "membership inference":
            cells = [f"{side['membership'].get('balanced_accuracy', float('nan')):.3f}" for side in sides]
        elif row == "forgotten class in test":
            classes = [side["test"]["per_class"] for side in sides]
            cells = [f"{100 * figures[forgotten]['accuracy']:.1f} %" if forgotten else "-" for figures in classes]
        else:
            cells = [f"{100 * side[row]['accuracy']:.1f} %" for side in sides]
        print(f"{row:<26}{cells[0]:>10}{cells[1]:>10}{cells[2]:>12}")
    stopped = unlearned.manifest["ascent"]
    print(f"{stopped['status']} after {stopped['steps']} steps: {stopped['reason']}")
    print(f"report: {unlearned.run_dir}/report.html", flush=True)
