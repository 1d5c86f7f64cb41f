"""A comparison of training methods on captioned pictures: run folder out, with one pipeline per method and seed.

    run/
      config.json, examples.jsonl, pictures/<name>.png     settings; the pictures that an audit measures
      models/<method>-seed<k>/
        pipeline/          loads with diffusers; with a pool, sinks.json and sinks.safetensors beside it
        metrics.jsonl, training.json, checkpoint/ (while it trains)

All methods of a seed start from the same weights. A mixture repeats some pictures of a collection and keeps others
back; without one, pictures are trained on as they come, and those whose id occurs twice or more count as repeated.
Started again, the command continues where it stopped; a folder that holds another run is refused.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from unmemorize.corpus import MixtureSettings
from unmemorize.corpus.picture_ids import PictureIdKind
from unmemorize.errors import ConfigError, DataError, RunFolderError, missing_extra
from unmemorize.files import read_json, write_atomic, write_json
from unmemorize.isolate.diffusion import grow, plan_sinks
from unmemorize.isolate.engine import environment, make_accelerator
from unmemorize.isolate.jobs import TRAINING_FILE
from unmemorize.isolate.methods import Method, MethodSettings, parse_method
from unmemorize.isolate.picture_data import Captioned, PictureData, encode_pictures, schedule
from unmemorize.isolate.picture_loop import (
    PictureJob,
    TrainedPictures,
    read_picture_training,
    train_pictures,
)
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.run_folder import (
    CONFIG_FILE,
    EXAMPLES_FILE,
    RUN_FORMAT,
    RUN_VERSION,
    model_folder,
    refuse_other_run,
)
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import Kind, load
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator


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


def train(
    settings: PictureTrainSettings,
    pictures: Sequence[Captioned],
    out: str | Path,
    progress: ProgressCallback | None = None,
) -> list[TrainedPictures]:
    """Train every method with every seed, or the ones that are still missing.

    Args:
        settings: what to compare.
        pictures: the collection, squares of one size.
        out: the run folder; made if missing.
        progress: called with steps done, loss and time left.

    Returns:
        One finished training per method and seed; seeds outside, methods inside.

    Raises:
        ConfigError, DataError: if settings or pictures cannot be used; nothing is written then.
        RunFolderError: if `out` holds another run, or cannot be written.
        FileFormatError, CheckpointMismatch: if an unfinished training is damaged or another one.
    """
    out = Path(out)
    accelerator = make_accelerator(settings.records, device=settings.device, folder=out)
    refuse_other_run(out, settings.to_json())
    tell = progress or (lambda _: None)
    pipe = load(settings.pipeline, dtype=torch.float32, run_check=False)
    tell(Progress("encode", 0, len(pictures), "pictures"))
    pipe.to(accelerator.device)
    data = encode_pictures(pipe, pictures, ids=settings.ids)
    split = split_pictures(pictures, data.ids, settings.mixture)
    material = _Material(settings=settings, pictures=pictures, data=data, split=split, pipe=pipe)
    methods = [parse_method(name, settings.method) for name in settings.methods]
    for method in methods if not (out / CONFIG_FILE).is_file() else ():
        _with_plan(material, method, pipe, 0)  # a plan that cannot be made stops the command before it writes
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_run(material, out)
    accelerator.wait_for_everyone()
    pairs = [(seed, method) for seed in settings.seeds for method in methods]
    return [
        _train_one(material, out, method, seed, accelerator, progress, f"{number} of {len(pairs)}")
        for number, (seed, method) in enumerate(pairs, start=1)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which rows of a collection are trained on, how often, and which are kept back.

    Attributes:
        rows: (row, times it is seen in a pass).
        repeated: rows of the repeated pictures, one for each id.
        validation: rows that are never seen.
    """

    rows: tuple[tuple[int, int], ...]
    repeated: tuple[int, ...]
    validation: tuple[int, ...] = ()


