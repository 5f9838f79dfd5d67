"""Forget rows: twelve people asked for their digit to be removed; the model must treat it as one that it never saw."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import imu_ray
from imu_ray.demo import train_digits

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = torch.arange(1400), torch.arange(1400, 1797)
model = train_digits(images[train], labels[train], epochs=12)

requested = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:12]]
result = imu_ray.unlearn(
    model,
    TensorDataset(images[requested], labels[requested]),
    evaluation={"test": TensorDataset(images[test], labels[test])},  # unseen rows: they say when to stop
)
print(f"{result.status}: {result.reason}")
for name, meaning in (("forget", "the requested rows"), ("test", "unseen digits")):
    before, after = (result.metrics[side][name] for side in ("before", "after"))
    print(f"{meaning}: loss {before['loss']:.3f} before, {after['loss']:.3f} after")
    print(f"{meaning}: accuracy {before['accuracy']:.3f} before, {after['accuracy']:.3f} after")
print(f"{result.run_dir}/report.html")
