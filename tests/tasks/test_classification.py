import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from architectures import named
from PIL import Image
from samples import Pairs, image_table, png, tensors

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Rows, open_source
from imu_ray.errors import ConfigError, ForgetSetError, NonFiniteError, UnsupportedModelError
from imu_ray.tasks.classification import ClassificationTask


def rows(*inputs, labels=None):
    return Rows([f"id{i}" for i in range(len(inputs))], np.array(labels or [0] * len(inputs)), list(inputs))


def task(**settings):
    return ClassificationTask(ForgetSetConfig(**settings), "fc", 5)


def test_pixels_are_scaled_and_standardised_per_channel():
    pixels = np.array([[[0, 51, 255]]], dtype=np.uint8)
    batch = task(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5)).collate(rows(png(pixels)))
    np.testing.assert_allclose(batch.inputs[0, :, 0, 0], [-0.1, 0.0, 1.4], atol=1e-6)


def test_mode_and_size_are_applied():
    grey = task(image_mode="L", image_size=3).collate(rows(png(np.full((6, 6, 3), 51, dtype=np.uint8))))
    assert grey.inputs.shape == (1, 1, 3, 3)
    np.testing.assert_allclose(grey.inputs, 0.2, atol=1e-6)
    high = task(image_size=(4, 2)).collate(rows(png(np.full((6, 6, 3), 51, dtype=np.uint8))))
    assert high.inputs.shape == (1, 3, 4, 2)


def test_tensors_arrays_and_images_are_taken():
    array = np.ones((1, 2, 2), dtype=np.float32)
    image = Image.fromarray(np.full((2, 2), 255, dtype=np.uint8))
    batch = task(image_mode="L").collate(rows(array, torch.ones(1, 2, 2), image))
    assert torch.equal(batch.inputs, torch.ones(3, 1, 2, 2))


