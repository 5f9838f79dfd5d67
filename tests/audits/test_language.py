"""Figures of language models beside open-unlearning's definitions written out, rouge-score and scipy, and at known extremes."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from imu_ray.audits import language
from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.influence.gradients import IGNORE

RANDOM = np.random.default_rng(5)
LOSSES, WRONG = RANDOM.gamma(2.0, 0.7, 40), RANDOM.gamma(2.0, 0.8, (40, 5))


def test_answer_probability_is_the_geometric_mean_of_the_tokens_probabilities():
    tokens = [0.9, 0.2, 0.5]
    assert language.answer_probability([-np.log(tokens).mean()])[0] == pytest.approx(np.prod(tokens) ** (1 / 3))


def test_truth_ratio_and_both_means_are_those_of_open_unlearning():
    wrong = np.exp(-np.mean(WRONG, axis=1))
    ratios = wrong / (np.exp(-LOSSES) + 1e-10)
    np.testing.assert_allclose(language.truth_ratio(LOSSES, WRONG), ratios)
    assert language.closer_to_1_better(ratios) == pytest.approx(np.mean(np.minimum(ratios, 1 / (ratios + 1e-10))))
    assert language.true_better(ratios) == pytest.approx(np.mean(np.maximum(0, 1 - ratios)))


@pytest.mark.parametrize(
    ("loss", "wrong", "closer", "true"),
    [(1.0, 1.0, 1.0, 0.0), (0.0, 50.0, 0.0, 1.0), (5.0, 0.0, np.exp(-5), 0.0), (900.0, 900.0, 0.0, 1.0)],
    ids=["alike", "only the right one", "only the wrong ones", "collapsed"],
)
def test_truth_ratio_at_its_extremes(loss, wrong, closer, true):
    ratios = language.truth_ratio([loss] * 3, [[wrong] * 5] * 3)
    assert language.closer_to_1_better(ratios) == pytest.approx(closer, abs=1e-6)
    assert language.true_better(ratios) == pytest.approx(true, abs=1e-6)


def test_choice_probability_is_the_share_of_the_right_answer():
    right, wrong = np.exp(-LOSSES), np.exp(-WRONG)
    np.testing.assert_allclose(language.choice_probability(LOSSES, WRONG), right / (right + wrong.sum(1) + 1e-10))
    assert language.choice_probability([2.0], [[2.0] * 3])[0] == pytest.approx(0.25)


def common(a, b):
    """Length of the longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + common(a[:-1], b[:-1])
    return max(common(a[:-1], b), common(a, b[:-1]))


def test_rouge_l_recall_is_the_share_of_the_answer_in_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    answers = ["The author was born in Lagos", "A red fox", "yes", "She writes plays"]
    generated = ["the author in Lagos was born", "", "Yes, indeed", "he wrote a play of writing"]
    split = [([word.strip(",").lower() for word in text.split()]) for text in answers + generated]
    expected = [common(split[i], split[4 + i]) / len(split[i]) for i in range(3)]
    found = language.rouge_l_recall(generated, answers)
    assert found[:3].tolist() == pytest.approx(expected)
    assert found[3] == pytest.approx(1 / 3)  # plays and play have one stem


def test_without_rouge_score_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"imu-ray\[hf\]"):
        language.rouge_l_recall(["a"], ["a"])


def figures(value=0.5):
    return {group: dict.fromkeys(language.UTILITY_FIGURES, value) for group in language.UTILITY_SETS}


def test_model_utility_is_the_harmonic_mean_of_nine_figures():
    values = RANDOM.uniform(0.1, 0.9, 9)
    given = {
        group: dict(zip(language.UTILITY_FIGURES, part, strict=True))
        for group, part in zip(language.UTILITY_SETS, values.reshape(3, 3).tolist(), strict=True)
    }
    assert language.model_utility(given) == pytest.approx(stats.hmean(values))
    assert language.model_utility(figures()) == pytest.approx(0.5)
    given["retain"]["rouge"] = 0.0
    assert language.model_utility(given) == 0.0


