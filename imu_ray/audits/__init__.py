"""What was forgotten and what was kept: one class per audit, the registry that every run reads, and the report."""

from imu_ray.audits.accuracy import SetMetrics
from imu_ray.audits.answers import Language
from imu_ray.audits.base import Audit
from imu_ray.audits.membership import Membership
from imu_ray.audits.retrieval import Retrieval

AUDITS: dict[str, Audit] = {
    "metrics": SetMetrics(),
    "membership": Membership(),
    "retrieval": Retrieval(),
    "language": Language(),
}
