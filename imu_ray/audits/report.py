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

from imu_ray.influence.order_statistics import Parts

# Squared cosine with the plain gradient above which the curvature has no say to speak of.
DOMINATED = 0.99


def render_report(
    manifest: Mapping[str, Any], metrics: Mapping[str, Any], intensities: tuple[Parts, Parts] | None, trajectory: pa.Table | None
) -> str:
    """The page as text; parts without data are left out.

    Args:
        manifest: the record of the run.
        metrics: figures before and after.
        intensities: influence and intensity of every sample, ``[N]`` in parts each.
        trajectory: a row per check of the ascent.
    """
    figures = []
    if trajectory is not None:
        figures.append(("Trajectory", _draw_trajectory(trajectory, (manifest.get("ascent") or {}).get("targets", []))))
    if intensities is not None:
        figures.append(("Influence and intensity", _draw_distributions(*intensities)))
    sides = [side for side in ("before", "after") if side in metrics]
    sets = [name for name in metrics[sides[-1]] if name != "membership"] if sides else []
    return render_page("report.html.j2", manifest=manifest, metrics=metrics, sides=sides, sets=sets, figures=figures, dominated=DOMINATED)


def render_page(template: str, **values: Any) -> str:
    """A template of this folder, with everything escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
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
    figure, (left, right) = figure_of(2)
    steps = trajectory["step"].to_numpy()
    for name in trajectory.column_names:
        if name.endswith("_accuracy"):
            left.plot(steps, 100 * trajectory[name].to_numpy(), label=name.removesuffix("_accuracy"))
        elif name.endswith("_loss"):
            right.plot(steps, trajectory[name].to_numpy(), label=name.removesuffix("_loss"))
    for target in targets:
        if target["metric"] == "forget_accuracy":
            left.axhline(100 * target["threshold"], color="grey", linestyle=":", label="target of forget")
    left.set(xlabel="step", ylabel="accuracy in %")
    right.set(xlabel="step", ylabel="mean loss in nats")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return svg_of(figure)


def _draw_distributions(influence: Parts, weights: Parts) -> Markup:
    figure, (left, right) = figure_of(2)
    samples = _histogram(left, influence, "#3b6ea5")
    left.axvline(0, color="grey", linewidth=1)
    left.set(xlabel="influence on the mean forget loss", ylabel="samples", yscale="log")
    kept = _histogram(right, lambda: (part[part > 0] for part in weights()), "#c2703d")
    right.set(xlabel=f"intensity of the {kept} kept of {samples} samples", ylabel="samples", yscale="log")
    return svg_of(figure)


def _histogram(axis: Axes, parts: Parts, color: str) -> int:
    """Draw the distribution of a column that is not held, in two passes; how many numbers it has."""
    ends = [(part.min(), part.max()) for part in parts() if len(part)]
    bounds = (min(low for low, _ in ends), max(high for _, high in ends))
    edges = np.histogram_bin_edges([], bins=60, range=bounds)
    counts = np.sum([np.histogram(part, edges)[0] for part in parts()], axis=0)
    axis.stairs(counts, edges, fill=True, color=color)
    return int(counts.sum())
