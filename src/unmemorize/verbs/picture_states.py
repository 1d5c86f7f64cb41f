"""States in which the models of a run on pictures are measured: every method, and with a pool every state of its sinks.

The first method's model is "before". A model with sinks is measured with all closed (off: what is shipped), with each
repeated picture's own open (own), with another repeated picture's open (foreign: the placebo of own), with every sink
at its share (all), and with the placebo of closing: own sinks open, and off as many random shared neurons of the same
sites as the picture owns sinks. Ordinary pictures were never trained on and open no sinks in any of them but all, as in
language models. Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import RunFolderError
from unmemorize.verbs.devices import dtype_of, on_device
from unmemorize.verbs.diffusion import Loading, opened

if TYPE_CHECKING:
    from torch import Tensor

    from unmemorize.audit.pictures import PromptCase
    from unmemorize.audit.ways import Way
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


def measured(run: Path) -> tuple[list[PromptCase], dict[str, int]]:
    """Read the pictures of a run that are measured, and whose sinks a prompt opens (0: none).

    Raises:
        RunFolderError: if the run kept no pictures.
    """
    from unmemorize.audit.pictures import PromptCase
    from unmemorize.files import read_json_lines

    rows = read_json_lines(run / "examples.jsonl")
    if not all("caption" in row and "picture" in row for row in rows):
        raise RunFolderError(f"{run} kept no pictures (records.keep_text is false); train it again with them")
    cases = [
        PromptCase(prompt=row["caption"], group=row["group"], pictures=(run / row["picture"],))
        for row in rows
    ]
    return cases, {row["caption"]: int(row["id"]) if row["group"] == "target" else 0 for row in rows}


def ways_of(
    run: Path, methods: list[str], seed: int, owners: Mapping[str, int], loading: Loading
) -> Iterator[Way]:
    """Yield the states of all models of one seed, the first method's as "before".

    Raises:
        RunFolderError: if a model is not trained yet.
    """
    from unmemorize.audit.ways import Way
    from unmemorize.files import read_json_lines
    from unmemorize.isolate.run_folder import model_folder
    from unmemorize.isolate.sink_files import load_with_sinks

    is_first = True
    for method in sorted(methods, key=lambda name: name.startswith("sinks")):
        folder = model_folder(run, method, seed)
        if not (folder / "training.json").is_file():
            raise RunFolderError(f"{folder} is not trained yet; run unmemorize train again to finish it")
        loss = read_json_lines(folder / "metrics.jsonl")[-1]["validation_loss"]
        known = "" if loss is None else f"validation loss {loss:.4f}"
        if (folder / "pipeline" / "sinks.json").is_file():
            pipe, plan = load_with_sinks(folder / "pipeline", dtype=dtype_of(loading.precision))
            on_device(pipe, loading.device)
            yield from _with_sinks(method, pipe, plan, owners, seed, known, is_first=is_first)
        else:
            pipe = opened(folder / "pipeline", loading)
            state = "before" if is_first else _word(method)
            yield Way(state=state, label=method, pipe=pipe, description=known, is_rival=not is_first)
        is_first = False


def _word(method: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", method.lower())


def _with_sinks(
    method: str,
    pipe: Pipeline,
    plan: SinkPlan,
    owners: Mapping[str, int],
    seed: int,
    known: str,
    *,
    is_first: bool,
) -> Iterator[Way]:
    """Yield the states of one model with sinks; without another model before it, off is "before"."""
    import torch

    from unmemorize.audit.ways import Way
    from unmemorize.isolate.diffusion import sink_state
    from unmemorize.remove.diffusion import deactivated

    repeated = torch.tensor(sorted({id for id in owners.values() if id}), dtype=torch.int64)
    placebo = f"placebo-{_word(method)}"

    def block(state: State) -> Callable[..., AbstractContextManager[Any]]:
        candidates = repeated if state == "foreign" else None
        return partial(sink_state, pipe, plan, state, candidates=candidates)

    for state, text in _STATES.items():
        has_owner = state in ("own", "foreign")
        yield Way(
            state="before" if is_first and state == "off" else f"{_word(method)}-{state}",
            label=f"{method}, {state}",
            pipe=pipe,
            description=f"{text}; {known}" if state == "off" and known else text,
            is_rival=state != "off",
            placebo=placebo,
            num_neurons=len(plan.pool()) if state == "off" else 0,
            identity=f"{method} {state} of repeated pictures",
            **(
                {"prompt_context": partial(_owned, block(state), owners)}
                if has_owner
                else {"context": block(state)}
            ),
        )
    drawn = plan.placebo(seed=seed)
    yield Way(
        state=placebo,
        label=f"{method}, placebo",
        pipe=pipe,
        description=_PLACEBO,
        is_rival=True,
        num_neurons=len(drawn),
        identity=f"{method} own of repeated pictures without shared neurons drawn with {seed}",
        context=partial(deactivated, pipe, drawn),
        prompt_context=partial(_owned, block("own"), owners),
    )


def _owned(
    block: Callable[..., AbstractContextManager[Any]], owners: Mapping[str, int], prompt: str
) -> AbstractContextManager[Any]:
    import torch

    ids: Tensor = torch.tensor([owners[prompt]])
    return block(ids=ids)
