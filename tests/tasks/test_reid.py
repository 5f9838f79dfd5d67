"""Re-identification: its scores beside autograd, the embeddings that are looked up, and what is refused."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from persons import TRAINING, Embedder, draw, entries, pixels_of, write_persons
from torch.nn import functional

from imu_ray.audits.retrieval import embed_shard
from imu_ray.config import UnlearnConfig
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.inputs import Inputs
from imu_ray.recipes import resolve_settings
from imu_ray.scopes.extraction import extract_features

LAYERS = ["first", "second", "embedding", "classifier"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("persons")
    write_persons(root / "train", TRAINING[:3], (1, 2), (1, 2))
    write_persons(root / "query", ("0007", "0100"), (3,))
    write_persons(root / "gallery", ("0007", "0100", "0000", "-1"), (4,))
    return root


def opened(folders, *sets, forget=None, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = Embedder().eval().to(dtype)
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    config = UnlearnConfig().with_overrides({"forget_set.classes": TRAINING, "influence.block_rows": 5, **settings})
    evaluation = {name: str(folders / name) for name in sets}
    return Inputs.open(
        model, forget or str(folders / "train"), "reid", evaluation, resolve_settings(None, config, "reid")
    )


def features_of(inputs, name):
    source = inputs.sources[name]
    (shard,) = source.shards(5, 8)
    return extract_features(source, shard, inputs.part, inputs.model, torch.device("cpu"))[0]


def test_scores_are_those_of_one_sample_at_a_time_under_autograd(folders):
    inputs = opened(folders, dtype=torch.float64)
    assert list(inputs.part.parameters) == LAYERS
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        for name, matrix in inputs.part.parameters.items()
    }
    table = inputs.part.scores(features_of(inputs, "forget"), directions)
    own = [inputs.model.get_submodule(name) for name in LAYERS]
    weights = [each for layer in own for each in (layer.weight, layer.bias) if each is not None]
    for row, pixels in enumerate(pixels_of(folders / "train", torch.float64)):
        loss = functional.cross_entropy(inputs.model(pixels[None]), torch.tensor([row // 4]))
        grads = iter(torch.autograd.grad(loss, weights))
        matrices = [
            torch.cat([next(grads).flatten(1), *([next(grads)[:, None]] if layer.bias is not None else [])], 1)
            for layer in own
        ]
        score = -sum((grad * direction).sum() for grad, direction in zip(matrices, directions.values(), strict=True))
        assert table["loss"][row].as_py() == pytest.approx(loss.item(), rel=1e-9)
        assert table["influence"][row].as_py() == pytest.approx(score.item(), rel=1e-9)


@pytest.mark.parametrize("scope", ["usable", ["embedding"], "last:2"])
def test_embeddings_are_the_classifiers_input_under_the_parameters_that_are_asked_for(folders, scope):
    inputs = opened(folders, "query", "gallery", ascent__scope=scope)
    moved = {name: 0.9 * matrix + 0.01 for name, matrix in inputs.part.parameters.items()}
    shard = features_of(inputs, "query")
    for part in (inputs.part, inputs.part.changed(moved)):
        found = embed_shard(shard, part)
        expected = np.stack([vector for vector, *_ in entries(part.apply(inputs.model), folders / "query")])
        assert np.abs(found.embeddings - expected).max() <= 1e-5 * np.abs(expected).max()
    assert found.ids == sorted(path.name for path in (folders / "query").iterdir())
    assert inputs.names == {"forget"}


def jpeg(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG")
    return buffer.getvalue()


def table(*ids):
    images = [jpeg(draw(7, 1, frame)) for frame in range(len(ids))]
    return pa.table({"file": list(ids), "image": images, "label": ["0007"] * len(ids)})


def test_a_table_with_such_ids_serves_as_well(folders):
    forget = table("0007_c1s1_000000_00.jpg", "0007_c2s1_000000_00.jpg")
    inputs = opened(folders, forget=forget, forget_set__id_column="file")
    assert features_of(inputs, "forget").labels_n.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("sets", "settings", "error", "message"),
    [
        ((), {"ascent__scope": "head"}, ConfigError, "ascent.scope is 'head' with task 'reid'; expected"),
        ((), {"ascent__scope": "last:1"}, ConfigError, "'last:1' is the classifier 'classifier' alone, which serves in"),
        ((), {"ascent__scope": ["class*"]}, ConfigError, "is the classifier 'classifier' alone"),
        (("query",), {}, ConfigError, "the set 'query' alone; expected query and gallery, or neither"),
        ((), {"forget_set__size": [2, 8]}, ConfigError, r"forget_set.size is \[2, 8\] with task 'reid'; .*quote them"),
        ((), {"forget_set__size": ["0003"]}, ConfigError, "forget_set.size names '0003', which is not among the 8 of"),
        ((), {"forget": table("7"), "forget_set__id_column": "file"}, ForgetSetError, "the id of row '7' of the table does not tell person"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_persons_is_refused(folders, sets, settings, error, message):
    with pytest.raises(error, match=message):
        opened(folders, *sets, **settings)


def test_sets_that_are_looked_up_serve_nothing_else(folders):
    inputs = opened(folders, "query", "gallery")
    with pytest.raises(ConfigError, match="influence.curvature_set names the sample set 'query'; .*'forget'"):
        inputs.require_sets(UnlearnConfig().with_overrides({"influence.curvature_set": "query"}))
