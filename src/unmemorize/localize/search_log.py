"""What was measured with sets of neurons off, kept line by line: an interrupted search continues.

A search asks the same questions in the same order when it starts again, so that it needs no state of its own: every
question that was answered before is answered from the file. A question is a set of neurons and the examples measured
with it, in one call; a set is named by a digest, because it may hold thousands. Numbers come back bit for bit.

The first line says what all others follow from: weights, device, examples, batch size and versions. A file that says
something else there, or that cannot be read, is begun anew. The ranking that is searched along is not part of it: it
decides which sets are asked about, not what is measured of them.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmemorize.errors import FileFormatError
from unmemorize.files import append_json_line, read_json_lines, write_atomic
from unmemorize.neurons import NeuronSet

LOG_FORMAT, LOG_VERSION = "unmemorize.search_log", 1

_Question = tuple[str, tuple[int, ...]]


class SearchLog:
    """Measurements of sets of neurons; without a path, everything is measured.

    Args:
        path: file that they are kept in, or None.
        inputs: what they follow from beside neurons and examples, as plain data.

    Attributes:
        earlier_s: what the answers that came from the file took when they were measured, in seconds.

    Raises:
        RunFolderError: if the file cannot be written.
    """

    def __init__(self, path: str | Path | None, inputs: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[_Question, tuple[Tensor, Tensor, float]] = {}
        self.earlier_s = 0.0
        if self._path is not None:
            header = {"format": LOG_FORMAT, "format_version": LOG_VERSION, **inputs}
            found = _read(self._path, header)
            if found is None:
                write_atomic(self._path, json.dumps(header, ensure_ascii=False) + "\n")
            self._known = found or {}

    def measured(
        self, off: NeuronSet, examples: Sequence[int], measure: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return what was measured before, or measure it and keep it.

        Args:
            off: neurons that are off.
            examples: numbers of the N examples that are measured.
            measure: measures losses of shape (N,), float32, nats per suffix token, and recited tokens of shape (N,),
                int64, both on the CPU.

        Raises:
            RunFolderError: if the file cannot be written.
        """
        if self._path is None:
            return measure()
        question = (digest_of(off), tuple(examples))
        if question in self._known:
            losses, recited, seconds = self._known[question]
            self.earlier_s += seconds
            return losses, recited
        started = time.monotonic()
        losses, recited = measure()
        if losses.isfinite().all():  # JSON has no other numbers; such a set is measured again
            row = {
                "off": question[0],
                "num_neurons": len(off),
                "examples": list(examples),
                "losses_nats": losses.tolist(),
                "recited_tokens": recited.tolist(),
                "seconds": round(time.monotonic() - started, 6),
            }
            append_json_line(self._path, row)
        return losses, recited


def digest_of(neurons: NeuronSet) -> str:
    """Name a set of neurons by 64 hexadecimal digits, whatever the order in which they were chosen."""
    places = [[s.path, s.side, s.start, chosen] for s, chosen in neurons.indices.items()]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def _read(path: Path, header: Mapping[str, Any]) -> dict[_Question, tuple[Tensor, Tensor, float]] | None:
    """Return the answers in a file; None if there is none, or it is not what it should be."""
    if not path.is_file():
        return None
    try:
        first, *rows = read_json_lines(path)
        return dict(map(_answer, rows)) if first == header else None
    except (FileFormatError, KeyError, TypeError, ValueError):
        return None


def _answer(row: Mapping[str, Any]) -> tuple[_Question, tuple[Tensor, Tensor, float]]:
    question = (str(row["off"]), tuple(map(int, row["examples"])))
    losses = torch.tensor(row["losses_nats"], dtype=torch.float32)
    recited = torch.tensor(row["recited_tokens"], dtype=torch.int64)
    if losses.shape != recited.shape or losses.shape != (len(question[1]),):
        raise ValueError("as many losses and recited tokens as examples")
    return question, (losses, recited, float(row["seconds"]))
