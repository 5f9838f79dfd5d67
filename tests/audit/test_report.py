import pyarrow as pa

from imu_ray.audit.report import render_report

FIGURES = {"samples": 3, "accuracy": 0.5, "loss": 1.25, "per_class": {"7": {"samples": 3, "accuracy": 0.5, "loss": 1.25}}}
MANIFEST = {
    "created": "2026-01-01", "model": {"class": "Net", "head": "fc", "hash_before": "a1"}, "seed": 0, "config_identity": "c0ffee",
    "config": {"recipe": "paper"}, "forget_set": {"rows_used": 3, "fingerprint": "f00d", "bad_rows": []}, "seconds": {"scores": 1.0},
    "hardware": {"processor": "P", "device": "cpu", "threads_per_worker": 1}, "versions": {"ray": "2"},
}  # fmt: skip


def side(accuracy):
    return {"forget": {**FIGURES, "accuracy": accuracy}, "membership": {"skipped": "no <b>unseen</b> samples"}}


def test_figures_stand_in_the_page_and_markup_in_them_is_escaped():
    page = render_report(MANIFEST, {"before": side(0.9876), "after": side(0.0123)}, None, None)
    assert "98.76 %" in page
    assert "1.23 %" in page
    assert "no &lt;b&gt;unseen&lt;/b&gt; samples" in page
    assert "<svg" not in page


def test_a_run_without_metrics_still_has_a_page():
    table = pa.table({"influence": [-1.0, 0.5], "intensity": [1.0, 0.0]})
    page = render_report(MANIFEST, {}, table, None)
    assert page.count("<svg") == 1
    assert "f00d" in page
