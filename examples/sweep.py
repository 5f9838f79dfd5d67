"""A sweep: what does it cost to forget 20 rows or 140, with how much damping? The model runs once for all."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import imu_ray
from imu_ray.demo import train_digits

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = torch.arange(1400), torch.arange(1400, 1797)
model = train_digits(images[train], labels[train])

result = imu_ray.sweep(
    model,
    TensorDataset(images[train], labels[train]),  # what rows are drawn from, a larger size containing a smaller one
    {"forget_set.size": [20, 140], "ascent.preconditioner_damping": [0.001, 0.1]},
    evaluation={"test": TensorDataset(images[test], labels[test])},
    recipe="samples",
)
for row in result.table.to_pylist():
    asked = f"{row['forget_set.size']} rows, damping {row['ascent.preconditioner_damping']}"
    print(
        f"{asked}: {row['status']}, loss on them {row['forget.loss']:.3f}, "
        f"accuracy on unseen rows {row['test.accuracy']:.3f}"
    )
print(f"best per size: {result.best}")
print(f"{result.sweep_dir}/sweep.html")
