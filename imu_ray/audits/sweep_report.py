"""The page of a sweep: figures against forget-set size, and a table of the trials. It shows no sample and no id."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from imu_ray.audits.report import figure_of, render_page, svg_of

Row = Mapping[str, Any]


def render_sweep(sweep: Row, rows: Sequence[Row], accuracies: Mapping[str, str], best: Collection[str]) -> str:
    """The page as text.

    Args:
        sweep: ``created``, ``axes``, ``choose_by``.
        rows: one per trial, as in ``results.parquet``.
        accuracies: column of the accuracy on every sample set, by its name.
        best: names of the best trials.
    """
    shown = [row for row in rows if row[accuracies["forget"]] is not None and row["rows"] is not None]
    lines = [(name, column, 100.0) for name, column in accuracies.items()]
    accuracy = [("accuracy on the forget set in %", lines[:1])]
    accuracy += [("accuracy in %", lines[1:])] if lines[1:] else []
    others = [("membership inference, balanced accuracy", [("", "membership", 1.0)])]
    others += [("seconds", [("", "seconds", 1.0)])]
    panels = {"Accuracy against the size of the forget set": accuracy, "Membership and time": others}
    failed = [row for row in rows if row["status"] == "failed"]
    return render_page(
        "sweep.html.j2",
        sweep=sweep,
        rows=rows,
        accuracies=accuracies,
        best=best,
        failed=failed,
        figures=[(title, _draw(shown, lines)) for title, lines in panels.items()] if shown else [],
        percent=_percent,
        number=_number,
    )


Panel = tuple[str, list[tuple[str, str, float]]]


def _draw(rows: Sequence[Row], panels: Sequence[Panel]) -> Markup:
    """A panel per label, a line per column through the medians of each size."""
    figure, axes = figure_of(len(panels))
    sizes = sorted({row["rows"] for row in rows})
    for axis, (label, lines) in zip(axes, panels, strict=True):
        for name, column, scale in lines:
            points = [(row["rows"], scale * row[column]) for row in rows if row[column] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.6, label=name)
                at = {size: [value for rows, value in points if rows == size] for size, _ in sorted(points)}
                medians = [(size, np.median(values)) for size, values in at.items()]
                axis.plot(*zip(*medians, strict=True), color=axis.lines[-1].get_color())
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="grey")
        axis.set(xlabel="forget-set rows", ylabel=label, xscale="log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        if len(lines) > 1:
            axis.legend(frameon=False)
        if label == "seconds" and axis.lines:
            axis.set_yscale("log")
    return svg_of(figure)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
