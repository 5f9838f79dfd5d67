"""Forget a class: the handwritten 3 must no longer be recognised, and the other digits must stay."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import imu_ray
from imu_ray.demo import train_digits

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = torch.arange(1400), torch.arange(1400, 1797)
model = train_digits(images[train], labels[train])

threes = train[labels[train] == 3]
others = test[labels[test] != 3]
result = imu_ray.unlearn(
    model,
    TensorDataset(images[threes], labels[threes]),
    evaluation={"others": TensorDataset(images[others], labels[others])},  # measured, never trained on
    recipe="classes",
)
print(f"{result.status}: {result.reason}")
for name, meaning in (("forget", "the forgotten threes"), ("others", "other digits, unseen")):
    before, after = (result.metrics[side][name]["accuracy"] for side in ("before", "after"))
    print(f"{meaning}: accuracy {before:.3f} before, {after:.3f} after")
print(f"{result.run_dir}/report.html")
