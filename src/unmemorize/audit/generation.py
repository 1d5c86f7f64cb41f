"""Making the pictures of an audit: every prompt with the same seeds in every state, as files that can be continued.

Each picture has a generator of its own on the CPU, seeded by its seed, so that one seed means one starting noise in
every state, on every device. Pictures are made in a fixed layout of batches, and a batch is made again unless all of
it is there; so a run that was interrupted ends in the files of one that was not.

    pictures/<state>/settings.json         what the pictures were made with; another run's are refused
    pictures/<state>/<prompt>-<seed>.png   number of the prompt in the audit, and seed
    pictures/<state>/made.jsonl            time and size of each batch

What this file does not do: decide on states (`ways.py`) or look at pictures. Source: ours.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unmemorize.audit.pictures import Picture, PromptCase, write_picture
from unmemorize.audit.ways import PictureAuditSettings, Way
from unmemorize.errors import ConfigError, DataError, ModelNotSupported, RunFolderError
from unmemorize.files import append_json_line, read_json, read_json_lines, write_json
from unmemorize.models.base import fingerprint_of
from unmemorize.models.denoising import Pipeline
from unmemorize.records import Progress, ProgressCallback

PICTURES_FORMAT = "unmemorize.pictures"
PICTURES_VERSION = 1

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Made:
    """The pictures of one state.

    Attributes:
        paths: for each prompt, in order, the files by seed, relative to the run folder.
        seconds: time spent on making them, over all runs.
        smallest_batch: pictures per call after halving; equals `batch_size` if memory never ran out.
        num_new: pictures that this call has made.
    """

    paths: tuple[tuple[str, ...], ...]
    seconds: float
    smallest_batch: int
    num_new: int


def make_pictures(
    way: Way,
    cases: Sequence[PromptCase],
    settings: PictureAuditSettings,
    out_folder: str | Path,
    *,
    progress: ProgressCallback | None = None,
) -> Made:
    """Make what is missing of a state's pictures. The pipeline is as it was afterwards, also after an error.

    Args:
        way: the state.
        cases: all prompts of the audit, in order.
        settings: seeds, steps, guidance, size.
        out_folder: the run folder.
        progress: called after every batch, and with a message when memory ran out.

    Raises:
        RunFolderError: if the folder holds pictures made with other settings.
        ConfigError: if memory runs out for a single picture.
        DataError: if a picture is not made of finite numbers.
    """
    out_folder, folder = Path(out_folder), Path(out_folder) / "pictures" / way.state
    _start(folder, _identity(way, cases, settings))
    jobs = [(number, seed) for number in range(len(cases)) for seed in settings.seeds]
    files = {job: folder / f"{job[0]:04d}-{job[1]}.png" for job in jobs}
    batches = [
        batch
        for batch in _layout(jobs, settings.batch_size, is_single=way.is_by_prompt)
        if not all(files[job].exists() for job in batch)
    ]
    maker = _Maker(way, cases, settings, settings.batch_size)
    todo, done = sum(map(len, batches)), 0
    if batches:
        with _plain_output(way.pipe), way.context():
            for batch in batches:
                started_s = time.perf_counter()
                for job, picture in zip(batch, maker.make(batch, progress), strict=True):
                    if not files[job].exists():
                        write_picture(files[job], picture)
                done += len(batch)
                seconds = time.perf_counter() - started_s
                row = {"pictures": len(batch), "seconds": seconds, "batch_size": maker.limit}
                append_json_line(folder / "made.jsonl", row)
                if progress is not None:
                    progress(Progress(f"pictures: {way.label}", done, todo, "pictures"))
    log = read_json_lines(folder / "made.jsonl") if (folder / "made.jsonl").exists() else []
    paths = tuple(
        tuple(files[number, seed].relative_to(out_folder).as_posix() for seed in settings.seeds)
        for number in range(len(cases))
    )
    smallest = min([settings.batch_size, *(int(row["batch_size"]) for row in log)])
    return Made(paths, sum(float(row["seconds"]) for row in log), smallest, done)


@dataclass(slots=True)
class _Maker:
    """Calls one pipeline; `limit` is how many pictures fit into memory as far as is known."""

    way: Way
    cases: Sequence[PromptCase]
    settings: PictureAuditSettings
    limit: int

    def make(self, batch: Sequence[tuple[int, int]], progress: ProgressCallback | None) -> list[Picture]:
        """Make the pictures of (prompt number, seed) pairs, in smaller pieces when memory runs out."""
        made: list[Picture] = []
        while len(made) < len(batch):
            piece = batch[len(made) : len(made) + self.limit]
            message = ""
            try:
                made += self._call(piece)
            except (MemoryError, RuntimeError) as error:
                message = _memory_message(error)
                if not message:
                    raise
            if message:  # outside the handler, so that the failed call's tensors are gone
                self._halve(len(piece), message, progress)
        return made

    def _halve(self, failed: int, message: str, progress: ProgressCallback | None) -> None:
        if failed == 1:
            raise ConfigError(
                f"memory ran out for a single picture in state {self.way.state!r} ({message}); "
                "choose a smaller size_px or another device"
            )
        self.limit = failed // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if progress is not None:
            note = f"memory ran out; {self.limit} pictures per call from here on"
            progress(Progress(f"pictures: {self.way.label}", 0, 0, "pictures", note))

    def _call(self, piece: Sequence[tuple[int, int]]) -> list[Picture]:
        prompts = [self.cases[number].prompt for number, _ in piece]
        seeds = tuple(seed for _, seed in piece)
        known = inspect.signature(type(self.way.pipe).__call__).parameters
        missing = sorted({"prompt", "generator", "output_type"} - set(known))
        if missing:
            raise ModelNotSupported(
                f"{type(self.way.pipe).__name__} takes no {missing[0]}; pass a text-to-image pipeline"
            )
        arguments = {name: value for name, value in self._usual(prompts, seeds).items() if name in known}
        if self.way.arguments is not None:
            own = dict(self.way.arguments(prompts[0], seeds))
            if own.get("prompt_embeds") is not None and "prompt" not in own:
                del arguments["prompt"]
            if _is_one_prompt(own):
                arguments["num_images_per_prompt"] = len(piece)
            arguments |= own
        factor, side = int(getattr(self.way.pipe, "vae_scale_factor", 1)), self.settings.size_px
        if side is not None and side % factor:
            raise ConfigError(
                f"size_px is {side}; pictures of state {self.way.state!r} need a multiple of {factor} pixels"
            )
        own_context = self.way.case_context
        context = nullcontext() if own_context is None else own_context(self.cases[piece[0][0]])
        with context:
            images = self.way.pipe(**arguments).images
        return _as_pictures(images, len(piece), self.way.state)

    def _usual(self, prompts: list[str], seeds: tuple[int, ...]) -> dict[str, Any]:
        size = {"height": self.settings.size_px, "width": self.settings.size_px}
        return {
            "prompt": prompts,
            "num_inference_steps": self.settings.num_steps,
            "guidance_scale": self.settings.guidance,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
            "use_resolution_binning": False,
            "clean_caption": False,
            **(size if self.settings.size_px is not None else {}),
        }


def _is_one_prompt(arguments: Mapping[str, Any]) -> bool:
    """Tell whether arguments carry a prompt of their own that all pictures of the call share."""
    embedding = arguments.get("prompt_embeds")
    if embedding is not None:
        return len(embedding) == 1
    return isinstance(arguments.get("prompt"), str)


def _memory_message(error: BaseException) -> str:
    """Return the first line of an error that says that memory ran out; empty for every other error."""
    text = str(error).strip()
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_MEMORY.search(text))
    return (text.splitlines()[0] if text else type(error).__name__) if is_memory else ""


def _as_pictures(images: Any, expected: int, state: str) -> list[Picture]:
    """Turn a pipeline's output (float arrays from 0 to 1, or Pillow pictures) into 8-bit arrays."""
    if len(images) != expected:
        raise ModelNotSupported(
            f"the pipeline of state {state!r} made {len(images)} pictures where {expected} were asked for"
        )
    made: list[Picture] = []
    for image in images:
        values = np.asarray(image)
        if values.dtype != np.uint8:
            if not np.isfinite(values).all():
                raise DataError(
                    f"the pipeline of state {state!r} made a picture of numbers that are not finite; "
                    "load it in float32 or bfloat16"
                )
            values = np.clip(np.round(values * 255), 0, 255).astype(np.uint8)
        made.append(values)
    return made


