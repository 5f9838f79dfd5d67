"""Checkpoints in the forms that the field keeps them in: read, and written again in the same form."""

import json
import os

import pytest
import torch
from architectures import named, same_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imu_ray.errors import CheckpointError
from imu_ray.models.checkpoint import load_checkpoint, model_hash, save_as_it_came
from imu_ray.models.copies import plain_copy
from imu_ray.models.spec import ModelSpec

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def spec(path):
    return ModelSpec("architectures:named", kwargs={"name": "fc"}, checkpoint=str(path))


def split(state, folder, files=FILES, **index):
    """The tensors in several files with an index, as Hugging Face's libraries write them."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    shards = {name: files[at % len(files)] for at, name in enumerate(names)}
    for file in files:
        save_file({name: state[name] for name in names if shards[name] == file}, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": shards, **index}))
    return folder


def wrapped(state, *keys):
    for key in reversed(keys):
        state = {key: state, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    return state


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


PICKLED = {
    "plain": ((), ""),
    "Lightning": (("state_dict",), "module."),
    "DeiT": (("model",), ""),
    "PyTorch's tutorial": (("model_state_dict",), "_orig_mod."),
    "both, compiled and parallel": (("state_dict", "model"), "module._orig_mod."),
}


@pytest.mark.parametrize("case", PICKLED)
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_state_dict_comes_back_under_the_same_keys_and_names_and_nothing_beside_it(tmp_path, case, suffix):
    keys, prefix = PICKLED[case]
    given = named("fc", seed=5)
    torch.save(wrapped(prefixed(given.state_dict(), prefix), *keys), tmp_path / f"given.{suffix}")
    model = spec(tmp_path / f"given.{suffix}").build()
    assert model_hash(model) == model_hash(given)
    changed = plain_copy(model)
    with torch.no_grad():
        changed.fc.weight += 1
    (tmp_path / "out").mkdir()
    save_as_it_came(changed, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.pt"]
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    for key in keys:
        assert list(found) == [key], "neither the epoch nor the optimiser is carried over"
        found = found[key]
    assert list(found) == [prefix + name for name in given.state_dict()]
    assert same_state(changed, {name.removeprefix(prefix): value for name, value in found.items()})


@pytest.mark.parametrize("place", ["", INDEX])
def test_shards_are_read_by_folder_or_index_and_come_back_in_the_same_files(tmp_path, place):
    given = named("fc", seed=5)
    folder = split(prefixed(given.state_dict(), "module."), tmp_path / "given")
    model = spec(folder / place).build()
    assert model_hash(model) == model_hash(given)
    with torch.no_grad():
        model.fc.bias -= 1
    (tmp_path / "out").mkdir()
    save_as_it_came(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((folder / INDEX).read_text())
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(folder))
    for file in FILES:
        before, after = load_file(folder / file), load_file(tmp_path / "out" / file)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [
            name for name in before if name == "module.fc.bias"
        ]
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert model_hash(spec(tmp_path / "out").build()) == model_hash(model)


def test_shards_are_read_by_uri(tmp_path):
    given = named("fc", seed=5)
    folder = split(given.state_dict(), tmp_path / "given")
    assert model_hash(spec(f"file://{folder}").build()) == model_hash(given)
    assert model_hash(spec(f"file://{folder}/{INDEX}").build()) == model_hash(given)


def test_a_folder_with_one_file_is_read_as_that_file(tmp_path):
    given = named("fc", seed=5)
    save_file(given.state_dict(), tmp_path / "model.safetensors")
    assert model_hash(spec(tmp_path).build()) == model_hash(given)


@pytest.mark.parametrize(("prefix", "written"), [("", []), ("module.", ["model.safetensors"])])
def test_one_safetensors_file_comes_back_where_it_has_other_names_than_the_model(tmp_path, prefix, written):
    given = named("fc", seed=5)
    save_file(prefixed(given.state_dict(), prefix), tmp_path / "given.safetensors")
    (tmp_path / "out").mkdir()
    save_as_it_came(spec(tmp_path / "given.safetensors").build(), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == written
    for file in written:
        assert load_file(tmp_path / "out" / file).keys() == prefixed(given.state_dict(), prefix).keys()


def test_a_model_without_a_checkpoint_is_not_written_again(tmp_path):
    save_as_it_came(named("fc"), tmp_path)
    assert not os.listdir(tmp_path)


def without_a_shard(state, folder):
    os.remove(split(state, folder) / FILES[1])


def of_another_save(state, folder):
    split(state, folder)
    save_file({"fc.weight": torch.zeros(5, 12)}, folder / FILES[0])


def twice(state, folder):
    """A tensor lies in both shards, of which the index names one."""
    split(state, folder)
    save_file({**load_file(folder / FILES[0]), **load_file(folder / FILES[1])}, folder / FILES[0])


def cut_off(state, folder):
    path = split(state, folder) / FILES[0]
    path.write_bytes(path.read_bytes()[:-9])


def naming(file):
    def make(state, folder):
        split(state, folder, weight_map={**dict.fromkeys(state, FILES[0]), "fc.weight": file})

    return make


BROKEN = {
    "a shard is missing": (without_a_shard, f"has no shard {FILES[1]}; expected every file that its index names"),
    "a shard is of another save": (of_another_save, f"does not fit its shard {FILES[0]}, of which one has body.0.bias"),
    "a tensor is there twice": (twice, f"does not fit its shard {FILES[0]}, of which one has"),
    "a shard is cut off": (cut_off, "cannot be read: .*expected a whole file"),
    "the index is no index": (lambda state, folder: split(state, folder, weight_map=[1]), "an index without weight_map"),
    "the index is no JSON": (lambda state, folder: (split(state, folder) / INDEX).write_text("{"), "cannot be read"),
    **{
        f"a shard is {file!r}": (naming(file), "as a shard; expected a .safetensors file in the folder of the index")
        for file in ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.bin", "C:x.safetensors", 3)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_do_not_make_a_whole_are_refused_and_none_is_read_from_elsewhere(tmp_path, case):
    make, message = BROKEN[case]
    state = named("fc").state_dict()
    save_file(state, tmp_path / "x.safetensors")
    make(state, tmp_path / "given")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(named("fc"), tmp_path / "given")


def test_an_empty_folder_is_refused_and_told_what_could_lie_there(tmp_path):
    with pytest.raises(CheckpointError, match=f"does not exist; .*a folder with model.safetensors or {INDEX}"):
        load_checkpoint(named("fc"), tmp_path)
