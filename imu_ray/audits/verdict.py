"""The status word of a run: what may be said of it by what was measured, and no more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imu_ray.scopes.base import FORGET_FRESH_VIEWS, TEST_FRESH_VIEWS

UTILITY_DROP = 0.1  # of the accuracy on a set to keep, beyond which a model counts as broken
MARGIN = 0.1  # of accuracy, by which recovered answers, or fresh views, may be above what they are compared with
OVERLAP = 0.01  # of the rows of ``test``, by which rows to forget among them may hide members from an attack
ERRORS = 2.0  # standard errors by which they must be too, where rows are few
# Tests of recovery, in words.
TRIED = {
    "probe": "a new head", "quantise": "rounding", "relearn": "training all parameters", "lora": "training adapters",
}  # fmt: skip
UTILITY = {"accuracy": "accuracy", "f1": "F1"}  # which metric tells whether a set is kept; the first that there is
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a run.

    Attributes:
        word: ``forgotten_as_measured``, ``contained``, ``inconclusive`` or ``not_reached``.
        reason: why it is that word.
        checked: what was measured and does not tell the forgotten rows.
        not_checked: what was not measured, and why.
        thresholds: the constants of the rule.
    """

    word: str
    reason: str
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    thresholds: dict[str, float] = field(
        default_factory=lambda: {
            "utility_drop": UTILITY_DROP,
            "margin": MARGIN,
            "standard_errors": ERRORS,
            "overlap": OVERLAP,
        }
    )


def verdict(status: str, reason: str, metrics: Metrics, overlap: float = 0.0) -> Verdict:
    """The status word of an update, by the first rule that holds.

    - ``not_reached``: the target was not met, or a guard stopped the run.
    - ``inconclusive``: there was no target, or the model met it before the first step; or the accuracy on a set to keep
      (without the classes to forget, where it has others; of several labels a sample the F1) fell by more than
      ``UTILITY_DROP``: a broken model passes every test of forgetting.
    - ``contained``: the target is met, but something that was measured still tells the rows. An attack on membership is
      above its band of chance. A new head, rounded weights, or a few steps of training are right on them more often
      than a retrained model under the same attack, or, of the first two, than the model itself, by more than ``MARGIN``
      and two standard errors. Or so are fresh views of the rows: more often right than the rows themselves, or than
      under a retrained model, or, without one, than such views of unseen rows of the same labels.
    - ``inconclusive`` again: membership, or every test of recovery, could not be measured; or more than ``OVERLAP`` of
      the rows of ``test``, beside which it is, are rows to forget.
    - ``forgotten_as_measured``: the target is met, and nothing that was measured tells the rows.

    One attack in forty is above its band by chance.

    Args:
        status: of the update: ``reached``, ``already_met``, ``epochs_done``, ``not_reached``, ``stopped_by_guard``.
        reason: of that status.
        metrics: what ``metrics.json`` holds.
        overlap: share of the rows of ``test`` that are rows to forget.
    """
    found = Evidence.of(metrics)

    def told(word: str, why: str) -> Verdict:
        return Verdict(word, why, found.checked, found.missing)

    if status in ("not_reached", "stopped_by_guard"):
        return told("not_reached", reason)
    if status != "reached":
        none = "there was no target" if status == "epochs_done" else "the model met the target before the first step"
        return told("inconclusive", none)
    if (broken := broken_set(metrics)) is not None:
        return told("inconclusive", broken)
    if found.against:
        return told("contained", "; ".join(found.against))
    if lacking := [name for name in ("membership", "recovery") if name not in found.measured]:
        return told("inconclusive", f"{' and '.join(lacking)} could not be measured")
    if overlap > OVERLAP:
        return told("inconclusive", f"{100 * overlap:.1f} % of the rows of test, taken for unseen, are rows to forget")
    return told("forgotten_as_measured", reason)


def broken_set(metrics: Metrics) -> str | None:
    """Which set to keep has lost too much accuracy; None where none has."""
    before, after = metrics.get("before", {}), metrics.get("after", {})
    forgotten = set(after.get("forget", {}).get("per_class", {}))
    for name, figures in after.items():
        if not isinstance(figures, Mapping) or name.startswith("forget"):
            continue
        metric = next((each for each in UTILITY if each in figures), None)
        if metric is None:
            continue
        drop = _utility(before[name], metric, forgotten) - _utility(figures, metric, forgotten)
        if drop > UTILITY_DROP:
            return (
                f"the {UTILITY[metric]} on {name} fell by {100 * drop:.1f} points: what a broken model forgets says "
                "nothing"
            )
    return None


def _utility(figures: Metrics, metric: str, forgotten: set[str]) -> float:
    """That on the classes of which no row is to be forgotten, where there are such."""
    others = [each for label, each in figures.get("per_class", {}).items() if label not in forgotten]
    rows = sum(each["samples"] for each in others)
    return sum(each["samples"] * each[metric] for each in others) / rows if rows else float(figures[metric])


