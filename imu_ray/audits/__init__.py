"""What was forgotten and what was kept: the audits of every run, those of populations of models, and the report.

scikit-learn, and of scipy its statistics, are imported where they are called: every process that a model runs in
imports this package, and they take as long as half of torch.
"""

from collections.abc import Callable
from typing import Any

from imu_ray.audits.accuracy import SetMetrics
from imu_ray.audits.answers import Language
from imu_ray.audits.base import Audit
from imu_ray.audits.competition import forgetting_quality
from imu_ray.audits.destinations import Destinations
from imu_ray.audits.gaps import loss_changes, utility_paid
from imu_ray.audits.klom import klom
from imu_ray.audits.lira import ulira
from imu_ray.audits.margins import Margins
from imu_ray.audits.membership import Membership
from imu_ray.audits.retrieval import Retrieval
from imu_ray.audits.rmia import rmia

AUDITS: dict[str, Audit] = {
    "metrics": SetMetrics(),
    "membership": Membership(),
    "destinations": Destinations(),
    "retrieval": Retrieval(),
    "language": Language(),
}
POPULATION: dict[str, Callable[[Margins], dict[str, Any]]] = {
    "klom": klom,
    "ulira": ulira,
    "rmia": rmia,
    "forgetting_quality": forgetting_quality,
    "utility_paid": utility_paid,
    "loss_changes": loss_changes,
}
