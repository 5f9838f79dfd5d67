"""Drawn persons in the layout of Market-1501: stick figures in coloured clothes, seen by cameras of other tints."""

import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

TRAINING = ("0002", "0007", "0010", "0011", "0021", "0030", "0042", "0050")
SIZE = (16, 32)  # width and height


def draw(person, camera, frame):
    """A figure whose clothes are the person's; camera and frame give the background, the tint and the place."""
    looks, random = np.random.default_rng(person + 1), np.random.default_rng([person + 1, camera, frame])
    shirt, trousers = (tuple(int(255 * x) for x in colorsys.hsv_to_rgb(looks.random(), 0.9, 0.9)) for _ in range(2))
    image = Image.new("RGB", SIZE, tuple(random.integers(90, 150, 3).tolist()))
    pen, (right, down) = ImageDraw.Draw(image), random.integers(-2, 3, 2).tolist()
    x, y = 8 + right, 3 + down
    pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(230, 190, 160))
    pen.rectangle((x - 3, y + 3, x + 3, y + 13), fill=shirt)
    for leg in (x - 3, x + 1):
        pen.rectangle((leg, y + 14, leg + 2, y + 24), fill=trousers)
    tint = np.random.default_rng(1000 + camera).uniform(0.8, 1.2, 3)
    pixels = np.asarray(image) * tint + random.normal(0, 6, (SIZE[1], SIZE[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_persons(folder, persons, frames, cameras=(1, 2, 3)):
    """A folder of pictures of persons (texts) by each camera in some frames."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for person in persons:
        for camera in cameras:
            for frame in frames:
                picture = draw(int(person), camera, frame)
                picture.save(folder / f"{person}_c{camera}s1_{frame:06d}_00.jpg", quality=95)
    return folder


class Embedder(nn.Module):
    """Two convolutions, an embedding behind a BatchNorm (BNNeck), and the classifier of identities."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.embedding, self.neck = nn.Linear(16 * 4, 16), nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, len(TRAINING), bias=False)

    def embed(self, inputs):
        found = torch.relu(self.second(torch.relu(self.first(inputs))))
        found = nn.functional.adaptive_avg_pool2d(found, (4, 1)).flatten(1)
        return self.neck(self.embedding(found))

    def forward(self, inputs):
        return self.classifier(self.embed(inputs))


def pixels_of(folder, dtype=torch.float32):
    """The pictures of a folder in the order of their names, ``[N, 3, height, width]`` in [0, 1]."""
    pictures = (np.array(Image.open(path)) for path in sorted(folder.iterdir()))
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1).to(dtype) / 255 for picture in pictures])


def trained(folder, steps=60):
    """An embedder of the persons in a folder, in seconds."""
    torch.manual_seed(0)
    model, pixels = Embedder().train(), pixels_of(folder)
    labels = torch.tensor([TRAINING.index(path.name[:4]) for path in sorted(folder.iterdir())])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimiser.step()
    return model.eval()


def written_out(query, gallery, distance_of):
    """Mean average precision and ranks 1, 5 and 10, by a loop over sorted lists of ``(vector, person, camera)``."""
    precisions, firsts = [], []
    for vector, person, camera in query:
        ranking = sorted(gallery, key=lambda each: distance_of(vector, each[0]))
        seen = [each[1] for each in ranking if each[1] != -1 and each[1:] != (person, camera)]
        hits = [place for place, other in enumerate(seen, 1) if other == person and person > 0]
        if hits:
            precisions.append(sum(n / place for n, place in enumerate(hits, 1)) / len(hits))
            firsts.append(hits[0])
    return [np.mean(precisions), *(np.mean([first <= rank for first in firsts]) for rank in (1, 5, 10))]


def cosine(one, other):
    return 1 - one @ other / np.sqrt((one @ one) * (other @ other))


def entries(model, folder):
    """Every picture of a folder as ``(embedding, person, camera)``."""
    with torch.no_grad():
        vectors = model.embed(pixels_of(folder)).double().numpy()
    names = (path.name.partition("s1_")[0].split("_c") for path in sorted(folder.iterdir()))
    return [(vector, int(person), int(camera)) for vector, (person, camera) in zip(vectors, names, strict=True)]