@dataclass
class Evidence:
    """What was measured of forgotten rows: what does not tell them, what does, and what was not measured."""

    checked: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    measured: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, metrics: Metrics) -> "Evidence":
        """By all figures of a run."""
        found, after = cls(), metrics.get("after", {})
        found._take_membership(after.get("membership", {"skipped": "no audit was made"}))
        found._take_recovery(metrics)
        found._take_views(metrics)
        if "retrained" not in metrics:
            found.missing.append("a model that was retrained without the rows (audit.reference)")
        found.missing.append("single rows: per-example attacks need many models (imu-ray ensemble)")
        return found

    def _weigh(self, tells: bool, told: str) -> None:
        (self.against if tells else self.checked).append(told)

    def _compare(self, name: str, figures: Metrics, limit: float, beside: str) -> None:
        """Weigh an accuracy on forgotten rows beside what it should not be above."""
        accuracy = figures["accuracy"]
        reached = float(accuracy[-1] if isinstance(accuracy, list) else accuracy)
        rows = figures.get("rows", figures.get("samples", math.inf))
        error = math.sqrt(max(limit * (1 - limit), reached * (1 - reached)) / rows)
        told = f"{name}: {_percent(reached)} right, {beside} {_percent(limit)}"
        self._weigh(reached > limit + max(MARGIN, ERRORS * error), told)

    def _take_membership(self, attack: Metrics) -> None:
        if "skipped" in attack:
            self.missing.append(f"membership: {attack['skipped']}")
            return
        self.measured.add("membership")
        for name, why in attack.get("unmeasured", {}).items():
            self.missing.append(f"membership by {name.replace('_', ' ')}: {why}")
        others = {name: each for name, each in attack.get("attacks", {}).items() if name != "loss" and "band" in each}
        for name, each in {"loss": attack, **others}.items():
            accuracy, high = each["balanced_accuracy"], each["band"][1]
            told = f"is right {_percent(accuracy)}, by chance up to {_percent(high)}"
            self._weigh(accuracy > high, f"membership by {name.replace('_', ' ')} {told}")

    def _take_views(self, metrics: Metrics) -> None:
        """Beside the rows themselves, and those of the retrained model or, without one, of unseen rows."""
        after, retrained = metrics.get("after", {}), metrics.get("retrained", {})
        views, unseen = after.get(FORGET_FRESH_VIEWS), after.get(TEST_FRESH_VIEWS, {})
        if views is None or "accuracy" not in views:
            self.missing.append("fresh views of the rows (audit.views)")
            return
        rows = after["forget"].get("samples", math.inf)
        found = {"accuracy": views["accuracy"], "rows": rows}  # the views of a row are no rows of their own
        self._compare("fresh views", found, after["forget"]["accuracy"], "the rows themselves")
        if FORGET_FRESH_VIEWS in retrained:
            limit = retrained[FORGET_FRESH_VIEWS]["accuracy"]
            self._compare("fresh views", found, limit, "those of the retrained model")
            return
        ours, theirs = views.get("per_class", {}), unseen.get("per_class", {})
        counts = {label: each["samples"] for label, each in ours.items() if label in theirs}
        if not counts:
            self.missing.append("fresh views beside those of unseen rows: the set test has none of the labels")
            return
        accuracy, limit = (
            sum(count * side[label]["accuracy"] for label, count in counts.items()) / sum(counts.values())
            for side in (ours, theirs)
        )
        drawn = min(sum(counts.values()), sum(theirs[label]["samples"] for label in counts))
        few = {"accuracy": accuracy, "rows": drawn * rows / views["samples"]}
        self._compare("fresh views", few, limit, "those of unseen rows of the same labels")

    def _take_recovery(self, metrics: Metrics) -> None:
        sides = metrics.get("recovery", {})
        after, retrained = sides.get("after", {}), sides.get("reference", {})
        for name, why in after.get("skipped", {}).items():
            self.missing.append(f"recovery by {TRIED.get(name, name)}: {why}")
        for name, told in TRIED.items():
            for bits in ("8", "4") if name == "quantise" else ("",):
                found, beside = (side.get(name, {}) for side in (after, retrained))
                if bits:
                    told, found, beside = f"{TRIED[name]} to {bits} bit", found.get(bits, {}), beside.get(bits, {})
                if not found.get("accuracy"):
                    continue
                if beside.get("accuracy"):
                    limit, whose = beside["accuracy"], "of the retrained model"
                elif name in ("probe", "quantise"):
                    limit, whose = metrics["after"]["forget"]["accuracy"], "of the model itself"
                else:  # a model that never saw the rows learns them too
                    self.missing.append(f"recovery by {told}: there is no retrained model to compare it with")
                    continue
                self.measured.add("recovery")
                last = limit[-1] if isinstance(limit, list) else limit
                self._compare(f"recovery by {told}", found, last, whose)
        if not after:
            self.missing.append("recovery (audit.recovery)")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