def _layout(
    jobs: Sequence[tuple[int, int]], batch_size: int, *, is_single: bool
) -> list[list[tuple[int, int]]]:
    """Cut jobs into batches; `is_single`: no batch holds two prompts."""
    batches: list[list[tuple[int, int]]] = []
    for job in jobs:
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or (is_single and batches[-1][-1][0] != job[0]):
            batches.append([])
        batches[-1].append(job)
    return batches


def _identity(way: Way, cases: Sequence[PromptCase], settings: PictureAuditSettings) -> dict[str, Any]:
    """Describe what decides over the pictures of a state, as JSON."""
    scheduler = getattr(way.pipe, "scheduler", None)
    options = {
        name: option
        for name, option in dict(getattr(scheduler, "config", {})).items()
        if not name.startswith("_")  # notes of diffusers, in an order that changes from process to process
    }
    return {
        "state": way.state,
        "identity": way.identity,
        "num_neurons": way.num_neurons,
        "pipeline": type(way.pipe).__name__,
        "weights": _weights(way.pipe),
        "scheduler": [
            type(scheduler).__name__,
            json.loads(json.dumps(options, default=str), parse_constant=str),
        ],
        "seeds": list(settings.seeds),
        "num_steps": settings.num_steps,
        "guidance": settings.guidance,
        "size_px": settings.size_px,
        "prompts": [case.title for case in cases],
    }


def _weights(pipe: Pipeline) -> dict[str, str]:
    """Digest the weights of each part of a pipeline, outside its state; parts that are offloaded have none to read."""
    parts = {
        name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)
    }
    return {
        name: "offloaded" if any(p.is_meta for p in part.parameters()) else fingerprint_of("-", part)
        for name, part in sorted(parts.items())
        if name != "safety_checker"
    }


def _start(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "settings.json"
    value = {"format": PICTURES_FORMAT, "format_version": PICTURES_VERSION, **identity}
    if not path.exists():
        if folder.exists() and any(folder.glob("*.png")):
            raise RunFolderError(f"{folder} holds pictures of unknown origin; choose a new folder")
        write_json(path, value)
        return
    stored = read_json(path, format=PICTURES_FORMAT, version=PICTURES_VERSION)
    changed = [name for name in value if stored.get(name) != value[name]]
    if changed:
        raise RunFolderError(
            f"{folder} holds pictures made with other settings ({', '.join(changed)}); choose a new folder, or delete "
            "this one to make them again"
        )


@contextmanager
def _plain_output(pipe: Pipeline) -> Iterator[None]:
    """Silence a pipeline's progress bar and take off its safety checker: black pictures would look like removal."""
    checker = getattr(pipe, "safety_checker", None)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    has_bar = hasattr(pipe, "set_progress_bar_config")
    if checker is not None:
        pipe.safety_checker = None
    if has_bar:
        pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if has_bar:
            pipe.set_progress_bar_config(**bar)
        if checker is not None:
            pipe.safety_checker = checker
