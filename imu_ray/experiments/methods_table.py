"""The table of an ensemble: a row for each method, figures as intervals over models, reasons where there is none."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imu_ray.audits import POPULATION
from imu_ray.audits.margins import Margins
from imu_ray.audits.population import interval, lacking
from imu_ray.errors import StageFailedError
from imu_ray.run.directory import RunDirectory
from imu_ray.run.storage import below

SETS = ("forget", "retain", "test")
NOTHING, RETRAIN = "do nothing", "retrain"


def margins_folder(method: str) -> str:
    """Where the margins of a method's models lie; of the models that it starts from without a name."""
    return f"margins/{_plain(method)}" if method else "margins/models"


def figures_name(method: str, kind: str, seed: int) -> str:
    """The file of a model's figures."""
    return f"figures/{_plain(method) if method else 'models'}/{kind}-{seed:05d}.json"


def _plain(name: str) -> str:
    """A name of a method as that of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def method_rows(run: RunDirectory, methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for *do nothing*, for *retrain*, and for each method.

    Raises:
        StageFailedError: there are too few originals or retrained models for any audit.
    """
    made = Margins.read(below(run.location, margins_folder("")))
    if reason := lacking(made, ("original", "retrained"), least=2):
        raise StageFailedError(f"{reason}; see why the others failed; the same call tries them again")
    retrained = {seed: _read(run, "", "retrained", seed) for seed in made.seeds["retrained"]}
    rows = [
        _row(NOTHING, {seed: _read(run, "", "original", seed) for seed in made.seeds["original"]}, retrained),
        _row(RETRAIN, retrained, retrained, needs="retain"),
    ]
    files = run.storage.files()
    for name, own in methods.items():
        folder, needs = margins_folder(name), own.get("needs", "forget")
        if not any(file.startswith(f"{folder}/") for file in files):
            rows.append(_row(name, {}, retrained, needs))
            continue
        whole = made.join(Margins.read(below(run.location, folder)))
        figures = {seed: _read(run, name, "unlearned", seed) for seed in whole.seeds.get("unlearned", ())}
        row = _row(name, figures, retrained, needs)
        row["audits"] = {audit: function(whole) for audit, function in POPULATION.items()}
        rows.append(row)
    _share_controls(rows)
    return rows


