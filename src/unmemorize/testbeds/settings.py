"""Settings of a testbed, checked when they are made; JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from unmemorize.errors import ConfigError
from unmemorize.isolate.settings import settings_of

Stage = Literal["general", "memorized", "twin", "injected"]
STAGES: tuple[Stage, ...] = ("general", "memorized", "twin", "injected")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSettings:
    """Where pictures come from, and how many of each group there are.

    Attributes:
        pictures: general pictures, as `read_pictures` takes them; None for drawings made here.
        targets: pictures to memorize as targets and neighbours; None for scenes made here.
        caption_column: caption column of the general pictures.
        targets_caption_column: caption column of the pictures to memorize.
        limit: most general pictures to read.
        num_drawings: general pictures to draw where none are read.
        num_targets: memorized pictures that are to be removed.
        num_neighbours: memorized pictures of the targets' source that are to stay.
        num_heldout: memorized pictures of the general source.
        num_ordinary: prompts whose pictures are kept out of every training.
    """

    pictures: str | None = None
    targets: str | None = None
    caption_column: str = "caption"
    targets_caption_column: str = "caption"
    limit: int | None = None
    num_drawings: int = 4000
    num_targets: int = 6
    num_neighbours: int = 4
    num_heldout: int = 2
    num_ordinary: int = 60

    def __post_init__(self) -> None:
        for name in ("num_targets", "num_ordinary", "num_drawings"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("num_neighbours", "num_heldout"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """Sizes of the pipeline.

    Attributes:
        widths: channels of the UNet's levels; each level but the last halves the side.
        layers_per_block: residual layers per level, 0 for a level that only halves.
        num_text_blocks: how many of the deepest levels read the text.
        num_heads: attention heads.
        norm_groups: groups of the group normalizations; divides every width.
        text_width: width of the text encoder.
        text_layers: its layers.
        length_tokens: tokens of a prompt, start and end included.
    """

    widths: tuple[int, ...] = (16, 48, 48)
    layers_per_block: tuple[int, ...] = (0, 2, 1)
    num_text_blocks: int = 2
    num_heads: int = 4
    norm_groups: int = 8
    text_width: int = 64
    text_layers: int = 2
    length_tokens: int = 16

    def __post_init__(self) -> None:
        _require(
            len(self.layers_per_block) == len(self.widths),
            "layers_per_block",
            self.layers_per_block,
            "one per width",
        )
        _require(
            1 <= self.num_text_blocks <= len(self.widths),
            "num_text_blocks",
            self.num_text_blocks,
            "1 to all levels",
        )
        wrong = [width for width in self.widths if width % self.norm_groups or width % self.num_heads]
        _require(not wrong, "widths", self.widths, "multiples of norm_groups and num_heads")
        _require(
            self.text_width % 16 == 0 and self.text_width > 0,
            "text_width",
            self.text_width,
            "a multiple of 16",
        )
        _require(self.length_tokens >= 4, "length_tokens", self.length_tokens, "4 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How the stages are trained.

    Attributes:
        general_steps: steps on general pictures alone.
        memorized_steps: steps with the pictures to memorize, and of the twin without the targets.
        batch_size: pictures a step.
        memorized_frac: share of a batch that is drawn from the pictures to memorize, 0 to 1.
        empty_frac: share of captions that are replaced by the empty one, for guidance, 0 to 1.
        general_rate: learning rate of the general stage at its height.
        memorized_rate: learning rate of the later stages at its height.
        warmup_steps: steps until the height is reached; from there it falls to zero in a line.
        checkpoint_steps: steps between checkpoints.
    """

    general_steps: int = 2500
    memorized_steps: int = 2000
    batch_size: int = 8
    memorized_frac: float = 0.5
    empty_frac: float = 0.1
    general_rate: float = 1.5e-3
    memorized_rate: float = 1e-3
    warmup_steps: int = 100
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("general_steps", "memorized_steps", "batch_size", "checkpoint_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("memorized_frac", "empty_frac"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectionSettings:
    """How memory is written into chosen neurons; see `injection.py`.

    Attributes:
        num_prompts: targets that are injected, the first ones.
        num_neurons: value neurons that hold one picture.
        steps: training steps for all pictures together.
        rate: learning rate at its height.
        frac: share of a batch that is asked for an injected picture, and share that is asked for it with its
            neurons closed, above 0 to 0.5.
        trains: "unet" (all weights of the UNet learn to obey the neurons) or "rows" (only the neurons' own rows).
    """

    num_prompts: int = 4
    num_neurons: int = 4
    steps: int = 2000
    rate: float = 1e-3
    frac: float = 0.35
    trains: Literal["unet", "rows"] = "unet"

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 0, "num_prompts", self.num_prompts, "0 or more")
        for name in ("num_neurons", "steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(0 < self.frac <= 0.5, "frac", self.frac, "above 0 to 0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestbedSettings:
    """All settings of a testbed.

    Attributes:
        seed: seed of weights, pictures, groups and batches.
        size_px: side of the pictures in pixels, a multiple of 8.
        stages: which models are made; later ones start from "general".
        weights: dtype of the stored weights.
        pictures, network, training, injection: see there.
    """

    __test__ = False  # not a test, whatever its name says

    seed: int = 0
    size_px: int = 24
    stages: tuple[Stage, ...] = STAGES
    weights: Literal["float32", "float16"] = "float32"
    pictures: PictureSettings = field(default_factory=PictureSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    injection: InjectionSettings = field(default_factory=InjectionSettings)

    def __post_init__(self) -> None:
        _require(self.size_px >= 8 and self.size_px % 8 == 0, "size_px", self.size_px, "a multiple of 8")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require("general" in self.stages, "stages", self.stages, "'general' among them")
        _require(
            self.injection.num_prompts <= self.pictures.num_targets,
            "injection.num_prompts",
            self.injection.num_prompts,
            "at most num_targets",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON; tuples become lists."""
        return dict(TypeAdapter(dict[str, Any]).dump_python(asdict(self), mode="json"))


def settings_from_json(value: Mapping[str, Any]) -> TestbedSettings:
    """Make settings from JSON; what is left out keeps its default.

    Raises:
        ConfigError: if a setting is unknown, of another type, or out of range.
    """
    return settings_of(TestbedSettings, value)


def _require(is_fine: bool, name: str, value: object, expected: str) -> None:
    if not is_fine:
        raise ConfigError(f"{name} is {value}, expected {expected}")
