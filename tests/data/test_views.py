import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from samples import image_table, pairs, png
from torchvision.transforms import v2

from imu_ray.config import ForgetSetConfig
from imu_ray.data import PartSource, Rows, Source, ViewSource, draw_rows, open_source
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.tasks.classification import ClassificationTask

CONFIG = ForgetSetConfig(image_mode="L")
TASK = ClassificationTask(CONFIG, "fc", 5, shape=(1, 6, 6))

# What ascent.view_transform names by import path.
training = v2.Compose([v2.RandomCrop(6, padding=1), v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.5)])


def noise(pixels):
    return pixels.add_(random.random() + np.random.random() + torch.rand(()))  # noqa: NPY002


def broken(pixels):
    raise ValueError("Jane")


number, text, larger, whole = 7, lambda pixels: "Jane", lambda pixels: pixels.repeat(1, 2, 1), torch.Tensor.int
GIVEN = image_table(40)


def views(source=None, count=3, transform="crop_flip", seed=0):
    return ViewSource(open_source(GIVEN, CONFIG) if source is None else source, count, transform, seed)


def read(source, block_rows=7, blocks_per_shard=2):
    """Ids, labels and inputs of all blocks."""
    batches = [
        TASK.collate(rows)
        for shard in source.shards(block_rows, blocks_per_shard)
        for rows in source.read_blocks(shard)
    ]
    ids = [sample_id for batch in batches for sample_id in batch.ids]
    return ids, torch.cat([batch.labels_B for batch in batches]), torch.cat([batch.inputs for batch in batches])


def equal(one, other):
    return one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_the_views_of_a_row_stand_together_with_its_label_and_place():
    source = views(PartSource(open_source(GIVEN, CONFIG), np.array([2, 30, 31])))
    ids, labels, _ = read(source)
    assert ids == [f"s{row:03d}#{view}" for row in (2, 30, 31) for view in range(3)]
    assert labels.tolist() == [label for row in (2, 30, 31) for label in GIVEN["label"].to_pylist()[row : row + 1] * 3]
    assert (source.num_rows, source.rows_given) == (9, 40)
    assert source.positions(0, 9).tolist() == [2, 2, 2, 30, 30, 30, 31, 31, 31]
    assert source.positions(2, 7).tolist() == [2, 30, 30, 30, 31]


@pytest.mark.parametrize("transform", ["crop_flip", "flip", __name__ + ":training", __name__ + ":noise"])
@pytest.mark.parametrize(("block_rows", "blocks_per_shard"), [(1, 1), (2, 4), (7, 2), (120, 1)])
def test_views_do_not_depend_on_blocks_and_shards(transform, block_rows, blocks_per_shard):
    source = views(transform=transform)
    assert equal(read(source, block_rows, blocks_per_shard), read(source, 48, 1))


@pytest.mark.parametrize("transform", ["crop_flip", __name__ + ":training"])
def test_views_are_the_same_in_any_order_in_threads_and_after_pickling(transform):
    source = views(transform=transform)
    copy = pickle.loads(pickle.dumps(source))
    wanted = read(source)[2]
    with ThreadPoolExecutor(4) as pool:
        places = np.random.default_rng(0).permutation(source.num_rows)
        made = list(pool.map(lambda place: TASK.collate(copy.read(place, place + 1)).inputs[0], places.tolist()))
    assert torch.equal(torch.stack(made), wanted[places])


def test_views_of_a_nested_part_are_those_of_the_whole():
    whole = open_source(GIVEN, CONFIG)
    sources = [views(PartSource(whole, draw_rows(40, size, seed=0))) for size in (5, 20)] + [views(whole)]
    small, large, everything = (dict(zip(*read(source)[::2], strict=True)) for source in sources)
    assert set(small) < set(large) < set(everything)
    assert all(torch.equal(pixels, everything[sample_id]) for sample_id, pixels in (small | large).items())


def test_views_of_a_row_and_of_two_seeds_differ():
    one, other = read(views())[2].unflatten(0, (40, 3)), read(views(seed=1))[2].unflatten(0, (40, 3))
    assert not torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :2], read(views(count=2))[2].unflatten(0, (40, 2)))
    draws = {view.draw for view in views().read(0, 120).inputs}
    assert len(draws) == 120
    assert all(0 <= draw < 2**63 for draw in draws)


def test_digests_tell_views_of_other_draws_and_transforms_apart():
    made = [source.read(0, 9).digest() for source in (views(), views(seed=1), views(transform="flip"))]
    assert len(set(made)) == 3
    assert made[0] == views().read(0, 9).digest()


