"""What is shared reaches workers that cannot import the code it is made of."""

import importlib
import threading

import pytest
import ray
import torch

from imu_ray.distributed.sharing import own_modules, share
from imu_ray.errors import ForgetSetError, UnsupportedModelError

CODE = """
import threading
import torch
LOCK = threading.Lock()
def double(x):
    return 2 * x
class Net(torch.nn.Module):
    def forward(self, x):
        return double(x)
class Locked(torch.nn.Module):
    def forward(self, x):
        with LOCK:
            return x
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in a folder that no worker looks into."""
    (tmp_path / "module_of_a_script.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("module_of_a_script")


def test_a_callers_own_modules_are_those_outside_the_installed_packages(own):
    found = own_modules()
    assert own in found
    assert not {"imu_ray", "torch", "ray", "json", "__main__"} & {module.__name__ for module in found}


def test_a_model_of_a_scripts_own_module_runs_on_a_worker(ray_cluster, own):
    run = ray.remote(lambda refs: ray.get(refs[0])(torch.ones(2)))
    assert ray.get(run.remote([share(own.Net(), "the model", UnsupportedModelError)])).tolist() == [2.0, 2.0]


def test_code_that_cannot_travel_is_left_to_the_workers_to_find(ray_cluster, own):
    assert isinstance(ray.get(share(own.Locked(), "the model", UnsupportedModelError)), own.Locked)


def test_what_does_not_pickle_is_refused_by_name(ray_cluster):
    with pytest.raises(ForgetSetError, match="Pairs cannot be sent to the workers .*lock"):
        share(threading.Lock(), "Pairs", ForgetSetError)
