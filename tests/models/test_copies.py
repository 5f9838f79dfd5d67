"""Copies of live models, and checkpoints of wrapped ones."""

import threading

import pytest
import torch
from architectures import named
from safetensors.torch import save_file
from samples import tensors
from torch import nn

from imu_ray.errors import UnsupportedModelError
from imu_ray.models.checkpoint import load_checkpoint, model_hash
from imu_ray.models.copies import plain_copy

EXAMPLE = tensors(3)[0]


def compiled(model):
    return torch.compile(model, backend="eager")


def inside(model):
    model.body = compiled(nn.DataParallel(model.body))
    return model


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: compiled(nn.DataParallel(model)),
    "a part": inside,
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_a_wrapped_model_is_copied_as_the_plain_one_and_left_as_it_was(case):
    wrapped = WRAPPERS[case](named("fc"))
    names = list(wrapped.state_dict())
    copied = plain_copy(wrapped)
    assert model_hash(copied) == model_hash(named("fc"))
    assert torch.equal(copied(EXAMPLE), named("fc")(EXAMPLE))
    assert list(wrapped.state_dict()) == names


@pytest.mark.parametrize("case", sorted({*WRAPPERS} - {"averaged"}))  # which has a counter that a plain model lacks
def test_a_checkpoint_loads_into_a_plain_and_a_wrapped_model_whichever_wrote_it(case, tmp_path):
    source = named("fc", seed=5)
    for number, (written, loaded) in enumerate(
        [(WRAPPERS[case](named("fc", seed=5)), named("fc")), (source, WRAPPERS[case](named("fc")))]
    ):
        save_file(written.state_dict(), path := tmp_path / f"{number}.safetensors")
        load_checkpoint(loaded, path)
        assert model_hash(plain_copy(loaded)) == model_hash(source)


def test_a_model_with_a_part_named_module_keeps_its_names(tmp_path):
    model, other = (nn.ModuleDict({"module": named("fc", seed=seed), "other": named("fc", seed=2)}) for seed in (0, 1))
    assert list(plain_copy(model).state_dict()) == list(model.state_dict())
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    load_checkpoint(other, tmp_path / "x.safetensors")
    assert model_hash(other) == model_hash(model)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}


def holding(value):
    model = named("fc")
    model.held = value
    return model


UNFIT = {
    "without values": (lambda: nn.Linear(3, 2, device="meta"), "weight of Linear is on the meta device"),
    "not initialised": (lambda: nn.LazyLinear(2), "weight of LazyLinear is not initialised yet"),
    "sparse": (lambda: holding(nn.Parameter(torch.eye(3).to_sparse())), "held of Named is sparse"),
    "with state of another kind": (lambda: Extra(3, 2), "_extra_state of Extra is a dict"),
    "with a lock": (
        lambda: holding(threading.Lock()),
        "Named cannot be copied .TypeError: cannot pickle '_thread.lock'",
    ),
    "with a computed tensor": (
        lambda: holding(torch.ones(2, requires_grad=True) * 2),
        "Named cannot be copied .RuntimeError",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_cannot_be_copied_hashed_or_written_is_refused(case):
    make, message = UNFIT[case]
    with pytest.raises(UnsupportedModelError, match=message):
        plain_copy(make())
