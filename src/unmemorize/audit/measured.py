"""What was measured of one state of a language model, and a folder that keeps it: an interrupted audit continues.

A file is named by everything that its numbers follow from: weights, device, neurons that are off, texts, settings and
versions. Whatever differs gives another name, so measurements of different inputs never meet. Files are written whole;
one that cannot be read is measured again. Scores of continuations are computed from the tokens, not stored.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.audit.examples import AuditSettings, DocumentLosses, Extractions
from unmemorize.audit.verbatim import score_continuations
from unmemorize.errors import UnmemorizeError
from unmemorize.models.language import fingerprint
from unmemorize.neurons import NeuronSet
from unmemorize.records import Measure
from unmemorize.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_FORMAT, MEASURED_VERSION = "unmemorize.measured_state", 1
_TOKENS = ("indices", "generated", "teacher_forced", "truth")


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Losses and extraction tests of N texts in one state, in their order, and exp(nats / tokens) of ordinary text."""

    losses: DocumentLosses
    tests: tuple[Extractions, ...]
    perplexity: Measure


class MeasuredStates:
    """A folder of measurements; without one, everything is measured.

    Args:
        folder: where they are kept, or None.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._model_ids: dict[int, str] = {}

    def get(
        self,
        model: PreTrainedModel,
        neurons: NeuronSet | None,
        texts: Sequence[Sequence[int]],
        ordinary: Sequence[Sequence[int]],
        settings: AuditSettings,
        measure: Callable[[], Measured],
    ) -> Measured:
        """Return what was measured of a state before, or measure it and keep it.

        Args:
            model: the model; its weights may not change between calls.
            neurons: what is off, or None.
            texts: what is measured, as token ids.
            ordinary: texts whose perplexity is measured, as token ids.
            settings: of the measurement.
            measure: measures it.

        Raises:
            RunFolderError: if the file cannot be written.
        """
        if self._folder is None:
            return measure()
        inputs = {
            "model": self._model_id(model),
            "device": str(model.device),
            "neurons": _places(neurons),
            "texts": [list(text) for text in texts],
            "ordinary": [list(text) for text in ordinary],
            "settings": asdict(settings),
            "versions": _versions(),
        }
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        path = self._folder / f"{digest[:16]}.safetensors"
        found = _read(path, digest)
        if found is None:
            found = measure()
            _write(path, digest, found)
        return found

    def _model_id(self, model: PreTrainedModel) -> str:
        if id(model) not in self._model_ids:
            self._model_ids[id(model)] = fingerprint(model)
        return self._model_ids[id(model)]


def _places(neurons: NeuronSet | None) -> list[Any]:
    if neurons is None:
        return []
    return [[s.path, s.side, s.width, s.start, list(chosen)] for s, chosen in neurons.indices.items()]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from unmemorize.isolate.engine import environment

    return {"unmemorize": version("unmemorize"), **environment()}


def _write(path: Path, digest: str, found: Measured) -> None:
    from torch import from_numpy

    tensors = {
        "nll_nats": from_numpy(found.losses.nll_nats),
        "num_tokens": from_numpy(found.losses.num_tokens),
    }
    for number, test in enumerate(found.tests):
        tensors.update({f"{name}_{number}": from_numpy(getattr(test, name)) for name in _TOKENS})
    lengths = [[test.prefix_tokens, test.suffix_tokens, test.num_excluded] for test in found.tests]
    header = {"digest": digest, "tests": lengths, "perplexity": found.perplexity.model_dump(mode="json")}
    write_tensors(path, tensors, format=MEASURED_FORMAT, version=MEASURED_VERSION, header=header)


def _read(path: Path, digest: str) -> Measured | None:
    """Return what a file holds; None if there is none, or it is not what it should be."""
    if not path.is_file():
        return None
    try:
        header, tensors = read_tensors(
            path, format=MEASURED_FORMAT, version=MEASURED_VERSION, what="a measured state"
        )
        if header["digest"] != digest:
            return None
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        tests = [
            _test(lengths, {name: arrays[f"{name}_{number}"] for name in _TOKENS})
            for number, lengths in enumerate(header["tests"])
        ]
        losses = DocumentLosses(arrays["nll_nats"], arrays["num_tokens"])
        return Measured(losses, tuple(tests), Measure.model_validate(header["perplexity"]))
    except (UnmemorizeError, KeyError, ValueError):
        return None


def _test(lengths: Sequence[int], arrays: dict[str, Any]) -> Extractions:
    prefix, suffix, num_excluded = lengths
    return Extractions(
        prefix_tokens=prefix,
        suffix_tokens=suffix,
        scores=score_continuations(arrays["generated"], arrays["teacher_forced"], arrays["truth"]),
        num_excluded=num_excluded,
        **arrays,
    )
