"""The frame around every verb: exit codes, one line for a mistake, JSON, progress, pipes and interruption."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from unmemorize import cli
from unmemorize.cli import Answer, ProgressPrinter
from unmemorize.errors import DataError
from unmemorize.records import Progress


def verb_that(action: Callable[[], Answer]) -> Callable[..., Answer]:
    def verb(
        progress: ProgressPrinter, number: Annotated[int, typer.Option(help="Any number.")] = 3
    ) -> Answer:
        """Do what the test wants."""
        return action()

    return verb


def raise_(error: BaseException) -> Any:
    raise error


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(action: Callable[[], Answer], *words: str) -> tuple[int, str, str]:
        monkeypatch.setitem(cli.VERBS, "trial", verb_that(action))
        code = cli.main(["trial", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


ANSWER = Answer(data={"path": "ä.html"}, lines=["made it", "ä.html"])


def test_an_answer_is_printed_for_a_person_or_a_program(run: Callable[..., Any]) -> None:
    assert run(lambda: ANSWER) == (0, "made it\nä.html\n", "")
    code, out, err = run(lambda: ANSWER, "--json")
    assert (code, json.loads(out), err) == (0, {"path": "ä.html"}, "")


def test_a_missed_bar_is_exit_code_1(run: Callable[..., Any]) -> None:
    assert run(lambda: Answer(data={}, lines=["missed"], exit_code=1))[0] == 1


def test_a_mistake_is_one_line_and_exit_code_2(run: Callable[..., Any]) -> None:
    code, out, err = run(lambda: raise_(DataError("row 3 is\nbinary; convert the file")))
    assert (code, out, err) == (2, "", "unmemorize: row 3 is binary; convert the file\n")


def test_debug_shows_the_traceback_of_a_mistake(run: Callable[..., Any]) -> None:
    code, _, err = run(lambda: raise_(DataError("row 3 is binary")), "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("unmemorize: row 3 is binary\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_disk_is_a_mistake_not_a_defect(run: Callable[..., Any], number: int) -> None:
    code, _, err = run(lambda: raise_(OSError(number, "reason", "model.safetensors")))
    assert code == 2
    assert err == (
        "unmemorize: cannot write or read model.safetensors: reason; free space or choose another folder\n"
    )


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch names its own."""


@pytest.mark.parametrize(
    "error", [MemoryError(), OutOfMemoryError("CUDA"), RuntimeError("Allocator: can't allocate memory: 9")]
)
def test_too_little_memory_is_a_mistake_not_a_defect(run: Callable[..., Any], error: Exception) -> None:
    code, out, err = run(lambda: raise_(error))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("unmemorize: out of memory; choose smaller sizes")


def test_a_defect_keeps_its_traceback(run: Callable[..., Any]) -> None:
    code, _, err = run(lambda: raise_(KeyError("lost")))
    assert code == 3
    assert err.startswith("Traceback")
    assert "KeyError: 'lost'" in err


def test_interruption_is_one_line_and_exit_code_130(run: Callable[..., Any]) -> None:
    code, out, err = run(lambda: raise_(KeyboardInterrupt()))
    assert (code, out, err) == (130, "", "interrupted; run the same command again to continue\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "No such command 'nonsense'; see unmemorize --help"),
        (["ids", "--nonsense", "x"], "No such option: --nonsense; see unmemorize ids --help"),
        (["report"], "Missing argument 'RUN...'; see unmemorize report --help"),
        (["ids", "x.jsonl", "--limit", "few"], "see unmemorize ids --help"),
        (["ids", "nowhere.jsonl"], "nowhere.jsonl does not exist; expected a corpus file"),
        (["ids", "python-docs", "--limit", "0"], "limit is 0, expected 1 document or more"),
        (["check", "./nowhere"], "the folder ./nowhere does not exist; pass a model's folder, or a hub name"),
        (["audit", "/nowhere"], "the folder /nowhere does not exist; pass a model's folder, or a hub name"),
        (["report", "nowhere"], "run folder nowhere does not exist"),
        (
            ["plan", "--pool", "9", "--sinks", "2", "--sources", "3", "--tolerance", "nan"],
            "--tolerance is nan",
        ),
        (["audit", "nowhere", "--max-extraction", "inf"], "--max-extraction is inf, expected a number"),
        (
            ["audit", "nowhere", "--max-extraction", "5"],
            "--max-extraction is 5.0, expected a share from 0 to 1",
        ),
        (["ids", "python-docs", "--limit", "9" * 30], "expected a whole number of at most 64 bits"),
        (["train", "--seeds", "9" * 30, "--out", "nowhere"], "holds a number of more than 64 bits"),
        (["localize", "nowhere", "--examples", "x.txt", "--out", ""], "--out is empty; give it a value"),
        (["report", "--output=", "nowhere"], "--output is empty; give it a value, or leave it out"),
        (["check", ""], "an argument is empty; give it a value"),
    ],
)
def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_every_verb_takes_json_and_debug_and_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.VERBS:
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert "--json" in text and "--debug" in text, name