def _read(run: RunDirectory, method: str, kind: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = run.read_json(figures_name(method, kind, seed))
    return found


def _row(
    name: str,
    figures: Mapping[int, Mapping[str, Any]],
    retrained: Mapping[int, Mapping[str, Any]],
    needs: str = "nothing",
) -> dict[str, Any]:
    """What can be told of a method without the audits of populations."""
    row: dict[str, Any] = {"method": name, "models": len(figures), "needs": needs}
    if not figures:
        return row | {"skipped": "no model is left"}
    row["accuracy"] = {part: interval([each[part]["accuracy"] for each in figures.values()]) for part in SETS}
    row["gap"] = interval(
        [_gap(each, [other for other in retrained.values() if other is not each]) for each in figures.values()]
    )
    if seconds := [each["seconds"] for each in figures.values() if "seconds" in each]:
        row["seconds"] = interval(np.array(seconds))
    statuses = [each["status"] for each in figures.values()]
    row["statuses"] = {status: statuses.count(status) for status in sorted(set(statuses))}
    return row


def _gap(figures: Mapping[str, Any], retrained: list[Mapping[str, Any]]) -> float:
    """Mean over the sets of the distance of a model's accuracy from the mean of retrained models, without itself."""
    means = {part: np.mean([each[part]["accuracy"] for each in retrained]) for part in SETS}
    return float(np.mean([abs(figures[part]["accuracy"] - means[part]) for part in SETS]))


def _share_controls(rows: list[dict[str, Any]]) -> None:
    """What the audits of a method say of originals and oracles stands in their own rows."""
    audited = next((row["audits"] for row in rows if "audits" in row), None)
    if audited is None:
        return
    for row, side in zip(rows[:2], ("do_nothing", "oracle"), strict=True):
        floor = audited["klom"].get("floor", {})
        row["klom"] = {name: found[side] for name, found in floor.get("sets", {}).items()}
        offline = audited["rmia"].get("offline", {})
        row["rmia"] = offline.get("retrained" if side == "oracle" else side, {}).get("auc")
    rows[0]["ulira"] = audited["ulira"].get("do_nothing", {})
    for row in (row for row in rows[2:] if "audits" in row):
        floor = row["audits"]["klom"].get("floor", {})
        row["klom"] = {name: found["unlearned"] for name, found in floor.get("sets", {}).items()}
        row["rmia"] = row["audits"]["rmia"].get("offline", {}).get("unlearned", {}).get("auc")
        row["ulira"] = row["audits"]["ulira"].get("untouched", {})
        row["ulira_alike"] = row["audits"]["ulira"].get("unlearned_alike", {})


def write_tables(run: RunDirectory, rows: list[dict[str, Any]], failed: Mapping[str, str], wanted: int) -> None:
    """``metrics.json`` with everything, and ``table.md`` to read."""
    run.write_json("metrics.json", {"models": wanted, "failed": dict(failed), "methods": rows})
    run.write_text("table.md", markdown(rows, failed, wanted))


def markdown(rows: list[dict[str, Any]], failed: Mapping[str, str], wanted: int) -> str:
    """The table, and below it what is missing and why."""
    titles = [
        "method", "needs", "models", "forget", "retain", "test", "gap", "KLOM forget", "KLOM retain", "KLOM test",
        "U-LiRA", "band", "TPR", "U-LiRA alike", "band", "TPR", "RMIA", "seconds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        klom = row.get("klom", {})
        cells = [row["method"], row["needs"], str(row["models"])]
        cells += [_percent(row.get("accuracy", {}).get(part)) for part in SETS] + [_percent(row.get("gap"))]
        cells += [_within(klom.get(part), 2) for part in SETS]
        cells += [*_attack(row.get("ulira")), *_attack(row.get("ulira_alike")), _plus_minus(row.get("rmia"), 3)]
        lines.append(f"| {' | '.join([*cells, _plus_minus(row.get('seconds'), 2)])} |")
    lines += ["", *_notes(rows, failed, wanted)]
    return "\n".join(lines) + "\n"


def _notes(rows: list[dict[str, Any]], failed: Mapping[str, str], wanted: int) -> list[str]:
    """How to read the table, which models are missing, and what was not measured."""
    told = [
        f"Means over models (of {wanted} wanted) with 95 % intervals; accuracy in per cent, gap: mean distance from "
        "the (other) retrained models' mean over the three sets, in points. KLOM: 95th percentile, nats, beside one "
        "half of the oracles, and where 95 % of draws of the models lie; the row of retrain is its floor. U-LiRA: "
        "area, its band of chance, and the true positives at 1 % false ones in per cent, beside models that were never "
        "trained on the rows; alike: and had the same method. RMIA: area, offline. Seconds are of a model."
    ]
    told += [f"Failed: {name}: {reason}." for name, reason in failed.items()]
    for row in rows:
        ended = {
            status: count for status, count in row.get("statuses", {}).items() if status not in ("trained", "done")
        }
        if ended:
            told.append(f"{row['method']} ended {', '.join(f'{status} {count}' for status, count in ended.items())}.")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, found in row.get("audits", {}).items():
            for key, told_of in (("skipped", "not measured"), ("warning", "in doubt")):
                if key in found:
                    reasons.setdefault(f"{name} {told_of}: {found[key]}", []).append(row["method"])
    told += [f"{reason} ({', '.join(names)})." for reason, names in reasons.items()]
    return [f"{line}\n" for line in told]


def _percent(found: Mapping[str, float] | None) -> str:
    return _plus_minus(found and {name: 100 * value for name, value in found.items()}, 1)


def _plus_minus(found: Mapping[str, float] | None, places: int) -> str:
    """The mean over models and half the width of its interval."""
    if not found or "mean" not in found:
        return "-"
    half = f" ± {found['high'] - found['mean']:.{places}f}" if "high" in found else ""
    return f"{found['mean']:.{places}f}{half}"


def _within(found: Mapping[str, float] | None, places: int) -> str:
    """The mean over draws and where 95 % of them lie."""
    return f"{found['mean']:.{places}f} ({found['low']:.{places}f} to {found['high']:.{places}f})" if found else "-"


def _attack(found: Mapping[str, Any] | None) -> list[str]:
    """The area, its band, and the true positives."""
    if not found or "auc" not in found:
        return ["-"] * 3
    low, high = found["band"]
    return [_plus_minus(found["auc"], 3), f"{low:.3f} to {high:.3f}", _percent(found.get("tpr_at_1_fpr"))]
