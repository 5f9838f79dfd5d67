import numpy as np

from imu_ray.audits.report import render_report

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
    influence, weights = [np.array([-1.0]), np.array([0.5, -3.0])], [np.array([1.0]), np.array([0.0, 1.0])]
    page = render_report(MANIFEST, {}, (lambda: influence, lambda: weights), None)
    assert page.count("<svg") == 1
    assert "the 2 kept of 3 samples" in page
    assert "f00d" in page


INFLUENCE = {
    "damping": 0.01, "fisher_quantiles": {"0.05": 1e-9, "0.5": 2e-6, "0.95": 3e-4}, "fisher_below_damping": 0.987,
    "plain_gradient_share": 0.5, "clipped_at": None,
}  # fmt: skip


def test_the_page_says_how_far_the_damping_dominates():
    config = {"recipe": "paper", "influence": {"curvature": "kfac", "curvature_set": "forget"}}
    page = render_report({**MANIFEST, "config": config, "influence": INFLUENCE}, {}, None, None)
    assert "98.7 %" in page
    assert "50.0 %" in page
    assert "The damping dominates" not in page
    page = render_report({**MANIFEST, "config": config, "influence": {**INFLUENCE, "plain_gradient_share": 0.999}}, {}, None, None)
    assert "The damping dominates" in page
    assert "kfac" not in render_report({**MANIFEST, "config": config}, {}, None, None)
