"""Settings of a training comparison: corpus, mixture, model, optimization, methods, records.

Frozen dataclasses, checked when they are made; `to_json` and `settings_from_json` are the one way in and out of
`config.json`. What a setting means is written at the setting. Nothing is trained or read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from unmemorize.corpus import PYTHON_DOCS, IdKind, MixtureSettings
from unmemorize.errors import ConfigError
from unmemorize.isolate.methods import LARGEST_FACTOR, MethodSettings, parse_method

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
}
"""Models that need no file: about 1.3 M parameters with a vocabulary of 2,048."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """What to read; see `corpus.read_corpus`."""

    path: str = "python-docs"
    """A file, a folder, a hub name, or the word python-docs."""
    text_column: str = "text"
    """Column that holds the text."""
    source_column: str | None = None
    """Column that names the source of a row, for ids="source"."""
    ids: IdKind = "content"
    """What an id stands for."""
    limit: int | None = None
    """Read at most so many documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The model to start from, its tokenizer, and how documents become rows."""

    model: str = "tiny"
    """A preset, a config.json (random weights), or a checkpoint folder or hub name (trained weights)."""
    tokenizer: str | None = None
    """Folder or hub name; by default the checkpoint's own, or a new byte-level BPE from the training documents."""
    vocabulary_size: int = 2048
    """Tokens of a new tokenizer."""
    length_tokens: int = 256
    """Tokens of a row, at most the model's context; longer documents are cut."""
    rows: Literal["packed", "padded"] = "packed"
    """Several documents a row, or one document a row."""

    def __post_init__(self) -> None:
        _require(self.vocabulary_size >= 257, "vocabulary_size", self.vocabulary_size, "257 or more")
        _require(self.length_tokens >= 8, "length_tokens", self.length_tokens, "8 or more")
        _require(self.rows in ("packed", "padded"), "rows", self.rows, "packed or padded")


