"""Sample sets for the tests, random images with labels in every form that the library reads, and their settings."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import Dataset

from imu_ray.config import UnlearnConfig


def tensors(count, classes=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, classes, (count,), generator=generator)


class Pairs(Dataset):
    """A map-style Dataset of tensors."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.inputs[row], int(self.labels[row])


def pairs(count, **options):
    return Pairs(*tensors(count, **options))


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def image_table(count, classes=5, seed=0):
    random = np.random.default_rng(seed)
    images = [png(random.integers(0, 256, (6, 6), dtype=np.uint8)) for _ in range(count)]
    labels = random.integers(0, classes, count)
    return pa.table({"id": [f"s{i:03d}" for i in range(count)], "image": images, "label": labels})


def write_images(path, count, **options):
    table = image_table(count, **options)
    pq.write_table(table, path, row_group_size=7)
    return table


# Several shards and checks in a run on few samples.
SMALL = {
    "influence.block_rows": 16, "influence.blocks_per_shard": 1, "ascent.batch_size": 16, "ascent.stop.every_steps": 2,
}  # fmt: skip


def paper(more=(), **changes):
    """The recipe ``paper`` with other settings, some of them by keyword: ``ascent__l1=0``."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return UnlearnConfig.from_recipe("paper").with_overrides({**dict(more), **changes})


def nudge(pixels):
    """A view of an image: moved by at most one pixel."""
    down, right = (int(torch.randint(-1, 2, ())) for _ in range(2))
    return pixels.roll((down, right), (1, 2))


# Preprocessings of an image, by import path.
def halved(image):
    """Half the pixels, in float64."""
    return torch.from_numpy(np.array(image, dtype=np.float64)).unsqueeze(0) / 510


def drawn(image):
    return halved(image) + torch.rand(())


def raising(image):
    raise ValueError("Jane Doe")


def words(image):
    return "Jane Doe"


def whole_numbers(image):
    return torch.from_numpy(np.array(image))


LIST = [1, 2]


def labels_of(kind, count, classes=5, seed=3):
    """Labels by ``forget_set.target``."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "class":
        return torch.randint(0, classes, (count,), generator=generator)
    numbers = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return torch.softmax(2 * numbers, 1) if kind == "soft" else (numbers > 0).double()


class Labelled(Pairs):
    """A Dataset whose labels are as they are given."""

    def __getitem__(self, row):
        return self.inputs[row], self.labels[row]
