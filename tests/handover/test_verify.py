"""A run, its export and its signature: what is changed shows, and nothing that is handed on names a sample."""

import hashlib
import hmac
import json
import shutil
import subprocess
import zipfile

import pyarrow.parquet as pq
import pytest
import torch
from architectures import named
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from samples import SMALL, image_table, paper

from imu_ray import CheckpointError, ConfigError, compare, unlearn
from imu_ray.cli import main
from imu_ray.handover.export import export_run
from imu_ray.handover.verify import verify_run

pytestmark = pytest.mark.usefixtures("ray_cluster")
SECRET = b"0123456789abcdef0123456789abcdef"


def private_key(path):
    """A new key, and the file of its public half."""
    key = Ed25519PrivateKey.generate()
    pem, raw = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, raw))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path, public


def forget(folder, run_dir):
    settings = SMALL | {"record.key": str(folder / "secret"), "ascent.stop.targets": {"forget.accuracy": 0.0}}
    settings |= {"forget_set.image_mode": "L"}
    sets = {"retain": image_table(70, seed=1), "test": image_table(60, seed=2)}
    unlearn(named("fc"), image_table(50), evaluation=sets, config=paper(settings), run_dir=run_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handover")
    (folder / "secret").write_bytes(SECRET + b"\n")
    forget(folder, folder / "run")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run, in another place."""
    return shutil.copytree(finished / "run", tmp_path / "moved")


def changed(findings):
    return {each.part for each in findings if each.status == "changed"}


def test_what_was_not_touched_verifies_in_another_place_too(run):
    findings = verify_run(run)
    assert not changed(findings)
    assert {"record", "checkpoint", "table", "metrics", "report", "ids"} <= {each.part for each in findings}
    told = {each.part: each.told for each in findings if "described" in each.told}
    assert set(told) == {"checkpoint"}


def test_a_run_that_was_killed_before_its_seal_has_one_when_it_is_called_again(run, finished):
    (run / "manifest.sha256").unlink()
    forget(finished, run)
    assert not changed(verify_run(run))


def flip_byte(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.safetensors", "checkpoint"), ("intensities.parquet", "table"), ("metrics.json", "metrics"),
        ("report.html", "report"), ("manifest.json", "record"), ("manifest.sha256", "record"),
        ("forget_ids.parquet", "ids"), ("trajectory.parquet", "table"),
    ],
)  # fmt: skip
def test_a_changed_byte_shows_and_its_part_is_named(name, part, run):
    if name == "manifest.json":
        (run / name).write_text((run / name).read_text().replace('"seed": 0', '"seed": 1', 1))
    else:
        flip_byte(run / name, 5 if name == "manifest.sha256" else -1)
    assert changed(verify_run(run)) == {part}


def test_a_checkpoint_with_the_right_name_and_other_weights_is_not_the_one_described(run, tmp_path):
    tensors = load_file(run / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    torch.save(tensors, tmp_path / "same.pt")
    assert not changed(verify_run(run, checkpoint=tmp_path / "same.pt"))
    assert changed(verify_run(run, checkpoint=tmp_path / "other.safetensors")) == {"checkpoint"}


def test_a_missing_artifact_is_a_change_of_a_run_and_absent_from_an_export(run, tmp_path):
    export_run(run, tmp_path / "out")
    absent = {each.part for each in verify_run(tmp_path / "out") if each.status == "absent"}
    assert {"checkpoint", "table"} <= absent
    (run / "model.safetensors").unlink()
    assert changed(verify_run(run)) == {"checkpoint"}


@pytest.mark.parametrize("out", ["folder", "record.zip"])
def test_an_export_verifies_and_nothing_in_it_names_a_sample(out, run, tmp_path):
    key, public = private_key(tmp_path / "key.pem")
    made = export_run(run, tmp_path / out, key)
    findings = verify_run(made, public_key=public, checkpoint=run / "model.safetensors")
    assert not changed(findings)
    assert {"signature", "checkpoint", "metrics", "report", "ids"} <= {
        each.part for each in findings if each.status == "same"
    }
    folder = made
    if out.endswith(".zip"):
        folder = tmp_path / "unpacked"
        zipfile.ZipFile(made).extractall(folder)
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "manifest.sha256", "manifest.sig", "metrics.json", "report.html", "forget_ids.parquet",
    }  # fmt: skip
    ids = pq.read_table(run / "intensities.parquet")["sample_id"].to_pylist()
    everything = b"".join(path.read_bytes() for path in folder.iterdir() if path.suffix != ".parquet")
    assert ids[0] == "s000"
    assert not [sample_id for sample_id in ids if sample_id.encode() in everything]


def test_a_run_and_its_export_have_the_same_figures_side_by_side(run, tmp_path):
    found = compare(run, export_run(run, tmp_path / "record.zip"))
    assert found.settings == {}
    assert not any("comparison" in each for each in found.warnings)
    assert sum("record.zip is an export, which does not tell rows to forget" in each for each in found.warnings) == 1
    assert len(found.figures) > 20
    for figure in found.figures:
        assert figure.values[0] == figure.values[1]
        assert isinstance(figure.values[0], float), figure
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {(each.name, each.side): each.values[0] for each in found.figures}
    assert figures["test.loss", "after"] == metrics["after"]["test"]["loss"]
    assert figures["recovery.probe.accuracy", "before"] == metrics["recovery"]["before"]["probe"]["accuracy"]


def test_rows_that_were_left_out_are_handed_on_without_their_ids(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["forget_set"]["bad_rows"] = [{"sample_id": "person-17", "reason": "it is empty"}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = (export_run(run, tmp_path / "out") / "manifest.json").read_text()
    assert "it is empty" in text
    assert "person-17" not in text


def test_nothing_is_handed_on_by_which_samples_could_be_guessed(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    where = "person == 'Jane'"
    manifest["config"]["forget_set"]["where"] = where
    selection = {"rows_searched": 9, "rows_found": 1, "ids_digest": "d1ge57", "where": where}
    manifest["forget_set"]["selection"] = selection
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = (export_run(run, tmp_path / "out") / "manifest.json").read_text()
    assert json.loads(text)["forget_set"]["selection"] == {"rows_searched": 9, "rows_found": 1}
    for secret in ("Jane", "d1ge57", manifest["forget_set"]["fingerprint"]):
        assert secret not in text


@pytest.mark.parametrize("broken", ["record", "signature", "another key", "no signature"])
def test_a_signature_is_of_one_record_under_one_key(broken, run, tmp_path):
    key, public = private_key(tmp_path / "key.pem")
    out = export_run(run, tmp_path / "out", key)
    if broken == "record":  # and its digest, as somebody would who knows of it
        text = (out / "manifest.json").read_text().replace('"seed": 0', '"seed": 1', 1)
        (out / "manifest.json").write_text(text)
        (out / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    elif broken == "signature":
        flip = {"0": "1"}.get((out / "manifest.sig").read_text()[0], "0")
        (out / "manifest.sig").write_text(flip + (out / "manifest.sig").read_text()[1:])
    elif broken == "another key":
        _, public = private_key(tmp_path / "other.pem")
    else:
        (out / "manifest.sig").unlink()
    found = verify_run(out, public_key=public)
    assert changed(found) == {"signature"}
    told = next(each.told for each in found if each.part == "signature")
    assert told.startswith(
        "there is none, where one under the key" if broken == "no signature" else "it is not of this"
    )


def test_a_signature_without_any_key_is_no_proof(run, tmp_path):
    key, _ = private_key(tmp_path / "key.pem")
    out = export_run(run, tmp_path / "out", key)
    record = json.loads((out / "manifest.json").read_text())
    assert record.pop("public_key")
    (out / "manifest.json").write_text(json.dumps(record))
    assert [each.told for each in verify_run(out) if each.part == "signature"] == [
        "there is one, but the record names no key, and none was given"
    ]


def test_a_file_that_is_put_into_the_models_folder_shows(run):
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert changed(verify_run(run)) == {"checkpoint"}


def test_an_id_is_not_looked_for_without_the_key(run):
    with pytest.raises(ConfigError, match="ids are given without a key"):
        verify_run(run, ids=["s000"])


def test_who_has_the_key_can_test_an_id_and_others_cannot(finished, run, tmp_path):
    ids = pq.read_table(run / "intensities.parquet")["sample_id"].to_pylist()
    known = [each.told for each in verify_run(run, key=finished / "secret", ids=[ids[3], "nobody"])]
    assert f"{ids[3]!r} is among them" in known
    assert "'nobody' is not among them" in known
    stored = sorted(hmac.digest(SECRET, sample_id.encode(), "sha256") for sample_id in ids)
    assert pq.read_table(run / "forget_ids.parquet")["hmac"].to_pylist() == stored
    manifest = json.loads((run / "manifest.json").read_text())
    expected = hmac.digest(SECRET, b"".join(stored), "sha256").hex()
    assert manifest["forget_ids"] == {"rows": 50, "fingerprint": expected}
    (tmp_path / "wrong").write_text("another secret of some length")
    findings = verify_run(run, key=tmp_path / "wrong", ids=[ids[3]])
    assert changed(findings) == {"ids"}
    assert not any("among" in each.told for each in findings)
    (tmp_path / "short").write_text("short")
    with pytest.raises(ConfigError, match="holds 5 bytes; expected 16"):
        verify_run(run, key=tmp_path / "short")


def test_the_seal_is_what_sha256sum_checks(run):
    assert subprocess.run(["sha256sum", "--check", "manifest.sha256"], cwd=run, capture_output=True).returncode == 0


def test_the_record_says_what_was_read_for_what_and_gives_its_word(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data_access"] == {
        "forget": ["gradient", "curvature", "measured"], "retain": ["measured"], "test": ["measured"],
    }  # fmt: skip
    assert manifest["verdict"]["word"] in ("not_reached", "inconclusive", "contained")
    assert manifest["verdict"]["not_checked"]


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="is there; expected a new folder"):
        export_run(run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "failed"}))
    for function in (lambda: export_run(run, tmp_path / "out"), lambda: verify_run(run)):
        with pytest.raises(CheckpointError, match="holds a run that is failed"):
            function()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("")
    with pytest.raises(CheckpointError, match="no manifest"):
        verify_run(tmp_path / "else")
    with pytest.raises(CheckpointError, match="there is no run at .*nowhere; expected the directory of a run"):
        verify_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_record_that_cannot_be_read_any_more_is_named_as_changed(run, text):
    if text is None:
        (run / "manifest.json").unlink()
    else:
        (run / "manifest.json").write_text(text)
    (found,) = verify_run(run)
    assert (found.part, found.status) == ("record", "changed")


def test_an_edited_status_is_a_changed_record(run):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "done"}))
    assert changed(verify_run(run)) == {"record"}


def command(monkeypatch, capsys, *line):
    """Exit status, last line, and what was said on standard error."""
    monkeypatch.setattr("sys.argv", ["imu-ray", *map(str, line)])
    code = main()
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


@pytest.mark.usefixtures("restored_log")
def test_the_commands_export_and_verify_and_a_change_has_an_exit_status(run, tmp_path, monkeypatch, capsys):
    code, last, _ = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "record.zip")
    assert (code, last["export"]) == (0, str(tmp_path / "record.zip"))
    code, last, _ = command(monkeypatch, capsys, "verify", tmp_path / "record.zip")
    assert (code, last["status"]) == (0, "complete")
    flip_byte(run / "model.safetensors")
    code, last, said = command(monkeypatch, capsys, "verify", run)
    assert (code, last["status"], last["reason"]) == (1, "failed", "changed: checkpoint")
    assert "table: same: intensities.parquet" in said
    code, last, _ = command(monkeypatch, capsys, "export", tmp_path, "--out", tmp_path / "none")
    assert (code, last["status"]) == (2, "refused")
