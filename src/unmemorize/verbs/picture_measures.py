"""What audits of pictures are measured with, and how they are made: from options to the library.

Pipelines (`diffusion.py`) and runs that trained pictures (`picture_runs.py`) share it. Heavy libraries are imported
inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import figure_text

if TYPE_CHECKING:
    from unmemorize.audit.picture_quality import PictureQuality
    from unmemorize.audit.pictures import PictureSource
    from unmemorize.audit.prompt_alignment import ClipAlignment
    from unmemorize.audit.similarity import SimilarityMeasure, SscdVariant
    from unmemorize.audit.ways import PictureAuditSettings
    from unmemorize.records import Group, Measure, PictureAudit, PictureGroup

QUALITIES = {"alignment": ("alignment", ".3f"), "kid": ("KID", ".4g"), "fid": ("FID", ".4g")}
"""Figures of how good the pictures of ordinary prompts are: what each is called, and how it is worded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOptions:
    """Options of `audit` that only text-to-image models have; the verb says what they mean.

    Raises:
        ConfigError: if there are real pictures to compare with and no CLIP model to compare by.
    """

    neurons: Path | None = None
    rivals: str = "placebo"
    mended: Path | None = None
    twin: Path | None = None
    sscd: tuple[Path, ...] = ()
    clip: str | None = None
    reference: Path | None = None
    num_seeds: int = 10
    num_steps: int = 50
    guidance: float = 7.0
    size_px: int | None = None
    copy_threshold: float | None = None
    column: str | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if self.reference is not None and self.clip is None:
            raise ConfigError(
                "--reference compares pictures by the features of a CLIP model; name one with --clip, or leave it out"
            )

    @property
    def copy_thresholds(self) -> dict[str, float]:
        """The threshold that was named, for the measure that has no convention.

        Raises:
            ConfigError: if it is out of range.
        """
        if self.copy_threshold is None:
            return {}
        if not 0.0 < self.copy_threshold <= 1.0:
            raise ConfigError(f"--copy-threshold is {self.copy_threshold}, expected above 0 and at most 1")
        return {"structure": self.copy_threshold}

    def settings(self) -> PictureAuditSettings:
        """Return how pictures are made and judged.

        Raises:
            ConfigError: if a number is out of range.
        """
        from unmemorize.audit.ways import PictureAuditSettings

        return PictureAuditSettings(
            seeds=tuple(range(1000, 1000 + self.num_seeds)),
            num_steps=self.num_steps,
            guidance=self.guidance,
            size_px=self.size_px,
            copy_thresholds=self.copy_thresholds,
        )


def reference_of(source: Path | None, groups: Iterable[Group]) -> list[PictureSource]:
    """Return the real pictures to compare with, none if none are named.

    Raises:
        ConfigError: if no prompt of the audit is an ordinary one, so that nothing would be compared with them.
        DataError: if there are no pictures.
    """
    from unmemorize.corpus.pictures import find_pictures

    if source is None:
        return []
    if "ordinary" not in groups:
        raise ConfigError(
            "--reference is compared with the pictures of ordinary prompts, and none of the prompts is in group "
            "ordinary; add some, or leave it out"
        )
    return list(find_pictures(source))


def quality_of(reference: Sequence[PictureSource], alignment: ClipAlignment | None) -> PictureQuality | None:
    """Return what FID and KID are computed with: CLIP's features and real pictures, if there are any."""
    from unmemorize.audit.picture_quality import PictureQuality
    from unmemorize.audit.prompt_alignment import ClipFeatures

    if alignment is None or not reference:
        return None
    return PictureQuality(
        features=ClipFeatures(alignment), reference=reference, name=f"CLIP {alignment.name}"
    )


def ordinary_group(audit: PictureAudit, number: int) -> PictureGroup | None:
    """Return what a state, by its number, does to ordinary prompts; None if there were none."""
    return next((group for group in audit.states[number].groups if group.group == "ordinary"), None)


def quality_measures(groups: Sequence[PictureGroup | None]) -> dict[str, list[Measure | None]]:
    """Return what was measured of the quality of pictures, by figure, for each of several audits."""
    found = {name: [None if one is None else getattr(one, name) for one in groups] for name in QUALITIES}
    return {name: measures for name, measures in found.items() if measures.count(None) < len(measures)}


def quality_words(
    groups: Sequence[PictureGroup | None],
    text: Callable[[Sequence[Measure | None], str], str] = lambda measures, style: figure_text(
        measures[0], style
    ),
) -> str:
    """Word what was measured of the quality of ordinary prompts' pictures; "" if nothing was.

    Args:
        groups: ordinary prompts in one state, for each of several audits.
        text: words one figure of several audits in a format; by default that of the first.
    """
    words = {QUALITIES[n][0]: text(found, QUALITIES[n][1]) for n, found in quality_measures(groups).items()}
    if "KID" in words and words["KID"] == words.get("FID"):  # one reason for both
        words["KID and FID"] = words.pop("KID")
        del words["FID"]
    listed = ", ".join(f"{name} {figure}" for name, figure in words.items())
    return f"on ordinary prompts {listed}" if listed else ""


def alignment_of(source: str | None, device: str) -> ClipAlignment | None:
    """Return the CLIP model of a folder or hub name, if one is named."""
    from unmemorize.audit.prompt_alignment import ClipAlignment

    return None if source is None else ClipAlignment.load(source, device=device)


def measures_of(files: Sequence[Path], device: str) -> list[SimilarityMeasure]:
    """Return SSCD for every model file, its variant told by the file's name, then the measure that needs no file."""
    from unmemorize.audit.similarity import sscd, structure

    found: list[SimilarityMeasure] = []
    for path in files:
        variant: SscdVariant
        if "disc_mixup" in path.name:
            variant = "sscd_disc_mixup"
        elif "disc_large" in path.name:
            variant = "sscd_disc_large"
        else:
            raise ConfigError(
                f"the name of {path} tells no SSCD variant; expected disc_mixup or disc_large in it, as released"
            )
        found.append(sscd(path, variant, device=device))
    return [*found, structure()]
