"""How far an unlearned model is from models that were retrained without the forget set, and what unlearning cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from imu_ray.audits.guard import figures_warning
from imu_ray.audits.margins import Margins, Matrix
from imu_ray.audits.population import Column, interval, lacking, population_warning

Figures = Mapping[str, Any]
ACCURACIES = ("forget", "retain", "test")
COUNTS = ("samples", "members", "non_members", "gallery", "left_out")
EFFICACY = "membership.svc_efficacy.non_members"
MIN_PAIRS = 3


def reference_gaps(
    after: Figures,
    references: Sequence[Figures],
    divergences: Sequence[Mapping[str, Mapping[str, float]]] = (),
    before: Figures | None = None,
) -> dict[str, Any]:
    r"""Figures of a model less those of each retrained reference, and the scores that the literature makes of them.

    Args:
        after: figures of the unlearned model by name of set, and under ``membership``, as ``metrics.json`` has them.
        references: the same of every retrained model.
        divergences: ``kl``, ``agreement`` and ``js`` by name of set beside every retrained model.
        before: the figures of the original, where the same gaps are to be told of doing nothing.

    Returns:
        ``sides``, of ``unlearned`` and ``do_nothing``: ``metrics``, by set and metric the signed gap
        :math:`m_{after} - m_{reference}` in the metric's unit; ``average_gap``, ``tug_of_war`` and
        ``tug_of_war_membership``; each with mean and 95 % t interval over the references, and 0, 0, 1 and 1 at a
        reference. ``floor``: the same scores of each reference beside the next. ``predictions``: intervals of the
        ``divergences``. What could not be measured is ``skipped`` with its reason.
    """
    if not references:
        return {"skipped": "there is no retrained reference"}
    sides = {"unlearned": after} | ({} if before is None else {"do_nothing": before})
    found: dict[str, Any] = {"references": len(references), "sides": {}}
    for side, figures in sides.items():
        pairs = [(figures, reference) for reference in references]
        found["sides"][side] = {"metrics": _metric_gaps(figures, references), **_scores(pairs)}
    if len(references) > 1:
        found["floor"] = _scores(list(zip(references, [*references[1:], references[0]], strict=True)))
    else:
        found["floor"] = {"skipped": "one retrained reference; expected two or more"}
    names = divergences[0].keys() if divergences else ()
    found["predictions"] = {
        name: {kind: interval([each[name][kind] for each in divergences]) for kind in divergences[0][name]}
        for name in names
    }
    return found | figures_warning(after, {"before": before, "retrained": references[0]})


def average_gap(figures: Figures, reference: Figures) -> float:
    r"""Mean distance from a retrained model of the accuracies on forget, retain and test, and of the SVC efficacy.

    .. math:: \tfrac14\bigl(|\Delta A_f| + |\Delta A_r| + |\Delta A_t| + |\Delta E|\bigr)

    In [0, 1]; 0 is the retrained model. E is ``membership.svc_efficacy``, the share of the forget set that an attack
    takes for non-members.

    Source: Fan et al., SalUn, arXiv:2310.12508; the four as in Jia et al., arXiv:2304.04934.
    """
    paths = [*(f"{name}.accuracy" for name in ACCURACIES), EFFICACY]
    return float(np.mean([_distance(figures, reference, path) for path in paths]))


def tug_of_war(figures: Figures, reference: Figures) -> float:
    r"""Tug-of-War: product over forget, retain and test of how near the accuracy is to a retrained model's.

    .. math:: \mathrm{ToW} = (1 - |\Delta A_f|)\,(1 - |\Delta A_r|)\,(1 - |\Delta A_t|)

    In [0, 1]; 1 is the retrained model.

    Source: Zhao et al., What makes unlearning hard and what to do about it, arXiv:2406.01257; as in the authors' code
    (github.com/kairanzhao/RUM).
    """
    return float(np.prod([1 - _distance(figures, reference, f"{name}.accuracy") for name in ACCURACIES]))


def tug_of_war_membership(figures: Figures, reference: Figures) -> float:
    r"""Tug-of-War with the SVC efficacy in place of the forget accuracy.

    .. math:: (1 - |\Delta E|)\,(1 - |\Delta A_r|)\,(1 - |\Delta A_t|)

    In [0, 1]; 1 is the retrained model.

    Source: Zhao and Triantafillou, Scalability of memorization-based machine unlearning, arXiv:2410.16516; as in the
    authors' code (github.com/kairanzhao/RUM).
    """
    paths = [EFFICACY, *(f"{name}.accuracy" for name in ACCURACIES[1:])]
    return float(np.prod([1 - _distance(figures, reference, path) for path in paths]))


SCORES = {each.__name__: each for each in (average_gap, tug_of_war, tug_of_war_membership)}


def utility_paid(margins: Margins) -> dict[str, Any]:
    r"""What unlearning costs on other samples, for each forgotten point: of members, and of points never trained on.

    .. math:: \frac{\bar\ell_S(\text{unlearned}) - \bar\ell_S(\text{original})}{|\text{forget}|}, \qquad
              \frac{\bar\ell_S(\text{control}) - \bar\ell_S(\text{retrained})}{|\text{forget}|}

    with the mean loss :math:`\ell = \ln(1 + e^{-\phi})` in nats over each set S but the forget set; mean over the seeds
    that have both models, with a 95 % t interval. Unbounded; 0 costs nothing. Where ``others`` cost as much as
    ``members``, the price is that of the push, not of what was remembered.
    """
    names = [name for name in margins.names if name != "forget"]
    forgotten = int((margins.sets == "forget").sum())
    if not names or not forgotten:
        return {"skipped": f"the points are of the sets {', '.join(margins.names)}; expected forget and another"}
    found: dict[str, Any] = {"forgotten": forgotten}
    for side, pair in {"members": ("unlearned", "original"), "others": ("control", "retrained")}.items():
        rows = _paired(margins, *pair)
        if len(rows) < MIN_PAIRS:
            found[side] = {"skipped": f"{len(rows)} seeds have {pair[0]} and {pair[1]} models; fewer than {MIN_PAIRS}"}
            continue
        after, without = (_losses(margins.of[kind][[row[at] for row in rows]]) for at, kind in enumerate(pair))
        changes = after - without
        found[side] = {name: interval(changes[:, margins.sets == name].mean(1) / forgotten) for name in names}
    return found | population_warning(margins)


def loss_changes(margins: Margins) -> dict[str, Any]:
    r"""Whether unlearning moves each forgotten sample as leaving it out would: rank correlation of loss changes.

    .. math:: \rho_s = \mathrm{Spearman}_i\bigl(\ell_i(u_s) - \ell_i(o_s),\
              \bar\ell_i(r_{-s}) - \bar\ell_i(o_{-s})\bigr)

    over the forgotten samples i, of the unlearned model :math:`u_s` of seed s and its original :math:`o_s`, beside the
    mean change from originals to retrained models without that seed, so that no model stands on both sides. Mean over
    seeds with a 95 % t interval; in [-1, 1], 0 by chance. ``retrained`` has the retrained model of the seed in place of
    the unlearned one: what a single retraining reaches, which is below 1 by its own chance. Forgetting as retraining
    would comes to about as much.
    """
    reason = lacking(margins, ("original", "unlearned", "retrained"), ("forget",), MIN_PAIRS)
    if reason:
        return {"skipped": reason}
    forgotten = margins.subset("forget")
    if len(forgotten.points) < MIN_PAIRS:
        return {
            "skipped": f"{len(forgotten.points)} forgotten points; fewer than {MIN_PAIRS} have no ranks to speak of"
        }
    losses = {kind: _losses(each) for kind, each in forgotten.of.items()}

    def without(kind: str, seed: int) -> Column:
        mean: Column = losses[kind][[each != seed for each in forgotten.seeds[kind]]].mean(0)
        return mean

    found: dict[str, Any] = {}
    for kind in ("unlearned", "retrained"):
        values = []
        for row, original in _paired(forgotten, kind, "original"):
            seed = forgotten.seeds[kind][row]
            change = losses[kind][row] - losses["original"][original]
            if np.ptp(change) > 0:
                values.append(
                    float(scipy.stats.spearmanr(change, without("retrained", seed) - without("original", seed))[0])
                )
        enough = len(values) >= MIN_PAIRS
        found[kind] = interval(values) if enough else {"skipped": f"{len(values)} seeds in which losses moved"}
    return found | population_warning(margins)


def _losses(margins_MN: Matrix) -> Matrix:
    """Cross-entropy in nats by the log-odds of the true class."""
    losses: Matrix = np.logaddexp(0.0, -margins_MN)
    return losses


def _paired(margins: Margins, kind: str, other: str) -> list[tuple[int, int]]:
    """Rows of both kinds that are of the same seed."""
    places = {seed: row for row, seed in enumerate(margins.seeds.get(other, ()))}
    return [(row, places[seed]) for row, seed in enumerate(margins.seeds.get(kind, ())) if seed in places]


def _metric_gaps(figures: Figures, references: Sequence[Figures]) -> dict[str, Any]:
    """By set and metric the signed gap to each reference, for every number that all of them have."""
    found: dict[str, Any] = {}
    for name, part in figures.items():
        sides = [part, *(reference.get(name) for reference in references)]
        shared = [key for key in (part if isinstance(part, Mapping) else ()) if key not in COUNTS]
        shared = [key for key in shared if all(_is_number(_at({name: side}, f"{name}.{key}")) for side in sides)]
        gaps = {key: interval([part[key] - reference[name][key] for reference in references]) for key in shared}
        found |= {name: gaps} if gaps else {}
    return found


def _scores(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, score in SCORES.items():
        missing = next((each for pair in pairs for each in _unmeasured(name, *pair)), None)
        skipped = {"skipped": f"{missing} was not measured on both sides"}
        found[name] = skipped if missing else interval([score(*pair) for pair in pairs])
    return found


def _unmeasured(score: str, *sides: Figures) -> list[str]:
    """What a score is made of and was not measured on some side."""
    wanted = [f"{name}.accuracy" for name in ACCURACIES if score != "tug_of_war_membership" or name != "forget"]
    wanted += [] if score == "tug_of_war" else [EFFICACY]
    return [path for path in wanted for side in sides if not _is_number(_at(side, path))]


def _at(figures: Figures, path: str) -> Any:
    found: Any = figures
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _distance(figures: Figures, reference: Figures, path: str) -> float:
    return abs(float(_at(figures, path) - _at(reference, path)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