def split_pictures(
    pictures: Sequence[Captioned], ids: Sequence[int], mixture: MixtureSettings | None
) -> Split:
    """Split a collection as a mixture says; with a mixture every id enters once.

    Raises:
        DataError: if there are not enough different pictures.
        ConfigError: if the mixture asks for held-out pictures.
    """
    if mixture is None:
        times = Counter(ids)
        first = {id: row for row, id in reversed(list(enumerate(ids)))}
        return Split(
            rows=tuple((row, 1) for row in range(len(ids))),
            repeated=tuple(sorted(first[id] for id, count in times.items() if count > 1)),
        )
    if mixture.num_heldout:
        raise ConfigError(
            "num_heldout is for documents; keep pictures of another origin in a collection of their own"
        )
    distinct = list({id: row for row, id in reversed(list(enumerate(ids)))}.values())
    distinct.sort()
    random.Random(mixture.seed).shuffle(distinct)
    fitting = [row for row in distinct if pictures[row].source.startswith(mixture.repeated_source)]
    repeated = fitting[: mixture.num_repeated]
    rest = [row for row in distinct if row not in set(repeated)]
    if len(repeated) < mixture.num_repeated or len(rest) < mixture.num_validation:
        raise DataError(
            f"there are {len(distinct)} different pictures, {len(fitting)} of them to repeat; expected "
            f"{mixture.num_repeated} to repeat and {mixture.num_validation} for validation; use more pictures or "
            "smaller numbers"
        )
    once = rest[mixture.num_validation :][: mixture.num_once]
    return Split(
        rows=tuple([(row, mixture.repeats) for row in repeated] + [(row, 1) for row in once]),
        repeated=tuple(repeated),
        validation=tuple(rest[: mixture.num_validation]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Material:
    """What all trainings of a run share, in memory."""

    settings: PictureTrainSettings
    pictures: Sequence[Captioned]
    data: PictureData
    split: Split
    pipe: Pipeline

    @property
    def repeated_ids(self) -> frozenset[int]:
        return frozenset(self.data.ids[row] for row in self.split.repeated)

    def sink_ids(self, method: Method) -> list[int]:
        return [method.sink_id(id, self.repeated_ids) for id in self.data.ids]


def _write_run(material: _Material, out: Path) -> None:
    """Write what comes before the models; a run that is continued keeps what it has."""
    split = material.split
    data = {
        "num_repeated": len(split.repeated),
        "num_trained": len(split.rows),
        "num_validation": len(split.validation),
        "digest": material.data.digest,
    }
    if (out / CONFIG_FILE).is_file():
        theirs = read_json(out / CONFIG_FILE, format=RUN_FORMAT, version=RUN_VERSION).get("data")
        if theirs != data:
            raise RunFolderError(f"{out} was trained on other pictures; choose another folder")
    else:
        head = {
            "format": RUN_FORMAT,
            "format_version": RUN_VERSION,
            "kind": "training",
            "family": "diffusion",
        }
        rest = {"settings": material.settings.to_json(), "data": data, "environment": environment()}
        write_json(out / CONFIG_FILE, head | rest)
    if not (out / EXAMPLES_FILE).is_file():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _examples(material, out)]
        write_atomic(out / EXAMPLES_FILE, "".join(lines))


def _examples(material: _Material, out: Path) -> list[dict[str, Any]]:
    """List the pictures that an audit measures, and store them; `repeats` is how often plain training saw them."""
    data, seen = material.data, Counter[int]()
    for row, times in material.split.rows:
        seen[data.ids[row]] += times
    examples: list[dict[str, Any]] = []
    for group, rows in (("target", material.split.repeated), ("ordinary", material.split.validation)):
        for number, row in enumerate(rows):
            picture, name = material.pictures[row], f"{group}-{number:04d}"
            example: dict[str, Any] = {
                "name": name,
                "group": group,
                "source": picture.source,
                "repeats": seen[data.ids[row]],
                "id": data.ids[row],
            }
            if material.settings.records.keep_text:
                write_atomic(out / "pictures" / f"{name}.png", _png(picture))
                example |= {"caption": picture.caption, "picture": f"pictures/{name}.png"}
            examples.append(example)
    return examples


def _png(picture: Captioned) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "images") from error
    stream = io.BytesIO()
    Image.fromarray(picture.pixels).save(stream, "PNG")
    return stream.getvalue()


def _fresh(material: _Material, seed: int) -> Pipeline:
    """Return the pipeline with a denoiser of its own: the weights it came with, or random ones by seed."""
    denoiser: Any = denoiser_of(material.pipe)
    if material.settings.start == "weights":
        return with_denoiser(material.pipe, copy.deepcopy(denoiser))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(denoiser).from_config(denoiser.config)
    return with_denoiser(material.pipe, fresh)


def _with_plan(
    material: _Material, method: Method, pipe: Pipeline, seed: int
) -> tuple[Pipeline, SinkPlan | None]:
    """Give a pipeline the pool of a method that has one: grown where the settings say so, else carved."""
    if not method.has_pool:
        return pipe, None
    sinks, settings = method.settings.sinks, material.settings
    if sinks.grown:
        pipe = grow(pipe, sinks.grown, kinds=settings.kinds, seed=seed)
    plan = plan_sinks(pipe, sinks, kinds=settings.kinds, blocks=settings.blocks)
    if plan.scheme == "disjoint":
        owners = material.sink_ids(method)
        plan = plan.with_sources(tuple(sorted({owners[row] for row, _ in material.split.rows} - {0})))
    return pipe, plan


def _train_one(
    material: _Material,
    out: Path,
    method: Method,
    seed: int,
    accelerator: Accelerator,
    progress: ProgressCallback | None,
    place: str,
) -> TrainedPictures:
    settings, data = material.settings, material.data
    folder = model_folder(out, method.name, seed)
    trained = replace(settings, methods=(method.name,), seeds=(seed,), records=RecordSettings())
    text = json.dumps(trained.to_json(), sort_keys=True)
    identity = {"settings": hashlib.sha256(text.encode()).hexdigest()[:16]}
    if (folder / TRAINING_FILE).is_file():
        return read_picture_training(folder, identity)
    pipe, plan = _with_plan(material, method, _fresh(material, seed), seed)
    job = PictureJob(
        pipe=pipe,
        data=data,
        order=schedule(
            material.split.rows, data.ids, method.cap, seed=seed, passes=settings.optimization.passes
        ),
        sink_ids=material.sink_ids(method),
        validation=material.split.validation,
        repeated=material.split.repeated,
        method=method,
        plan=plan,
        seed=seed,
        empty_caption_frac=settings.empty_caption_frac,
        empty_caption_sinks=settings.empty_caption_sinks,
        optimization=settings.optimization,
        records=settings.records,
        folder=folder,
        identity=identity,
        title=f"{method.name}, seed {seed} ({place})",
    )
    if settings.records.tracker is not None:
        accelerator.init_trackers(folder.name)
    run = train_pictures(job, accelerator=accelerator, progress=progress)
    for tracker in accelerator.trackers if settings.records.tracker is not None else ():
        tracker.finish()
    return run
