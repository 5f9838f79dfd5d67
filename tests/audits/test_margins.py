import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imu_ray.audits.easydub import read_easydub
from imu_ray.audits.margins import Margins, model_table
from imu_ray.errors import CheckpointError, ForgetSetError, NonFiniteError
from imu_ray.influence.scores import margins as margin_of

POINTS, SETS = ["a", "b", "a", "c"], np.array(["forget", "forget", "test", "retain"])


def table(seed=0, kind="unlearned", points=POINTS, sets=SETS, values=None):
    values = np.arange(len(points)) + 10.0 * seed if values is None else values
    return model_table(kind, seed, points, list(sets), np.asarray(values))


def two_kinds(models=3):
    random = np.random.default_rng(0)
    kinds = ("original", "unlearned")
    of = {kind: random.normal(size=(models, 4)) for kind in kinds}
    return Margins(POINTS, SETS, {kind: list(range(5, 5 + models)) for kind in kinds}, of)


def test_what_is_written_is_read_again_digit_for_digit(tmp_path):
    made = two_kinds()
    names = made.write(tmp_path / "all")
    assert len(names) == 6
    found = Margins.read(tmp_path / "all")
    assert (found.points, found.sets.tolist(), found.seeds) == (POINTS, SETS.tolist(), made.seeds)
    for kind, margins in made.of.items():
        assert np.array_equal(found.of[kind], margins)
    some = Margins.read([tmp_path / "all" / name for name in names[:2]])
    assert some.seeds == {"original": [5, 6]}
    rows = pq.read_table(tmp_path / "all" / names[-1]).to_pylist()
    assert rows[2] == {
        "kind": "unlearned",
        "seed": 7,
        "point": "a",
        "set": "test",
        "margin": made.of["unlearned"][2, 2],
    }


