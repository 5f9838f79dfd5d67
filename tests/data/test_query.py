"""Conditions on columns: what is written means what Python would make of each row, and nothing else is let in."""

import datetime
import re

import pyarrow as pa
import pytest

from imu_ray.data.query import Query
from imu_ray.errors import ForgetSetError

ROWS = [
    {"label": label, "site": site, "share": share, "kept": kept, "tag": "ä"}
    for label in (0, 3, 7)
    for site in ("x", "y'z", "")
    for share in (-1.5, 0.0, 2.0)
    for kept in (True, False)
]
TABLE = pa.Table.from_pylist(ROWS)

CONDITIONS = [
    "label == 3",
    "label == 3 and site == 'x'",
    "3 == label or label > 5 and not site == 'x'",
    "not (label == 3 or share < 0)",
    "0 <= share < 2 and label != 3",
    "label in (3, 7, 9)",
    "site not in ['x', \"y'z\"]",
    "site in {''}",
    "share == -1.5",
    "share > label",
    "kept and not label == 0",
    "kept == False",
    "tag == 'ä' and label == 7",
    "share >= -1 and label < 3.5",
    "label >= 0\n  and site == 'x'",
]


@pytest.mark.parametrize("text", CONDITIONS)
@pytest.mark.parametrize("coded", [False, True])
def test_a_condition_means_what_python_makes_of_it_row_by_row(text, coded):
    table = TABLE.set_column(1, "site", TABLE["site"].dictionary_encode()) if coded else TABLE
    wanted = [place for place, row in enumerate(ROWS) if eval(text.replace("\n", " "), {}, row)]
    assert Query(text, table.schema).rows(table).to_pylist() == wanted
    assert 0 < len(wanted) < len(ROWS)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a == 1", [0]), ("a != 1", [1]), ("not a == 1", [1]), ("a in (1,)", [0]), ("a not in (1,)", [1]),
        ("a is None", [2]), ("a is not None", [0, 1]), ("b", [0]), ("not b", [1]), ("a is None or a == 1", [0, 2]),
    ],
)  # fmt: skip
def test_a_row_without_a_value_meets_no_comparison(text, rows):
    table = pa.table({"a": [1, 2, None], "b": [True, False, None]})
    assert Query(text, table.schema).rows(table).to_pylist() == rows


def test_times_are_written_as_texts():
    days = [datetime.date(2024, 1, day) for day in (1, 2, 3)]
    for kind in (pa.date32(), pa.timestamp("us")):
        table = pa.table({"day": pa.array(days).cast(kind)})
        assert Query("day > '2024-01-01' and '2024-01-03' > day", table.schema).rows(table).to_pylist() == [1]
        assert Query("day in ('2024-01-03',)", table.schema).rows(table).to_pylist() == [2]
        with pytest.raises(ForgetSetError, match="at character 7: a value that is not understood"):
            Query("day < 'Monday'", table.schema)


REFUSED = {
    "label == ": (r"\d+", "the text breaks off or is not understood"),
    "label = 3": (r"\d+", "the text breaks off"),
    "__import__('os').system('x') == 1": (1, "is nothing that may stand here; expected column names, texts"),
    "label == len(site)": (10, "'len\\(site\\)' is nothing that may stand here"),
    "label.real == 3": (1, "'label.real' is nothing that may stand here"),
    "label + 1 == 3": (1, "'label \\+ 1' is nothing"),
    "label == 3 and lable == 4": (16, "has no column 'lable'; did you mean label"),
    "tag == 'ä' and site is 'x'": (24, "after `is` stands something else than None"),
    "site == None": (9, "None .a missing value is told by `is None`."),
    "label in 3": (10, "after `in` stands something else than values"),
    "label in ()": (10, "after `in` stands something else than values"),
    "label in (1, 'x')": (11, "the values in brackets are of several types"),
    "'x' in (1, 2)": (1, "''x'' is nothing that may stand here|\"'x'\" is nothing"),
    "1 == 1": (1, "a comparison without a column"),
    "label == b'x'": (10, "b'x' .a missing value"),
    "True": (1, "'True' is nothing that may stand here"),
    "label == 3 if kept else kept": (1, "is nothing that may stand here"),
    "label == " + "9" * 30: (10, "a value that is not understood"),
    "(" * 5000 + "kept" + ")" * 5000: (r"\d+", "too deep|breaks off"),
    "not " * 4000 + "kept": (r"\d+", "too deep|breaks off"),
    "label == '\0'": (r"\d+", "too deep, or holds what no text holds|breaks off"),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_condition_is_refused_at_its_place(text):
    place, message = REFUSED[text]
    with pytest.raises(ForgetSetError, match=message) as caught:
        Query(text, TABLE.schema)
    assert re.search(f", at character {place}: ", str(caught.value))


@pytest.mark.parametrize("text", ["label == 'x'", "site > 3", "label", "kept and site", "site in (1, 2)"])
def test_a_condition_that_does_not_fit_the_columns_is_refused_with_their_types(text):
    with pytest.raises(
        ForgetSetError, match="does not fit the columns .*(label: int64|site: string).*put texts in quotes"
    ):
        Query(text, TABLE.schema)