def test_model_utility_names_what_it_lacks():
    given = figures()
    del given["real_authors"], given["retain"]["rouge"]
    with pytest.raises(ConfigError, match=r"lacks retain\.rouge, real_authors\.probability"):
        language.model_utility(given)


def test_forget_quality_is_scipys_p_value_of_the_reciprocals_as_in_open_unlearning():
    ours, reference = language.truth_ratio(LOSSES, WRONG), language.truth_ratio(LOSSES[::-1] * 1.5, WRONG)
    expected = stats.ks_2samp(1 / (ours + 1e-10), 1 / (reference + 1e-10)).pvalue
    assert language.forget_quality(ours, reference) == pytest.approx(expected)
    assert language.forget_quality(ours, ours) == 1.0
    assert language.forget_quality(ours, ours + 100) < 1e-20


@pytest.mark.parametrize("reference", [None, []])
def test_forget_quality_without_a_reference_is_refused(reference):
    with pytest.raises(ConfigError, match="no reference"):
        language.forget_quality([1.0], reference)


def test_a_retain_log_is_read_in_the_order_of_its_rows(tmp_path):
    path = tmp_path / "TOFU_EVAL.json"
    scores = {"10": {"score": 0.3}, "2": {"score": 0.2}, "0": {"score": 0.1}}
    path.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.2, "value_by_index": scores}}))
    assert language.read_retain_log(path).tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"forget_truth_ratio": {"value_by_index": {"0": {}}}}'])
def test_another_file_is_no_retain_log(tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="forget_truth_ratio"):
        language.read_retain_log(path)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        language.read_retain_log(tmp_path / "absent.json")


def strength_written_out(predicted, labels):
    """open-unlearning's loop over the answer without its end token."""
    labelled = (labels != IGNORE).nonzero().flatten()[:-1]
    if not len(labelled):
        return 0.0
    for k in range(len(labelled)):
        if torch.equal(predicted[labelled][k:], labels[labelled][k:]):
            break
    return 1 - k / len(labelled)


def test_extraction_strength_is_that_of_open_unlearning():
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(60, 9, 2, generator=generator)
    labels = torch.randint(2, (60, 9), generator=generator)
    for row in range(60):
        labels[row, : row % 8] = IGNORE
        labels[row, 9 - row % 3 :] = IGNORE
    expected = [strength_written_out(outputs[row].argmax(-1), labels[row]) for row in range(60)]
    assert language.extraction_strength(outputs, labels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "strength"),
    [([1, 1, 1, 1, 0], 1.0), ([0, 1, 1, 1, 0], 0.75), ([1, 1, 1, 0, 1], 0.25), ([IGNORE, 1, 1, IGNORE, 0], 1.0), ([IGNORE] * 4 + [1], 0.0)],
)  # fmt: skip
def test_extraction_strength_counts_the_prefix_that_must_be_given(labels, strength):
    outputs = nn.functional.one_hot(torch.ones(1, 5, dtype=torch.int64), 2).float()
    assert language.extraction_strength(outputs, torch.tensor([labels])).item() == strength


class Counting(nn.Module):
    """Says the next number, and ends after 7."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return SimpleNamespace(logits=nn.functional.one_hot((ids + 1) % 8, 8).float())


def test_greedy_answers_end_at_the_end_token_or_the_limit_and_keep_their_order():
    prompts = [[5], [1, 2, 3, 4], [7], [2, 3]]
    found = language.greedy_answers(Counting(), prompts, end=0, limit=3, batch=2)
    assert found == [[6, 7], [5, 6, 7], [], [4, 5, 6]]
    assert language.greedy_answers(Counting(), [], end=0) == []


def test_a_models_own_generate_says_what_a_pass_for_each_token_says_whatever_its_defaults():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    prompts = [torch.randint(1, 24, (length,)).tolist() for length in (3, 9, 4, 1, 6)]
    found = language.greedy_answers(model, prompts, end=0, limit=12, batch=3)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(input_ids=ids, use_cache=False)

    assert found == language.greedy_answers(Plain(), prompts, end=0, limit=12, batch=5)
    assert len({tuple(answer) for answer in found}) == 5
