"""Documents: what is read from every kind of file, and how a wrong one is reported."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
import random
import re
import socket
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mtp_ext.cli.main import main
from mtp_ext.train.config_file import write_config
from mtp_ext.train.data.config import TEXT_SUFFIXES, DataConfig
from mtp_ext.train.data.corpus import Corpus
from mtp_ext.train.data.documents import MODULES, Document, read_documents
from mtp_ext.train.data.sources import find_files
from tests.train.test_data_sources import names, write
from tests.train.tiny import tiny_config

ZSTD = importlib.import_module(MODULES[".zst"])
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: ZSTD.compress(
        data, options={ZSTD.CompressionParameter.checksum_flag: 1}
    ),  # as the program does
}
LINES = b'{"text": "one\\ntwo"}\n\n{"text": "\xc3\xa9"}\n'
BOM = b"\xef\xbb\xbf"


def read(path: Path, **options: Any) -> tuple[list[Document], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    files = find_files([str(path)], TEXT_SUFFIXES)
    config = DataConfig(source=(str(path),), **options)
    return list(read_documents(files, config, lambda *reason: skipped.append(reason))), skipped


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read(path, **options)[0]]


def write_parquet(path: Path, column: Any, name: str = "text", **options: Any) -> Path:
    parquet.write_table(pyarrow.table({"id": range(len(column)), name: column}), path, **options)
    return path


def test_binary_undecodable_and_empty_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utf16 = {"d.txt": "text".encode("utf-16"), "e.txt": b"\xfe\xff\0t"}
    bad = {"a.txt": b"a\0b", "b.txt": b"\xff", "c.txt": "", "c.jsonl": "\n \n", **utf16, "f.txt": BOM}
    write(tmp_path / "d", {**bad, "good1.txt": "x", "good2.txt": "y"})
    corpus = Corpus(DataConfig(source=(str(tmp_path / "d"),)))
    assert corpus.skipped == {"binary": 1, "empty": 3, "not UTF-8": 1, "UTF-16": 2}
    assert corpus.sizes.tolist() == [1, 1]
    assert "1 binary (first: d/a.txt); 3 empty (first: d/c.jsonl); 1 not UTF-8 (first: d/b.txt)" in caplog.text
    assert "2 UTF-16 (first: d/d.txt)" in caplog.text


def test_a_corpus_of_skipped_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"a\0b", "b.txt": "", "c.ndjson": ""})
    with pytest.raises(ValueError, match=r"holds no text: 1 binary .*2 empty"):
        Corpus(DataConfig(source=(str(tmp_path),)))


def test_texts_are_kept_to_the_byte(tmp_path: Path) -> None:
    text = "a\ufeff\r\nb\rc\n\n\t\u00a0\u2028é😀 \x0c"
    write(tmp_path, {"a.txt": text})
    (document,), skipped = read(tmp_path)
    assert (document.text, document.data, skipped) == (text, text.encode(), [])


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("suffix", [".txt", ".py", ".jsonl", ".ndjson", ".json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str, compression: str) -> None:
    is_text = suffix in (".txt", ".py")
    content = BOM + (b"text\n" if is_text else LINES + BOM + LINES)  # two files, one after the other
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESS.get(compression, bytes)(content))
    assert texts(path) == (["text\n"] if is_text else ["one\ntwo", "é"] * 2)


def test_records_are_documents_named_by_file_and_line(tmp_path: Path) -> None:
    lines = [{"body": "one\ntwo"}, {"body": ""}, {"body": "é", "other": 1}, {"body": "é"}]
    write(tmp_path, {"r.jsonl": "\n\n".join(json.dumps(line) for line in lines) + "\n"})
    documents, skipped = read(tmp_path / "r.jsonl", text_field="body")
    path = (tmp_path / "r.jsonl").as_posix()
    assert [(d.name, d.text) for d in documents] == [(f"{path}:1", "one\ntwo"), (f"{path}:5", "é"), (f"{path}:7", "é")]
    assert skipped == [("empty", f"{path}:3")]
    assert documents[1].group == documents[2].group != documents[0].group  # duplicates stay together


BAD_LINES = [
    (b'{"text": "cut', "expected a JSON object in UTF-8", "not JSON"),
    (b"\0\x01binary", "expected a JSON object in UTF-8", "not JSON"),
    (b'{"text": "\xff"}', "expected a JSON object in UTF-8", "not UTF-8"),
    (b'["text"]', "expected a JSON object, got", "not an object"),
    (b'"text"', "expected a JSON object, got", "not an object"),
    (b'{"body": "x", "id": 1}', "text_field 'text' is missing; the fields are 'body', 'id'", "no text_field"),
    (b"{}", "text_field 'text' is missing; the fields are none", "no text_field"),
    (b'{"text": 3}', "text_field 'text' must hold a string, got int", "not a string"),
    (b'{"text": null}', "text_field 'text' must hold a string, got null", "not a string"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair", "not UTF-8"),
    (b"[" * 100_000, "expected a JSON object in UTF-8", "not JSON"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_LINES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.jsonl.gz", "r.json.zst"])
def test_a_bad_line_is_an_error_with_file_and_line_or_is_skipped(
    tmp_path: Path, name: str, line: bytes, message: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(LINES + b"\n" + line + b"\r\n" + LINES))
    with pytest.raises(ValueError) as error:
        read(path)
    assert f"{path}, line 5: " in str(error.value)
    assert message in str(error.value)
    documents, skipped = read(path, on_bad_line="skip")
    assert [document.text for document in documents] == ["one\ntwo", "é"] * 2
    assert skipped == [(f"bad line, {reason}", f"{path.as_posix()}:5")]


def test_skipped_lines_are_printed_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "d", {"a.jsonl": b"oops\n" + LINES + b"3\noops\n", "b.jsonl": LINES})
    write_parquet(root / "c.parquet", ["x", None, "y"])
    config = DataConfig(source=(str(root),), on_bad_line="skip")
    expected = {"bad line, not JSON": 2, "bad line, not an object": 1, "bad row, not a string": 1}
    assert Corpus(config).inputs["skipped"] == expected
    assert "left out of the corpus: 2 bad line, not JSON (first: d/a.jsonl:1); 1 bad line, not an obj" in caplog.text
    with pytest.raises(ValueError, match="on_bad_line must be one of error, skip, got 'warn'"):
        DataConfig(on_bad_line="warn")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_shows_and_records_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"def f{i}(): return {i}"}) for i in range(40)]
    path = write(tmp_path, {"r.jsonl": "\n".join([*lines, "oops", "{}", "", "3"])}) / "r.jsonl"
    config = tiny_config(tmp_path, max_steps=1)
    write_config(dataclasses.replace(config, data=dataclasses.replace(config.data, source=(str(path),))), tmp_path)
    command = ["train", "--config", str(tmp_path / "config.toml")]
    assert main(command) == 2
    assert f"{path}, line 41: expected a JSON object" in capsys.readouterr().err
    assert main([*command, "--data.on-bad-line", "skip"]) == 0
    expected = {"bad line, no text_field": 1, "bad line, not JSON": 1, "bad line, not an object": 1}
    output = capsys.readouterr().out
    assert "left out   1 bad line, no text_field; 1 bad line, not JSON; 1 bad line, not an object" in output
    (recorded,) = tmp_path.glob("run/checkpoints/*/dataset.json")
    (manifest,) = tmp_path.glob("cache/*/manifest.json")
    assert [json.loads(p.read_text())["inputs"]["skipped"] for p in (recorded, manifest)] == [expected] * 2
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "2"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--data.on-bad-line", "error", "--max-steps", "3"]) == 2
    path.write_text("\n".join(lines))  # mended, it is the same corpus
    assert main(["train", "--resume", str(tmp_path / "run"), "--data.on-bad-line", "error", "--max-steps", "3"]) == 0
    assert "left out" not in capsys.readouterr().out.rpartition("changed on resuming")[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', r"holds an array, expected .* per line; `jq -c '\.\[\]'` converts it"),
        (b'\n[\n{"text": "a"},\n{"text": "b"}\n]\n', "holds an array"),
        (BOM + b"[]", "holds an array"),
        (b'{\n  "text": "a"\n}\n', r"holds an object over several lines, .* `jq -c '\.'` converts it"),
        (b' { \r\n  "text": "a"\r\n}\r\n', "holds an object over several lines"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16, expected UTF-8; `iconv"),
    ],
)
@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.zst"])
@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_a_file_that_is_not_json_lines_is_never_taken_for_bad_lines(
    tmp_path: Path, name: str, content: bytes, message: str, on_bad_line: str
) -> None:
    """Skipping lines, the last one of an array would be its only document."""
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    with pytest.raises(ValueError, match=f"source: {re.escape(str(path))} {message}"):
        read(path, on_bad_line=on_bad_line)


def test_json_in_a_directory_is_data_only_where_it_is_compressed(tmp_path: Path) -> None:
    """A project's own .json files are no text; shards of a corpus are."""
    files: dict[str, str | bytes] = {f"c4.0.json{s}": compress(LINES) for s, compress in COMPRESS.items()}
    root = write(tmp_path / "d", {**files, "package.json": "{}", "x.jsonl/part.jsonl": LINES})
    write_parquet(root / "part-0.parquet", ["a"])
    assert names(root) == ["d/c4.0.json.gz", "d/c4.0.json.zst", "d/part-0.parquet", "d/x.jsonl/part.jsonl"]
    assert names(root / "x.jsonl") == ["x.jsonl/part.jsonl"]
    assert len(texts(root)) == 7


