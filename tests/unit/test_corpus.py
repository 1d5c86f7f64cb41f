"""Corpora: every format reads the same documents, every bad input is one clear line; mixtures and schedules."""

from __future__ import annotations

import gzip
import hashlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmemorize.corpus import PYTHON_DOCS, Document, Mixture, MixtureSettings, mix, read_corpus
from unmemorize.errors import ConfigError, DataError, IdError, MissingExtra
from unmemorize.ids import content_id, source_id

ROWS = [{"text": f"document {n}\nwith two lines", "book": f"book-{n % 2}", "n": n} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _zst(*parts: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _jsonl(folder: Path, *rows: object) -> Path:
    return _written(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def _parquet(path: Path) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def _saved(path: Path, *, splits: tuple[str, ...] = ()) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({name: data for name in splits}) if splits else data).save_to_disk(str(path))
    return path


def _data_folder(path: Path) -> Path:
    pytest.importorskip("datasets")
    path.mkdir()
    return _written(path / "rows.jsonl", LINES).parent


FORMATS = {
    "jsonl": lambda folder: _written(folder / "rows.jsonl", LINES),
    "json": lambda folder: _written(folder / "rows.json", LINES),
    "byte order mark, blank lines": lambda folder: _written(
        folder / "rows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")
    ),
    "no end of line": lambda folder: _written(folder / "rows.jsonl", LINES.rstrip()),
    "gz": lambda folder: _written(folder / "rows.jsonl.gz", gzip.compress(LINES)),
    "gz, two members": lambda folder: _written(
        folder / "rows.JSONL.GZ", gzip.compress(LINES[:50]) + gzip.compress(LINES[50:])
    ),
    "zst": lambda folder: _written(folder / "rows.jsonl.zst", _zst(LINES)),
    "zst, two frames": lambda folder: _written(folder / "rows.jsonl.zst", _zst(LINES[:50], LINES[50:])),
    "parquet": lambda folder: _parquet(folder / "rows.parquet"),
    "saved data set": lambda folder: _saved(folder / "saved"),
    "saved splits": lambda folder: _saved(folder / "splits", splits=("test", "train")),
    "folder of files": lambda folder: _data_folder(folder / "data"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name, tmp_path):
    documents = read_corpus(FORMATS[name](tmp_path), source_column="book")
    assert documents == [
        Document(row["text"], content_id(row["text"]), row["book"], number) for number, row in enumerate(ROWS)
    ]


def test_a_hub_name_is_streamed_by_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, **arguments):
        asked.append((name, arguments))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_corpus("owner/name-1.5", limit=3)) == 3
    assert asked == [("owner/name-1.5", {"split": "train", "streaming": True})]


def test_plain_text_has_blank_lines_between_documents(tmp_path):
    path = _written(tmp_path / "a.txt", b"\n\none\nstill one\n \n\ntwo\r\n\r\nthree")
    assert [d.text for d in read_corpus(path)] == ["one\nstill one", "two", "three"]


def test_blank_rows_count_but_are_no_documents(tmp_path):
    path = _jsonl(tmp_path, {"text": " \n"}, {"text": "a"}, {"text": ""}, {"text": "b"})
    assert [(d.text, d.row) for d in read_corpus(path)] == [("a", 1), ("b", 3)]


