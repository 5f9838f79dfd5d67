"""A self-contained HTML page of what a run did: tables, trajectory and distributions. It shows no sample and no id."""

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

from imu_ray.influence.intensity import Column

# Squared cosine with the plain gradient above which the curvature has no say to speak of.
DOMINATED = 0.99


def render_report(
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    intensities: tuple[Column, Column] | None,
    trajectory: pa.Table | None,
) -> str:
    """The page as text; parts without data are left out.

    Args:
        manifest: the record of the run.
        metrics: figures before and after.
        intensities: influence and intensity of every sample, ``[N]`` each.
        trajectory: a row per check of the ascent.
    """
    figures = []
    if trajectory is not None:
        figures.append(("Trajectory", _draw_trajectory(trajectory, (manifest.get("ascent") or {}).get("targets", []))))
    if intensities is not None:
        figures.append(("Influence and intensity", _draw_distributions(*intensities)))
    sides = [side for side in ("before", "after") if side in metrics]
    sets = [name for name in metrics[sides[-1]] if name != "membership"] if sides else []
    return render_page(
        "report.html.j2",
        manifest=manifest,
        metrics=metrics,
        sides=sides,
        sets=sets,
        figures=figures,
        dominated=DOMINATED,
    )


def render_page(template: str, **values: Any) -> str:
    """A template of this folder, with everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def figure_of(columns: int) -> tuple[Figure, list[Axes]]:
    """A row of axes in the style of the pages."""
    # Figure rather than pyplot: no global state, safe in any thread, needs no display.
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def svg_of(figure: Figure) -> Markup:
    """A figure as an inline picture."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _draw_trajectory(trajectory: pa.Table, targets: Sequence[Mapping[str, Any]]) -> Markup:
    """A panel for accuracy, loss and every metric that has a target, with a line for each sample set."""
    wanted = ["accuracy", "loss", *(target["metric"].rpartition(".")[2] for target in targets)]
    shown = [name for name in dict.fromkeys(wanted) if f"forget.{name}" in trajectory.column_names]
    figure, axes = figure_of(len(shown))
    steps = trajectory["step"].to_numpy()
    for axis, metric in zip(axes, shown, strict=True):
        for column in trajectory.column_names:
            if column.endswith(f".{metric}"):
                axis.plot(steps, trajectory[column].to_numpy(), label=column.rpartition(".")[0])
        for target in targets:
            if target["metric"] == f"forget.{metric}":
                axis.axhline(target["threshold"], color="grey", linestyle=":", label="target of forget")
        axis.set(xlabel="check", ylabel=metric.replace("_", " "))
        axis.legend(frameon=False)
    return svg_of(figure)


def _draw_distributions(influence: Column, weights: Column) -> Markup:
    figure, (left, right) = figure_of(2)
    _histogram(left, influence, "#3b6ea5")
    left.axvline(0, color="grey", linewidth=1)
    left.set(xlabel="influence on the mean forget loss", ylabel="samples", yscale="log")
    kept = weights[weights > 0]
    _histogram(right, kept, "#c2703d")
    right.set(xlabel=f"intensity of the {len(kept)} kept of {len(weights)} samples", ylabel="samples", yscale="log")
    return svg_of(figure)


def _histogram(axis: Axes, column: Column, color: str) -> None:
    axis.stairs(*np.histogram(column, bins=60), fill=True, color=color)
