"""The pages in a browser: they show without an error, fetch nothing, and can be read by everyone, on a desk and on a phone."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from audits.test_report import ACCURACIES, ASCENT, FIGURES, INFLUENCE, MANIFEST, ROW, SAID, TARGET, VERDICT
from samples import png

from imu_ray.audits.report import render_report
from imu_ray.audits.samples import Shown
from imu_ray.audits.sweep_report import render_sweep
from imu_ray.handover.comparison import Comparison, Figure

WIDTHS = (1280, 390)
ATTACK = {"balanced_accuracy": 0.61, "band": [0.45, 0.55], "members": 30, "non_members": 40, "auc": 0.66}
ATTACK |= {"roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, 0.8, 1.0]}, "warning": "every row is called class 3"}
ATTACK |= {
    "attacks": {name: {"balanced_accuracy": 0.6, "band": [0.4, 0.6]} for name in ("confidence", "modified_entropy")}
}
ATTACK |= {"svc_efficacy": {"non_members": 0.4, "trained_on": {"retain": 500, "test": 500}, "reads": ["retain"]}}
FOUND = {"queries": 7, "mAP": 0.4321, "rank1": 0.1, "rank5": 0.2, "rank10": 0.3}
SIDE = {
    "forget": FIGURES, "retain": FIGURES, "test": FIGURES, "membership": ATTACK, "destinations": {"7": {"1": 5, "2": 9}},
    "retrieval": {"gallery": 50, "distance": "cosine", "all": FOUND, "forgotten": {"queries": 0}, "others": FOUND},
    "language": {"sets": {"forget": SAID}, "skipped": {"model_utility": "no sets"}, "forget_quality": 0.01, "model": "c" * 64},
}  # fmt: skip
STEPS = {"steps": [0, 1, 2], "accuracy": [0.0, 0.5, 0.9]}
RECOVERED = {"probe": {"accuracy": 0.9, "labelled": 50}, "relearn": STEPS, "skipped": {"lora": "of language models"}}
RECOVERED |= {"quantise": {"8": {"accuracy": 0.01}, "4": {"accuracy": 0.2}}}
GAP = {"average_gap": {"mean": 0.01}, "tug_of_war": {"mean": 0.9}, "tug_of_war_membership": {"skipped": "no retain"}}
APART = {name: {"kl": 0.123, "agreement": 0.75} for name in ("forget", "retain", "test")}


def report(samples):
    """A report with every part that there is, in one page."""
    ascent = {**ASCENT, "status": "reached", "targets": [TARGET], "recipe": "classes", "warnings": ["near chance"]}
    config = {"recipe": "classes", "influence": {"curvature": "diagonal_fisher", "curvature_set": "forget"}}
    manifest = {**MANIFEST, "ascent": ascent, "verdict": VERDICT, "config": config, "influence": INFLUENCE}
    manifest["forget_set"] = {**MANIFEST["forget_set"], "fingerprint": "f00d" * 16}
    metrics = dict.fromkeys(("before", "after", "retrained"), SIDE)
    metrics["reference"] = {"model": "d" * 64, "before": APART, "after": APART}
    metrics["recovery"] = dict.fromkeys(("before", "after", "reference"), RECOVERED)
    metrics["gaps"] = {"references": 1, "sides": {"unlearned": GAP, "do_nothing": GAP}}
    columns = {
        "step": [0, 1, 2],
        "forget.accuracy": [1.0, 0.5, 0.0],
        "forget.loss": [0.1, 1.0, 2.0],
        "test.loss": [0.1] * 3,
    }
    weights = (np.linspace(-1, 1, 50), np.linspace(0, 1, 50))
    return render_report(manifest, metrics, weights, pa.table(columns), samples)


def pages():
    """Every kind of page, by name."""
    picture = Shown.of(png(np.arange(36, dtype=np.uint8).reshape(6, 6)), 7, 1.25, -0.125)
    text = Shown.of({"question": "Who was it? " * 9, "answer": "w" * 200}, None, 0.5, None)
    runs = [{"name": name, "stage": "unlearn", "location": "/a/long/path/" * 6 + name} for name in ("one", "two")]
    runs = [
        run | {"status": "contained", "ended": "reached", "recipe": "samples", "rows": 30, "reason": "r"}
        for run in runs
    ]
    figures = [
        Figure("forget.accuracy", "after", [0.5, "no test"]),
        Figure("a_long_name." * 9, "before", [0.5, 1.0]),
        Figure("seconds.total", "", [1.0, 2.0]),
    ]
    sweep = {"created": "2026-01-01", "axes": {"seed": "[1]", "ascent.learning_rate": "[1]"}, "choose_by": "auto"}
    failed = {
        **ROW,
        "trial": "b",
        "status": "failed",
        "reason": "it broke",
        "rows": None,
        "forget.accuracy": None,
        "test.accuracy": None,
    }
    rows = [row | {"ascent.learning_rate": 0.01} for row in (ROW, failed)]
    many = [{**runs[0], "name": f"a run of some length, number {number}"} for number in range(12)]
    return {
        "report": report({"highest influence": [picture, text], "least forgotten": [text, picture]}),
        "sweep": render_sweep(sweep, rows, ACCURACIES, ["a"]),
        "comparison": Comparison(runs, ["other rows: no fair comparison"], {"seed": [0, 1]}, figures).page(),
        "many": Comparison(many, [], {"seed": list(range(12))}, [Figure("test.loss", "after", [0.123456] * 12)]).page(),
    }


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="expected playwright: pip install -e '.[test]'")
    pytest.importorskip("axe_playwright_python", reason="expected axe-playwright-python: pip install -e '.[test]'")
    path = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("there is no chromium; expected one on the PATH (apt install chromium), or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, page in pages().items():
        (folder / f"{name}.html").write_text(page)
    return folder


def violations(page):
    """What axe finds: rule, and the first element that breaks it."""
    from axe_playwright_python.sync_playwright import Axe

    return [(each["id"], each["nodes"][0]["html"]) for each in Axe().run(page).response["violations"]]


@pytest.fixture
def open_page(browser):
    """Opens a page of a width; its errors and the addresses that it asks for stand in lists."""
    contexts = []

    def open_at(path, width):
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        page, errors, asked = context.new_page(), [], []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page, errors, asked

    yield open_at
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "sweep", "comparison", "many"])
def test_a_page_shows_without_an_error_fetches_nothing_and_can_be_read_by_everyone(name, width, written, open_page):
    page, errors, asked = open_page(written / f"{name}.html", width)
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [(written / f"{name}.html").as_uri()]
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it must not scroll sideways"


def test_the_checks_see_what_is_wrong(tmp_path, open_page):
    body = '<h3 style="color: #eee">pale</h3><img src="http://localhost:9/x.png"><script>undefined.x</script>'
    (tmp_path / "bad.html").write_text(f"<!doctype html><title>bad</title>{body}")
    page, errors, asked = open_page(tmp_path / "bad.html", 390)
    assert any("of undefined" in each for each in errors)
    assert "http://localhost:9/x.png" in asked
    assert {"html-has-lang", "color-contrast", "image-alt"} <= {rule for rule, _ in violations(page)}