def test_a_limit_reads_no_further(tmp_path):
    path = _written(tmp_path / "rows.jsonl", LINES + b"not json\n")
    assert [d.row for d in read_corpus(path, limit=5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="line 6 is not JSON"):
        read_corpus(path)


def test_ids(tmp_path):
    path = _jsonl(tmp_path, {"text": "a", "s": "x"}, {"text": "b", "s": 7}, {"text": "a", "s": " x "})
    content = [d.id for d in read_corpus(path)]
    assert content == [content_id("a"), content_id("b"), content_id("a")]
    assert [d.id for d in read_corpus(path, ids="index")] == [1, 2, 3]
    sources = read_corpus(path, ids="source", source_column="s")
    assert [d.id for d in sources] == [source_id("x"), source_id("7"), source_id("x")]
    pytest.importorskip("rensa")
    assert [d.id for d in read_corpus(path, ids="near-duplicate")] == content


BAD_FILES = {
    "empty": ("a.jsonl", b"", "holds no documents"),
    "blank": ("a.txt", b" \n\n", "holds no documents"),
    "binary": ("a.jsonl", bytes(range(256)), "line 1 holds binary data"),
    "binary text": ("a.txt", b"fine\n\x00\x01\n", "line 2 holds binary data"),
    "latin-1": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        r"line 2 is not UTF-8 \(byte 11 of the line is 0xe9\); convert",
    ),
    "not json": ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
    "deep json": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "json list": ("a.json", b'[{"text": "a"}]', "line 1 is a JSON list; expected one object a line"),
    "no text column": ("a.jsonl", b'{"text": "a"}\n{"b": 1, "a": 2}\n', "row 2 has no column 'text', only .'a', 'b'."),
    "no text": ("a.jsonl", b'{"text": 3}\n', "row 1: column 'text' holds int, expected text"),
    "null text": ("a.jsonl", b'{"text": null}\n', "row 1: column 'text' holds NoneType, expected text"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "row 1: the text holds half of a surrogate pair"),
    "unknown extension": ("a.csv", b"text\na\n", "is of an unknown kind; expected .jsonl"),
    "no extension": ("corpus", b"text", "is of an unknown kind"),
    "truncated gz": ("a.jsonl.gz", gzip.compress(LINES)[:-12], "is damaged or truncated after line"),
    "corrupted gz": ("a.jsonl.gz", gzip.compress(LINES)[:20] + b"\xff" * 30, "is damaged or truncated"),
    "not gz": ("a.jsonl.gz", LINES, "is damaged or truncated after line 0 .*Not a gzipped file"),
    "not parquet": ("a.parquet", LINES, "is not a readable Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    file, data, message = BAD_FILES[name]
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(_written(tmp_path / file, data))
    assert "\n" not in str(caught.value)


def test_bad_zst(tmp_path):
    lines = b"".join(b'{"text": "line %d"}\n' % n for n in range(9999))
    for data in (_zst(lines)[:-9], _zst(lines, lines)[:-9], b"no frame at all"):
        with pytest.raises(DataError, match="is damaged or truncated after line"):
            read_corpus(_written(tmp_path / "a.jsonl.zst", data))


def test_missing_paths_are_not_asked_for_on_the_hub(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "a.jsonl", "nothing", "data/rows.jsonl", "../a/b"):
        with pytest.raises(DataError, match="does not exist; expected a corpus file"):
            read_corpus(path)


def test_unreadable_data_sets(tmp_path):
    with pytest.raises(DataError, match=r"has the splits \['test'\] and no 'train'"):
        read_corpus(_saved(tmp_path / "splits", splits=("test",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot read .* as a data set") as caught:
        read_corpus(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_columns_that_parquet_and_data_sets_lack(tmp_path):
    for path in (_parquet(tmp_path / "rows.parquet"), _saved(tmp_path / "saved")):
        with pytest.raises(DataError, match=r"row 1 has no column 'body', only \['book', 'n', 'text'\]"):
            read_corpus(path, text_column="body")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "b"}, r"row 2 has no column 's', only \['text'\]; name the source column"),
        ({"text": "b", "s": None}, r"row 2 has no source \(1 of 2 rows have none\)"),
        ({"text": "b", "s": " "}, "row 2 has no source"),
        ({"text": "b", "s": 1.5}, "row 2: the source is float, expected text or a whole number"),
    ],
)
def test_sources_that_are_missing_or_no_names(row, message, tmp_path):
    path = _jsonl(tmp_path, {"text": "a", "s": "x"}, row)
    with pytest.raises(IdError, match=message):
        read_corpus(path, ids="source", source_column="s")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0, expected 1 document or more"),
        ({"ids": "names"}, "unknown ids 'names'; expected one of content"),
        ({"ids": "source"}, "ids from sources need the column that names them"),
    ],
)
def test_settings_of_reading_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_corpus(FORMATS["jsonl"](tmp_path), **settings)


@pytest.mark.parametrize(
    ("library", "name"), [("zstandard", "zst"), ("pyarrow", "parquet"), ("datasets", "folder of files")]
)
def test_missing_libraries_are_named_with_their_install_line(library, name, tmp_path, monkeypatch):
    path = FORMATS[name](tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"{library} is not installed.*unmemorize\[data\]"):
        read_corpus(path)


@pytest.fixture(scope="module")
def docs():
    return read_corpus(PYTHON_DOCS, limit=1200)  # half of what there is


def test_python_docs_are_many_named_texts_of_useful_size(docs):
    assert len(docs) == 1200
    assert len({d.source for d in docs}) == len(docs)
    assert {d.source.partition("/")[0] for d in docs} == {"topics", "module"}
    assert all(len(d.text) >= 200 for d in docs)
    assert statistics.quantiles([len(d.text) for d in docs], n=100)[-1] < 4500
    assert "module/argparse" in {d.source for d in docs}
    assert [d.id for d in docs] == [content_id(d.text) for d in docs]


def test_python_docs_are_the_same_in_another_process_and_need_no_torch(docs):
    code = (
        "import sys, hashlib; from unmemorize.corpus import read_corpus\n"
        "found = repr([(d.source, d.id) for d in read_corpus('python-docs', limit=300)])\n"
        "print(hashlib.sha256(found.encode()).hexdigest())\n"
        "print('torch' in sys.modules)"
    )
    path = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "3", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256(repr([(d.source, d.id) for d in docs[:300]]).encode()).hexdigest()
    assert done.stdout.split() == [digest, "False"]


def _documents(num: int, origins: int = 1) -> list[Document]:
    return [Document(f"text {n}", content_id(f"text {n}"), f"o{n % origins}/{n}", n) for n in range(num)]


SMALL = MixtureSettings(num_repeated=4, repeats=8, num_once=20, num_validation=5)


