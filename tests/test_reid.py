"""Persons are forgotten end to end, as the documentation shows it, and what is reported is what the new model does."""

import re
from pathlib import Path

import pytest
import torch
from figures import check_metrics
from persons import TRAINING, cosine, entries, trained, write_persons, written_out

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"
FIGURES = ("mAP", "rank1", "rank5", "rank10")


@pytest.mark.slow
def test_persons_named_by_id_are_forgotten_and_looked_up_before_and_after(tmp_path, ray_cluster, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = trained(write_persons(tmp_path / "bounding_box_train", TRAINING, range(6)))
    query = write_persons(tmp_path / "query", (*TRAINING, "0100", "0101"), range(20, 22))
    gallery = write_persons(tmp_path / "gallery", (*TRAINING, "0100", "0101", "0000", "-1"), range(30, 33))
    (example,) = re.findall(r"^```python\n(.*?task=\"reid\".*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    ran = {"model": model}
    exec(example, ran)
    result = ran["result"]
    assert check_metrics(result.run_dir) == result.metrics
    assert result.status == "reached"
    assert set(result.intensities["label"].to_pylist()) == {1, 2}
    old, new = model.state_dict(), result.model.state_dict()
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"first", "second", "embedding", "classifier"}
    for side, net in (("before", model), ("after", result.model)):
        assert set(result.metrics[side]) == {"forget", "membership", "retrieval"}
        queries = entries(net, query)
        parts = {
            "all": queries,
            "forgotten": [each for each in queries if each[1] in (7, 10)],
            "others": [each for each in queries if each[1] not in (7, 10)],
        }
        for name, chosen in parts.items():
            found = result.metrics[side]["retrieval"][name]
            assert found["queries"] == len(chosen)
            expected = written_out(chosen, entries(net, gallery), cosine)
            # Other batches round otherwise, and a pair of pictures may change places.
            assert [found[key] for key in FIGURES] == pytest.approx(expected, abs=5e-3)
    before, after = (result.metrics[side]["retrieval"]["forgotten"]["mAP"] for side in ("before", "after"))
    assert after < before - 0.02
    assert f"'mAP': {after}" in capsys.readouterr().out
    assert "<h2>Retrieval</h2>" in (Path(result.run_dir) / "report.html").read_text()
