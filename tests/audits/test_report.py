import re

import numpy as np
import pytest

from imu_ray.audits.report import render_report
from imu_ray.audits.sweep_report import render_sweep

FIGURES = {
    "samples": 3, "accuracy": 0.5, "loss": 1.25, "per_class": {"7": {"samples": 3, "accuracy": 0.5, "loss": 1.25}},
}  # fmt: skip
MANIFEST = {
    "created": "2026-01-01", "model": {"kind": "Net", "layers": ["fc"], "hash_before": "a1"}, "seed": 0,
    "config_identity": "c0ffee", "config": {"recipe": "paper"}, "seconds": {"scores": 1.0},
    "forget_set": {"rows_used": 3, "fingerprint": "f00d", "bad_rows": []},
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


def test_retrieval_has_a_table_in_which_a_part_may_be_without_queries():
    figures = {"queries": 7, "mAP": 0.4321, "rank1": 0.1, "rank5": 0.2, "rank10": 0.3}
    retrieval = {"gallery": 50, "distance": "cosine", "all": figures, "forgotten": {"queries": 0}, "others": figures}
    page = render_report(MANIFEST, {"before": {**side(0.9), "retrieval": retrieval}}, None, None)
    assert page.count("43.21 %") == 2
    assert "among 50 pictures of the gallery by the cosine distance" in page
    assert "<h2>Retrieval</h2>" not in render_report(MANIFEST, {"before": side(0.9)}, None, None)


SAID = {
    "perplexity": 12.345,
    "probability": 0.25,
    "extraction_strength": 0.5,
    "truth_ratio": 0.75,
    "skipped": {"rouge": "no <b>"},
}


def test_what_a_language_model_says_has_a_table_and_reasons_and_no_sentence_is_of_classes():
    language = {
        "sets": {"forget": SAID},
        "skipped": {"model_utility": "no <b>"},
        "forget_quality": 0.0123,
        "model": "cafe" * 16,
    }
    forget = {**FIGURES, "per_class": {}}
    attack = {"balanced_accuracy": 0.5, "band": [0.4, 0.6], "members": 3, "non_members": 4}
    sides = {name: {"forget": forget, "membership": attack, "language": language} for name in ("before", "after")}
    manifest = {**MANIFEST, "ascent": {**ASCENT, "status": "reached"}}
    page = render_report(manifest, sides, None, None)
    for shown in ("12.35", "Extraction strength", "0.0123", "cafecafecafe"):
        assert page.count(shown) >= 2
    assert "Not measured: model utility, ROUGE-L of forget: no &lt;b&gt;." in page
    assert "Among the choices" not in page
    for word in ("same class", "true class", "labelled samples", "Per class"):
        assert word not in page
    assert "What the model still says" not in render_report(manifest, {"before": side(0.9)}, None, None)


def test_a_run_without_metrics_still_has_a_page():
    page = render_report(MANIFEST, {}, (np.array([-1.0, 0.5, -3.0]), np.array([1.0, 0.0, 1.0])), None)
    assert page.count("<svg") == 2
    assert "the 2 kept of 3 samples" in page
    assert "f00d" in page


INFLUENCE = {
    "damping": 0.01, "fisher_quantiles": {"0.05": 1e-9, "0.5": 2e-6, "0.95": 3e-4}, "fisher_below_damping": 0.987,
    "plain_gradient_share": 0.5, "clipped_at": None,
}  # fmt: skip


def test_the_page_says_how_far_the_damping_dominates():
    config = {"recipe": "paper", "influence": {"curvature": "kfac", "curvature_set": "forget"}}
    manifest = {**MANIFEST, "config": config}
    influences = [{**INFLUENCE, "plain_gradient_share": share} for share in (0.5, 0.999)]
    pages = [render_report({**manifest, "influence": influence}, {}, None, None) for influence in influences]
    assert "98.7 %" in pages[0]
    assert "50.0 %" in pages[0]
    assert ["The damping dominates" in page for page in pages] == [False, True]
    assert "kfac" not in render_report(manifest, {}, None, None)


ASCENT = {"steps": 25, "kept_samples": 3, "reason": "the accuracy is 0.5"}


@pytest.mark.parametrize(
    ("ascent", "shown", "colour"),
    [
        ({"status": "reached"}, "The target was reached.", "reached"),
        ({"status": "already_met", "steps": 0}, "Nothing was done: the model meets the target already.", "already_met"),
        ({"status": "not_reached"}, "The target was not reached.", "not_reached"),
        ({"status": "stopped_by_guard"}, "A guard stopped the run before the target", "stopped_by_guard"),
        ({"status": "reached", "warnings": ["near chance: <b>?"]}, "near chance: &lt;b&gt;?", "doubtful"),
        ({"status": "reached", "recipe": "samples", "recipe_reason": "all"}, "<code>samples</code>: all.", "reached"),
    ],
)
def test_the_headline_says_how_the_run_ended_and_is_green_only_when_it_is_done(ascent, shown, colour):
    page = render_report({**MANIFEST, "ascent": {**ASCENT, **ascent}}, {}, None, None)
    assert shown in page
    assert f'<span class="status {colour}">{ascent["status"].replace("_", " ")}</span>' in page
    assert ("Only the head was changed" in page) == (ascent.get("steps") != 0)


def test_what_was_resumed_is_said():
    page = render_report({**MANIFEST, "resumed": ["2026-01-02", "2026-01-03"]}, {}, None, None)
    assert "2026-01-01, resumed 2026-01-03" in page


ACCURACIES = {"forget": "forget.accuracy", "test": "test.accuracy"}
ROW = {
    "trial": "a", "seed": 1, "rows": 30, "status": "reached", "reason": "", "steps": 5, "forget.accuracy": 0.5,
    "test.accuracy": 0.75, "membership": None, "output_change": 0.1, "parameter_drift": 0.2, "seconds": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(("best", "shown"), [(["a"], "chosen by output change"), ([], "none was chosen")])
def test_a_sweep_says_by_what_it_chose_only_where_it_chose(best, shown):
    failed = {"trial": "b", "status": "failed", "rows": None, "forget.accuracy": None, "test.accuracy": None}
    sweep = {"created": "2026-01-01", "axes": {"seed": "[1]"}, "choose_by": "output_change"}
    page = render_sweep(sweep, [ROW, {**ROW, **failed}], ACCURACIES, best)
    assert shown in page
    assert ("chosen by" in page) == bool(best)
    assert "75.00" in page
    assert "None" not in page


def test_every_cell_that_is_stacked_on_a_phone_has_its_name_and_the_status_comes_first():
    sweep = render_sweep({"created": "", "axes": {"seed": ""}, "choose_by": "auto"}, [ROW], ACCURACIES, [])
    report = render_report(MANIFEST, {"before": side(0.9), "after": side(0.1)}, None, None)
    for page in (sweep, report):
        stacked = "".join(re.findall(r'<table class="stacked">.*?</table>', page, re.DOTALL))
        assert stacked
        assert not re.findall(r"<td>", stacked)
    assert re.search(r'<td class="first">\s*reached</td>', sweep)
    assert 'data-name="Accuracy after"' in report


def test_a_picture_is_told_in_words_and_a_retrained_model_stands_beside_every_figure():
    figures = {"before": side(0.9), "after": side(0.1), "retrained": side(0.2)}
    page = render_report(MANIFEST, figures, (np.array([-1.0, 0.5]), np.array([1.0, 0.0])), None)
    assert page.count("<svg") == page.count('<svg role="img" aria-label="samples against ') == 2
    assert 'data-name="Accuracy retrained">20.00 %' in page
    assert page.index("Accuracy before") < page.index("Accuracy after") < page.index("Accuracy retrained")


VERDICT = {
    "word": "contained", "reason": "a new head <b>finds</b> them", "checked": ["membership by loss"],
    "not_checked": ["a retrained model"], "thresholds": {"margin": 0.1},
}  # fmt: skip
TARGET = {"metric": "forget.accuracy", "threshold": 0.01, "reason": "", "tolerance": 0.0, "rising": False}


def test_the_headline_gives_the_status_word_what_was_asked_and_what_was_not_checked():
    ascent = {**ASCENT, "status": "reached", "targets": [TARGET]}
    page = render_report({**MANIFEST, "ascent": ascent, "verdict": VERDICT}, {}, None, None)
    head = page[: page.index("</section>")]
    for shown in (
        '<span class="status contained">contained</span>',
        "The rows can still be told. The target was reached.",
        "until forget.accuracy is\nat most 0.01",
        "Why this word: a new head &lt;b&gt;finds&lt;/b&gt; them.",
        "<li>membership by loss</li>",
        "<li>a retrained model</li>",
    ):
        assert shown in head


def test_attacks_destinations_recovery_and_gaps_have_their_tables():
    attack = {"balanced_accuracy": 0.61, "band": [0.45, 0.55], "members": 30, "non_members": 40, "auc": 0.66}
    attack |= {"roc": {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}, "svc_efficacy": {"skipped": "no <b>retain</b>"}}
    attack |= {"attacks": {"modified_entropy": {"balanced_accuracy": 0.777, "band": [0.4, 0.6]}}, "warning": "broken"}
    found = {**side(0.1), "membership": attack, "destinations": {"7": {"1": 5, "2": 9, "3": 4, "4": 1}}}
    steps = {"steps": [0, 1], "accuracy": [0.01, 0.345]}
    recovery = {"probe": {"accuracy": 0.868, "labelled": 50}, "relearn": steps, "skipped": {"lora": "of language <b>"}}
    recovery |= {"quantise": {"8": {"accuracy": 0.011}, "4": {"accuracy": 0.222}}}
    gap = {"average_gap": {"mean": 0.0123}, "tug_of_war": {"mean": 0.987}, "tug_of_war_membership": {"skipped": "none"}}
    metrics = {"before": found, "after": found, "recovery": {"after": recovery}}
    metrics["gaps"] = {"references": 1, "sides": {"do_nothing": gap}}
    page = render_report(MANIFEST, metrics, None, None)
    for shown in (
        "0.777", "modified entropy", "0.660", "no &lt;b&gt;retain&lt;/b&gt;", "2: 9, 1: 5, 3: 4<", "86.8 %", "34.5 %", "22.2 %",
        "Rounding to 4 bit", "Training all parameters, 1 step<", "lora: of language &lt;b&gt;.", "0.012", "not measured: none",
        "forgotten rows taken for members against unseen rows taken for members: chance, before, after", "before: broken",
    ):  # fmt: skip
        assert shown in page, shown