def test_rows_in_another_order_are_the_same_margins():
    shuffled = [3, 0, 2, 1]
    other = table(1, points=[POINTS[at] for at in shuffled], sets=SETS[shuffled], values=[13.0, 10.0, 12.0, 11.0])
    found = Margins.of_tables([("one", table(0)), ("two", other)])
    assert found.of["unlearned"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_a_subset_has_the_points_of_its_set_alone():
    made = two_kinds()
    part = made.subset("forget")
    assert part.points == ["a", "b"]
    assert np.array_equal(part.of["original"], made.of["original"][:, :2])
    assert made.names == ["forget", "test", "retain"]
    with pytest.raises(ForgetSetError, match="no margins of the set 'unseen'; expected one of forget, test, retain"):
        made.subset("unseen")


def test_models_of_two_tables_are_joined_by_their_points():
    made = two_kinds()
    other = Margins.of_tables([("x", table(5, "retrained", POINTS[::-1], SETS[::-1], [3.0, 2.0, 1.0, 0.0]))])
    found = made.join(other)
    assert found.seeds == {"original": [5, 6, 7], "retrained": [5], "unlearned": [5, 6, 7]}
    assert found.of["retrained"].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(CheckpointError, match="the original model of seed 5 stands there twice"):
        made.join(made)


BAD = {
    "a hole": ([table(), table(1, points=POINTS[:3], sets=SETS[:3])], CheckpointError, "f1 lacks 1 of the points"),
    "a point more": ([table(), table(1, points=[*POINTS, "d"], sets=[*SETS, "test"])], CheckpointError, "f1 has 1 more"),
    "a point of another set": ([table(), table(1, sets=SETS[[0, 2, 2, 3]], points=["a", "b", "a", "c"])], CheckpointError, "f1 lacks 1"),
    "a model twice": ([table(), table()], CheckpointError, "f1 and f0 both hold the unlearned model of seed 0"),
    "two models": ([pa.concat_tables([table(), table(1)])], CheckpointError, r"kinds \['unlearned'\] and seeds \[0, 1\]"),
    "a point twice": ([pa.concat_tables([table(), table()])], ForgetSetError, "point 'a' of the set 'forget' stands in f0 twice"),
    "no margin": ([table().set_column(4, "margin", pa.array([1.0, None, 2.0, 3.0]))], NonFiniteError, "f0 has 1 rows without a margin"),
    "NaN": ([table().set_column(4, "margin", pa.array([1.0, np.nan, 2.0, 3.0]))], NonFiniteError, "margin nan at point 'b'"),
    "infinity": ([table().set_column(4, "margin", pa.array([1.0, 0.0, 2.0, -np.inf]))], NonFiniteError, "margin -inf at point 'c'"),
    "no set": ([table().drop_columns(["set"])], CheckpointError, "f0 has columns kind, seed, point, margin; expected"),
    "text": ([table().set_column(4, "margin", pa.array(list("abcd")))], CheckpointError, "a column of another type"),
    "no rows": ([table().slice(0, 0)], CheckpointError, "f0 has no rows"),
    "an unknown kind": ([table().set_column(0, "kind", pa.array(["oracle"] * 4))], CheckpointError, "'oracle'; expected one of original"),
    "nothing": ([], ForgetSetError, "there are no margins"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_margins_that_are_not_whole_are_refused_by_name(case):
    tables, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        Margins.of_tables((f"f{at}", each) for at, each in enumerate(tables))


def test_files_that_are_no_margins_are_refused(tmp_path):
    with pytest.raises(ForgetSetError, match="the margins .*/none does not exist"):
        Margins.read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForgetSetError, match="no Parquet file lies in .*/empty"):
        Margins.read(tmp_path / "empty")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(CheckpointError, match=r"broken.parquet cannot be read \(ArrowInvalid\)"):
        Margins.read(tmp_path)


def test_the_margin_of_a_sure_prediction_keeps_its_digits():
    # ln(p / (1 - p)) of the probability itself is infinite from a difference of 37 on.
    logits = torch.tensor([[60.0, 0.0, 1.0], [-3.0, 500.0, 2.0]])
    found = margin_of(logits, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([60 - np.log1p(np.e), -503.0], rel=1e-15)


def published(root, models=3, train=10, val=4, forget=(7, 2)):
    """Random margins as EasyDUB lays them out."""
    random, made = np.random.default_rng(1), {}

    def put(place, rows):
        for model in range(models):
            path = root / place / "resnet9" / f"id_{model}_epoch_23.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            made[place, model] = random.normal(size=rows).astype(np.float32)
            np.save(path, made[place, model])

    (root / "forget_sets/cifar10").mkdir(parents=True)
    np.save(root / "forget_sets/cifar10/forget_set_3.npy", np.array(forget))
    base = "margins/cifar10"
    put(f"{base}/pretrain/retain", train)
    put(f"{base}/pretrain/forget_3", len(forget))
    put(f"{base}/pretrain/val", val)
    put(f"{base}/oracle/forget_3/retain", train - len(forget))
    put(f"{base}/oracle/forget_3/forget", len(forget))
    put(f"{base}/oracle/forget_3/val", val)
    return made


def test_published_margins_stand_at_their_rows(tmp_path):
    made = published(tmp_path)
    found = read_easydub(tmp_path, 3, models=2)
    assert found.seeds == {"original": [0, 1], "retrained": [0, 1]}
    retain = [0, 1, 3, 4, 5, 6, 8, 9]
    assert found.points == [f"train-{row}" for row in (*retain, 7, 2)] + [f"val-{row}" for row in range(4)]
    assert found.sets.tolist() == ["retain"] * 8 + ["forget"] * 2 + ["test"] * 4
    base = "margins/cifar10"
    for model in range(2):
        originals = [made[f"{base}/pretrain/{name}", model] for name in ("retain", "forget_3", "val")]
        assert np.array_equal(found.of["original"][model], np.concatenate([originals[0][retain], *originals[1:]]))
        oracles = [made[f"{base}/oracle/forget_3/{name}", model] for name in ("retain", "forget", "val")]
        assert np.array_equal(found.of["retrained"][model], np.concatenate(oracles))


def test_published_margins_that_do_not_fit_are_refused(tmp_path):
    published(tmp_path)
    one = tmp_path / "margins/cifar10/oracle/forget_3/val/resnet9/id_1_epoch_23.npy"
    with pytest.raises(CheckpointError, match=r"pretrain/retain/resnet9 has 3 models; expected 5 or more"):
        read_easydub(tmp_path, 3, models=5)
    with pytest.raises(CheckpointError, match=r"forget_set_4.npy cannot be read \(FileNotFoundError\)"):
        read_easydub(tmp_path, 4)
    np.save(one, np.zeros(7))
    with pytest.raises(CheckpointError, match="arrays in .*/val/resnet9 differ in length"):
        read_easydub(tmp_path, 3)
    np.save(one, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"id_1_epoch_23.npy cannot be read \(ValueError\)"):
        read_easydub(tmp_path, 3)
    one.unlink()
    with pytest.raises(CheckpointError, match=r"has other models than .*\[1\]; expected the same"):
        read_easydub(tmp_path, 3)
