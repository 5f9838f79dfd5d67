"""Evaluation sets with columns and preprocessing of their own."""

import json

import pyarrow as pa
import pytest
import torch
from architectures import named
from samples import SMALL, image_table, pairs, paper, write_images

from imu_ray import ConfigError, ForgetSetError, JobConfig, audit, unlearn
from imu_ray.config import ForgetSetConfig
from imu_ray.data import SelectedSource, ViewSource, open_other_set, open_source, own_settings
from imu_ray.data.columns import image_fields
from imu_ray.tasks.base import reader_of
from imu_ray.tasks.causal_lm import CausalLMTask
from imu_ray.tasks.classification import ClassificationTask

CONFIG = ForgetSetConfig(image_mode="L", ids=("s001",), size=3, mean=(0.5,))


def opened(given, config=CONFIG):
    return open_other_set("test", given, config, image_fields)


def decoded(source):
    """Inputs as a task with the settings of the forget set hands them to the model."""
    task = reader_of(ClassificationTask(CONFIG, "fc", 5), source)
    return task.collate(source.read(0, source.num_rows)).inputs


def test_a_set_has_the_settings_of_the_forget_set_but_for_which_rows():
    table = image_table(6)
    source = opened(table)
    assert source.num_rows == 6
    torch.testing.assert_close(decoded(source), decoded(opened({"path": table})), rtol=0, atol=0)
    assert own_settings(source, CONFIG) == {}


def test_a_set_is_read_by_its_own_columns_and_decoded_by_its_own_settings():
    table = image_table(6)
    other = table.rename_columns(["name", "png", "kind"]).append_column("label", pa.array([9] * 6))
    own = {"image_column": "png", "label_column": "kind", "id_column": "name", "mean": [0.0], "std": [0.5]}
    source = opened({"path": other, **own})
    assert source.read(0, 6).digest() == open_source(table, ForgetSetConfig()).read(0, 6).digest()
    torch.testing.assert_close(decoded(source), (decoded(opened(table)) + 0.5) / 0.5)
    assert own_settings(source, CONFIG) == {**own, "mean": (0.0,), "std": (0.5,)}


def test_rows_of_a_set_are_named_and_its_views_are_decoded_as_it_is():
    table = image_table(6)
    source = opened({"path": table, "where": "label >= 0", "mean": [0.25]})
    assert isinstance(source, SelectedSource)
    views = ViewSource(source, 2, "flip", 0)
    assert (views.row_settings.mean, own_settings(source, CONFIG)["where"]) == ((0.25,), "label >= 0")
    assert own_settings(opened({"path": table, "ids": ["s001", "s002"]}), CONFIG) == {"ids": "2 ids"}


def test_two_ways_of_the_same_source_of_ones_own_do_not_mix():
    given = open_source(image_table(4), ForgetSetConfig(image_mode="L"))
    one, other = opened({"path": given, "mean": [0.0]}), opened({"path": given, "mean": [0.5]})
    torch.testing.assert_close(decoded(one), decoded(other) + 0.5)


def test_a_set_of_texts_has_its_own_prompt():
    task = CausalLMTask(ForgetSetConfig(), tokenizer=None)
    rows = pa.table({"q": ["Why?"], "answer": ["So."]})
    source = open_other_set(
        "test", {"path": rows, "question_column": "q", "prompt": "{question}"}, task.config, CausalLMTask.fields
    )
    assert reader_of(task, source).config.prompt == "{question}"
    assert source.read(0, 1).inputs == [{"question": "Why?", "answer": "So."}]


REFUSED = {
    "no path": ({"image_column": "png"}, ConfigError, "'test' is a mapping with image_column; expected its path"),
    "an unknown setting": (
        {"image_colum": "x"},
        ConfigError,
        "evaluation.test: unknown setting 'image_colum'; did you",
    ),
    "a value out of range": ({"std": [0.0]}, ConfigError, "evaluation.test: forget_set.std"),
    "what all sets share": (
        {"size": 3, "max_length": 7},
        ConfigError,
        "evaluation.test sets max_length, size, which an",
    ),
    "a column that is not there": ({"image_column": "png"}, ForgetSetError, "the table has no column 'png'; it has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_a_set_cannot_have_are_refused_with_its_name(case):
    own, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        opened(own if case == "no path" else {"path": image_table(4), **own})


def test_a_job_file_and_its_overrides_say_how_a_set_is_read(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "model: {factory: resnet18}\nforget_set: {path: a.parquet}\n"
        "evaluation: {retain: b.parquet, test: {path: c.parquet, image_column: png}}\n"
    )
    job = JobConfig.load(tmp_path / "job.yaml", ["evaluation.test.image_size=[4, 6]", "evaluation.retain.mean=[0.5]"])
    assert job.evaluation["retain"] == {"path": "b.parquet", "mean": [0.5]}
    assert job.evaluation["test"] == {"path": "c.parquet", "image_column": "png", "image_size": [4, 6]}
    with pytest.raises(ConfigError, match="expected a path per name, .*or a mapping with a path in it"):
        JobConfig.load(tmp_path / "job.yaml", ["evaluation.other.mean=[0.5]"])


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_measures_such_a_set_and_its_record_says_how_it_was_read(tmp_path):
    write_images(tmp_path / "test.parquet", 30, seed=1)
    table = image_table(30, seed=1)
    scaled = decoded(open_source(table, ForgetSetConfig(image_mode="L", mean=(0.5,)))).numpy()
    grey = paper(SMALL | {"forget_set.image_mode": "L", "ascent.stop.max_epochs": 1})
    forget = pa.table(
        {"image": [array.tolist() for array in pairs(20).inputs.numpy()], "label": pairs(20).labels.tolist()}
    )
    own = {"path": str(tmp_path / "test.parquet"), "mean": [0.5], "id_column": "id"}
    plain = pa.table({"image": [array.tolist() for array in scaled], "label": table["label"]})
    model = named("heads.head")
    figures = [audit(model, forget, evaluation={"test": given}, config=grey)["after"] for given in (own, plain)]
    assert figures[0] == figures[1]
    unlearn(model, forget, evaluation={"test": own}, config=grey, run_dir=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert record["evaluation"]["test"]["settings"] == {"mean": [0.5], "id_column": "id"}
    with pytest.raises(Exception, match="evaluation sets"):
        unlearn(model, forget, evaluation={"test": {**own, "mean": [0.4]}}, config=grey, run_dir=tmp_path / "run")
