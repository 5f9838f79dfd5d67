"""The status word of a run: what may be said of it by what was measured, and no more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UTILITY_DROP = 0.1  # of the accuracy on a set to keep, beyond which a model counts as broken
MARGIN = 0.1  # of accuracy, by which recovered answers, or fresh views, may be above what they are compared with
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a run.

    Attributes:
        word: ``forgotten_as_measured``, ``contained``, ``inconclusive`` or ``not_reached``.
        reason: why it is that word.
        checked: what was measured and does not tell the forgotten rows.
        not_checked: what was not measured, and why.
    """

    word: str
    reason: str
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def verdict(status: str, reason: str, metrics: Metrics) -> Verdict:
    """The status word of an update, by the first rule that holds.

    - ``not_reached``: the target was not met, or a guard stopped the run.
    - ``inconclusive``: there was no target, or the model met it before the first step; or the accuracy on a set to keep
      fell by more than ``UTILITY_DROP``, and a broken model passes every test of forgetting.
    - ``contained``: the target is met, but something that was measured still tells the rows: membership inference is
      above its band; a new head, or a few steps of training, bring answers back that are right more often, by more than
      ``MARGIN``, than a retrained model's under the same attack, or, of a new head, than the model's own; or fresh
      views of the rows are.
    - ``inconclusive`` again: membership inference, or every test of recovery, could not be measured.
    - ``forgotten_as_measured``: the target is met, and nothing that was measured tells the rows.

    Args:
        status: of the update: ``reached``, ``already_met``, ``epochs_done``, ``not_reached``, ``stopped_by_guard``.
        reason: of that status.
        metrics: what ``metrics.json`` holds.
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
    return told("forgotten_as_measured", reason)


def broken_set(metrics: Metrics) -> str | None:
    """Which set to keep has lost too much accuracy; None where none has."""
    before = metrics.get("before", {})
    for name, figures in metrics.get("after", {}).items():
        kept = isinstance(figures, Mapping) and "accuracy" in figures and not name.startswith("forget")
        if kept and (drop := before[name]["accuracy"] - figures["accuracy"]) > UTILITY_DROP:
            return f"the accuracy on {name} fell by {100 * drop:.1f} points: what a broken model forgets says nothing"
    return None


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
        views = after.get("forget_fresh_views")
        if views is None:
            found.missing.append("fresh views of the rows (audit.views)")
        else:
            own, seen = after["forget"]["accuracy"], views["accuracy"]
            found._weigh(seen > own + MARGIN, f"fresh views are right {_percent(seen)}, the rows {_percent(own)}")
        if "retrained" not in metrics:
            found.missing.append("a model that was retrained without the rows (audit.reference)")
        found.missing.append("single rows: per-example attacks need many models (imu-ray ensemble)")
        return found

    def _weigh(self, tells: bool, told: str) -> None:
        (self.against if tells else self.checked).append(told)

    def _take_membership(self, attack: Metrics) -> None:
        if "skipped" in attack:
            self.missing.append(f"membership: {attack['skipped']}")
            return
        accuracy, high = attack["balanced_accuracy"], attack["band"][1]
        self.measured.add("membership")
        self._weigh(
            accuracy > high, f"membership inference is right {_percent(accuracy)}, by chance up to {_percent(high)}"
        )

    def _take_recovery(self, metrics: Metrics) -> None:
        sides = metrics.get("recovery", {})
        after, retrained = sides.get("after", {}), sides.get("reference", {})
        for name, why in after.get("skipped", {}).items():
            self.missing.append(f"recovery by {SPOKEN[name]}: {why}")
        for name in ("probe", "relearn", "lora"):
            if name not in after:
                continue
            reached, told = _last(after[name]), f"recovery by {SPOKEN[name]}"
            if name in retrained:
                limit, beside = _last(retrained[name]), "of the retrained model"
            elif name == "probe":
                limit, beside = metrics["after"]["forget"]["accuracy"], "of the model's own head"
            else:  # a model that never saw the rows learns them too
                self.missing.append(f"{told}: {_percent(reached)} right, with no retrained model beside it")
                continue
            self.measured.add("recovery")
            self._weigh(reached > limit + MARGIN, f"{told}: {_percent(reached)} right, {beside} {_percent(limit)}")
        if not after:
            self.missing.append("recovery (audit.recovery)")


SPOKEN = {"probe": "a new head", "relearn": "a few steps", "lora": "a few steps of adapters", "quantise": "rounding"}


def _last(found: Metrics) -> float:
    accuracy = found["accuracy"]
    return float(accuracy[-1] if isinstance(accuracy, list) else accuracy)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