def test_compressed_files_are_found_by_the_suffix_below(tmp_path: Path) -> None:
    root = write(tmp_path / "d", {"a.TXT.GZ": COMPRESS[".gz"](b"a"), "b.py.zst": COMPRESS[".zst"](b"b")})
    write(root, {"c.gz": "x", "d.png.gz": "x", ".e.txt.gz": "x"})
    assert names(root) == ["d/a.TXT.GZ", "d/b.py.zst"]
    assert texts(root) == ["a", "b"]
    write(root, {"notes.gz": COMPRESS[".gz"](b"named")})
    assert texts(root / "notes.gz") == ["named"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_of_a_compressed_file_are_read_in_turn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES) * 3)
    assert texts(path) == ["one\ntwo", "é"] * 3


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "header only": lambda data: data[:4],
    "cut": lambda data: data[: len(data) // 2],
    "without its last bytes": lambda data: data[:-3],
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "not compressed": lambda data: LINES,
    "garbage after it": lambda data: data + b"garbage",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["r.txt.gz", "r.txt.zst", "r.jsonl.gz", "r.jsonl.zst", "r.parquet"])
@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str, damage: str, on_bad_line: str) -> None:
    source, path = random.Random(0), tmp_path / name
    column = [source.randbytes(50).hex() for _ in range(200)]
    if name == "r.parquet":
        write_parquet(path, column, compression="gzip", write_page_checksum=True)
        content = path.read_bytes()
    else:
        content = COMPRESS[path.suffix]("".join(json.dumps({"text": text}) + "\n" for text in column).encode())
    path.write_bytes(DAMAGE[damage](content))
    is_shown_by_a_line = (name, damage, on_bad_line) == (
        "r.jsonl.gz",
        "flipped",
        "error",
    )  # before the checksum is read
    sentence = ", line" if is_shown_by_a_line else " is truncated, damaged or not"
    with pytest.raises(ValueError, match=re.escape(f"{path}{sentence}")):
        read(path, on_bad_line=on_bad_line)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_rows_of_parquet_are_documents(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = [f"{i} é\n" for i in range(600)] + ["", "twice", "twice"]
    path = write_parquet(tmp_path / "r.parquet", pyarrow.array(values, kind), "body", row_group_size=100)
    documents, skipped = read(path, text_field="body")
    assert [document.text for document in documents] == [value for value in values if value]
    assert documents[-1].group == documents[-2].group != documents[0].group
    assert (documents[0].name, skipped) == (f"{path.as_posix()}:1", [("empty", f"{path.as_posix()}:601")])
    assert read(write_parquet(tmp_path / "empty.parquet", pyarrow.array([], kind)))[1][0][0] == "empty"


def test_rows_without_a_text_are_named_or_skipped(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff", b"too"], pyarrow.binary())
    as_text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())  # unchecked, as other writers do
    for column, reason, message in (
        (["fine", None, "too"], "not a string", "must hold a string, got null"),
        (as_text, "not UTF-8", "text_field 'text' is not UTF-8"),
    ):
        path = write_parquet(tmp_path / "r.parquet", column)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}, row 2: .*{message}"):
            read(path)
        documents, skipped = read(path, on_bad_line="skip")
        assert [document.text for document in documents] == ["fine", "too"]
        assert skipped == [(f"bad row, {reason}", f"{path.as_posix()}:2")]
    with pytest.raises(ValueError, match=r"row 1: .*must hold a string, got bytes"):
        read(write_parquet(path, raw))
    with pytest.raises(ValueError, match=r"row 1: .*must hold a string, got list"):
        read(write_parquet(path, [["a"]]))


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_a_missing_column_is_an_error_that_lists_the_others(tmp_path: Path, on_bad_line: str) -> None:
    path = write_parquet(tmp_path / "r.parquet", ["x"], "body")
    with pytest.raises(ValueError, match=r"r\.parquet: text_field must be .* got 'text'; the columns are 'id', 'body'"):
        read(path, on_bad_line=on_bad_line)
    write(tmp_path, {"r.parquet.gz": COMPRESS[".gz"](path.read_bytes())})
    with pytest.raises(ValueError, match=r"r\.parquet\.gz is compressed twice; expected a \.parquet file"):
        read(tmp_path / "r.parquet.gz")


