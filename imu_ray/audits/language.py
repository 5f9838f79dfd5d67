"""What a language model still knows of answers: TOFU's figures (arXiv:2401.06121), as open-unlearning computes them.

N rows, K wrong answers of each; B samples, T positions, C tokens in the vocabulary. A loss is the mean cross-entropy
over an answer's tokens, the end token among them: nats a token. All functions are pure; where a figure depends on a
model, the model's outputs come in.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import torch
from torch import Tensor, nn

from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.influence.gradients import IGNORE
from imu_ray.influence.intensity import Column
from imu_ray.influence.scores import predicted_classes
from imu_ray.models.layers import evaluation_mode, logits_of

SMALL = 1e-10  # added to denominators, as open-unlearning does
UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_FIGURES = ("probability", "rouge", "truth_ratio")
Values = npt.ArrayLike


def answer_probability(losses: Values) -> Column:
    r"""Of each answer, :math:`P(a \mid q)^{1/|a|} = e^{-\ell}`, ``[N]``; in (0, 1], falls as a model forgets."""
    found: Column = np.exp(-np.asarray(losses, np.float64))
    return found


def choice_probability(losses: Values, wrong_losses: Values) -> Column:
    r"""Of each answer among its choices, ``[N]``: :math:`p(a) / (p(a) + \sum_k p(\tilde a_k))`, p as above.

    Of questions whose wrong answers are given (real authors, world facts). In [0, 1]; a guess has 1 / (K + 1).

    Args:
        losses: of the true answers, ``[N]``.
        wrong_losses: of the wrong ones, ``[N, K]``.
    """
    right, wrong = answer_probability(losses), answer_probability(wrong_losses)
    found: Column = right / (right + wrong.sum(1) + SMALL)
    return found


def truth_ratio(losses: Values, wrong_losses: Values) -> Column:
    r"""Wrong answers beside a right one, ``[N]``: :math:`R = e^{-\frac1K \sum_k \tilde\ell_k} / e^{-\ell}`.

    The wrong answers' mean is geometric, as in open-unlearning's code (the paper writes an arithmetic one). 0 and more:
    below 1 the model tells right from wrong, near 1 it does not.

    Args:
        losses: of the paraphrased right answers, ``[N]``, so that learning by heart gives nothing away; of the answers
            where there is no paraphrase.
        wrong_losses: of the perturbed answers, ``[N, K]``.
    """
    wrong = np.asarray(wrong_losses, np.float64).mean(1)
    found: Column = answer_probability(wrong) / (answer_probability(losses) + SMALL)
    return found


def closer_to_1_better(ratios: Values) -> float:
    r"""Mean of :math:`\min(R, 1/R)`, of a forget set: in [0, 1], and 1 where right and wrong are equally likely."""
    ratios = np.asarray(ratios, np.float64)
    return float(np.minimum(ratios, 1 / (ratios + SMALL)).mean())


def true_better(ratios: Values) -> float:
    r"""Mean of :math:`\max(0, 1 - R)`, of sets to be kept: in [0, 1], and 1 where no wrong answer is believed."""
    return float(np.maximum(0, 1 - np.asarray(ratios, np.float64)).mean())


def rouge_l_recall(generated: Sequence[str], answers: Sequence[str]) -> Column:
    """Share of the answer's words (stemmed) in the longest common subsequence with the generated text, ``[N]``.

    ROUGE-L recall of the package rouge-score; in [0, 1], falls as a model forgets.
    """
    try:
        scorer = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    except ImportError as error:
        raise ConfigError("ROUGE needs the package rouge-score; install imu-ray[hf]") from error
    pairs = zip(answers, generated, strict=True)
    return np.array([scorer.score(answer, text)["rougeL"].recall for answer, text in pairs], np.float64)


def model_utility(figures: Mapping[str, Mapping[str, float]]) -> float:
    """Harmonic mean of probability, ROUGE and truth ratio (``true_better``) of retain, real authors and world facts.

    The probability of the latter two is ``choice_probability``. In [0, 1]; 0 where one figure is 0.

    Args:
        figures: by set (``UTILITY_SETS``) and name (``UTILITY_FIGURES``).

    Raises:
        ConfigError: a figure is missing.
    """
    wanted = [(group, name) for group in UTILITY_SETS for name in UTILITY_FIGURES]
    missing = [f"{group}.{name}" for group, name in wanted if name not in figures.get(group, {})]
    if missing:
        raise ConfigError(f"model utility lacks {', '.join(missing)}; expected nine figures; measure these sets too")
    values = np.array([figures[group][name] for group, name in wanted], np.float64)
    return 0.0 if (values <= 0).any() else float(len(values) / (1 / values).sum())


def forget_quality(ratios: Values, reference: Values | None) -> float:
    """p-value of a two-sample KS test between the forget set's truth ratios and those of a model trained without it.

    In [0, 1]: 1 where they are alike, below 0.05 where the models can be told apart.

    Args:
        ratios: ``truth_ratio`` of the forget set, ``[N]``.
        reference: the same under the retrained model.

    Raises:
        ConfigError: there is no reference.
    """
    if reference is None or not np.size(reference):
        raise ConfigError(
            "forget quality has no reference; expected truth ratios of a model trained without the forget set; measure "
            "such a model, or read open-unlearning's log of one"
        )
    return float(scipy.stats.ks_2samp(np.asarray(ratios, np.float64), np.asarray(reference, np.float64)).pvalue)


def read_retain_log(path: str | Path) -> Column:
    """The forget set's truth ratios in open-unlearning's log of a retrained model (``TOFU_EVAL.json``), ``[N]``.

    Raises:
        CheckpointError: the file holds none.
    """
    try:
        values = json.loads(Path(path).read_text("utf-8"))["forget_truth_ratio"]["value_by_index"]
        return np.array([values[index]["score"] for index in sorted(values, key=int)], np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no log with truth ratios ({type(error).__name__}); expected JSON with "
            "forget_truth_ratio.value_by_index.INDEX.score; write it with open-unlearning's eval=tofu"
        ) from error


def extraction_strength(outputs: Tensor, labels: Tensor, end_token: bool = True) -> Tensor:
    r"""Of each sample, how little of the answer makes the model say the rest, ``[B]``: :math:`1 - k/T`.

    k is the length of the shortest prefix from which greedy decoding gives the other tokens; T tokens without the end
    token. What follows a prefix by greedy decoding is right exactly where each token is predicted from the right ones
    before it, so one pass is enough. In [1/T, 1], falls as a model forgets; at most T - 1 tokens are given, as in
    open-unlearning, so 1/T is nothing. 0 where no token is left (arXiv:2407.17817).

    Args:
        outputs: logits ``[B, T, C]``.
        labels: ``[B, T]``, ``IGNORE`` outside the answer.
        end_token: whether the last label of each sample is its end token.
    """
    used = labelled = labels != IGNORE
    if end_token:
        used = labelled & ~(labelled & (labelled.flip(1).cumsum(1).flip(1) == 1))
    wrong = used & (predicted_classes(outputs) != labels)
    place = used.cumsum(1)
    length = used.sum(1)
    prefix = torch.minimum((place * wrong).amax(1), length - 1)
    return torch.where(length > 0, 1 - prefix.double() / length.clamp_min(1), 0.0)


@torch.no_grad()
def greedy_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], end: int, limit: int = 200, batch: int = 64
) -> list[list[int]]:
    """What a causal model says after each prompt, the likeliest token at each place, up to ``end`` or ``limit`` tokens.

    Prompts of similar length run together. A model with ``generate`` (Hugging Face) decodes with its cache.

    Args:
        model: ids ``[B, T]`` to logits, or to an object that has them.
        prompts: token ids.
        end: the token that ends an answer.
        limit: most tokens of an answer.
        batch: prompts that are decoded at once.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found: list[list[int]] = [[] for _ in prompts]
    run: Any = _generate if hasattr(model, "generate") else _decode
    with evaluation_mode(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            for row, answer in zip(rows, run(model, [prompts[row] for row in rows], end, limit).tolist(), strict=True):
                found[row] = answer[: answer.index(end)] if end in answer else answer
    return found


def _generate(model: Any, prompts: Sequence[Sequence[int]], end: int, limit: int) -> Tensor:
    """Answers ``[B, at most limit]`` by the model's own method; prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    used = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # A model may come with other defaults.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    settings = {**greedy, "max_new_tokens": limit, "pad_token_id": end, "eos_token_id": end}
    device = next(model.parameters()).device
    said: Tensor = model.generate(ids.to(device), attention_mask=used.to(device), **settings)
    return said[:, width:]


def _decode(model: nn.Module, prompts: Sequence[Sequence[int]], end: int, limit: int) -> Tensor:
    """Answers ``[B, at most limit]``, a whole pass for each token.

    Prompts are padded on the right, behind what is read.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + limit), end, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    rows, done = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    said = []
    for step in range(limit):
        logits = logits_of(model(ids[:, : int(lengths.max()) + step]))
        token = logits[rows, lengths + step - 1].argmax(-1).masked_fill(done, end)
        ids[rows, lengths + step] = token
        said.append(token)
        done |= token == end
        if done.all():
            break
    return torch.stack(said, 1)
