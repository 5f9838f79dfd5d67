"""Retrieval against a ranking that is written out, and scikit-learn's average precision."""

import numpy as np
import pytest
from persons import cosine, written_out
from sklearn.metrics import average_precision_score

from imu_ray.audits import retrieval
from imu_ray.audits.base import Predictions
from imu_ray.audits.retrieval import Retrieval, distances_of, places
from imu_ray.config import AuditConfig


def drawn(count, seed, persons=(-1, 0, 2, 5, 7, 11)):
    """Embeddings that say a little of who is seen; persons and cameras."""
    random = np.random.default_rng(seed)
    who, cameras = random.choice(persons, count), random.integers(1, 4, count)
    looks = np.random.default_rng(0).normal(size=(12, 6))
    return (random.normal(size=(count, 6)) + 0.3 * looks[who]).astype(np.float32), who, cameras


def predictions(embedded):
    vectors, persons, cameras = embedded
    pairs = zip(persons.tolist(), cameras.tolist(), strict=True)
    ids = [
        f"{person if person < 0 else f'{person:04d}'}_c{camera}s1_{i:06d}_00.jpg"
        for i, (person, camera) in enumerate(pairs)
    ]
    return Predictions(np.zeros(len(ids), int), {}, 4, ids, vectors)


def measure(query, gallery, forgotten="0005_c1s1_000000_00.jpg", **settings):
    forget = Predictions(np.zeros(1, int), {"loss": np.zeros(1)}, 4, [forgotten])
    measured = {"forget": forget, "query": predictions(query), "gallery": predictions(gallery)}
    return Retrieval().run(measured, AuditConfig(**settings), 0)["retrieval"]


def squared(one, other):
    return ((one - other) ** 2).sum()


@pytest.mark.parametrize(("distance", "distance_of"), [("cosine", cosine), ("euclidean", squared)])
def test_figures_are_those_of_a_ranking_that_is_written_out(distance, distance_of, monkeypatch):
    monkeypatch.setattr(retrieval, "AT_ONCE", 1500)  # several pieces
    query, gallery = drawn(60, 1), drawn(200, 2)
    found = measure(query, gallery, distance=distance)
    rows = [[(v.astype(float), int(p), int(c)) for v, p, c in zip(*part, strict=True)] for part in (query, gallery)]
    for name, among in {
        "all": lambda person: True,
        "forgotten": lambda person: person == 5,
        "others": lambda person: person != 5,
    }.items():
        chosen = [row for row in rows[0] if among(row[1])]
        expected = written_out(chosen, rows[1], distance_of)
        assert [found[name][key] for key in ("mAP", "rank1", "rank5", "rank10")] == pytest.approx(expected, rel=1e-12)
        assert found[name]["queries"] == sum(person > 0 for _, person, _ in chosen)
    assert found["left_out"] == sum(person <= 0 for _, person, _ in rows[0])
    assert 0 < found["all"]["rank1"] < found["all"]["rank5"] < found["all"]["rank10"] < 1


def test_average_precision_is_that_of_scikit_learn():
    query, gallery = drawn(1, 3, (2,)), drawn(300, 4, (0, 2, 5))
    counted = ~((gallery[1] == 2) & (gallery[2] == query[2][0]))
    scores = -distances_of(query[0], gallery[0], "cosine")[0]
    expected = average_precision_score(gallery[1][counted] == 2, scores[counted])
    assert places(query, gallery, "cosine")[0] == pytest.approx(expected, rel=1e-12)


def test_of_equal_distances_the_wrong_answers_stand_first():
    query, gallery = (np.zeros((1, 3)), np.array([2]), np.array([1])), (np.ones((5, 3)), np.arange(5), np.full(5, 2))
    precisions, firsts = places(query, gallery, "cosine")
    assert (precisions.tolist(), firsts.tolist()) == ([1 / 5], [5])


def test_a_query_whose_person_no_other_camera_saw_is_left_out():
    query, gallery = (np.eye(2), np.array([2, 5]), np.array([1, 1])), (np.eye(2), np.array([2, 5]), np.array([1, 2]))
    found = measure(query, gallery)
    assert (found["left_out"], found["others"], found["forgotten"]["mAP"]) == (1, {"queries": 0}, 1.0)


def test_sets_of_these_names_without_embeddings_are_sets_as_any_other():
    plain = Predictions(np.zeros(2, int), {"loss": np.zeros(2)}, 4)
    assert Retrieval().run(dict.fromkeys(("forget", "query", "gallery"), plain), AuditConfig(), 0) == {}
