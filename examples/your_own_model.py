"""Your own model and Dataset, both defined in this script; the unlearned copy is used at once."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

import imu_ray


class Digits(Dataset):
    """Pairs of 64 pixels and a label."""

    def __init__(self, rows):
        pixels, labels = load_digits(return_X_y=True)
        self.inputs, self.labels = torch.tensor(pixels[rows], dtype=torch.float32) / 16, labels[rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.inputs[row], self.labels[row]


class Network(nn.Module):
    """Any module that ends in a linear layer, whatever its name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.answer = nn.Linear(64, 10)

    def forward(self, inputs):
        """Logits."""
        return self.answer(self.body(inputs))


torch.manual_seed(0)
model, train = Network(), Digits(slice(1400))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(train.inputs), torch.as_tensor(train.labels)).backward()
    optimiser.step()

test = Digits(slice(1400, 1797))
result = imu_ray.unlearn(model.eval(), Digits(slice(70)), evaluation={"test": test})
print(f"{result.status}: {result.reason}")
for name, network in (("original", model), ("unlearned", result.model)):
    print(f"{name}: test accuracy {(network(test.inputs).argmax(1).numpy() == test.labels).mean():.3f}")
print(f"{result.run_dir}/report.html")