@pytest.mark.parametrize("kind", ["mirrored", "read-only", "of the other byte order", "bfloat16", "of a graph"])
def test_arrays_are_taken_however_they_lie_in_memory(kind):
    array = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    given = {
        "mirrored": array[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
        "read-only": np.broadcast_to(array, array.shape),
        "of the other byte order": array.astype(">f4"),
        "bfloat16": torch.from_numpy(array).bfloat16(),
        "of a graph": torch.from_numpy(array).requires_grad_() * 1,
    }[kind]
    assert torch.equal(task().collate(rows(given)).inputs, torch.from_numpy(array)[None])


def bomb():
    """A tiny PNG that claims to be 30,000 x 30,000 pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def deep_png():
    buffer = io.BytesIO()
    Image.fromarray(np.full((1, 2), 30_000, dtype=np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


CUT = png(np.zeros((50, 50), dtype=np.uint8))[:60]
BAD = {
    "broken bytes": (b"no image", ForgetSetError, "does not decode"),
    "a cut image": (CUT, ForgetSetError, "does not decode"),
    "a decompression bomb": (bomb(), ForgetSetError, "does not decode .DecompressionBomb"),
    "nothing": (None, ForgetSetError, "the input is missing"),
    "text": ("hello", ForgetSetError, "is a str, not an image"),
    "16 bits a channel": (deep_png(), ForgetSetError, "has mode I"),
    "lists of different lengths": (np.asarray(None), ForgetSetError, "not an image or an array of numbers"),
    "NaN": (torch.tensor([[[float("nan"), 0.0]]]), NonFiniteError, "NaN or infinity"),
    "a broken PIL image": (Image.open(io.BytesIO(CUT)), ForgetSetError, "does not decode"),
    "a sparse tensor": (torch.eye(2).to_sparse(), ForgetSetError, "the input is sparse, nested or quantized"),
    "a meta tensor": (torch.ones(1, 1, 2, device="meta"), ForgetSetError, "the input is on the meta device"),
    "complex numbers": (torch.ones(1, 1, 2) * 1j, ForgetSetError, "the input is complex"),
    "an empty array": (np.ones((1, 0, 2)), ForgetSetError, "the input is empty"),
    "infinity": (np.array([[[np.inf, 0.0]]]), NonFiniteError, "NaN or infinity"),
}
GOOD = png(np.zeros((1, 2), dtype=np.uint8))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_an_error_that_names_it_or_is_left_out_and_listed(case):
    value, kind, message = BAD[case]
    with pytest.raises(kind, match=f"row 'id1': .*{message}") as caught:
        task(image_mode="L").collate(rows(GOOD, value, GOOD))
    assert "hello" not in str(caught.value), "no content of a row"
    batch = task(image_mode="L", on_bad_row="skip").collate(rows(GOOD, value, GOOD, labels=[1, 2, 3]))
    assert batch.ids == ["id0", "id2"]
    assert batch.labels_B.tolist() == [1, 3]
    assert [bad.sample_id for bad in batch.bad_rows] == ["id1"]


def test_a_label_outside_the_classes_is_refused_even_when_bad_rows_are_skipped():
    with pytest.raises(ForgetSetError, match="row 'id0' has label 5; expected 0 to 4"):
        task(on_bad_row="skip").collate(rows(GOOD, labels=[5]))


def test_a_sample_of_another_shape_than_the_first_is_refused_by_name():
    made = ClassificationTask(ForgetSetConfig(image_mode="L"), "fc", 5, shape=(1, 1, 2))
    with pytest.raises(ForgetSetError, match=r"row 'id1': its shape is \[1, 3, 2\].*forget_set.image_size"):
        made.collate(rows(GOOD, png(np.zeros((3, 2), np.uint8))))


def test_a_mean_that_does_not_fit_the_channels_is_refused():
    with pytest.raises(ConfigError, match="forget_set.mean has 2 values"):
        task(mean=(0.1, 0.2)).collate(rows(GOOD))


def test_a_palette_image_with_transparency_decodes():
    buffer = io.BytesIO()
    Image.new("P", (2, 2)).save(buffer, format="PNG", transparency=0)
    assert task().collate(rows(buffer.getvalue())).inputs.shape == (1, 3, 2, 2)


def test_the_head_is_found_though_the_first_rows_are_bad():
    table = pa.table({"image": [b"bad", GOOD, b"bad"], "label": [0, 1, 2]})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 5))
    config = ForgetSetConfig(image_mode="L")
    assert ClassificationTask.for_model(model, {"forget": open_source(table, config)}, config).head == "1"


def test_a_model_that_cannot_take_the_samples_is_refused_with_their_shape():
    source = open_source(image_table(3), ForgetSetConfig())
    with pytest.raises(ForgetSetError, match=r"cannot take 1 samples of shape \[3, 6, 6\].*forget_set.image_mode"):
        ClassificationTask.for_model(named("fc"), {"forget": source}, ForgetSetConfig())


def test_a_size_above_pillows_limit_is_refused_before_an_image_is_read():
    config = ForgetSetConfig(image_size=1_000_000)
    with pytest.raises(ConfigError, match="forget_set.image_size is 1000000; expected at most 9459"):
        ClassificationTask.for_model(named("fc"), {"forget": open_source(image_table(3), config)}, config)


def test_a_set_without_a_usable_row_is_refused_with_a_reason():
    samples = open_source(pa.table({"image": [b"bad"] * 2, "label": [0, 1]}), ForgetSetConfig())
    with pytest.raises(ForgetSetError, match=r"no row of the table can be used \(the last: the image does not decode"):
        ClassificationTask.for_model(named("fc"), {"forget": samples}, ForgetSetConfig())


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), StopIteration(), OSError("x"), torch.OutOfMemoryError("x")]
)
def test_what_a_model_raises_is_refused_with_the_shape_unless_memory_ran_out(error):
    def fail(module, inputs):
        raise error

    model = named("fc")
    model.register_forward_pre_hook(fail)
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else ForgetSetError
    with pytest.raises(kind, match=r"x|Named cannot take 1 samples of shape \[1, 6, 6\]: \w+"):
        ClassificationTask.for_model(
            model, {"forget": open_source(Pairs(*tensors(3)), ForgetSetConfig())}, ForgetSetConfig()
        )


def test_a_model_that_loses_rows_is_refused():
    model, (inputs, labels) = named("fc"), tensors(4)
    model.register_forward_pre_hook(lambda module, inputs: inputs[0][:3])
    with pytest.raises(UnsupportedModelError, match=r"gave head inputs \(3, 12\) and outputs \(3, 5\) for 4 samples"):
        task().forward(model, task().collate(rows(*inputs, labels=labels.tolist())))


def test_a_column_of_single_numbers_is_refused():
    samples = open_source(pa.table({"image": [0.5, 1.5], "label": [0, 1]}), ForgetSetConfig())
    with pytest.raises(ForgetSetError):
        ClassificationTask.for_model(named("fc"), {"forget": samples}, ForgetSetConfig())
