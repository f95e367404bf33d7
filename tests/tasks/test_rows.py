"""Rows of JSON lines and of CSV read alike, and what is wrong is named with file, line and field."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import InputError
from zotune.tasks.rows import other_files, read_file, split_file
from zotune.tasks.task import Task

KINDS = ("jsonl", "json", "csv", "tsv", "parquet")

TASK = Task(name="t", prompt="{text} It was", words={"0": "bad", "1": "good"})


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_jsonl_and_a_csv_of_the_same_rows_give_the_same_examples(tmp_path):
    a = write(tmp_path / "a.jsonl", '{"text": "so, so", "label": 1}\n{"text": "two\\nlines", "label": 0}\n')
    b = write(tmp_path / "b.csv", 'text,label\n"so, so",1\n"two\nlines",0\n')
    one, two = ([TASK.example(row) for row in read_file(path)] for path in (a, b))
    assert [(e.prompt, e.candidates, e.label) for e in one] == [(e.prompt, e.candidates, e.label) for e in two]
    assert [e.label for e in one] == [1, 0]


def test_booleans_are_the_same_label_in_both(tmp_path):
    task = Task(name="t", prompt="{text}", words={"false": "no", "true": "yes"})
    a = read_file(write(tmp_path / "a.jsonl", '{"text": "x", "label": true}\n'))
    b = read_file(write(tmp_path / "b.csv", "text,label\nx,true\n"))
    assert [task.example(row).label for row in a + b] == [1, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_blank_lines_and_windows_line_ends_change_nothing(tmp_path, name, end):
    text = {"a.jsonl": '{"text": "x"}\n\n{"text": "y"}\n\n', "a.csv": "text\nx\n\ny\n\n"}[name]
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.replace("\n", end).encode())
    assert [row["text"] for row in read_file(path)] == ["x", "y"]
    assert read_file(path)[1].where == f"{path}:{3 if name == 'a.jsonl' else 4}"


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1)


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_any_text_comes_back_from_both_as_it_was_but_for_line_ends(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerows([("text", "label"), *rows])
    a = write(
        folder / "a.jsonl", "".join(json.dumps({"text": t, "label": w}, ensure_ascii=False) + "\n" for t, w in rows)
    )
    b = write(folder / "a.csv", table.getvalue())
    assert [(r["text"], r["label"]) for r in read_file(a)] == rows
    unix = [tuple(s.replace("\r\n", "\n").replace("\r", "\n") for s in row) for row in rows]
    assert [(r["text"], r["label"]) for r in read_file(b)] == unix


def test_a_missing_field_is_named_with_the_line_and_what_the_row_has(tmp_path):
    row = read_file(write(tmp_path / "a.jsonl", '{"sentence": "x", "target": 1}\n'))[0]
    with pytest.raises(InputError) as caught:
        TASK.example(row)
    assert str(caught.value) == f"{tmp_path / 'a.jsonl'}:1: no field 'text' (has 'sentence', 'target')"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_field_without_a_value_is_said_to_be_empty(tmp_path, name):
    text = {"a.jsonl": '{"text": "x", "label": null}\n', "a.csv": "text,label\nx\n"}[name]
    with pytest.raises(InputError, match="field 'label' has no value"):
        TASK.example(read_file(write(tmp_path / name, text))[0])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{oops\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', "a.jsonl:3: a list where a JSON object was expected"),
        ("a.jsonl", '"a"\n', "a.jsonl:1: a str where"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl:1: not UTF-8 at byte 7"),
        ("a.csv", b"\xef\xbb\xbfa\nb\nse\xf1or\n", "a.csv:3: not UTF-8 at byte 2"),
        ("a.csv", "a;b\n1;2;3\n", "a.csv:2: more values than the header has names; quote fields that hold a semicolon"),
        ("a.jsonl", '{"a": "\\ud800"}\n', "a.jsonl:1: half a surrogate pair"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: more values than the header has names"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2: not CSV"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the header names 'a' twice"),
        ("a.txt", "x", "a.txt: not a .jsonl, .csv, .tsv or .parquet file"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_says_where(tmp_path, name, text, said):
    assert said in refusal(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text;label\nso, so;1\n"),
        ("A.CSV", 'text,label\n"so, so",1\n'),
        ("a.csv", "text\tlabel\nso, so\t1\n"),
        ("a.tsv", "text\tlabel\nso, so\t1\n"),
        ("a.csv", '"a, b";text;label\nx;so, so;1\n'),
        ("a.JSONL", '{"text": "so, so", "label": "1"}\n'),
    ],
)
def test_a_table_s_delimiter_is_its_header_s_and_a_suffix_may_be_in_capitals(tmp_path, name, text):
    (row,) = read_file(write(tmp_path / name, text))
    assert (row["text"], row["label"]) == ("so, so", "1")


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such file"
    (tmp_path / "folder.jsonl").mkdir()
    assert "no such file" in refusal(tmp_path / "folder.jsonl")


def test_two_files_of_one_split_are_refused(tmp_path):
    assert split_file(tmp_path, "train") is None
    write(tmp_path / "train.csv", "a\n")
    assert split_file(tmp_path, "train") == tmp_path / "train.csv"
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(InputError, match=r"both train\.jsonl and train\.csv; keep one"):
        split_file(tmp_path, "train")


@pytest.mark.parametrize("name", ["validation.jsonl", "valid.jsonl", "dev.csv", "val.tsv", "Dev.CSV"])
def test_a_validation_split_may_be_called_as_others_call_it(tmp_path, name):
    write(tmp_path / name, "a\n")
    assert split_file(tmp_path, "validation") == tmp_path / name
    assert other_files(tmp_path) == []
    write(tmp_path / "extra.jsonl", "{}\n")
    write(tmp_path / "README.md", "")
    assert other_files(tmp_path) == ["extra.jsonl"]


FILM = [{"text": '"Fine" it is', "label": "1"}, {"text": "so", "label": "0"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(FILM)),
        ("a.json", json.dumps(FILM, indent=1)),
        ("a.json", "\n".join(map(json.dumps, FILM))),
        ("a.jsonl", json.dumps(FILM, indent=1)),
        ("a.tsv", 'text\tlabel\n"Fine" it is\t1\nso\t0\n'),
        ("a.tsv", 'text\tlabel\n"""Fine"" it is"\t1\nso\t0\n'),
        ("a.tsv", '"text"\t"label"\n"""Fine"" it is"\t"1"\n"so"\t"0"\n'),
        ("a.csv", 'text,label,,\n"""Fine"" it is",1,,\nso,0,,\n'),
        ("a.csv", ',text,label\n0,"""Fine"" it is",1\n1,so,0\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_rows_as_each_format_s_users_write_them(tmp_path, name, text, packed):
    path = write(tmp_path / (name + ".gz" * packed), gzip.compress(text.encode()) if packed else text)
    assert [row.fields for row in read_file(path)] == FILM


def test_in_tables_with_tabs_a_quote_that_begins_a_line_is_text_and_takes_no_further_row(tmp_path):
    texts = ['"Great" film', '"unclosed', "plain", '"and', 'closed here"', '"whole"']
    lines = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    for name in ("a.tsv", "a.csv"):
        rows = read_file(write(tmp_path / name, "text\tlabel\n" + lines))
        assert [row["text"] for row in rows] == texts
        assert [row["label"] for row in rows] == list("010101")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\n,1\nx,1\n"),
        ("a.tsv", "text\tlabel\n\t1\nx\t1\n"),
        ("a.jsonl", '{"text": null, "label": 1}\n{"text": "x", "label": 1}\n'),
        ("a.json", '[{"text": null, "label": 1}, {"text": "x", "label": 1}]'),
    ],
)
def test_no_value_means_the_same_in_all_formats(tmp_path, name, text):
    first, second = read_file(write(tmp_path / name, text))
    assert TASK.example(second).label == 1
    with pytest.raises(InputError, match="field 'text' has no value"):
        TASK.example(first)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "a.jsonl:2: the object names 'a' twice"),
        ("a.json", '[{"a": 1},\n oops]', "a.json:2: not a list in JSON"),
        (
            "a.json",
            '{\n"data": [{"a": 1}]\n}',
            "a.json: one JSON object (with 'data') where a list of them was expected",
        ),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not a whole gzip file"),
        ("a.csv.gz", gzip.compress(b"a\n1\n", mtime=0)[:-9], "a.csv.gz: not a whole gzip file"),
        ("a.parquet.gz", b"", "a.parquet.gz: not a .jsonl"),
        *[
            (f"a.{kind}", b"version https://git-lfs.github.com/spec/v1\noid", f"a.{kind}: is a git-lfs pointer")
            for kind in KINDS
        ],
        *[(f"a.{kind}", b"<!DOCTYPE html>\n<html>", f"a.{kind}: is a web page") for kind in KINDS],
        ("a.tsv", "a\tb\n1\t2\t3\n", "a.tsv:2: more values than the header has names; a field cannot hold a tab here"),
    ],
)
def test_what_no_format_means_is_refused_in_one_line(tmp_path, name, text, said):
    assert said in refusal(write(tmp_path / name, text))


def test_what_is_packed_is_read_whatever_its_name(tmp_path):
    for name in ("a.csv", "a.csv.gz"):
        (row,) = read_file(write(tmp_path / name, gzip.compress(b"a\n1\n")))
        assert row.fields == {"a": "1"}


def test_a_column_that_parquet_has_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["x"]), pyarrow.array([1]), pyarrow.array([0])], ["t", "label", "label"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: two columns are named 'label'" in refusal(tmp_path / "a.parquet")


def test_a_split_s_file_may_be_packed(tmp_path):
    path = write(tmp_path / "Train.jsonl.gz", gzip.compress(b"{}"))
    write(tmp_path / "more.json", "[]")
    write(tmp_path / "dataset_info.json", "{}")
    assert split_file(tmp_path, "train") == path
    assert other_files(tmp_path) == ["more.json"]


def test_a_field_may_be_longer_than_csv_s_own_limit(tmp_path):
    (row,) = read_file(write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n"))
    assert len(row["text"]) == 200_000
    assert csv.field_size_limit() == 131072
