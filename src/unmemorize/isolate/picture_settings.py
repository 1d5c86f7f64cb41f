"""Settings of a training comparison on pictures; the counterpart of `settings.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from unmemorize.corpus import MixtureSettings
from unmemorize.corpus.picture_ids import PictureIdKind
from unmemorize.errors import ConfigError
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.models.diffusion import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTrainSettings:
    """A comparison: every method with every seed, on the same pictures. A row of a batch is a picture."""

    pipeline: str
    """Folder or hub name of the pipeline to start from."""
    start: Literal["weights", "random"] = "weights"
    """Start from the pipeline's weights, or from random weights of its denoiser's config, by seed."""
    ids: PictureIdKind = "content"
    """What an id stands for."""
    mixture: MixtureSettings | None = None
    """Which pictures are repeated, seen once and kept back; None to train on all pictures as they come."""
    kinds: tuple[Kind, ...] = ("hidden",)
    """Where sinks are: hidden, values, or both."""
    blocks: tuple[str, ...] | None = None
    """Groups of blocks that get sinks; all by default."""
    empty_caption_frac: float = 0.1
    """Share of pictures whose caption is dropped, 0..1."""
    empty_caption_sinks: Literal["own", "off"] = "own"
    """Whose sinks a picture without its caption opens."""
    optimization: OptimizationSettings = field(
        default_factory=lambda: OptimizationSettings(learning_rate=1e-4, weight_decay=0.01)
    )
    method: MethodSettings = field(
        default_factory=lambda: MethodSettings(
            sinks=SinkSettings(share_frac=1.0, grown=256, active_frac=None, sinks_per_id=32), compute="masked"
        )
    )
    records: RecordSettings = field(default_factory=RecordSettings)
    methods: tuple[str, ...] = ("standard", "dedup", "cap:8", "sinks")
    """What to compare: standard, dedup, cap:R or sinks; see `methods.parse_method`."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of random weights, order, noise and dropped captions."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train; auto takes what accelerate finds."""

    def __post_init__(self) -> None:
        if self.start not in ("weights", "random"):
            raise ConfigError(f"start is {self.start!r}, expected weights or random")
        if not self.methods or not self.seeds:
            raise ConfigError("methods and seeds are empty, expected at least one of each")
        parsed = [parse_method(name, self.method) for name in self.methods]
        if len({method.folder for method in parsed}) != len(parsed) or len(set(self.seeds)) != len(
            self.seeds
        ):
            raise ConfigError(
                f"methods {list(self.methods)} or seeds {list(self.seeds)} repeat, expected each once"
            )
        for method in parsed:
            if method.kind not in ("standard", "dedup", "cap", "sinks"):
                raise ConfigError(
                    f"method {method.name} is for language models; expected standard, dedup, cap:R or sinks"
                )

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value
