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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unmemorize.errors import missing_extra
from unmemorize.files import write_atomic, write_json_lines
from unmemorize.isolate.diffusion import grow, plan_sinks
from unmemorize.isolate.engine import make_accelerator, tracked
from unmemorize.isolate.jobs import TRAINING_FILE
from unmemorize.isolate.methods import Method, parse_method
from unmemorize.isolate.picture_data import Captioned, PictureData, encode_pictures
from unmemorize.isolate.picture_loop import PictureJob, TrainedPictures, read_picture_training, train_pictures
from unmemorize.isolate.picture_schedule import Split, schedule, split_pictures
from unmemorize.isolate.picture_settings import PictureTrainSettings
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.run_folder import (
    CONFIG_FILE,
    EXAMPLES_FILE,
    model_folder,
    refuse_other_run,
    write_config,
)
from unmemorize.isolate.settings import RecordSettings
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import load
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    write_config(out, "diffusion", material.settings.to_json(), data, others="other pictures")
    if not (out / EXAMPLES_FILE).is_file():
        write_json_lines(out / EXAMPLES_FILE, _examples(material, out))


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
    with tracked(accelerator, settings.records, folder.name):
        return train_pictures(job, accelerator=accelerator, progress=progress)
