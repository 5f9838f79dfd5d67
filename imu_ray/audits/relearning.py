"""Relearning: how fast a model knows again what it was to forget, by plain steps or by those of adapters."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from imu_ray.data import Source
from imu_ray.models.copies import plain_copy
from imu_ray.models.layers import evaluation_mode, logits_of
from imu_ray.scopes.layers import wide
from imu_ray.tasks.base import Batch, Task, read_batch, reader_of, rows_at_once

AT_ONCE = 64  # rows of a forward pass, whatever the settings, so that the figures are the same
FIGURES = ("accuracy", "loss", "probability")  # of those that the task has
LORA_RATE = 1e-3


@dataclass(frozen=True)
class Sample:
    """Rows of a source as the batches that a task makes of them, read again whenever they are gone through."""

    source: Source
    task: Task
    device: str = "cpu"

    def __iter__(self) -> Iterator[Batch]:
        step, task = rows_at_once(AT_ONCE, self.task), reader_of(self.task, self.source)
        for start in range(0, self.source.num_rows, step):
            batch = read_batch(task, self.source, start, min(start + step, self.source.num_rows))
            if batch.ids:
                yield replace(batch, inputs=batch.inputs.to(self.device), labels_B=batch.labels_B.to(self.device))


def mean_figures(model: nn.Module, task: Task, sample: Iterable[Batch]) -> dict[str, float]:
    """Mean accuracy, loss (nats) and, of sequences, probability; a figure that is not finite is left out."""
    sums, rows = dict[str, float](), 0
    with evaluation_mode(model):
        for batch in sample:
            found = task.sample_metrics(wide(logits_of(model(batch.inputs))), batch.labels_B)
            sums = {name: sums.get(name, 0.0) + float(found[name].sum()) for name in FIGURES if name in found}
            rows += len(batch.ids)
    return {name: total / rows for name, total in sums.items() if math.isfinite(total)}


def checked_steps(steps: int) -> list[int]:
    """The steps after which a relearnt model is measured: 0, 1, 2, 5, 10, 20, 50, ... and the last."""
    found = [digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5)]
    return [0, *(step for step in found if step < steps), steps]


def relearn(
    model: nn.Module,
    task: Task,
    shown: Iterable[Batch],
    measured: Mapping[str, Iterable[Batch]],
    steps: int,
    optimiser: torch.optim.Optimizer,
) -> dict[str, Any]:
    r"""What a model knows again after a few steps on a few of the rows that it was to forget.

    .. math:: \theta \leftarrow \theta - \eta \, \nabla_\theta \frac1n \sum_i \ell_i(\theta)

    over all rows that are shown, in each step; the rule is that of the optimiser, here of plain SGD. Norms keep their
    statistics and dropout is off. The model is changed.

    Accuracy on the *other* rows is in [0, 1], and step 0 is the model as it was. A model that was to forget a class is
    taught the class by these steps, as is one that never saw it: only a rise that is faster than that of a retrained
    model tells of what was left, and the figures of the other set whether the model was ruined on the way.

    Args:
        model: in eval mode; which parameters move says the optimiser.
        task: gives loss and figures.
        shown: labelled rows.
        measured: rows by set: ``forget``, and what else is to be measured.
        steps: how many.
        optimiser: over the parameters.

    Returns:
        ``steps``, and at each of them the mean ``accuracy``, ``loss`` and ``probability`` (of sequences) on the
        ``forget`` rows; the same below the name of every other set; ``ended`` where the loss was no longer finite.
    """
    record: dict[str, Any] = {"steps": [], **{name: {} for name in measured}}
    done, rows = 0, sum(len(batch.ids) for batch in shown)
    for step in checked_steps(steps):
        for _ in range(done, step):
            optimiser.zero_grad()
            for batch in shown:
                outputs = logits_of(model(batch.inputs))
                pull = task.output_gradient(wide(outputs.detach()), batch.labels_B) / rows
                outputs.backward(pull.to(outputs.dtype))  # type: ignore[no-untyped-call]
            optimiser.step()
        done, found = step, {name: mean_figures(model, task, sample) for name, sample in measured.items()}
        if any("loss" not in figures for figures in found.values()):
            record["ended"] = f"the loss is not finite after step {step}"
            break
        record["steps"].append(step)
        for name, figures in found.items():
            for figure, mean in figures.items():
                record[name].setdefault(figure, []).append(mean)
    return {**record.pop("forget"), **record}


def moving(model: nn.Module) -> list[nn.Parameter]:
    """Every floating parameter of a model, ready to move: nothing is left frozen to an attacker."""
    found = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in found:
        parameter.requires_grad_()
    return found


def with_adapters(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a Hugging Face model with fresh LoRA adapters beside all linear layers; older ones are merged first.

    Rank 8, scale 16 / 8, no dropout. Source: Hu et al., LoRA, arXiv:2106.09685, by PEFT.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    base = plain_copy(model)
    merged = base.merge_and_unload() if isinstance(base, PeftModel) else base
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds Conv1D by itself, and says so
        torch.manual_seed(seed)
        made: nn.Module = get_peft_model(merged, config).eval()
    return made


def missing_adapters(model: nn.Module) -> str | None:
    """Why no adapters can be put into a model; None where they can."""
    try:
        import peft
        from transformers import PreTrainedModel
    except ImportError:
        return "PEFT is not installed: pip install imu-ray[hf]"
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return None if isinstance(base, PreTrainedModel) else "the model is none of Hugging Face's"
