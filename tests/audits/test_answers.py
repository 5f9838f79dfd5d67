"""What a model makes of answers beside loops that are written out, rouge-score and scipy; and what is not measured, with its reason."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from language import ANSWERS, QUESTIONS, llama, tokenizer
from scipy import stats

from imu_ray.audits.answers import PARAPHRASED, PERTURBED, ROUGE, Answering, Language, asks_for_answers, check_settings
from imu_ray.audits.base import Predictions, predict_shard
from imu_ray.config import UnlearnConfig
from imu_ray.data import Shard, open_source
from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.influence.gradients import IGNORE
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.layers import Layers
from imu_ray.tasks.causal_lm import CausalLMTask
from imu_ray.tasks.classification import ClassificationTask

ROWS = [
    {
        "question": question,
        "answer": answer,
        PARAPHRASED: f"By the water: {answer}",
        PERTURBED: [f"{wrong} Never." for wrong in (ANSWERS[row - 1], ANSWERS[row - 2])],
    }
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
]


def opened(folder, rows=ROWS, **settings):
    """A part with other parameters than its model's, the rows, and the model that this makes."""
    tokenizer().save_pretrained(folder)
    config = UnlearnConfig().with_overrides({f"forget_set.{key}": value for key, value in settings.items()})
    model = llama(vocab_size=320, max_position_embeddings=64)
    model.name_or_path = str(folder)
    source = open_source(pa.Table.from_pylist(rows), config.forget_set, fields=CausalLMTask.fields(config.forget_set))
    task = CausalLMTask.for_model(model, {"forget": source}, config.forget_set)
    names = [name for name, _ in model.named_modules() if name.endswith("o_proj")]
    part = Layers.of_names(model, task, names, task.collate(source.read(0, 2)).inputs, config)
    part = part.changed({name: 0.8 * matrix for name, matrix in part.parameters.items()})
    return part, source, part.apply(model)


@torch.no_grad()
def loss_written_out(model, split, question, answer):
    prompt = split(f"Question: {question}\nAnswer:")["input_ids"]
    tokens = [*split(f" {answer}")["input_ids"], split.eos_token_id]
    probabilities = model(torch.tensor([prompt + tokens])).logits[0].softmax(-1)
    logs = [probabilities[len(prompt) - 1 + place, token].log().item() for place, token in enumerate(tokens)]
    return -sum(logs) / len(logs)


@torch.no_grad()
def said_written_out(model, split, question, limit):
    ids = split(f"Question: {question}\nAnswer:")["input_ids"]
    said = []
    for _ in range(limit):
        token = model(torch.tensor([ids + said])).logits[0, -1].argmax().item()
        if token == split.eos_token_id:
            break
        said.append(token)
    return split.decode(said, skip_special_tokens=True)


def test_losses_and_recalls_are_those_of_one_answer_at_a_time_under_the_parts_parameters(tmp_path):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    part, source, model = opened(tmp_path)
    split, found = part.task.tokenizer, Answering(source, part, 9)(Shard(0, 2, 7, 5))
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for place, row in enumerate(ROWS[2:7]):
        losses = [
            loss_written_out(model, split, row["question"], answer) for answer in [row[PARAPHRASED], *row[PERTURBED]]
        ]
        assert [*found[PARAPHRASED][place], *found[PERTURBED][place]] == pytest.approx(losses, rel=1e-9)
        said = said_written_out(model, split, row["question"], 9)
        assert found[ROUGE][place] == [scorer.score(row["answer"], said)["rougeL"].recall]
    assert ROUGE not in Answering(source, part, 0)(Shard(0, 0, 2, 2))


def test_answers_end_where_the_model_has_no_more_positions(tmp_path):
    part, source, _ = opened(tmp_path)
    part.cut.model.config.max_position_embeddings = part.task.positions  # as GPT-2, which would raise an IndexError
    found = Answering(source, part, 10**6)(Shard(0, 0, 2, 2))
    assert np.shape(found[ROUGE]) == (2, 1)


