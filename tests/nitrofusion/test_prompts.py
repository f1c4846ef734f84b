"""Prompt files of every kind, good and bad."""

import builtins
import json

import pytest

from nitrofusion.errors import InputError
from nitrofusion.prompts import read_prompts

PROMPTS = ["a red circle", "ein grüner Ring, groß", 'a "quoted" cross']


def test_text(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(PROMPTS).encode() + b"\n\n")
    assert read_prompts(path) == PROMPTS


def test_only_line_ends_end_a_prompt(tmp_path):
    odd = "one\u2028two\x85three"
    (tmp_path / "p.txt").write_bytes(f"{odd}\r\nb\n".encode())
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + '\n\n{"text": "b"}\n')
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == [odd, "b"]


def test_a_named_column_wins(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("\ufeffprompt,mine\na,x\nb,\nc\nd,y\n")
    assert read_prompts(path) == ["a", "b", "c", "d"]
    assert read_prompts(path, column="mine") == ["x", "y"]
    with pytest.raises(InputError, match="must have a column yours, got prompt, mine"):
        read_prompts(path, column="yours")


@pytest.mark.parametrize("column", ["prompt", "caption", "text", "TEXT"])
def test_csv_and_jsonl(tmp_path, column):
    csv = tmp_path / "p.csv"
    rows = [f'{i},"{p.replace(chr(34), chr(34) * 2)}"\n' for i, p in enumerate(PROMPTS)]
    csv.write_text(f"id,{column}\n" + "".join(rows))
    assert read_prompts(csv) == PROMPTS
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(json.dumps({"id": 1, column: p}) for p in PROMPTS))
    assert read_prompts(lines) == PROMPTS
    lines.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    assert read_prompts(lines) == PROMPTS


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow (the train extra)")
    import pyarrow.parquet as parquet

    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3], "caption": PROMPTS}), path)
    assert read_prompts(path) == PROMPTS
    with pytest.raises(InputError, match="must hold text, got int '1'"):
        read_prompts(path, column="id")
    with pytest.raises(InputError, match="must have a column words, got id, caption"):
        read_prompts(path, column="words")
    for harmed in (b"PAR1 not really", b"", path.read_bytes()[:-20], path.read_bytes()[:40] + path.read_bytes()[60:]):
        path.write_bytes(harmed)
        with pytest.raises(InputError) as caught:
            read_prompts(path)
        assert str(caught.value).startswith(f"prompts: {path} must") and "\n" not in str(caught.value)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "p.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pip install nitrofusion\[train\]"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("p.txt", b"", "at least one prompt, got none"),
        ("p.txt", b"\n \n", "at least one prompt, got none"),
        ("p.txt", b"\xff\xfe\x00", "must be UTF-8"),
        ("p.csv", b"id,words\n1,a\n", "must have a column prompt or caption or text or TEXT, got id, words"),
        ("p.csv", b"", "must have a column"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "got line 2"),
        ("p.jsonl", b"[1]\n", "got line 1: list"),
        ("p.jsonl", b'{"words": "a"}\n', "got words"),
        ("p.jsonl", b'{"prompt": {"a": 1}}\n', "must hold text, got dict"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "must hold valid Unicode"),
        ("p.jsonl", b"[" * 100_000, "got line 1"),
        ("p.csv", b'prompt\na\n"open\nb\n', "must be CSV, got unexpected end of data after line 2"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "must be CSV, got field larger"),
        ("p.docx", b"x", "must be a .txt, .csv, .jsonl or .parquet file, got .docx"),
        ("p", b"x", "got none"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"prompts: {path} must") and "\n" not in str(caught.value)


def test_missing_and_folder(tmp_path):
    with pytest.raises(InputError, match="got nothing"):
        read_prompts(tmp_path / "no.txt")
    with pytest.raises(InputError, match="got a folder"):
        read_prompts(tmp_path)
