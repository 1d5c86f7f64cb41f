"""From picture files to numbers: every state is read once, and only the vectors of "before" stay in memory.

What this file does not do: make pictures (`generation.py`) or turn numbers into figures (`picture_figures.py`).

Letters: N prompts, S seeds, D features. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmemorize.audit.generation import Made, make_pictures
from unmemorize.audit.picture_figures import PictureSimilarities, similarities_of_state
from unmemorize.audit.picture_quality import PictureQuality, features_of, fid_and_kid
from unmemorize.audit.pictures import Picture, PromptCase, read_picture
from unmemorize.audit.prompt_alignment import ClipAlignment
from unmemorize.audit.similarity import SimilarityMeasure
from unmemorize.audit.statistics import Floats
from unmemorize.audit.ways import PictureAuditSettings, Way
from unmemorize.records import Measure, Progress, ProgressCallback

_READ = 32  # pictures in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """What pictures are measured with.

    Attributes:
        measures: similarity measures, the most trusted one first.
        alignment: CLIP model for the similarity of prompt and picture.
        quality: features and reference pictures for FID and KID.
    """

    measures: tuple[SimilarityMeasure, ...]
    alignment: ClipAlignment | None = None
    quality: PictureQuality | None = None

    def descriptions(self) -> dict[str, str]:
        """Say what each figure is, by name."""
        found = {
            m.name: f"{m.description} {m.definition} Unit: {m.unit}. Source: {m.source}."
            for m in self.measures
        }
        if self.alignment is not None:
            found["alignment"] = self.alignment.description
        if self.quality is not None:
            found["fid"] = found["kid"] = self.quality.description
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StateNumbers:
    """What was measured of one state.

    Attributes:
        made: its pictures.
        similarities: measure -> similarities.
        alignment_N: median over seeds of each prompt's alignment, shape (N,), unitless; None if not measured.
        loss_N: denoising loss of each prompt's picture, shape (N,), unitless; None if not measured.
        distances: FID and KID of the group they were measured on; None if not measured.
    """

    made: Made
    similarities: Mapping[str, PictureSimilarities]
    alignment_N: Floats | None
    loss_N: Floats | None
    distances: tuple[Measure, Measure] | None


@dataclass(slots=True)
class PictureMeasuring:
    """Measures one state after the other.

    Attributes:
        cases: the prompts.
        settings: seeds and how pictures are made.
        out_folder: the run folder.
        instruments: what is measured.
        references: measure -> for each prompt the vectors of its training pictures, shape (K, D).
        progress: called after every batch of pictures.
    """

    cases: Sequence[PromptCase]
    settings: PictureAuditSettings
    out_folder: Path
    instruments: Instruments
    references: Mapping[str, Sequence[Tensor]]
    progress: ProgressCallback | None = None
    _before: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _real_ND: Tensor | None = None

    @property
    def before(self) -> Mapping[str, NDArray[np.float32]]:
        """By measure the vectors of the pictures of the first state measured, shape (N, S, D)."""
        return self._before

    def measure(self, way: Way) -> StateNumbers:
        """Make what is missing of a state's pictures and measure them; the first state measured is "before"."""
        made = make_pictures(way, self.cases, self.settings, self.out_folder, progress=self.progress)
        similarities = {}
        for instrument in self.instruments.measures:
            vectors_NSD = self._vectors(instrument, made)
            own = [reference.numpy() for reference in self.references[instrument.name]]
            similarities[instrument.name] = similarities_of_state(
                vectors_NSD, own, self._before.get(instrument.name)
            )
            self._before.setdefault(instrument.name, vectors_NSD)
        numbers = StateNumbers(
            made=made,
            similarities=similarities,
            alignment_N=self._alignment(made),
            loss_N=None if way.losses is None else np.asarray(way.losses(), dtype=np.float64),
            distances=self._distances(made),
        )
        if self.progress is not None:
            self.progress(Progress("measures", 1, 1, "state", way.label))
        return numbers

    def _pieces(self, made: Made) -> Iterator[list[Picture]]:
        """Yield the pictures of a state, prompt by prompt and seed by seed, a few at a time."""
        paths = [path for row in made.paths for path in row]
        for start in range(0, len(paths), _READ):
            yield [read_picture(self.out_folder / path) for path in paths[start : start + _READ]]

    def _vectors(self, instrument: SimilarityMeasure, made: Made) -> NDArray[np.float32]:
        vectors = torch.cat([instrument.embed(piece) for piece in self._pieces(made)]).numpy()
        return vectors.reshape(len(made.paths), len(self.settings.seeds), -1)

    def _alignment(self, made: Made) -> Floats | None:
        if self.instruments.alignment is None:
            return None
        prompts = [case.prompt for case in self.cases for _ in self.settings.seeds]
        scores: list[float] = []
        for piece in self._pieces(made):
            said = prompts[len(scores) : len(scores) + len(piece)]
            scores += self.instruments.alignment.scores(said, piece).tolist()
        median_N: Floats = np.median(np.array(scores).reshape(len(self.cases), -1), axis=1)
        return median_N

    def _distances(self, made: Made) -> tuple[Measure, Measure] | None:
        quality = self.instruments.quality
        if quality is None:
            return None
        rows = [row for case, row in zip(self.cases, made.paths, strict=True) if case.group == quality.group]
        by_seed = [[self.out_folder / path for path in column] for column in zip(*rows, strict=True)]
        if self._real_ND is None and len(quality.reference):
            self._real_ND = features_of(quality.features, quality.reference)
        return fid_and_kid(quality, by_seed, reference_ND=self._real_ND)
