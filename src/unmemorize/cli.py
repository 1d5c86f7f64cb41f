"""The command line's frame. The only file that prints.

The verbs themselves are in `verbs`. Around each stands the same frame, which adds `--json` and `--debug`, shows
progress on stderr, and turns each outcome into an exit code:

    0    done
    1    done, and an audit or a check did not hold
    2    a mistake that the library explains, in one line on stderr
    3    a defect of ours, with its traceback
    130  interrupted
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from unmemorize.errors import ConfigError, UnmemorizeError, UnmemorizeWarning
from unmemorize.verbs import VERBS, Answer

if TYPE_CHECKING:
    from unmemorize.records import Progress

_TEXT_INTERVAL_S = 30.0
_LINE_INTERVAL_S = 0.1
_NO_MEMORY = "can't allocate memory"
"""What PyTorch says on a CPU; on accelerators it raises its own OutOfMemoryError."""
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class ProgressPrinter:
    """Shows `Progress`: one moving line on a terminal, a plain line now and then elsewhere.

    Args:
        stream: where to write.
        now: clock, in seconds.
        is_silent: show nothing.
    """

    def __init__(
        self, stream: TextIO, now: Callable[[], float] = time.monotonic, *, is_silent: bool = False
    ) -> None:
        self._is_silent = is_silent
        self._stream = stream
        self._now = now
        self._is_terminal = stream.isatty()
        self._stage = ""
        self._shown_s = -float("inf")
        self._is_line_open = False

    def __call__(self, progress: Progress) -> None:
        """Show a step, unless the last one was shown a moment ago; a stage's first and last steps always are."""
        is_new = progress.stage != self._stage
        is_last = 0 < progress.total <= progress.done
        interval_s = _LINE_INTERVAL_S if self._is_terminal else _TEXT_INTERVAL_S
        is_recent = self._now() - self._shown_s < interval_s
        if self._is_silent or (is_recent and not is_new and not is_last):
            return
        if is_new:
            self.close()
        self._stage, self._shown_s = progress.stage, self._now()
        line = _progress_line(progress)
        if self._is_terminal:
            width = _terminal_columns(self._stream)
            self._write(f"\r\x1b[K{line[: width - 1]}")
            self._is_line_open = True
        else:
            self._write(line + "\n")

    def close(self) -> None:
        """End the moving line, so that what follows starts on a new one."""
        if self._is_line_open:
            self._write("\n")
        self._is_line_open = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _progress_line(progress: Progress) -> str:
    count = f"{progress.done:,}/{progress.total:,}" if progress.total else f"{progress.done:,}"
    parts = [progress.stage, f"{count} {progress.unit}".rstrip(), progress.message]
    return "  ".join(part for part in parts if part)


def _terminal_columns(stream: TextIO) -> int:
    try:
        return max(20, os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        return 80


def user_parameters(verb: Callable[..., Answer]) -> list[inspect.Parameter]:
    """Return what a user gives to a verb: all its parameters but `progress`, annotations evaluated."""
    # Verbs name the type of `progress` for type checkers only, because importing it costs time.
    signature = inspect.signature(verb, eval_str=True, locals={"ProgressCallback": object})
    return [p for p in signature.parameters.values() if p.name != "progress"]


def _framed(verb: Callable[..., Answer]) -> Callable[..., None]:
    """Give a verb its frame: progress, `--json`, `--debug`, exit codes."""

    @functools.wraps(verb)
    def framed(*, as_json: bool, debug: bool, **arguments: Any) -> None:
        def checked(progress: ProgressPrinter) -> Answer:
            _require_numbers(arguments)
            return verb(progress, **arguments)

        raise typer.Exit(_run(checked, as_json=as_json, debug=debug))

    json_flag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
    debug_flag = Annotated[bool, typer.Option("--debug", help="Show the traceback of a mistake.")]
    parameters = user_parameters(verb)
    for name, annotation in (("as_json", json_flag), ("debug", debug_flag)):
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=False, annotation=annotation))
    framed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    framed.__annotations__ = {p.name: p.annotation for p in parameters}
    del framed.__wrapped__
    return framed


def _require_numbers(arguments: Mapping[str, Any]) -> None:
    """Refuse numbers that no option means: NaN, infinity, and whole ones of more than 64 bits."""
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{option} is {value}, expected a number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{option} is {value}, expected a whole number of at most 64 bits")


def _empty_word(words: list[str]) -> str | None:
    """Name the option, or argument, that was given an empty word: often a variable of the shell that is not set."""
    for before, word in zip(["", *words], words, strict=False):
        name, sign, value = word.partition("=")
        if sign and not value and name.startswith("--"):
            return name
        if not word:
            return before if before.startswith("--") else "an argument"
    return None


def _run(verb: Callable[..., Answer], *, as_json: bool, debug: bool) -> int:
    progress = ProgressPrinter(sys.stderr, is_silent=not _is_first_process())
    try:
        with _warnings_as_lines(progress):
            answer = verb(progress)
    except KeyboardInterrupt:
        progress.close()
        return _interrupted()
    except Exception as error:
        progress.close()
        message = _explained(error)
        if message is None:
            traceback.print_exc()
            return 3
        if debug:
            traceback.print_exc()
        return _refused(message)
    progress.close()
    if _is_first_process():
        _show(json.dumps(answer.data, ensure_ascii=False, indent=2) if as_json else "\n".join(answer.lines))
    return answer.exit_code


@contextmanager
def _warnings_as_lines(progress: ProgressPrinter) -> Iterator[None]:
    """Show warnings of ours as one line each, and the same one once; others are shown as Python shows them."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if not issubclass(category, UnmemorizeWarning):
            others(message, category, *rest, **named)
        elif _is_first_process():
            progress.close()
            print(f"unmemorize: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UnmemorizeWarning)
        warnings.showwarning = show
        yield


def _is_first_process() -> bool:
    """Tell whether this is the process that speaks, under launchers that start one for each device."""
    return os.environ.get("RANK", "0") == "0"


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has left (for example `head`); keep the interpreter's flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: Exception) -> str | None:
    """Return the one line that explains a mistake, or None if the error is a defect."""
    if isinstance(error, UnmemorizeError):
        return str(error)
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or _NO_MEMORY in str(error):
        return "out of memory; choose smaller sizes, shorter texts, --dtype bfloat16, or another machine"
    if isinstance(error, OSError) and error.errno in _FULL_OR_FORBIDDEN:
        place = error.filename or "a file"
        return f"cannot write or read {place}: {error.strerror}; free space or choose another folder"
    return None


def _refused(message: str) -> int:
    print(f"unmemorize: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted() -> int:
    print("interrupted; run the same command again to continue", file=sys.stderr)
    return 130


def _version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        print(version("unmemorize"))
        raise typer.Exit(0)


def application() -> typer.Typer:
    """Build the command line from `VERBS`."""
    app = typer.Typer(
        name="unmemorize",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Find, isolate and remove what a model has memorized, and prove it."""

    for name, verb in VERBS.items():
        app.command(name)(_framed(verb))
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: words after the program's name; those of the process if None.
    """
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    empty = _empty_word(words)
    if empty is not None:
        return _refused(f"{empty} is empty; give it a value, or leave it out")
    try:
        return int(application()(words, prog_name="unmemorize", standalone_mode=False) or 0)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "unmemorize"
        return _refused(f"{error.format_message().rstrip('.')}; see {command} --help")
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()


if __name__ == "__main__":
    sys.exit(main())
