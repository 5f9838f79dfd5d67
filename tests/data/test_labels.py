"""Soft labels and several labels a sample: the same numbers whatever they are read from, and refused with the row's name."""

import io
import json
import re
import tarfile

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from architectures import named
from samples import Labelled, image_table, labels_of, tensors

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Rows, open_source
from imu_ray.data.columns import image_fields
from imu_ray.data.sets import open_other_set
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.recipes import resolve_settings
from imu_ray.tasks.classification import ClassificationTask

ROWS, CLASSES = 9, 5


def config(target, **more):
    return ForgetSetConfig(target=target, image_mode="L", **more)


def table(labels, kind=None):
    rows = image_table(len(labels)).drop_columns("label")
    return rows.append_column("label", pa.array(labels, kind))


def in_tar(rows, path):
    with tarfile.open(path, "w") as archive:
        for row in rows.to_pylist():
            label = json.dumps({"label": row["label"]}).encode()
            for ending, content in (("png", row["image"]), ("json", label)):
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def in_parquet(rows, path):
    pq.write_table(rows, path, row_group_size=4)
    return path


SOURCES = {
    "table": lambda rows, folder: rows,
    "fixed size": lambda rows, folder: rows.set_column(2, "label", rows["label"].cast(pa.list_(pa.float64(), CLASSES))),
    "parquet": lambda rows, folder: in_parquet(rows, folder / "rows.parquet"),
    "frame": lambda rows, folder: pandas.DataFrame(rows.to_pylist()),
    "mappings": lambda rows, folder: rows.to_pylist(),
    "tar": lambda rows, folder: in_tar(rows, folder / "rows.tar"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", ["soft", "multi_label"])
def test_labels_are_the_same_whatever_they_are_read_from(target, source, tmp_path):
    labels = labels_of(target, ROWS).tolist()
    given = SOURCES[source](table(labels), tmp_path)
    opened = open_source(given, config(target))
    opened.check(CLASSES)
    found = opened.read(2, 7)
    assert found.labels.dtype == np.float64
    np.testing.assert_array_equal(found.labels, labels[2:7])
    np.testing.assert_array_equal(opened.take(np.array([1, 8])).labels, [labels[1], labels[8]])
    expected = open_source(table(labels), config(target))
    assert found.digest() == expected.read(2, 7).digest()


@pytest.mark.parametrize("target", ["soft", "multi_label"])
def test_labels_of_datasets_and_pairs_may_be_tensors(target):
    inputs, labels = tensors(ROWS)[0], labels_of(target, ROWS)
    for given in (Labelled(inputs, labels), list(zip(inputs, labels, strict=True))):
        opened = open_source(given, config(target))
        np.testing.assert_array_equal(opened.read(0, ROWS).labels, labels.numpy())


def test_flags_may_be_whole_numbers_or_true_and_false():
    labels = labels_of("multi_label", ROWS)
    for given in (labels.long().tolist(), labels.bool().tolist()):
        np.testing.assert_array_equal(open_source(table(given), config("multi_label")).read(0, ROWS).labels, labels)


FAULTS = {
    "sum": (
        "soft",
        [0.5, 0.4, 0, 0, 0],
        "(row|sample) 's003' of {name} has a label that sums to 0.9; .* divide it by its sum",
    ),
    "below 0": ("soft", [1.5, -0.5, 0, 0, 0], "(row|sample) 's003' of {name} has a label that holds -0.5; .*mend it"),
    "missing number": (
        "soft",
        [0.5, None, 0.5, 0, 0],
        "(row|sample) 's003' of {name} has label a list with something else than",
    ),
    "missing": (
        "soft",
        None,
        "(row|sample) 's003' of {name} has label a NoneType, with forget_set.target 'soft'; expected a list",
    ),
    "infinite": (
        "soft",
        [float("inf"), 0, 0, 0, 0],
        "(row|sample) 's003' of {name} has label a list with something else than",
    ),
    "length": (
        "soft",
        [0.5, 0.5],
        "(row|sample) 's003' of {name} has a label of 2 numbers; expected 5, as the rows before it have; .*mend it",
    ),
    "empty": ("multi_label", [], "(row|sample) 's003' of {name} has label an empty list, with forget_set.target"),
    "no flag": (
        "multi_label",
        [1, 0, 0.5, 0, 0],
        "(row|sample) 's003' of {name} has a label that holds 0.5; .* zeros and ones",
    ),
    "indices": (
        "multi_label",
        [0, 0, 2, 0, 0],
        "(row|sample) 's003' of {name} has a label that holds 2; .* zeros and ones",
    ),
}


@pytest.mark.parametrize("source", ["table", "parquet", "tar"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_label_that_cannot_be_used_is_refused_with_set_row_and_remedy(fault, source, tmp_path):
    target, label, message = FAULTS[fault]
    labels = labels_of(target, ROWS).tolist()
    labels[3] = label
    given, name = SOURCES[source](table(labels), tmp_path), {"table": "the table", "tar": ".*"}.get(source, tmp_path)
    with pytest.raises(ForgetSetError, match=message.format(name=f"{name}.*")):
        open_source(given, config(target)).check(CLASSES)
    if source != "tar":
        with pytest.raises(ForgetSetError, match=message.format(name=f"{name}.*")):
            open_source(given, config(target)).read(0, ROWS)


@pytest.mark.parametrize("source", ["table", "parquet", "tar"])
def test_a_label_with_another_number_of_classes_than_the_model_is_refused(source, tmp_path):
    given = SOURCES[source](table(labels_of("soft", ROWS, classes=4).tolist()), tmp_path)
    with pytest.raises(
        ForgetSetError, match="row 's000' of .* has a label of 4 numbers; expected 5, one for each output"
    ):
        open_source(given, config("soft")).check(CLASSES)


def test_a_column_of_another_kind_than_the_target_is_refused_where_it_is_opened(tmp_path):
    soft, hard = table(labels_of("soft", ROWS).tolist()), image_table(ROWS)
    with pytest.raises(
        ForgetSetError, match="'label' of the table holds list.*lists are labels of forget_set.target soft"
    ):
        open_source(soft, config("class"))
    with pytest.raises(ForgetSetError, match="holds int64, with forget_set.target 'soft'; expected a list of numbers"):
        open_source(hard, config("soft"))
    with pytest.raises(ForgetSetError, match="row 0 of Labelled has label a int, with forget_set.target 'soft'"):
        open_source(Labelled(tensors(ROWS)[0], labels_of("class", ROWS)), config("soft")).read(0, 1)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "one.png").write_bytes(hard["image"][0].as_py())
    with pytest.raises(
        ForgetSetError, match="folders by class, with forget_set.target 'soft'; expected rows with a list"
    ):
        open_source(tmp_path, config("soft"))


def test_a_source_of_ones_own_is_checked_where_its_rows_are_decoded():
    task = ClassificationTask(config("soft"), "fc", CLASSES)
    inputs = list(tensors(2)[0])
    for labels, message in (
        (np.zeros(2, np.int64), r"the labels are int64 of shape \[2\], with forget_set.target 'soft'"),
        (np.full((2, CLASSES), 0.3), "row 'a' has a label that sums to 1.5"),
        (np.full((2, 4), 0.25), "row 'a' has a label of 4 numbers; expected 5"),
        (
            np.array([[1, 0, 0, 0, 0], [np.nan, 0, 0, 0, 1]]),
            "row 'b' has label a list with something else than numbers",
        ),
    ):
        with pytest.raises(ForgetSetError, match=message):
            task.collate(Rows(["a", "b"], labels, inputs))
    with pytest.raises(
        ForgetSetError, match=r"the labels are float64 of shape \[2, 5\], with forget_set.target 'class'"
    ):
        ClassificationTask(config("class"), "fc", CLASSES).collate(Rows(["a", "b"], np.eye(2, CLASSES), inputs))


@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0] * 6])
def test_class_weights_of_another_number_than_the_models_outputs_are_refused(weights):
    settings = config("class", class_weights=weights)
    source = open_source(image_table(ROWS), settings)
    with pytest.raises(ConfigError, match=f"class_weights has {len(weights)} numbers for a model with 5 outputs"):
        ClassificationTask.for_model(named("fc"), {"forget": source}, settings)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], []])
