"""The page of a sweep: figures against forget-set size, and a table of the trials. It shows no sample and no id."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from imu_ray.audits.report import new_panel, render_page, svg_of

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
    panels = {
        "Accuracy against the size of the forget set": [
            ("accuracy on the forget set in %", lines[:1]),
            *([("accuracy in %", lines[1:])] if lines[1:] else []),
        ],
        "Membership and time": [
            ("membership: balanced accuracy", [("", "membership", 1.0)]),
            ("seconds", [("", "seconds", 1.0)]),
        ],
    }
    return render_page(
        "sweep.html.j2",
        sweep=sweep,
        rows=rows,
        accuracies=accuracies,
        best=best,
        failed=[row for row in rows if row["status"] == "failed"],
        figures={title: [_draw(shown, *panel) for panel in row] for title, row in panels.items()} if shown else {},
        percent=lambda value: "" if value is None else f"{100 * value:.2f}\N{NO-BREAK SPACE}%",
        number=lambda value: "" if value is None else f"{value:.3g}",
    )


def _draw(rows: Sequence[Row], label: str, lines: Sequence[tuple[str, str, float]]) -> Markup:
    """A panel with a line per column through the medians of each size."""
    figure, axes = new_panel()
    sizes = sorted({row["rows"] for row in rows})
    for name, column, scale in lines:
        points = [(row["rows"], scale * row[column]) for row in rows if row[column] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.6, label=name)
            at = {size: [value for rows, value in points if rows == size] for size, _ in sorted(points)}
            medians = [(size, np.median(values)) for size, values in at.items()]
            axes.plot(*zip(*medians, strict=True), color=axes.lines[-1].get_color())
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="grey")
    axes.set(xlabel="forget-set rows", ylabel=label, xscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    if len(lines) > 1:
        axes.legend(frameon=False)
    if label == "seconds" and axes.lines:
        axes.set_yscale("log")
    return svg_of(figure)
