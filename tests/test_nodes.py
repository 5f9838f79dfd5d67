"""Nodes that are lost, come late, are small or differ: several nodes on one machine, in a process of their own."""

import json

import pyarrow.parquet as pq
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROWS, STAGES = 160, ("features", "statistics", "scores")


@pytest.fixture(scope="module")
def play(drive):
    """Plays a scenario of the driver in a folder, and gives the folder back."""

    def run(scenario, folder):
        done = drive("nodes_driver.py", scenario, folder)
        assert done.returncode == 0, done.stderr
        return folder

    return run


def scores(run):
    return pq.read_table(run / "intensities.parquet")


@pytest.fixture(scope="module")
def losses(tmp_path_factory, play):
    """An undisturbed run on one node, and on three nodes one run for each stage in which a node was lost."""
    return play("lose", tmp_path_factory.mktemp("lose"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_lost_while_scoring_leaves_the_same_bits(losses, stage):
    assert (losses / stage / "lost").exists(), "a node was lost"
    assert scores(losses / stage / "run").equals(scores(losses / "none" / "run"))


def test_features_that_were_lost_with_their_node_are_made_again(losses):
    # How many the node held, and whether copies were elsewhere, is up to Ray's scheduler: it may be none in a stage.
    assert sum((losses / stage / "reads").stat().st_size for stage in STAGES) > len(STAGES) * (ROWS + 1)


# One step is sums in a fixed order; the steps of two workers differ from one worker's in the order of theirs.
@pytest.mark.parametrize(
    ("update", "lost", "tolerance"),
    [("head", ["node"], 1e-9), ("layers", ["node"], 1e-9), ("one step", ["curvature", "gradient", "trial"], 0)],
)
def test_a_node_lost_while_parameters_move_leaves_the_same_model(tmp_path, play, update, lost, tolerance):
    play(update, tmp_path)
    assert all((tmp_path / token).exists() for token in lost), "nodes were lost"
    assert float((tmp_path / "apart").read_text()) <= tolerance


@pytest.fixture(scope="module")
def addition(tmp_path_factory, play):
    """A run that a second node joined, and one on both nodes that notes which node read and scored a sample."""
    return play("add", tmp_path_factory.mktemp("add"))


def test_a_node_that_comes_during_the_features_is_used(addition):
    nodes = [path for path in addition.iterdir() if len(path.name) == 56]
    assert len(nodes) == 2, "samples were read on both"
    assert len(scores(addition / "run")) == 64


def test_features_are_scored_on_the_node_that_made_them(addition):
    scored = {path.name: path.read_text() for path in (addition / "scored").iterdir()}
    assert sorted(scored, key=int) == ["0", "16", "32", "48"]
    assert scored == {row: (addition / "read" / row).read_text() for row in scored}
    assert len(set(scored.values())) == 2


def test_an_object_store_smaller_than_the_features_gives_the_same_scores(tmp_path, play):
    play("spill", tmp_path)
    stores = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("small", "large")}
    made = json.loads((tmp_path / "small" / "manifest.json").read_text())["forget_set"]["feature_bytes"]
    assert made > 150e6
    assert stores["small"] < made < stores["large"]
    assert scores(tmp_path / "small").equals(scores(tmp_path / "large"))


def test_a_node_with_another_torch_is_refused_by_name(tmp_path, play):
    play("refuse", tmp_path)
    said = (tmp_path / "refused").read_text()
    address = json.loads((tmp_path / "nodes").read_text())[0]
    driver = torch.__version__.partition("+")[0]
    assert f"1 of 3 nodes cannot do the work: node {address}: torch 1.0 (driver {driver}" in said
    assert not (tmp_path / "run").exists()


def test_the_driver_takes_less_than_12_kb_more_for_a_shard(tmp_path, play):
    play("count", tmp_path)
    (few, before), (many, after) = json.loads((tmp_path / "memory.json").read_text()).items()
    assert 1000 * (after["VmHWM"] - before["VmRSS"]) < 12 * (int(many) - int(few))
