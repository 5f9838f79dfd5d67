"""Retrieval: how far up the gallery the pictures of a query's person stand.

Q queries, G pictures of the gallery, D numbers of an embedding; n samples of a shard.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from imu_ray.audits.base import Predictions
from imu_ray.config import AuditConfig
from imu_ray.data.market import sighting_of
from imu_ray.influence.intensity import Column
from imu_ray.influence.layer_io import sizes_of
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import FeatureShard, Positions
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.seen import layer_of

AT_ONCE = 2**24  # distances held at a time
RANKS = (1, 5, 10)
JUNK = -1
Embedded = tuple[npt.NDArray[np.floating[Any]], Positions, Positions]


class Retrieval:
    r"""Mean average precision and cumulative matching of the set ``query`` in the set ``gallery``, as of Market-1501.

    .. math:: mAP = \frac1Q \sum_q \frac1{n_q} \sum_{i=1}^{n_q} \frac{i}{\rho_{qi}}, \qquad
              rank_k = \frac1Q \sum_q [\rho_{q1} \le k]

    :math:`\rho_{qi}` is the place of the i-th of the :math:`n_q` pictures of the query's person, by distance of the
    embeddings (``audit.distance``), among all but junk (person -1) and those of this person by the query's own camera.
    Distractors (person 0) are wrong answers; of equal distances the wrong answers stand first. Queries without a right
    answer are left out. In [0, 1]; of forgotten persons (those of the forget set) both fall, of the others they stay. A
    model that never saw a person still finds some pictures, as it does of the others that it never saw: 0 is too far.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """``retrieval``: ``all``, ``forgotten`` and ``others``, each with ``queries``, ``mAP``, ``rank1``, 5 and 10.

        Nothing where there are no embeddings. Of a part without queries, ``queries`` alone.
        """
        query, gallery = measured.get("query"), measured.get("gallery")
        if query is None or gallery is None or query.embeddings is None or gallery.embeddings is None:
            return {}
        persons, cameras = sightings(query.ids)
        known = (gallery.embeddings, *sightings(gallery.ids))
        precisions, firsts = places((query.embeddings, persons, cameras), known, config.distance)
        forgotten = np.isin(persons, sightings(measured["forget"].ids)[0])
        parts = {"all": np.full(len(persons), True), "forgotten": forgotten, "others": ~forgotten}
        found = {name: _figures(precisions, firsts, part & (firsts > 0)) for name, part in parts.items()}
        left_out = int((firsts == 0).sum())
        return {"retrieval": {"distance": config.distance, "gallery": len(gallery.ids), "left_out": left_out, **found}}


def places(query: Embedded, gallery: Embedded, distance: str) -> tuple[Column, Positions]:
    """Average precision of each query ``[Q]``, and the place of its first right answer, from 1; 0 where it has none.

    Args:
        query: embeddings ``[Q, D]``, persons ``[Q]``, cameras ``[Q]``.
        gallery: the same, ``[G, D]``, ``[G]``, ``[G]``.
        distance: ``cosine`` or ``euclidean``.
    """
    (vectors_QD, persons_Q, cameras_Q), (vectors_GD, persons_G, cameras_G) = query, gallery
    precisions, firsts = np.zeros(len(persons_Q)), np.zeros(len(persons_Q), np.int64)
    step = max(1, AT_ONCE // max(1, len(persons_G)))
    for start in range(0, len(persons_Q), step):
        for row, distances_G in enumerate(distances_of(vectors_QD[start : start + step], vectors_GD, distance), start):
            same = persons_G == persons_Q[row]
            right = np.sort(distances_G[same & (cameras_G != cameras_Q[row])])
            if persons_Q[row] > 0 and len(right):
                wrong = np.sort(distances_G[~same & (persons_G != JUNK)])
                count = np.arange(1, len(right) + 1)
                place = np.searchsorted(wrong, right, "right") + count
                precisions[row], firsts[row] = (count / place).mean(), place[0]
    return precisions, firsts


def distances_of(query_QD: npt.NDArray[Any], gallery_GD: npt.NDArray[Any], distance: str) -> npt.NDArray[np.float64]:
    """Distances ``[Q, G]``: 1 - cosine (1 of a vector of zeros), or the squared Euclidean one, which ranks alike."""
    query, gallery = query_QD.astype(np.float64), gallery_GD.astype(np.float64)
    if distance == "cosine":
        query, gallery = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (query, gallery))
        found: npt.NDArray[np.float64] = 1 - query @ gallery.T
    else:
        found = (query**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * query @ gallery.T
    return found


def _figures(precisions: Column, firsts: Positions, used: npt.NDArray[np.bool_]) -> dict[str, Any]:
    if not used.any():
        return {"queries": 0}
    found = {"queries": int(used.sum()), "mAP": float(precisions[used].mean())}
    return found | {f"rank{rank}": float((firsts[used] <= rank).mean()) for rank in RANKS}


def sightings(ids: Sequence[str]) -> tuple[Positions, Positions]:
    """Person and camera of each sample; the task has refused ids that do not tell them."""
    found = [(int(name.person), name.camera) for sample_id in ids if (name := sighting_of(sample_id))]
    persons, cameras = np.array(found, np.int64).reshape(-1, 2).T
    return persons, cameras


def embed_shard(shard: FeatureShard, part: Part) -> Predictions:
    """What a model's head is given of every sample of a shard, ``[n, D]`` float32, under a part's parameters."""
    layers = cast(Layers, part)  # the head alone may not move with such a task
    return Predictions(shard.labels_n, {}, layers.task.num_classes, shard.ids.to_pylist(), head_inputs(shard, layers))


def head_inputs(shard: FeatureShard, layers: Layers) -> npt.NDArray[np.float32]:
    """The penultimate features ``[n, D]`` of a shard, by a pass through the layers."""
    head = layer_of(layers.cut.model, layers.task.head)
    caught = [np.empty((0, sizes_of(head)[1]), np.float32)]

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0].detach().flatten(1).float().cpu().numpy())

    hook = head.register_forward_pre_hook(catch)
    try:
        for rows in shard.block_rows():
            layers.outputs(shard, rows)
    finally:
        hook.remove()
    return np.concatenate(caught)
