"""A self-contained HTML page of what a run did: tables, trajectory and distributions.

It shows no id, and no sample but those that it is given.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imu_ray.audits import AUDITS
from imu_ray.audits.samples import Shown
from imu_ray.audits.verdict import TRIED
from imu_ray.influence.intensity import Column

# Squared cosine with the plain gradient above which the curvature has no say to speak of.
DOMINATED = 0.99

SIDES = ("before", "after", "retrained")  # doing nothing is what stands before
RIGHT = {"accuracy": "Accuracy", "label_accuracy": "Label accuracy", "f1": "F1"}
SPOKEN = {
    "perplexity": "Perplexity", "probability": "Probability", "choice_probability": "Among the choices",
    "extraction_strength": "Extraction strength", "rouge": "ROUGE-L", "truth_ratio": "Truth ratio",
}  # fmt: skip


def render_report(
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    intensities: tuple[Column, Column] | None,
    trajectory: pa.Table | None,
    samples: Mapping[str, Sequence[Shown]] | None = None,
) -> str:
    """The page as text; parts without data are left out.

    Args:
        manifest: the record of the run.
        metrics: figures before and after.
        intensities: influence and intensity of every sample, ``[N]`` each.
        trajectory: a row per check of the ascent.
        samples: those to show, by what they were chosen for; a page with them is not to be handed on.
    """
    figures = {}
    if trajectory is not None:
        figures["Trajectory"] = _draw_trajectory(trajectory, (manifest.get("ascent") or {}).get("targets", []))
    if intensities is not None:
        figures["Influence and intensity"] = _draw_distributions(*intensities)
    sides = [side for side in SIDES if side in metrics]
    last = metrics[[side for side in sides if side != "retrained"][-1]] if sides else {}
    sets, language = [name for name in last if name not in AUDITS], last.get("language")
    rights = [name for name in RIGHT if sets and name in last[sets[0]]]
    shown = {"sides": sides, "last": last, "sets": sets, "language": language, "rights": {n: RIGHT[n] for n in rights}}
    if rocs := {side: metrics[side]["membership"]["roc"] for side in sides if "roc" in _membership(metrics[side])}:
        figures = {"Membership: the attack by the loss": [_draw_rocs(rocs)], **figures}
    if recovery := metrics.get("recovery"):
        shown["recovered"] = [side for side in ("before", "after", "reference") if side in recovery]
        shown["recovery_rows"], shown["unrecovered"] = _recovery_rows(recovery)
    shown |= {"figures": figures, "dominated": DOMINATED, "top": _top}
    if language:
        present = {name for found in language["sets"].values() for name in found}
        shown["spoken"] = {name: title for name, title in SPOKEN.items() if name in present}
        shown["unsaid"] = _unsaid(language)
    return render_page("report.html.j2", manifest=manifest, metrics=metrics, samples=samples, **shown)


def render_page(template: str, **values: Any) -> str:
    """A template of this folder, with everything escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(template).render(**values)


def new_panel() -> tuple[Figure, Axes]:
    """A figure of one panel in the style of the pages, which lay figures out: a phone stacks them."""
    # Figure rather than pyplot: no global state, safe in any thread, needs no display.
    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def svg_of(figure: Figure) -> Markup:
    """A figure as an inline picture, with its axes and its lines in words for who cannot see it."""
    text, axes = io.StringIO(), figure.axes[0]
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    lines = ", ".join(axes.get_legend_handles_labels()[1])
    told = f"{axes.get_ylabel()} against {axes.get_xlabel()}{lines and f': {lines}'}"
    return Markup('<svg role="img" aria-label="{}"').format(told) + Markup(svg[svg.index("<svg") + 4 :])


def _membership(side: Mapping[str, Any]) -> Mapping[str, Any]:
    return side.get("membership") or {}


def _top(counts: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """The three most frequent predictions."""
    return sorted((counts or {}).items(), key=lambda pair: (-pair[1], pair[0]))[:3]


def _recovery_rows(recovery: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Accuracy on forgotten rows by what was tried and by side; and what was not, by reason."""
    rows: dict[str, dict[str, float]] = {}
    unmeasured: dict[str, list[str]] = {}
    for side, tests in recovery.items():
        for name, title in TRIED.items():
            found, title = tests.get(name, {}), title.capitalize()
            if name == "probe" and found:
                rows.setdefault(f"{title}, {found['labelled']} labelled rows", {})[side] = found["accuracy"]
            for bits in ("8", "4") if name == "quantise" and found else ():
                rows.setdefault(f"{title} to {bits} bit", {})[side] = found[bits]["accuracy"]
            for place, step in enumerate(found.get("steps", ())):
                accuracy = found["accuracy"][place]
                rows.setdefault(f"{title}, {step} step{'s' * (step != 1)}", {})[side] = accuracy
        for name, reason in tests.get("skipped", {}).items():
            told = unmeasured.setdefault(reason, [])
            told += [] if name in told else [name]
    return rows, unmeasured


def _unsaid(language: Mapping[str, Any]) -> dict[str, list[str]]:
    """What of a language model was not measured, by reason."""
    found: dict[str, list[str]] = {}
    parts = {"": language, **{f" of {name}": each for name, each in language["sets"].items()}}
    for where, part in parts.items():
        for name, reason in part["skipped"].items():
            found.setdefault(reason, []).append(SPOKEN.get(name, name.replace("_", " ")) + where)
    return found


def _draw_trajectory(trajectory: pa.Table, targets: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A panel for accuracy, loss and every metric that has a target, with a line for each sample set."""
    wanted = ["accuracy", "label_accuracy", "f1", "loss", *(target["metric"].rpartition(".")[2] for target in targets)]
    panels, steps = [], trajectory["step"].to_numpy()
    for metric in dict.fromkeys(wanted):
        if f"forget.{metric}" not in trajectory.column_names:
            continue
        figure, axes = new_panel()
        for column in trajectory.column_names:
            if column.endswith(f".{metric}"):
                axes.plot(steps, trajectory[column].to_numpy(), label=column.rpartition(".")[0])
        for target in targets:
            if target["metric"] == f"forget.{metric}":
                axes.axhline(target["threshold"], color="grey", linestyle=":", label="target of forget")
        axes.set(xlabel="check", ylabel=metric.replace("_", " "))
        axes.legend(frameon=False)
        panels.append(svg_of(figure))
    return panels


def _draw_rocs(rocs: Mapping[str, Mapping[str, Sequence[float]]]) -> Markup:
    """The attack by the loss: members found against false alarms, a line for each model."""
    figure, axes = new_panel()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    for side, roc in rocs.items():
        axes.plot(roc["fpr"], roc["tpr"], label=side)
    axes.set(xlabel="unseen rows taken for members", ylabel="forgotten rows taken for members")
    axes.legend(frameon=False)
    return svg_of(figure)


def _draw_distributions(influence: Column, weights: Column) -> list[Markup]:
    kept = weights[weights > 0]
    shown = f"intensity of the {len(kept)} kept of {len(weights)} samples"
    panels = []
    for column, label, color in ((influence, "influence on the mean forget loss", "#3b6ea5"), (kept, shown, "#c2703d")):
        figure, axes = new_panel()
        axes.stairs(*np.histogram(column, bins=60), fill=True, color=color)
        axes.set(xlabel=label, ylabel="samples", yscale="log")
        if column is influence:
            axes.axvline(0, color="grey", linewidth=1)
        panels.append(svg_of(figure))
    return panels