def test_a_long_row_changes_no_other_and_what_the_model_has_no_room_for_is_left_out(tmp_path):
    part, source, _ = opened(tmp_path)
    alone = Answering(source, part, 10)(Shard(0, 0, 1, 1))
    long = {**ROWS[1], "question": QUESTIONS[1] * 8, PERTURBED: [ANSWERS[0] * 5, ANSWERS[0]]}
    part, source, _ = opened(tmp_path, [ROWS[0], long])
    prompt, _ = part.task.prompt_and_answer(source.read(1, 2).inputs[0])
    part.cut.model.config.max_position_embeddings = len(prompt)  # room for the question and no answer
    found = Answering(source, part, 10)(Shard(0, 0, 2, 2))
    assert [found[kind][0] for kind in (ROUGE, PERTURBED)] == [alone[kind][0] for kind in (ROUGE, PERTURBED)]
    assert (found[ROUGE][1], found[PERTURBED][1]) == ([0.0], [])


def test_rows_that_are_left_out_have_no_answers_and_unusable_answers_are_none(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "answer": ""}, {**ROWS[2], PERTURBED: ["right", ""], PARAPHRASED: None}]
    rows.append({**ROWS[3], PERTURBED: []})
    part, source, _ = opened(tmp_path, rows, on_bad_row="skip")
    found = Answering(source, part, 0)(Shard(0, 0, 4, 4))
    assert [len(row) for row in found[PERTURBED]] == [2, 0, 0]
    assert [len(row) for row in found[PARAPHRASED]] == [1, 0, 1]


def test_a_set_without_other_answers_is_read_again_only_to_be_answered(tmp_path):
    plain = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    settings = [UnlearnConfig().audit, UnlearnConfig().with_overrides({"audit.generate": True}).audit]
    assert [[asks_for_answers(opened(tmp_path, rows)[1], each) for each in settings] for rows in (plain, ROWS)] == [
        [False, True], [True, True],
    ]  # fmt: skip


RANDOM = np.random.default_rng(3)


def predictions(count, wrong=3, paraphrased=True, spoken=True):
    """Made-up figures of sequences of different lengths."""
    labels = np.zeros((count, 6), np.int64)
    for row in range(count):
        labels[row, : row % 5] = IGNORE
    answers = {PERTURBED: RANDOM.gamma(2.0, 0.8, (count, wrong)).tolist(), PARAPHRASED: [[]] * count}
    if paraphrased:
        answers[PARAPHRASED] = RANDOM.gamma(2.0, 0.7, (count, 1)).tolist()
    if spoken:
        answers[ROUGE] = RANDOM.uniform(0.2, 0.9, (count, 1)).tolist()
    losses = {"loss": RANDOM.gamma(2.0, 0.7, count), "extraction_strength": RANDOM.uniform(0, 1, count)}
    return Predictions(labels, losses, 9, answers=answers)


def test_figures_of_all_sets_are_those_of_tofu_written_out(tmp_path):
    log = tmp_path / "TOFU_EVAL.json"
    reference = RANDOM.gamma(2.0, 0.5, 17)
    values = {str(row): {"score": score} for row, score in enumerate(reference)}
    log.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": values}}))
    sets = {"forget": predictions(12), "test": predictions(5), "retain": predictions(11)}
    sets |= {name: predictions(9, paraphrased=False) for name in ("real_authors", "world_facts")}
    config = UnlearnConfig().with_overrides({"audit.generate": True, "audit.retain_log": str(log)}).audit
    found = Language().run(sets, config, 0)["language"]
    parts, ratios = [], {}
    for name, part in sets.items():
        losses, answers, shown = part.metrics["loss"], part.answers, found["sets"][name]
        tokens = [sum(label != IGNORE for label in row) for row in part.labels.tolist()]
        total = sum(loss * count for loss, count in zip(losses.tolist(), tokens, strict=True))
        assert shown["perplexity"] == pytest.approx(np.exp(total / sum(tokens)))
        assert shown["tokens"] == sum(tokens)
        wrong = np.array(answers[PERTURBED])
        right = losses if name in ("real_authors", "world_facts") else np.array(answers[PARAPHRASED])[:, 0]
        ratios[name] = np.exp(-wrong.mean(1)) / (np.exp(-right) + 1e-10)
        kept = np.minimum(ratios[name], 1 / ratios[name]) if name == "forget" else np.maximum(0, 1 - ratios[name])
        assert shown["truth_ratio"] == pytest.approx(kept.mean())
        own = np.exp(-losses)
        if name in ("real_authors", "world_facts"):
            own = own / (own + np.exp(-wrong).sum(1))
            assert shown["choice_probability"] == pytest.approx(own.mean())
        if name not in ("forget", "test"):
            parts += [own.mean(), np.mean(answers[ROUGE]), kept.mean()]
    assert found["model_utility"] == pytest.approx(stats.hmean(parts))
    assert found["forget_quality"] == pytest.approx(stats.ks_2samp(ratios["forget"], reference).pvalue)
    assert found["skipped"] == {}
    json.dumps(found, allow_nan=False)


