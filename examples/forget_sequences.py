"""Forget sequences: a small transformer learnt 400 walks of tokens by heart; twenty of them must go."""

import pyarrow as pa
import torch
from torch import nn

import imu_ray

TOKENS, LENGTH, WIDTH = 12, 16, 48
generator = torch.Generator().manual_seed(0)
rules = torch.softmax(2 * torch.randn(TOKENS, TOKENS, generator=generator), 1)  # which token follows which


def walks(count):
    """Sequences of tokens that follow the rules."""
    found = torch.randint(TOKENS, (count, 1), generator=generator)
    for _ in range(LENGTH - 1):
        found = torch.cat([found, torch.multinomial(rules[found[:, -1]], 1, generator=generator)], 1)
    return found


class Transformer(nn.Module):
    """One block; token ids ``[B, T]`` to logits of the next token ``[B, T, TOKENS]``."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 192), nn.GELU(), nn.Linear(192, WIDTH))
        self.out = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids):
        """A forward pass."""
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.out(x + self.mlp(x))


def table(sequences):
    """What imu_ray reads: a row for each sequence."""
    return pa.table({"tokens": sequences.tolist()})


if __name__ == "__main__":
    torch.manual_seed(0)
    train, test, model = walks(400), walks(200), Transformer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(train[:, :-1]).transpose(1, 2), train[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    result = imu_ray.unlearn(
        model,
        table(train[:20]),
        task="sequence",
        evaluation={"test": table(test), "retain": table(train[20:])},
    )
    print(f"{result.status}: {result.reason}")
    for name in ("forget", "retain", "test"):
        before, after = (result.metrics[side][name]["loss"] for side in ("before", "after"))
        print(f"{name}: {before:.3f} nats a token before, {after:.3f} after")
    print(f"{result.run_dir}/report.html")