def test_no_words_mean_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_ids_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "one", "book": "b"}\n{"text": "one", "book": "c"}\n')
    assert cli.main(["ids", str(path), "--source-column", "book", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["num_documents"], value["num_ids"]) == (2, 1)
    assert [row["source"] for row in value["documents"]] == ["b", "c"]
    assert cli.main(["ids", str(path), "--source-column", "book", "--ids", "source"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == ["b", "c"]
    assert rows[0][1] != rows[1][1]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "unmemorize.cli", *words]


def test_help_loads_no_heavy_library(record_property: Callable[[str, object], None]) -> None:
    """The time is recorded, not judged: it depends on the machine. What makes it long is judged."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command("--help")[1:]],
        capture_output=True,
        text=True,
        check=True,
    )
    record_property("help_s", round(time.perf_counter() - started_s, 3))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "transformers", "numpy", "rich", "pydantic"} & loaded


def test_a_reader_that_leaves_is_no_error() -> None:
    source = subprocess.Popen(
        command("ids", "python-docs", "--limit", "4000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert source.stdout is not None and source.stderr is not None
    assert source.stdout.readline()
    source.stdout.close()
    err = source.stderr.read()
    source.stderr.close()
    assert (source.wait(60), err) == (0, b"")


def test_only_the_first_of_several_processes_speaks(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(lambda: ANSWER) == (0, "", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(printer: ProgressPrinter, clock: list[float], seconds_per_step: float) -> None:
    for done in range(5):
        clock[0] += seconds_per_step
        printer(Progress("train", done, 4, "steps", f"loss {done}"))


def test_progress_is_sparse_in_a_file() -> None:
    stream, clock = io.StringIO(), [0.0]
    steps(ProgressPrinter(stream, lambda: clock[0]), clock, 20.0)
    assert stream.getvalue().splitlines() == [
        "train  0/4 steps  loss 0",
        "train  2/4 steps  loss 2",
        "train  4/4 steps  loss 4",
    ]


def test_progress_of_work_without_a_known_end_is_as_sparse() -> None:
    stream, clock = io.StringIO(), [0.0]
    printer = ProgressPrinter(stream, lambda: clock[0])
    for done in range(1, 6):
        clock[0] += 20.0
        printer(Progress("search", done, 0, "sets"))
    assert stream.getvalue().splitlines() == ["search  1 sets", "search  3 sets", "search  5 sets"]


def test_progress_is_one_moving_line_on_a_terminal() -> None:
    stream, clock = Terminal(), [0.0]
    printer = ProgressPrinter(stream, lambda: clock[0])
    steps(printer, clock, 1.0)
    printer(Progress("audit", 1, 2, "documents"))
    printer.close()
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert [part.removeprefix("\x1b[K") for part in lines[0].split("\r")[1:]][
        -1
    ] == "train  4/4 steps  loss 4"
    assert lines[1].endswith("audit  1/2 documents")


def test_progress_of_other_processes_is_silent() -> None:
    stream = io.StringIO()
    ProgressPrinter(stream, is_silent=True)(Progress("train", 0, 4))
    assert stream.getvalue() == ""
