"""What a language model makes of the answers of a sample set, and TOFU's figures from that.

N rows, K wrong answers of each. Texts stay in the task that reads them; what leaves it are numbers.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from imu_ray.audits import language
from imu_ray.audits.base import Answers, Predictions
from imu_ray.config import AuditConfig, UnlearnConfig
from imu_ray.data import Shard, Source
from imu_ray.errors import ConfigError, StageFailedError
from imu_ray.influence.gradients import IGNORE
from imu_ray.influence.intensity import Column
from imu_ray.influence.scores import sample_losses
from imu_ray.models.layers import evaluation_mode, forward_errors, logits_of
from imu_ray.scopes.layers import Layers
from imu_ray.tasks.base import Task, UnusableError, reader_of, rows_at_once
from imu_ray.tasks.causal_lm import PARAPHRASED, PERTURBED, CausalLMTask
from imu_ray.tasks.sequence import PADDING, Ids

ROUGE = "rouge"
KINDS = (PARAPHRASED, PERTURBED, ROUGE)
ROWS = 32  # answered at once, whatever the settings, so that the figures are the same


class Language:
    r"""What a language model still knows of each sample set; TOFU's figures where the rows have what they need.

    .. math:: \text{perplexity} = \exp\Bigl(\frac{\sum_i T_i \ell_i}{\sum_i T_i}\Bigr)

    :math:`\ell_i` is the mean loss of the :math:`T_i` labelled tokens of a sample, the end token among them. With it,
    as ``imu_ray.audits.language`` defines them: the mean ``probability`` and ``extraction_strength`` of the answers;
    ``rouge``, recall of greedy answers (``audit.generate``); ``truth_ratio`` where rows have wrong answers (of the
    forget set ``closer_to_1_better``, of others ``true_better``); and ``choice_probability`` of ``audit.choice_sets``.

    Of the forget set perplexity rises, truth ratio comes to 1, the others fall; of every other set all stay.
    ``model_utility`` needs the sets retain, real_authors and world_facts, and falls where a model is ruined;
    ``forget_quality`` needs ``audit.retain_log``, and is 0.05 and more where the forget set's truth ratios cannot be
    told from those of a model that never saw it.

    Source: Maini et al., TOFU, arXiv:2401.06121, as open-unlearning computes them.
    """

    def run(self, measured: Mapping[str, Predictions], config: AuditConfig, seed: int) -> dict[str, Any]:
        """``language``: ``sets``, ``model_utility``, ``forget_quality``, and in ``skipped`` why some are not there.

        Nothing where samples are no sequences.
        """
        parts = {name: part for name, part in measured.items() if part.of_sequences and part.metrics}
        if not parts:
            return {}
        sets: dict[str, dict[str, Any]] = {}
        ratios: dict[str, Column | str] = {}
        for name, part in parts.items():
            sets[name], ratios[name] = _set_figures(part, name == "forget", name in config.choice_sets)
        found: dict[str, Any] = {"sets": sets}
        skipped: dict[str, str] = {}
        try:
            found["model_utility"] = language.model_utility(
                {name: _of_utility(sets[name], name in config.choice_sets) for name in sets}
            )
        except ConfigError as error:
            skipped["model_utility"] = str(error)
        forget = ratios["forget"]
        if config.retain_log is None:
            skipped["forget_quality"] = "audit.retain_log names no log of a retrained model"
        elif isinstance(forget, str):
            skipped["forget_quality"] = f"the forget set has no truth ratios: {forget}"
        else:
            found["forget_quality"] = language.forget_quality(forget, language.read_retain_log(config.retain_log))
        return {"language": {**found, "skipped": skipped}}


def _set_figures(part: Predictions, forgotten: bool, chosen: bool) -> tuple[dict[str, Any], Column | str]:
    """Figures of a set, with what was ``skipped`` and why; and its truth ratios ``[N]``, or why there are none."""
    losses, tokens_N = part.metrics["loss"], (part.labels != IGNORE).sum(1)
    wrong, ratios = _matrix(part.answers, PERTURBED), _truth_ratios(part)
    with np.errstate(over="ignore"):
        measured: dict[str, Any] = {
            "perplexity": np.exp((losses * tokens_N).sum() / tokens_N.sum()),
            "probability": language.answer_probability(losses),
            "extraction_strength": part.metrics["extraction_strength"],
            "rouge": _matrix(part.answers, ROUGE) if ROUGE in part.answers else "audit.generate is false",
            "truth_ratio": ratios,
        }
    if chosen:
        measured["choice_probability"] = wrong if isinstance(wrong, str) else language.choice_probability(losses, wrong)
    if not isinstance(ratios, str):
        measured["truth_ratio"] = (language.closer_to_1_better if forgotten else language.true_better)(ratios)
    skipped = {name: value for name, value in measured.items() if isinstance(value, str)}
    means = {name: float(np.mean(value)) for name, value in measured.items() if name not in skipped}
    skipped |= {name: "beyond the range of numbers" for name, mean in means.items() if not np.isfinite(mean)}
    shown = {name: mean for name, mean in means.items() if name not in skipped}
    return {"samples": len(losses), "tokens": int(tokens_N.sum()), **shown, "skipped": skipped}, ratios


def _truth_ratios(part: Predictions) -> Column | str:
    """Of each row ``[N]``, or why there are none; without a paraphrase the answer itself is the right one."""
    wrong, right = _matrix(part.answers, PERTURBED), _matrix(part.answers, PARAPHRASED)
    if isinstance(wrong, str):
        return wrong
    if not isinstance(right, str):
        return language.truth_ratio(right[:, 0], wrong)
    return right if any(part.answers.get(PARAPHRASED, ())) else language.truth_ratio(part.metrics["loss"], wrong)


def _matrix(answers: Answers, kind: str) -> Column | str:
    """Figures of a kind, ``[N, K]``, or why there are none."""
    rows = answers.get(kind, ())
    if isinstance(rows, str):
        return rows
    counts = {len(row) for row in rows} or {0}
    if counts == {0}:
        return f"the rows have no answers in forget_set.{kind}_column that can be used"
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        return f"the rows have from {few} to {many} answers in forget_set.{kind}_column that can be used"
    found: Column = np.array(rows, np.float64)
    return found


def _of_utility(figures: Mapping[str, Any], chosen: bool) -> dict[str, float]:
    """The three figures of a set, as far as they are there."""
    names = {
        "probability": "choice_probability" if chosen else "probability",
        ROUGE: ROUGE,
        "truth_ratio": "truth_ratio",
    }
    return {name: figures[key] for name, key in names.items() if key in figures}


def check_settings(config: UnlearnConfig, task: Task) -> None:
    """Refuse settings of ``audit.*`` that ask for what cannot be measured, before anything is.

    Raises:
        ConfigError: they do not fit the task or each other.
        CheckpointError: the retain log cannot be read.
    """
    audit = config.audit
    if audit.checks and config.ascent.keep != "all":
        raise ConfigError(
            f"audit.checks is true, but ascent.keep is {config.ascent.keep!r}, which keeps no parameters of checks; "
            "expected ascent.keep=all with it"
        )
    if audit.samples and not audit.report:
        raise ConfigError(
            f"audit.samples is {audit.samples}, but audit.report is false, so that no page would show them; expected "
            "audit.report=true with it"
        )
    asked = [f"audit.{name}" for name in ("generate", "retain_log") if getattr(audit, name)]
    if asked and (not isinstance(task, CausalLMTask) or task.config.text_column is not None):
        raise ConfigError(
            f"{' and '.join(asked)} asks for answers, which the samples do not have; expected task causal_lm and rows "
            "with a question and an answer, or with messages; leave it out"
        )
    if audit.retain_log is not None:
        language.read_retain_log(audit.retain_log)
    if audit.generate:
        language.rouge_l_recall([], [])
        if cast(CausalLMTask, task).tokenizer.eos_token_id is None:
            raise ConfigError(
                "audit.generate is true, but the tokenizer has no end token, so that no answer would end; expected "
                "eos_token in forget_set.tokenizer"
            )


def asks_for_answers(source: Source, audit: AuditConfig) -> bool:
    """Whether there is more to measure than the right answers of a set, by its first row."""
    (first,) = source.read(0, 1).inputs
    return audit.generate or (isinstance(first, Mapping) and not {PARAPHRASED, PERTURBED}.isdisjoint(first))


@dataclass(frozen=True)
class Answering:
    """A language model under a part's parameters at the answers of a source; picklable, it travels to the tasks.

    Attributes:
        source: where the rows are.
        part: which parameters.
        generated: most tokens of what the model says itself; 0: it is not asked.
    """

    source: Source
    part: Layers
    generated: int

    @property
    def task(self) -> CausalLMTask:
        """What reads the rows."""
        return cast(CausalLMTask, reader_of(self.part.task, self.source))

    @functools.cached_property
    def model(self) -> nn.Module:
        """The whole model, made once per process."""
        return self.part.apply(self.part.cut.model).to(self.part.device)

    @property
    def room(self) -> float:
        """Tokens that the model takes at most, as far as it says so."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None) or math.inf

    def __call__(self, shard: Shard) -> Answers:
        """Of each usable row the losses (nats a token) of its other answers, and ROUGE-L recall of the model's own."""
        rows = self.source.read(shard.start, shard.stop)
        usable = set(self.task.collate(self.source.placed(rows, shard.start)).ids)
        values = [value for sample_id, value in zip(rows.ids, rows.inputs, strict=True) if sample_id in usable]
        others = {kind: [self._others(value, kind) for value in values] for kind in (PARAPHRASED, PERTURBED)}
        found = {kind: self._losses(answers) for kind, answers in others.items()}
        return {**found, ROUGE: self._recalls(values)} if self.generated else found

    def _others(self, value: Any, kind: str) -> list[tuple[Ids, Ids]]:
        try:
            found = self.task.other_answers(value, kind)
        except UnusableError:
            return []
        return found if all(len(tokens) <= self.room for tokens, _ in found) else []

    def _losses(self, answers: Sequence[Sequence[tuple[Ids, Ids]]]) -> list[list[float]]:
        """Loss of every answer of each row."""
        losses = self._each_loss([pair for row in answers for pair in row])
        return [[next(losses) for _ in row] for row in answers]

    def _each_loss(self, pairs: Sequence[tuple[Ids, Ids]]) -> Iterator[float]:
        longest = max((len(tokens) for tokens, _ in pairs), default=1)
        step = rows_at_once(ROWS, replace(self.task, positions=longest))
        for start in range(0, len(pairs), step):
            tokens, labels = (
                pad_sequence([torch.from_numpy(each) for each in part], True, filling).to(self.part.device)
                for part, filling in zip(zip(*pairs[start : start + step], strict=True), (PADDING, IGNORE), strict=True)
            )
            kind = getattr(torch, self.part.autocast, None)
            with (
                evaluation_mode(self.model),
                torch.autocast(tokens.device.type, kind, enabled=self.part.autocast != "none"),
                forward_errors(self.model, tokens, StageFailedError),
            ):
                losses = sample_losses(logits_of(self.model(tokens))[:, :-1], labels[:, 1:])
            yield from losses.tolist()

    def _recalls(self, values: Sequence[Any]) -> list[list[float]]:
        """ROUGE-L recall of what the model says after each prompt."""
        if not values:
            return []
        prompts, answers = zip(*map(self.task.prompt_and_answer, values), strict=True)
        # A row has its own limit, so that its answer does not depend on the rows beside it.
        limits = np.array([int(max(0, min(self.generated, self.room - len(prompt)))) for prompt in prompts])
        said: list[list[int]] = [[] for _ in prompts]
        for limit in np.unique(limits[limits > 0]).tolist():
            rows = np.flatnonzero(limits == limit).tolist()
            asked, end = [prompts[row] for row in rows], self.task.tokenizer.eos_token_id
            for row, answer in zip(rows, language.greedy_answers(self.model, asked, end, limit, ROWS), strict=True):
                said[row] = answer
        texts = [self.task.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        return [[recall] for recall in language.rouge_l_recall(texts, answers).tolist()]
