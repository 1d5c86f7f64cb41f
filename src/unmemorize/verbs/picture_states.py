"""States in which the models of a run on pictures are measured: every method, and with a pool every state of its sinks.

The first method's model is "before". A model with sinks is measured with all closed (off: what is shipped), with each
repeated picture's own open (own), with another repeated picture's open (foreign: the placebo of own), with every sink
at its share (all), and with the placebo of closing: own sinks open, and off as many random shared neurons of the same
sites as the picture owns sinks. Ordinary pictures were never trained on and open no sinks in any of them but all, as in
language models. In every state the denoising loss of the measured pictures is taken as well, that of the ordinary ones
being the validation loss. Source: ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import RunFolderError
from unmemorize.verbs.devices import dtype_of, on_device
from unmemorize.verbs.diffusion import Loading, opened

if TYPE_CHECKING:
    from torch import Tensor

    from unmemorize.audit.pictures import Picture, PromptCase
    from unmemorize.audit.ways import Way
    from unmemorize.isolate.picture_data import PictureData
    from unmemorize.isolate.plan import SinkPlan
    from unmemorize.isolate.states import State
    from unmemorize.models.denoising import Pipeline

_STATES: dict[State, str] = {
    "off": "all sinks closed: the model that is shipped",
    "own": "each repeated picture's own sinks open",
    "foreign": "another repeated picture's sinks open, the placebo of own",
    "all": "every sink open at its share",
}
_PLACEBO = "own sinks open, and off as many random shared neurons as a picture owns sinks: the placebo of off"


Block = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredPictures:
    """The pictures of a run that are measured, N.

    Attributes:
        cases: their captions as prompts; pictures that share one are told apart by their names.
        owners: id whose sinks each of them opens, 0 for none, length N.
        limits: what the reader of the audit should know about them.
    """

    cases: tuple[PromptCase, ...]
    owners: tuple[int, ...]
    limits: tuple[str, ...] = ()

    @property
    def repeated(self) -> list[int]:
        """Ids of the repeated pictures, sorted."""
        return sorted(set(self.owners) - {0})

    def owner(self, case: PromptCase) -> Tensor:
        """Return the id whose sinks a case opens, shape (1,), int64."""
        import torch

        return torch.tensor([self.owners[self.cases.index(case)]])


def measured(run: Path) -> MeasuredPictures:
    """Read the pictures of a run that are measured.

    An ordinary picture whose caption is that of a repeated one is left out: its prompt asks for what was memorized.

    Raises:
        RunFolderError: if the run kept no pictures.
    """
    from unmemorize.audit.pictures import PromptCase
    from unmemorize.files import read_json_lines

    rows = read_json_lines(run / "examples.jsonl")
    if not all("caption" in row and "picture" in row for row in rows):
        raise RunFolderError(f"{run} kept no pictures (records.keep_text is false); train it again with them")
    memorized = {row["caption"] for row in rows if row["group"] == "target"}
    kept = [row for row in rows if row["group"] == "target" or row["caption"] not in memorized]
    times = Counter(row["caption"] for row in kept)
    limits = []
    if len(kept) < len(rows):
        limits.append(
            f"{len(rows) - len(kept)} ordinary pictures have the caption of a repeated one and are left out: their "
            "prompt asks for what was memorized."
        )
    if num_shared := sum(count for count in times.values() if count > 1):
        limits.append(
            f"{num_shared} pictures share their caption with another one. Each is measured against itself, with its "
            "own sinks where sinks are open; elsewhere they are made from the same words and seeds, so that intervals "
            "are a little too narrow."
        )
    cases = [
        PromptCase(
            prompt=row["caption"],
            group=row["group"],
            pictures=(run / row["picture"],),
            name=row["name"] if times[row["caption"]] > 1 else "",
        )
        for row in kept
    ]
    owners = [int(row["id"]) if row["group"] == "target" else 0 for row in kept]
    return MeasuredPictures(cases=tuple(cases), owners=tuple(owners), limits=tuple(limits))


def ways_of(
    run: Path, methods: Sequence[str], seed: int, pictures: MeasuredPictures, loading: Loading
) -> Iterator[Way]:
    """Yield the states of all models of one seed, the first method's as "before".

    Raises:
        RunFolderError: if a model is not trained yet.
    """
    from unmemorize.audit.ways import Way
    from unmemorize.isolate.picture_data import encode_pictures
    from unmemorize.isolate.run_folder import model_folder
    from unmemorize.isolate.sink_files import load_with_sinks

    data: PictureData | None = None  # encoders and VAE are not trained: those of the first model serve all
    for method in sorted(methods, key=lambda name: name.startswith("sinks")):
        folder = model_folder(run, method, seed)
        if not (folder / "training.json").is_file():
            raise RunFolderError(f"{folder} is not trained yet; run unmemorize train again to finish it")
        plan: SinkPlan | None = None
        if (folder / "pipeline" / "sinks.json").is_file():
            pipe, plan = load_with_sinks(folder / "pipeline", dtype=dtype_of(loading.precision))
            on_device(pipe, loading.device)
        else:
            pipe = opened(folder / "pipeline", loading)
        is_first = data is None
        data = encode_pictures(pipe, [_captioned(case) for case in pictures.cases]) if data is None else data
        losses = partial(_losses, pipe, data, pictures)
        if plan is not None:
            yield from _with_sinks(method, pipe, plan, pictures, seed, losses, is_first=is_first)
        else:
            state = "before" if is_first else _word(method)
            yield Way(state=state, label=method, pipe=pipe, is_rival=not is_first, losses=losses)


@dataclass(frozen=True, slots=True, eq=False)
class _Captioned:
    """A measured picture as encoding wants it."""

    caption: str
    pixels: Picture
    name: str = ""
    source: str = ""


def _captioned(case: PromptCase) -> _Captioned:
    from unmemorize.audit.pictures import read_picture

    return _Captioned(case.prompt, read_picture(case.pictures[0]))


def _losses(pipe: Pipeline, data: PictureData, pictures: MeasuredPictures, *blocks: Block) -> list[float]:
    """Measure the denoising loss of every picture, shape (N,), inside `with` blocks that attach sinks, or none.

    Group by group, so that the ordinary ones meet the noise under which training logged its validation loss.
    """
    import torch

    from unmemorize.isolate.picture_data import picture_losses
    from unmemorize.models.denoising import denoiser_of

    found = [0.0] * len(pictures.cases)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block())
        for group in dict.fromkeys(case.group for case in pictures.cases):
            rows = [number for number, case in enumerate(pictures.cases) if case.group == group]
            ids = torch.tensor([pictures.owners[row] for row in rows]) if blocks else None
            losses = picture_losses(denoiser_of(pipe), pipe.scheduler, data, rows, sink_ids=ids)
            for row, loss in zip(rows, losses.tolist(), strict=True):
                found[row] = loss
    return found


def _word(method: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", method.lower())


def _with_sinks(
    method: str,
    pipe: Pipeline,
    plan: SinkPlan,
    pictures: MeasuredPictures,
    seed: int,
    losses: Callable[..., list[float]],
    *,
    is_first: bool,
) -> Iterator[Way]:
    """Yield the states of one model with sinks; without another model before it, off is "before"."""
    import torch

    from unmemorize.audit.ways import Way
    from unmemorize.isolate.diffusion import sink_state
    from unmemorize.remove.diffusion import deactivated

    repeated = torch.tensor(pictures.repeated, dtype=torch.int64)
    placebo = f"placebo-{_word(method)}"

    def block(state: State) -> Block:
        candidates = repeated if state == "foreign" else None
        return partial(sink_state, pipe, plan, state, candidates=candidates)

    for state, text in _STATES.items():
        attached = block(state)
        has_owner = state in ("own", "foreign")
        yield Way(
            state="before" if is_first and state == "off" else f"{_word(method)}-{state}",
            label=f"{method}, {state}",
            pipe=pipe,
            description=text,
            is_rival=state != "off",
            placebo=placebo,
            num_neurons=len(plan.pool()) if state == "off" else 0,
            identity=f"{method} {state} of repeated pictures",
            losses=partial(losses, attached),
            **({"case_context": partial(_owned, attached, pictures)} if has_owner else {"context": attached}),
        )
    drawn = plan.placebo(seed=seed)
    closed = partial(deactivated, pipe, drawn)
    yield Way(
        state=placebo,
        label=f"{method}, placebo",
        pipe=pipe,
        description=_PLACEBO,
        is_rival=True,
        num_neurons=len(drawn),
        identity=f"{method} own of repeated pictures without shared neurons drawn with {seed}",
        context=closed,
        losses=partial(losses, closed, block("own")),
        case_context=partial(_owned, block("own"), pictures),
    )


def _owned(block: Block, pictures: MeasuredPictures, case: PromptCase) -> AbstractContextManager[Any]:
    return block(ids=pictures.owner(case))