@pytest.mark.parametrize(
    ("suffix", "module", "package"),
    [(".txt.zst", MODULES[".zst"], MODULES[".zst"]), (".parquet", "pyarrow.parquet", "pyarrow")],
)
def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, package: str
) -> None:
    write(tmp_path, {"a.jsonl": "not JSON, and never read", f"b{suffix}": "x"})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"reading .*b{suffix} takes the module {module}, .*`pip install {package}`"):
        read(tmp_path)


@pytest.mark.slow
def test_reading_records_takes_the_memory_of_a_few(tmp_path: Path) -> None:
    line = b'{"text": "%s"}\n' % (b"x" * 1000)
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"r.jsonl{suffix}"
        path.write_bytes(compress(line * 10_000))
        files, config = find_files([str(path)], ()), DataConfig()
        tracemalloc.start()
        assert sum(len(document.data) for document in read_documents(files, config, print)) == 10_000_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
        tracemalloc.stop()
    path = write_parquet(tmp_path / "r.parquet", [os.urandom(5000).hex() for _ in range(4000)], use_dictionary=False)
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_documents(find_files([str(path)], ()), DataConfig(), print):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 20_000_000  # of 40 MB in one row group


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("how", ["named", "glob", "directory", "**"])
def test_what_is_no_file_is_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    write(Path("d"), {"a.txt": "a"})
    path = Path("d/b.txt")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    source = {"named": path, "glob": "d/*.txt", "directory": "d", "**": "**/*.txt"}[how]
    with pytest.raises(
        ValueError, match=rf"source: d/b\.txt is a {kind}, expected a file, .*leave it out with"
    ) as error:
        names(source)
    pattern = re.findall(r"data\.exclude '(.*)'", str(error.value))
    if how != "named":
        assert names(source, exclude=tuple(pattern)) == ["d/a.txt"]


def test_a_process_substitution_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match=f"source: /dev/fd/{reader} is a pipe, expected a file"):
        names(f"/dev/fd/{reader}")
    os.close(reader)
    os.close(writer)