def test_what_cannot_be_measured_has_a_reason_and_no_number():
    part = predictions(3, spoken=False)
    part.answers[PERTURBED][1] = []
    part.metrics["loss"][:] = 1e4
    found = Language().run({"forget": part, "world_facts": predictions(3, wrong=0)}, UnlearnConfig().audit, 0)[
        "language"
    ]
    ragged = "the rows have from 0 to 3 answers in forget_set.perturbed_answer_column that can be used"
    overflow, silent = "beyond the range of numbers", "audit.generate is false"
    assert found["sets"]["forget"].pop("skipped") == {"perplexity": overflow, ROUGE: silent, "truth_ratio": ragged}
    assert not {"perplexity", ROUGE, "truth_ratio"} & found["sets"]["forget"].keys()
    none = "the rows have no answers in forget_set.perturbed_answer_column that can be used"
    skipped = found["sets"]["world_facts"]["skipped"]
    assert skipped == {"truth_ratio": none, "choice_probability": none}
    assert "lacks retain.probability" in found["skipped"]["model_utility"]
    assert "world_facts.probability" in found["skipped"]["model_utility"]
    assert found["skipped"]["forget_quality"] == "audit.retain_log names no log of a retrained model"
    assert "model_utility" not in found
    assert (
        Language().run(
            {"forget": Predictions(np.zeros(3, np.int64), {"loss": np.ones(3)}, 2)}, UnlearnConfig().audit, 0
        )
        == {}
    )


def test_extraction_strength_of_sequences_counts_the_last_token_and_of_answers_leaves_out_their_end(tmp_path):
    part, source, model = opened(tmp_path)
    shard, _ = extract_features(source, Shard(0, 0, 8, 8), part, part.cut.model, torch.device("cpu"))
    found = predict_shard(shard, part).metrics["extraction_strength"]
    batch = part.task.collate(source.read(0, 8))
    with torch.no_grad():
        right = model(batch.inputs).logits.argmax(-1) == batch.labels_B
    for row in range(8):
        hits = right[row][batch.labels_B[row] != IGNORE][:-1].tolist()
        given = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
        assert found[row] == pytest.approx(1 - given / len(hits))


CLASSIFIER = ClassificationTask(UnlearnConfig().forget_set, "fc", 3)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"audit.checks": True}, None, "ascent.keep is 'last'.*expected ascent.keep=all"),
        ({"audit.generate": True}, "classifier", "audit.generate asks for answers.*expected task causal_lm"),
        ({"audit.retain_log": "log.json"}, "classifier", "audit.retain_log asks for answers"),
        ({"audit.generate": True, "forget_set.text_column": "text"}, None, "audit.generate asks for answers"),
        ({"audit.generate": True}, "endless", "no end token"),
        ({"audit.retain_log": "log.json"}, None, "log.json is no log with truth ratios"),
    ],
)
def test_settings_that_ask_for_what_cannot_be_measured_are_refused_before_anything_is(settings, task, message):
    config, split = UnlearnConfig().with_overrides(settings), tokenizer()
    if task == "endless":
        split.eos_token = None
    given = CLASSIFIER if task == "classifier" else CausalLMTask(config.forget_set, 9, 320, split)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        check_settings(config, given)
