"""What audits of pictures are measured with, and how they are made: from options to the library.

Pipelines (`diffusion.py`) and runs that trained pictures (`picture_runs.py`) share it. Heavy libraries are imported
inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.errors import ConfigError

if TYPE_CHECKING:
    from unmemorize.audit.prompt_alignment import ClipAlignment
    from unmemorize.audit.similarity import SimilarityMeasure, SscdVariant
    from unmemorize.audit.ways import PictureAuditSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOptions:
    """Options of `audit` that only text-to-image models have; the verb says what they mean."""

    neurons: Path | None = None
    rivals: str = "placebo"
    mended: Path | None = None
    twin: Path | None = None
    sscd: tuple[Path, ...] = ()
    clip: str | None = None
    num_seeds: int = 10
    num_steps: int = 50
    guidance: float = 7.0
    size_px: int | None = None
    copy_threshold: float | None = None
    column: str | None = None
    title: str = ""

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
