"""Small classifiers whose heads have the names that real ones have."""

from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn


def backbone(channels=1, width=12):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, width), nn.Tanh(),
    )  # fmt: skip


class Named(nn.Module):
    """``body`` and a head under a dotted name, such as ``heads.head``."""

    def __init__(self, name, classes=5, bias=True):
        super().__init__()
        self.body = backbone()
        parts = name.split(".")
        head = nn.Linear(12, classes, bias=bias)
        if parts[-1].isdigit():
            head = nn.Sequential(*[nn.Identity() for _ in range(int(parts[-1]))], head)
            parts = parts[:-1]
        for part in reversed(parts[1:]):
            head = nn.Sequential(OrderedDict([(part, head)]))
        self.add_module(parts[0], head)
        self.top = parts[0]

    def forward(self, x):
        return getattr(self, self.top)(self.body(x))


def named(name="fc", classes=5, bias=True, seed=0):
    """A fixed random model with lively BatchNorm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Named(name, classes, bias)
        with torch.no_grad():
            model(torch.randn(64, 1, 6, 6))
    return model.eval()


def same_state(model, state):
    """Whether a model has the very tensors of a state dict."""
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class NoHead(nn.Module):
    """Ends in a convolution that is not 1x1."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Averaged(nn.Module):
    """Ends in a mean over positions, after a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class LogProbabilities(nn.Module):
    """Something stands after the head, so its output is not the model's."""

    def __init__(self):
        super().__init__()
        self.body = backbone()
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.body(x)).log_softmax(1)


class Scaled(nn.Module):
    """Changes the head's output in place."""

    def __init__(self):
        super().__init__()
        self.inner = named("fc")

    def forward(self, x):
        z = self.inner(x)
        z /= 3
        return z


class Twice(nn.Module):
    """Calls its head twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = named("fc")

    def forward(self, x):
        self.inner(x + 1)
        return self.inner(x)


class Moody(Named):
    """Cannot be put in eval mode."""

    def eval(self):
        raise RuntimeError("not today")


class CosineLinear(nn.Linear):
    def forward(self, x):
        return 5 * nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


def cosine():
    model = named("fc")
    model.fc = CosineLinear(12, 5)
    return model


class Residual(nn.Module):
    """A block around which its input goes, with BatchNorm and activations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.norm1(self.stem(x)))
        x = x + self.norm2(self.conv(x))
        return self.fc(self.relu(x).mean((2, 3)))


class Attending(nn.Module):
    """Patches, a class token, one block of attention and an MLP, each layer called by its name."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 6, 2, stride=2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 10, 6))
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.qkv, self.proj, self.fc1, self.fc2 = (
            nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 6),
        )  # fmt: skip
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class Grouped(nn.Module):
    """Depthwise, grouped and pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.pointwise, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 5)

    def forward(self, x):
        x = nn.functional.silu(self.depthwise(nn.functional.silu(self.stem(x))))
        return self.fc(nn.functional.silu(self.pointwise(self.grouped(x).tanh())).mean((2, 3)))


def lively(make, seed=0):
    """A fixed random model in eval mode with outputs and BatchNorm statistics that differ from sample to sample."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None  # the whole mean of what it sees
            model.train()(torch.randn(64, 1, 6, 6))
            for parameter in model.parameters():
                parameter.mul_(1.5)
    return model.eval()


class Reader(nn.Module):
    """A causal model of token ids ``[B, T]``: one block of attention and an MLP, then logits ``[B, T, vocabulary]``."""

    def __init__(self, vocabulary=11, width=8, length=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.out = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids) + self.place.weight[: ids.shape[1]]
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.out(x + self.mlp(x))


class Untraced(Reader):
    """The same, with a branch that cannot be traced, so that the token ids cross the cut; logits as Hugging Face gives them."""

    def forward(self, ids):
        if bool((ids >= 0).all()):
            return SimpleNamespace(logits=super().forward(ids))
        raise ValueError
