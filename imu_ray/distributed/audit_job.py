"""Measuring a part on Ray tasks, from kept features. The driver holds predictions as columns, for the audits only."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import ray

from imu_ray.audits import AUDITS
from imu_ray.audits.accuracy import divergence, output_change, set_figures
from imu_ray.audits.answers import KINDS, ROWS, Answering, asks_for_answers
from imu_ray.audits.base import Answers, Predictions, predict_shard
from imu_ray.audits.retrieval import embed_shard
from imu_ray.audits.samples import Shown
from imu_ray.config import AuditConfig
from imu_ray.data import PartSource, Shard, Source
from imu_ray.distributed import sharing
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.tasks import Stage, StageRef, TaskRunner
from imu_ray.errors import ForgetSetError
from imu_ray.influence.intensity import Column
from imu_ray.models.checkpoint import model_hash
from imu_ray.scopes.base import Part
from imu_ray.scopes.layers import Layers
from imu_ray.tasks.causal_lm import CausalLMTask


def predict(features: Mapping[str, FeatureSet], part: Part, signals: bool = False) -> dict[str, Predictions]:
    """Predictions on every sample set; embeddings of those that are for retrieval."""
    predicted = functools.partial(predict_shard, signals=signals)

    def of_set(name: str, made: FeatureSet) -> Predictions:
        function = embed_shard if name in part.task.retrieval_sets else predicted
        return Predictions.join(made.map(f"audit of {name}", functools.partial(function, part=part)))

    return {name: of_set(name, made) for name, made in features.items()}


def figures(features: Mapping[str, FeatureSet], part: Part) -> dict[str, Any]:
    """Every metric of every sample set."""
    return {name: set_figures(found) for name, found in predict(features, part).items()}


def measure(
    features: Mapping[str, FeatureSet],
    part: Part,
    config: AuditConfig,
    seed: int,
    sources: Mapping[str, Source] | None = None,
) -> dict[str, Any]:
    """What every audit tells; of a language model with the hash of the model that was measured.

    ``sources`` are where the rows of the sets can be read again.
    """
    measured = predict(features, part, signals=True)
    if isinstance(part.task, CausalLMTask):
        for name, made in features.items():
            found = answers(name, (sources or {}).get(name), cast(Layers, part), config, made.runner)
            measured[name] = replace(measured[name], answers=found)
    told = {name: found for audit in AUDITS.values() for name, found in audit.run(measured, config, seed).items()}
    if "language" in told:
        told["language"]["model"] = model_hash(part.apply(cast(Layers, part).cut.model))
    return told


@ray.remote
def _answer(stage: StageRef, shard: Shard) -> Answers:
    found: Answers = stage.begin()(shard)
    return found


def answers(name: str, source: Source | None, part: Layers, config: AuditConfig, runner: TaskRunner) -> Answers:
    """What a language model makes of the other answers of a set and, where asked, says itself.

    The rows are read again, because features are no prompts.
    """
    if source is None:
        return dict.fromkeys(KINDS, "the trials of a sweep do not read the rows again")
    if not asks_for_answers(source, config):
        return {}
    stage = f"answers of {name}"
    work = Answering(source, part, config.generated_tokens * config.generate)
    shared = StageRef(sharing.share(Stage(stage, runner.threads, work), source.name, ForgetSetError))
    shards = source.shards(ROWS, 1)
    tasks = runner.tasks(_answer, stage, len(shards), gpu=True)
    parts = list(
        runner.run(
            stage,
            lambda index: tasks(index).remote(shared, shards[index]),
            len(shards),
            lambda index, _: shards[index].stop - shards[index].start,
        )
    )
    return {kind: [row for found in parts for row in found[kind]] for kind in parts[0]}


def compare(
    features: Mapping[str, FeatureSet], part: Part, others: Mapping[str, FeatureSet], reference: Part
) -> dict[str, Any]:
    """Of every sample set the mean divergences from a reference model, and how often both predict the same class."""
    found = {}
    for name, made in features.items():
        function = functools.partial(divergence, part=part, reference=reference)
        means = np.concatenate(list(made.stream(f"reference on {name}", function, beside=others[name]))).mean(0)
        found[name] = dict(zip(("kl", "agreement", "js"), means.tolist(), strict=True))
    return found


def samples(
    forget: FeatureSet, source: Source, part: Part, influence: Column | None, count: int
) -> dict[str, list[Shown]]:
    """Samples of the forget set to show: so many with the largest influence, up or down, and so many least forgotten.

    Args:
        forget: features of the forget set.
        source: where its rows can be read again; they are read here.
        part: what makes outputs of the unlearned model.
        influence: of each sample ``[N]``; None where they were not scored.
        count: how many of each.
    """
    found = predict({"forget": forget}, part)["forget"]
    losses, (_, places) = found.metrics["loss"], forget.labels_and_places("forget")
    chosen = {"least forgotten, by loss": np.argsort(losses, kind="stable")[:count]}
    if influence is not None:
        chosen = {"highest influence, up or down": np.argsort(-np.abs(influence), kind="stable")[:count], **chosen}
    used = np.unique(np.concatenate(list(chosen.values())))
    used = used[np.argsort(places[used])]
    rows = PartSource.at(source, places[used]).read(0, len(used))

    def shown(sample: int, value: Any) -> Shown:
        label = int(found.labels[sample]) if found.labels.ndim == 1 else None
        return Shown.of(value, label, float(losses[sample]), None if influence is None else float(influence[sample]))

    made = {sample: shown(sample, value) for sample, value in zip(used.tolist(), rows.inputs, strict=True)}
    return {title: [made[sample] for sample in samples.tolist()] for title, samples in chosen.items()}


def mean_output_change(forget: FeatureSet, before: Part, after: Part) -> float:
    """Mean of ``output_change`` over the forget set; what a choice between runs can go by without retain data."""
    changes = forget.map("change of outputs", functools.partial(output_change, before=before, after=after))
    return float(np.concatenate(changes).mean())
