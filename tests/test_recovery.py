"""The audit sees through what looks forgotten, end to end on handwritten digits."""

import numpy as np
import pytest
import torch
from figures import check_metrics
from safetensors.torch import save_file
from samples import Pairs

from imu_ray import UnlearnConfig, audit, unlearn
from imu_ray.demo import digits, train_digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
FORGOTTEN = 3


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model of all digits, the checkpoint of one that never saw the class, and the sets of a request."""
    pixels, labels, train, test = digits()
    images = torch.from_numpy(pixels).unsqueeze(1) / 255
    pick = lambda rows: Pairs(images[rows], torch.from_numpy(labels[rows]))
    gone = labels[train] == FORGOTTEN
    sets = {"forget": pick(train[gone]), "retain": pick(train[~gone]), "test": pick(test)}
    fit = lambda rows: train_digits(images[rows], torch.from_numpy(labels[rows]))
    place = tmp_path_factory.mktemp("reference") / "retrained.safetensors"
    save_file(fit(train[~gone]).state_dict(), place)
    return fit(train), str(place), sets


def settings(**changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return UnlearnConfig.from_recipe("classes").with_overrides({"resources.workers": 2, **more})


@pytest.mark.long
def test_a_class_that_only_the_head_forgot_is_recovered_and_the_job_says_so(known, tmp_path):
    model, reference, sets = known
    evaluation = {name: sets[name] for name in ("retain", "test")}
    config = settings(audit__recovery=["probe", "relearn", "quantise", "lora"], audit__reference=reference)
    result = unlearn(model, sets["forget"], evaluation=evaluation, config=config, run_dir=tmp_path / "run")
    assert check_metrics(tmp_path / "run", *evaluation) == result.metrics
    found = result.metrics["recovery"]
    assert found.keys() == {"before", "after", "reference"}
    assert result.metrics["after"]["forget"]["accuracy"] <= 0.01
    assert found["after"]["probe"]["accuracy"] > 0.95
    assert found["after"]["probe"] == found["before"]["probe"]
    assert found["reference"]["probe"]["accuracy"] < found["after"]["probe"]["accuracy"]
    relearnt = {name: np.array(each["relearn"]["accuracy"]) for name, each in found.items()}
    assert found["after"]["relearn"]["steps"] == [0, 1, 2, 5, 10, 20]
    assert relearnt["after"][0] <= 0.02
    assert relearnt["after"][3] > relearnt["reference"][3]
    for name, each in found.items():
        assert each["skipped"] == {"lora": "LoRA relearning is of language models"}
        side = result.metrics["retrained" if name == "reference" else name]
        assert each["quantise"]["8"]["accuracy"] == pytest.approx(side["forget"]["accuracy"], abs=0.02)

    alone = config.with_overrides({"resources.workers": 1, "influence.blocks_per_shard": 1})
    again = audit(result.model, sets["forget"], original=model, evaluation=evaluation, config=alone)
    assert again["recovery"] == found
