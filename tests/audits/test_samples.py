"""Samples in a report: only where they are asked for, the right ones, and never in what is handed on."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from architectures import named
from audits.test_report import MANIFEST
from PIL import Image, PngImagePlugin
from samples import SMALL, image_table, pairs, paper, png

from imu_ray import ConfigError, export_run, unlearn, verify_run
from imu_ray.audits.report import render_report
from imu_ray.audits.samples import CHARACTERS, Shown, data_uri, picture_of, text_of

PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">')


def pixels(encoded):
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("L"))


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 3)])
def test_arrays_of_one_or_three_channels_are_pictures_and_are_stretched(shape):
    array = np.linspace(-2.0, 3.0, int(np.prod(shape))).reshape(shape)
    for value in (array, torch.from_numpy(array), torch.from_numpy(array).to(torch.bfloat16)):
        picture = picture_of(value)
        assert picture.size == (5, 6)
        assert (np.array(picture).min(), np.array(picture).max()) == (0, 255)
    shown = np.array(picture_of(np.full((4, 4), 7, np.uint8)))
    assert (shown == 7).all()
    assert (np.array(picture_of(np.full((4, 4), 7.0))) == 0).all()


def test_a_picture_is_small_and_without_what_its_file_says():
    buffer, said = io.BytesIO(), PngImagePlugin.PngInfo()
    said.add_text("Author", "Jane Doe")
    Image.new("RGB", (800, 400), (1, 2, 3)).save(buffer, "PNG", pnginfo=said, icc_profile=b"Jane Doe", dpi=(72, 72))
    uri = data_uri(picture_of(buffer.getvalue()))
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    small = Image.open(io.BytesIO(content))
    assert (small.size, small.info) == ((160, 80), {})
    assert b"Jane" not in content


@pytest.mark.parametrize(
    "value", [b"no image", None, [3, 4], np.arange(5), np.zeros((2, 2, 2, 2)), {"question": "q"}, "a"]
)
def test_what_is_no_picture_is_text(value):
    assert picture_of(value) is None
    assert text_of(value)


def test_texts_are_told_by_name_and_cut_off():
    assert text_of({"question": "Who?", "answer": "She.", "perturbed_answer": ["a", "b"], "more": None}) == (
        "question: Who?\nanswer: She.\nperturbed_answer: a; b"
    )
    assert text_of([{"role": "user", "content": "Hi"}]) == "user: Hi"
    assert text_of(np.array([3, 1, 2])) == "3 1 2"
    assert text_of("x" * (CHARACTERS + 1)) == "x" * CHARACTERS + " ..."
    assert text_of("x" * CHARACTERS) == "x" * CHARACTERS


def test_texts_are_escaped_and_a_picture_has_words():
    text = Shown.of("<script>alert(1)</script>", None, 0.5, None)
    picture = Shown.of(png(np.zeros((6, 6), np.uint8)), 7, 1.25, -0.125)
    page = render_report(MANIFEST, {}, None, None, {"least forgotten": [text, picture]})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "class 7, influence -0.125, loss after 1.25" in page
    assert PICTURE.findall(page)[0][1] == "Sample 2 of 2, least forgotten, of class 7"
    assert "This page shows samples" in page
    assert "This page shows samples" not in render_report(MANIFEST, {}, None, None)


@pytest.mark.parametrize(
    ("more", "message"), [({"audit.report": False}, "audit.samples is 2, but audit.report is false")]
)
def test_samples_that_no_page_would_show_are_refused(more, message, tmp_path):
    config = paper(SMALL | {"audit.samples": 2} | more)
    with pytest.raises(ConfigError, match=message):
        unlearn(named("fc"), pairs(20), config=config, run_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def shown(ray_cluster, tmp_path_factory):
    """A run on a part of a set that shows three samples of each kind, and its model."""
    table = image_table(60)
    settings = SMALL | {"audit.samples": 3, "forget_set.image_mode": "L", "forget_set.size": 41, "audit.recovery": []}
    run_dir = tmp_path_factory.mktemp("shown") / "run"
    result = unlearn(named("fc"), table, config=paper(settings), run_dir=run_dir)
    return table, result, run_dir


def test_those_with_the_highest_influence_and_the_lowest_loss_are_shown(shown):
    table, result, run_dir = shown
    page = (run_dir / "report_with_samples.html").read_text()
    found = PICTURE.findall(page)
    images = {row["id"]: np.array(Image.open(io.BytesIO(row["image"]))) for row in table.to_pylist()}
    labels = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    scored = result.intensities.to_pylist()
    by_influence = [row["sample_id"] for row in sorted(scored, key=lambda row: -abs(row["influence"]))[:3]]
    with torch.no_grad():
        losses = {
            row["sample_id"]: float(
                torch.nn.functional.cross_entropy(
                    result.model(torch.from_numpy(images[row["sample_id"]] / 255.0).float()[None, None]),
                    torch.tensor([row["label"]]),
                )
            )
            for row in scored
        }
    by_loss = sorted(losses, key=losses.get)[:3]
    assert len(found) == 6
    for (encoded, alt), name in zip(found, by_influence + by_loss, strict=True):
        assert (pixels(encoded) == images[name]).all()
        assert alt.endswith(f"of class {labels[name]}")
    assert html.unescape(page).count(f"loss after {losses[by_loss[0]]:.3g}<") >= 1
    assert not [name for name in labels if name in page]


def test_the_report_and_its_export_show_no_sample_and_the_record_says_that_another_page_does(shown, tmp_path):
    _, result, run_dir = shown
    report = (run_dir / "report.html").read_text()
    assert "data:image/png" not in report
    assert "This page shows samples" not in report
    assert result.record.samples_shown == 6
    assert not [each for each in verify_run(run_dir) if each.status != "same"]
    out = export_run(run_dir, tmp_path / "out")
    assert "report_with_samples.html" not in {path.name for path in out.iterdir()}
    everything = b"".join(path.read_bytes() for path in out.iterdir())
    pictures = PICTURE.findall((run_dir / "report_with_samples.html").read_text())
    assert not [encoded for encoded, _ in pictures if encoded.encode() in everything]
    assert json.loads((out / "manifest.json").read_text())["samples_shown"] == 6
    assert {each.told for each in verify_run(out) if each.status == "absent" and each.part == "report"} == {
        "report_with_samples.html is not in an export"
    }
    assert not [each for each in verify_run(out) if each.status == "changed"]
