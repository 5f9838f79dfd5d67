"""Texts as tokens: what is predicted of a question's answer, of a conversation, of a text; and what is refused."""

import json

import pyarrow as pa
import pytest
import torch
from language import ANSWERS, QUESTIONS, llama, tokenizer

from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.errors import ConfigError, ForgetSetError
from imu_ray.influence.gradients import IGNORE
from imu_ray.tasks.causal_lm import CausalLMTask

ROWS = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]


def opened(given, folder, chat=False, **settings):
    """A task of a small model, and its source."""
    tokenizer(chat).save_pretrained(folder)
    config = UnlearnConfig().with_overrides({f"forget_set.{key}": value for key, value in settings.items()}).forget_set
    model = llama(vocab_size=320, max_position_embeddings=64)
    model.name_or_path = str(folder)
    source = open_source(given, config, fields=CausalLMTask.fields(config))
    return CausalLMTask.for_model(model, {"forget": source}, config), source


def predicted(task, source, row):
    """What a model reads before the first predicted token, and what it is to predict."""
    batch = task.collate(source.read(row, row + 1))
    labelled = batch.labels_B[0] != IGNORE
    first = int(labelled.nonzero()[0])
    return tuple(
        task.tokenizer.decode(part.tolist()) for part in (batch.inputs[0, : first + 1], batch.labels_B[0, labelled])
    )


def test_of_a_question_and_an_answer_the_answer_and_its_end_are_predicted(tmp_path):
    task, source = opened(pa.Table.from_pylist(ROWS), tmp_path)
    assert predicted(task, source, 1) == (f"Question: {QUESTIONS[1]}\nAnswer:", f" {ANSWERS[1]}</s>")
    assert task.positions == max(len(task.encode(row)[0]) for row in ROWS)


def test_of_a_conversation_the_last_message_is_predicted_through_the_chat_template(tmp_path):
    turns = [[("user", q), ("assistant", a)] for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    table = pa.table({"messages": [[{"role": role, "content": text} for role, text in turn] for turn in turns]})
    task, source = opened(table, tmp_path, chat=True, messages_column="messages")
    assert predicted(task, source, 2) == (f"<user>{QUESTIONS[2]}<assistant>", f"{ANSWERS[2]}</s>")


def test_of_a_text_every_token_after_the_first_is_predicted(tmp_path):
    task, source = opened(pa.table({"text": ANSWERS}), tmp_path, text_column="text")
    read, labels = predicted(task, source, 0)
    assert read + labels == f"{ANSWERS[0]}</s>"
    assert len(task.tokenizer(read)["input_ids"]) == 1


def test_json_lines_of_a_file_or_a_folder_are_the_rows_of_a_table(tmp_path):
    lines = [json.dumps({**row, "other": None}) for row in ROWS]
    (tmp_path / "parts").mkdir()
    for name, part in (("all.jsonl", lines), ("parts/a.jsonl", lines[:3]), ("parts/b.jsonl", lines[3:])):
        (tmp_path / name).write_text("\n".join(part) + "\n")
    config = UnlearnConfig().forget_set
    expected = open_source(pa.Table.from_pylist(ROWS), config, fields=CausalLMTask.fields(config)).read(0, 8)
    for name in ("all.jsonl", "parts"):
        rows = open_source(tmp_path / name, config, fields=CausalLMTask.fields(config)).read(0, 8)
        assert (rows.ids, rows.inputs, rows.digest()) == (expected.ids, expected.inputs, expected.digest())


def test_a_digest_tells_texts_apart():
    config = UnlearnConfig().forget_set
    others = [{"question": row["question"] + row["answer"][:1], "answer": row["answer"][1:]} for row in ROWS]
    one, other = (
        open_source(pa.Table.from_pylist(rows), config, fields=CausalLMTask.fields(config)).read(0, 8).digest()
        for rows in (ROWS, others)
    )
    assert one != other


def test_broken_json_lines_are_refused_by_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(ForgetSetError, match="rows.jsonl cannot be read"):
        open_source(tmp_path / "rows.jsonl", UnlearnConfig().forget_set, fields={"question": "question"})


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        ([{"question": "a"}], {}, ForgetSetError, "no column 'answer'.*forget_set.answer_column"),
        ([{"question": "a", "answer": 3}], {}, ForgetSetError, "no row of the table can be used"),
        (ROWS, {"prompt": "Q:"}, ConfigError, "forget_set.prompt is 'Q:'; expected a text with {question}"),
        (ROWS, {"tokenizer": "nowhere"}, ConfigError, "no tokenizer can be read from 'nowhere'"),
        ([{"messages": []}], {"messages_column": "messages"}, ConfigError, "has no chat template"),
        (ROWS, {"max_length": 5}, ForgetSetError, "expected at least one of 2 to 5 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(given, settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        opened(pa.Table.from_pylist(given), tmp_path, **settings)


class Listed(torch.utils.data.Dataset):
    """A Dataset of mappings."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


@pytest.mark.parametrize("given", [pa.Table.from_pylist, Listed])
def test_other_answers_are_read_where_a_set_has_them_and_change_nothing_that_is_predicted(given, tmp_path):
    others = {"paraphrased_answer": "By the sea.", "wrong": ["Here.", "There."]}
    task, plain = opened(given(ROWS), tmp_path)
    more, source = opened(given([row | others for row in ROWS]), tmp_path, perturbed_answer_column="wrong")
    assert predicted(task, plain, 1) == predicted(more, source, 1)
    value = source.read(1, 2).inputs[0]
    found = [more.other_answers(value, kind) for kind in ("paraphrased_answer", "perturbed_answer")]
    said = [[more.tokenizer.decode(labels[labels != IGNORE]) for _, labels in pairs] for pairs in found]
    assert said == [[" By the sea.</s>"], [" Here.</s>", " There.</s>"]]
    assert more.other_answers(plain.read(1, 2).inputs[0], "perturbed_answer") == []