def test_crop_flip_is_a_crop_of_the_bordered_image_and_a_flip():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    table = pa.table({"image": [png(image)], "label": [0]})
    source = views(open_source(table, CONFIG), 20)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    made = ClassificationTask(ForgetSetConfig(mean=mean, std=std), "fc", 5).collate(source.read(0, 20)).inputs
    for view, pixels in zip(source.read(0, 20).inputs, made, strict=True):
        drawn = torch.Generator().manual_seed(view.draw)
        top, left, mirrored = (int(torch.randint(many, (), generator=drawn)) for many in (7, 9, 2))
        wanted = np.zeros((3, 24, 32))
        for row in range(24):
            for column in range(32):
                y, x = row + top - 3, (31 - column if mirrored else column) + left - 4
                if 0 <= y < 24 and 0 <= x < 32:
                    wanted[:, row, column] = image[y, x] / 255
        wanted = (wanted - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        np.testing.assert_allclose(pixels, wanted, atol=1e-6)


@pytest.mark.parametrize("transform", [__name__ + ":noise", __name__ + ":broken"])
def test_a_callable_leaves_global_random_numbers_and_its_input_as_they_were(transform):
    def state():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    data = pairs(2)
    before, inputs = state(), data.inputs.clone()
    rows = views(open_source(data, CONFIG), 2, transform).read(0, 4)
    if transform == __name__ + ":broken":
        with pytest.raises(ConfigError):
            TASK.collate(rows)
    else:
        first, second = TASK.collate(rows).inputs[:2]
        assert not torch.equal(first, second)
        torch.testing.assert_close(first - first.mean(), second - second.mean())
    assert state() == before
    assert torch.equal(data.inputs, inputs)


@pytest.mark.parametrize("block_rows", [3, 7])
def test_a_row_is_read_once_for_all_its_views_in_a_shard(block_rows):
    class Counted(Source):
        def __init__(self):
            self.name, self.num_rows, self.seen = "counted", 20, []

        def read(self, start, stop):
            self.seen += range(start, stop)
            return Rows(
                [str(row) for row in range(start, stop)], np.zeros(stop - start, np.int64), [0] * (stop - start)
            )

    source = views(Counted())
    blocks = list(source.read_blocks(source.shards(block_rows, 20)[0]))
    assert [len(rows.ids) for rows in blocks] == [min(block_rows, 60 - at) for at in range(0, 60, block_rows)]
    assert source.source.seen == list(range(20))


def test_an_image_that_two_blocks_share_is_read_from_its_file_before(tmp_path):
    Image.new("L", (6, 6)).save(tmp_path / "0.png")

    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, row):
            return Image.open(tmp_path / "0.png"), 0

    source = views(open_source(Lazy(), CONFIG), 4)
    blocks = source.read_blocks(source.shards(3, 2)[0])
    first, second = next(blocks), next(blocks)
    assert first.inputs[0].input is second.inputs[0].input
    assert second.inputs[0].input.fp is None


@pytest.mark.parametrize("image", [b"no image", png(np.zeros((5, 6), np.uint8))], ids=["broken", "of another shape"])
def test_all_views_of_a_bad_row_are_left_out(image):
    table = pa.table({"id": ["b", "a"], "image": [image, GIVEN["image"][0].as_py()], "label": [1, 0]})
    rows = views(open_source(table, CONFIG), 2, __name__ + ":training").read(0, 4)
    batch = replace(TASK, config=CONFIG.with_overrides({"on_bad_row": "skip"})).collate(rows)
    assert (batch.ids, [bad.sample_id for bad in batch.bad_rows]) == (["a#0", "a#1"], ["b#0", "b#1"])
    with pytest.raises(ForgetSetError, match="row 'b#0'"):
        TASK.collate(rows)


BAD = {
    "crop_flop": "ascent.view_transform is 'crop_flop'; .*did you mean crop_flip",
    "no_such_module:x": "'no_such_module:x' cannot be imported .ModuleNotFoundError",
    __name__ + ":number": ":number' is a int; expected a callable",
    __name__ + ":broken": r"raised ValueError in .*test_views.py, line .* for a sample of shape \[1, 6, 6\]",
    __name__ + ":larger": r"gave torch.float32 of shape \[1, 12, 6\] for a sample of shape \[1, 6, 6\]",
    __name__ + ":text": "gave a str for a sample",
    __name__ + ":whole": r"gave torch.int32 of shape \[1, 6, 6\]",
}


@pytest.mark.parametrize("name", BAD)
def test_a_transform_that_cannot_be_used_is_refused_also_where_bad_rows_are_left_out(name):
    skipping = ClassificationTask(CONFIG.with_overrides({"on_bad_row": "skip"}), "fc", 5)
    with pytest.raises(ConfigError, match=BAD[name]) as caught:
        skipping.collate(views(transform=name).read(0, 1))
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("name", ["crop_flip", "flip"])
def test_a_transform_of_images_refuses_what_is_no_image(name):
    table = pa.table({"image": [[1.0, 2.0]], "label": [0]})
    with pytest.raises(ConfigError, match=re.escape(f"{name!r} for a sample of shape [2]; expected an image")):
        ClassificationTask(CONFIG, "fc", 5).collate(views(open_source(table, CONFIG), transform=name).read(0, 1))