def test_class_weights_are_above_0(weights):
    with pytest.raises(ConfigError, match=re.escape(f"forget_set.class_weights is {weights}")):
        config("class", class_weights=weights)


@pytest.mark.parametrize(
    ("task", "recipe", "changes", "message"),
    [
        ("reid", "samples", {"target": "soft"}, "task is 'reid' with forget_set.target 'soft'"),
        ("sequence", "samples", {"target": "soft"}, "target is 'soft' with task 'sequence'"),
        ("causal_lm", "samples", {"class_weights": [1.0]}, "class_weights are set with task 'causal_lm'"),
        ("classification", "classes", {"target": "soft"}, "recipe is 'classes' with forget_set.target 'soft'"),
        ("classification", "samples", {"target": "soft", "size": [1]}, "size names classes with forget_set.target"),
        ("classification", "samples", {"target": "multi_label", "objective": "row_mask"}, "objective is 'row_mask' with"),
        ("classification", "samples", {"target": "soft", "objective": "renormalise"}, "expected one of ascent, bounded"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_for_a_target_are_refused_before_anything_runs(task, recipe, changes, message):
    from imu_ray import UnlearnConfig

    scope = {} if task == "classification" else {"ascent.scope": "all"}
    named = {f"{'ascent' if key == 'objective' else 'forget_set'}.{key}": value for key, value in changes.items()}
    settings = UnlearnConfig.from_recipe(recipe).with_overrides({**scope, **named})
    with pytest.raises(ConfigError, match=message):
        resolve_settings(None, settings, task)


@pytest.mark.parametrize("own", [{"target": "soft"}, {"class_weights": [1.0, 2.0]}])
def test_a_set_cannot_have_a_loss_of_its_own(own):
    with pytest.raises(
        ConfigError, match=f"evaluation.test sets {next(iter(own))}, which an evaluation set cannot have"
    ):
        open_other_set("test", {"path": image_table(3), **own}, config("class"), image_fields)


def test_views_repeat_the_labels_of_their_rows():
    from imu_ray.data import ViewSource

    labels = labels_of("soft", 3)
    views = ViewSource(open_source(table(labels.tolist()), config("soft")), 2, "flip", 0)
    np.testing.assert_array_equal(views.read(1, 5).labels, torch.repeat_interleave(labels, 2, 0)[1:5])