_LARGEST_NORM = 1e30  # what float32 multiplies without overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationSettings:
    """AdamW (betas 0.9 and 0.95, weight decay on matrices), linear warm-up, cosine. Defaults are ours."""

    batch_rows: int = 8
    """Rows of a global batch: of one optimizer step, over all processes."""
    micro_rows: int | None = None
    """Rows of one forward pass in one process; by default all of its share. Changes speed and memory only."""
    learning_rate: float = 4e-3
    """Highest learning rate."""
    final_frac: float = 0.1
    """Learning rate at the end, as a share of the highest, 0..1."""
    warmup_frac: float = 0.05
    """Share of the steps that warm up, 0..1."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None for no clipping."""
    passes: int = 1
    """Times the schedule is gone through, shuffled anew each time."""
    max_steps: int | None = None
    """Stop after so many steps; the learning rate is scheduled over these."""
    precision: Literal["float32", "bf16"] = "float32"
    """float32, or bf16 autocast with float32 weights."""

    def __post_init__(self) -> None:
        _require(self.batch_rows >= 1, "batch_rows", self.batch_rows, "1 or more")
        _require(self.micro_rows is None or self.micro_rows >= 1, "micro_rows", self.micro_rows, "1 or more")
        most = LARGEST_FACTOR
        is_rate = 0 < self.learning_rate <= most
        _require(is_rate, "learning_rate", self.learning_rate, f"above 0, at most {most:g}")
        _require(0 <= self.final_frac <= 1, "final_frac", self.final_frac, "0 to 1")
        _require(0 <= self.warmup_frac <= 1, "warmup_frac", self.warmup_frac, "0 to 1")
        _require(0 <= self.weight_decay <= most, "weight_decay", self.weight_decay, f"0 to {most:g}")
        is_norm = self.clip_norm is None or 0 < self.clip_norm <= _LARGEST_NORM
        _require(
            is_norm, "clip_norm", self.clip_norm, f"above 0, at most {_LARGEST_NORM:g}; null clips nothing"
        )
        _require(self.passes >= 1, "passes", self.passes, "1 or more")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        _require(self.precision in ("float32", "bf16"), "precision", self.precision, "float32 or bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """What is written down on the way, and how often. Changes no weight."""

    log_every_steps: int = 10
    """Steps between two lines of metrics."""
    evaluate_every_steps: int | None = None
    """Steps between two evaluations; by default eight in a run. The last step is always evaluated."""
    checkpoint_every_s: float = 60.0
    """Seconds between two checkpoints."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints, in addition."""
    tracker: str | None = None
    """A tracker that accelerate knows, such as tensorboard or wandb."""
    keep_text: bool = True
    """Whether examples.jsonl holds the texts themselves; an audit needs them."""

    def __post_init__(self) -> None:
        _require(self.log_every_steps >= 1, "log_every_steps", self.log_every_steps, "1 or more")
        _require(self.checkpoint_every_s > 0, "checkpoint_every_s", self.checkpoint_every_s, "above 0")
        for name in ("evaluate_every_steps", "checkpoint_every_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """A comparison: every method with every seed, on the same documents in the same order."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    records: RecordSettings = field(default_factory=RecordSettings)
    methods: tuple[str, ...] = ("standard", "dedup", "cap:8", "sinks")
    """What to compare; see `methods.parse_method`."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial weights and data order."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train; auto takes what accelerate finds."""

    def __post_init__(self) -> None:
        _require(len(self.methods) > 0, "methods", list(self.methods), "at least one method")
        _require(len(self.seeds) > 0, "seeds", list(self.seeds), "at least one seed")
        folders = [parse_method(name, self.method).folder for name in self.methods]
        _require(len(set(folders)) == len(folders), "methods", list(self.methods), "each method once")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", list(self.seeds), "each seed once")
        _require(min(self.seeds) >= 0, "seeds", list(self.seeds), "0 or more")
        _require(self.device in ("auto", "cpu"), "device", self.device, "auto or cpu")

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def demo_settings(
    corpus: str = "python-docs", text_column: str = "text", *, is_quick: bool = False
) -> TrainSettings:
    """Return a comparison that takes minutes on two CPU cores; `is_quick` takes seconds and shows no effect."""
    mixture = MixtureSettings(
        num_repeated=16, repeats=60, num_once=700, num_validation=120, min_characters=300
    )
    if is_quick:
        mixture = MixtureSettings(num_repeated=8, repeats=4, num_once=24, num_validation=8)
    elif corpus == PYTHON_DOCS:
        # What is repeated: pieces of the language reference, and docstrings as memorized text of another origin.
        mixture = replace(mixture, repeated_source="topics/", num_heldout=8)
    return TrainSettings(
        corpus=CorpusSettings(path=corpus, text_column=text_column),
        mixture=mixture,
        model=ModelSettings(vocabulary_size=512 if is_quick else 2048, length_tokens=128),
        optimization=OptimizationSettings(max_steps=4 if is_quick else None),
        # In so few steps sinks have to learn faster than the rest, or they do not get there first.
        method=MethodSettings(sink_learning_rate_scale=3.0),
        methods=("standard", "dedup", "cap:8", "sinks"),
    )


def settings_from_json(value: Mapping[str, Any]) -> TrainSettings:
    """Make settings from JSON; settings that are left out keep their defaults.

    Raises:
        ConfigError: if a setting is unknown, of another type, or out of range.
    """
    return settings_of(TrainSettings, value)


def settings_of(kind: type[T], value: Mapping[str, Any]) -> T:
    """Make settings of any kind, a dataclass of dataclasses, from JSON; what is left out keeps its default.

    Raises:
        ConfigError: if a setting is unknown, of another type, or out of range.
    """
    _refuse_unknown(kind, value, "")
    try:
        return TypeAdapter(kind).validate_python(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise cause from error
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"setting {place} cannot be used: {first['msg']}; correct it") from error


def first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """Name the first setting in which two JSON settings differ, with both values; None if they agree."""
    for name in [*here, *(key for key in there if key not in here)]:
        ours, theirs = here.get(name), there.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            inner = first_difference(ours, theirs)
            if inner is not None:
                return f"{name}.{inner}"
        elif ours != theirs:
            return f"{name} is {json.dumps(theirs)} there and {json.dumps(ours)} here"
    return None


def _require(is_fine: bool, name: str, value: object, expected: str) -> None:
    if not is_fine:
        raise ConfigError(f"{name} is {value}, expected {expected}")


def _refuse_unknown(kind: Any, value: Mapping[str, Any], where: str) -> None:
    hints = get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    for name, inner in value.items():
        if name not in known:
            raise ConfigError(f"unknown setting {where}{name}; expected one of {', '.join(sorted(known))}")
        if any(isinstance(n, int) and not -(2**63) <= n < 2**63 for n in _items(inner)):
            raise ConfigError(f"setting {where}{name} holds a whole number of more than 64 bits; correct it")
        if is_dataclass(hints[name]) and isinstance(inner, Mapping):
            _refuse_unknown(hints[name], inner, f"{where}{name}.")


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]
