"""What a sample is: one file per task, and the registry of all."""

from imu_ray.tasks.base import Task
from imu_ray.tasks.causal_lm import CausalLMTask
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.tasks.reid import ReidTask
from imu_ray.tasks.sequence import SequenceTask

TASKS: dict[str, type[Task]] = {
    "classification": ClassificationTask,
    "reid": ReidTask,
    "sequence": SequenceTask,
    "causal_lm": CausalLMTask,
}
