"""Train the benchmarks' small ResNet on CIFAR Parquet, with or without some rows (the retrained references).

    python tests/benchmarks/train_cifar.py --data DIR --out DIR --name original
    python tests/benchmarks/train_cifar.py --data DIR --out DIR --name retrain-class0 --without class:0
    python tests/benchmarks/train_cifar.py --data DIR --out DIR --name retrain-random10 --without random:0.10

The forget rows are a function of ``--without`` alone (``forget_rows``), so every script that names the same set means the
same rows.
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.nets import NETS, Training

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load_split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` uint8 and labels ``[N]`` of one split, in file order."""
    tables = [pq.read_table(path, columns=["image", "label"]) for path in sorted(data.glob(f"{split}-*.parquet"))]
    if not tables:
        raise SystemExit(f"no {split}-*.parquet under {data}")
    images = [
        np.asarray(Image.open(io.BytesIO(cell)).convert("RGB"))
        for table in tables
        for cell in table["image"].to_pylist()
    ]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def forget_rows(labels: Tensor, without: str) -> Tensor:
    """Boolean mask ``[N]`` of the rows that ``without`` names: ``class:K[,K...]``, ``random:FRACTION[:SEED]`` or ``none``."""
    kind, _, value = without.partition(":")
    value, _, seed = value.partition(":")
    mask = torch.zeros(len(labels), dtype=torch.bool)
    if kind == "class":
        mask = torch.isin(labels, torch.tensor([int(each) for each in value.split(",")]))
    elif kind == "random":
        order = np.random.default_rng(int(seed or 2026)).permutation(len(labels))
        mask[torch.from_numpy(order[: round(float(value) * len(labels))].copy())] = True
    elif kind != "none":
        raise SystemExit(f"--without {without}: expected class:K[,K...], random:FRACTION[:SEED] or none")
    return mask


def normalise(images: Tensor) -> Tensor:
    """Uint8 images to standardised floats."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator, crop: int = 4) -> Tensor:
    """Random flips, and random crops after padding by ``crop``."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    if not crop:
        return images
    padded = nn.functional.pad(images, (crop,) * 4)
    offset = torch.randint(0, 2 * crop + 1, (len(images), 2), generator=generator)
    rows = (offset[:, :1] + torch.arange(32))[:, None, :, None]
    columns = (offset[:, 1:] + torch.arange(32))[:, None, None, :]
    return padded[torch.arange(len(images))[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of ``images`` classified as ``labels``."""
    model.eval()
    hits = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train(images: Tensor, labels: Tensor, how: Training) -> nn.Module:
    """SGD or AdamW with a one-cycle schedule, label loss, flips and, where asked for, crops."""
    torch.manual_seed(how.seed)
    generator = torch.Generator().manual_seed(how.seed)
    model, epochs = how.make(int(labels.max()) + 1).to(memory_format=torch.channels_last), how.epochs
    batch = 256
    steps = epochs * (len(images) // batch)
    optimiser: torch.optim.Optimizer
    if how.adam:
        optimiser = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.05)
    else:
        optimiser = torch.optim.SGD(model.parameters(), lr=how.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=how.rate, total_steps=steps, pct_start=0.25)
    started = time.time()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            x = normalise(augment(images[rows], generator, how.crop)).to(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(x), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    return model


def main() -> None:
    """Train one model and write ``NAME.safetensors`` and ``NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--without", default="none")
    parser.add_argument("--net", choices=NETS, default="resnet")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    how = NETS[options.net]
    images, labels = (part[: how.rows] for part in load_split(options.data, "train"))
    forget = forget_rows(labels, options.without)
    started = time.time()
    model = train(images[~forget], labels[~forget], how)
    seconds = time.time() - started
    test_images, test_labels = load_split(options.data, "test")
    record = {
        "name": options.name, "without": options.without, "net": options.net, "epochs": how.epochs, "seed": how.seed,
        "rows": int((~forget).sum()), "seconds": round(seconds, 1),
        "accuracy": {
            "retain": accuracy(model, images[~forget], labels[~forget]),
            "forget": accuracy(model, images[forget], labels[forget]) if forget.any() else None,
            "test": accuracy(model, test_images, test_labels),
        },
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options.out / f"{options.name}.safetensors")
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