@given(st.integers(0, 50), st.integers(29, 60), st.integers(1, 12))
def test_every_document_is_in_one_part_and_seen_as_often_as_it_should(seed, num, cap):
    settings = MixtureSettings(num_repeated=4, repeats=8, num_once=20, num_validation=5, seed=seed)
    documents = _documents(num)
    mixture = mix(documents, settings)
    parts = (*mixture.repeated, *mixture.once, *mixture.validation)
    assert len({d.id for d in parts}) == len(parts) == 29
    for most, order in ((8, mixture.schedule(seed=1)), (min(cap, 8), mixture.schedule(cap, seed=1))):
        expected = {d.id: most for d in mixture.repeated} | {d.id: 1 for d in mixture.once}
        assert Counter(d.id for d in order) == expected


def test_mixtures_and_schedules_follow_from_their_seeds():
    documents = _documents(40)
    assert mix(documents, SMALL) == mix(documents, SMALL)
    others = mix(documents, MixtureSettings(num_repeated=4, repeats=8, num_once=20, num_validation=5, seed=1))
    assert others.repeated != mix(documents, SMALL).repeated
    mixture = mix(documents, SMALL)
    assert mixture.schedule(seed=3) == mixture.schedule(seed=3) != mixture.schedule(seed=4)
    # Golden: the same on every machine and Python, or experiments could not be repeated.
    assert [d.row for d in mixture.repeated] == [0, 27, 12, 21]
    assert [d.row for d in mixture.schedule(seed=3)[:8]] == [27, 21, 0, 12, 21, 21, 28, 12]


def test_copies_meet_in_a_batch_no_more_than_by_chance():
    mixture = Mixture(tuple(_documents(10)), tuple(_documents(200)[10:]), (), repeats=20)
    neighbours = []
    for seed in range(200):
        order = [d.id for d in mixture.schedule(seed=seed)]
        neighbours.append(sum(a == b for a, b in pairwise(order)))
    # A place and the next hold the same document with probability sum of c (c - 1) / (n (n - 1)); n - 1 such pairs.
    expected = 10 * 20 * 19 / 390
    assert abs(statistics.mean(neighbours) - expected) < 4 * statistics.stdev(neighbours) / 200**0.5


def test_copies_enter_a_mixture_once_whatever_their_ids():
    documents = _documents(40)
    copies = [Document(d.text, 1000 + d.row, d.source, 40 + d.row) for d in documents]
    near = [Document(d.text + "!", d.id, d.source, 80 + d.row) for d in documents]
    assert mix([*documents, *copies, *near], SMALL) == mix(documents, SMALL)


def test_a_source_that_names_two_texts_cannot_be_mixed():
    documents = [Document(f"text {n}", source_id("one"), "one", n) for n in range(3)]
    with pytest.raises(IdError, match="source 'one' names rows 1 and 2, which differ"):
        mix(documents, SMALL)
    named = [Document(d.text, source_id(d.source), d.source, d.row) for d in _documents(40)]
    assert len(mix([*named, *named], SMALL).repeated) == 4


def test_repeated_documents_from_one_source_and_held_out_ones_from_others():
    settings = MixtureSettings(
        num_repeated=4, repeats=2, num_once=9, num_validation=5, num_heldout=3, repeated_source="o1/"
    )
    mixture = mix(_documents(40, origins=3), settings)
    assert mixture.repeated[4:] == mixture.heldout
    assert [d.source[:3] for d in mixture.repeated[:4]] == ["o1/"] * 4
    assert len(mixture.heldout) == 3 and not any(d.source.startswith("o1/") for d in mixture.heldout)
    assert {d.id for d in mixture.repeated}.isdisjoint(d.id for d in (*mixture.once, *mixture.validation))
    assert len(mixture.schedule(seed=0)) == 7 * 2 + 9


def test_too_few_documents():
    with pytest.raises(
        DataError, match="the corpus has 8 different documents of 1 characters or more, 8 of them"
    ):
        mix(_documents(8), SMALL)
    with pytest.raises(
        DataError, match="of 7 characters or more, 30 of them to repeat; expected 40 to repeat"
    ):
        mix(_documents(40), MixtureSettings(num_repeated=40, num_validation=1, min_characters=7))
    settings = MixtureSettings(num_repeated=2, num_validation=2, num_heldout=1)
    with pytest.raises(DataError, match="num_heldout is 1, but 0 documents are of another origin"):
        mix(_documents(40), settings)


def test_once_may_be_fewer_than_asked_for():
    assert len(mix(_documents(20), SMALL).once) == 11


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("num_repeated", "repeats", "num_validation")),
        *((name, -1) for name in ("num_once", "num_heldout", "min_characters")),
    ],
)
def test_mixture_settings_out_of_range(name, value):
    with pytest.raises(
        ConfigError, match=f"{name} is {value}, expected {'1' if value == 0 else '0'} or more"
    ):
        MixtureSettings(**{name: value})
    with pytest.raises(ConfigError, match="cap is 0, expected 1 or more"):
        mix(_documents(40), SMALL).schedule(0, seed=0)
