"""Do sinks isolate pictures? Train standard, dedup, cap:R and sinks on testbeds, measure every state, and attack.

    python recipes/picture_sinks.py TESTBED0 TESTBED1 TESTBED2 --out RUNS
    python recipes/picture_sinks.py TESTBED0 TESTBED1 TESTBED2 --out SWEEP --rivals standard --variants "grown few"
    python recipes/picture_sinks_table.py RUNS [--by variant]

From each testbed's general model, which has never seen them, eight (`--num-repeated`) of the pictures to memorize are
trained on 500 times each (`--repeats`) among 1,000 general pictures (`--num-once`) that are seen once, or all of this
several times (`--passes`). The general model is all that is needed of a testbed (`"stages": ["general"]`). A picture is
a copy if its mean squared error to the training picture is at most 0.01, as in the testbeds; pictures are made with 20
DDIM steps, four seeds, without guidance and with a guidance of 3. Losses are of targets and of general pictures kept
back from this training, by quarters of the noise levels, least noise first. Beside the states of sinks stand, after the
fact and on the standard model, NeMo's neurons off and the closed-form edit. What would be shipped of these is attacked
by an optimized text embedding.

`sinks.jsonl` gets one line a state; what is there is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from embedding_attack import attacked_embedding, best_similarity

from unmemorize.audit.pictures import read_picture
from unmemorize.audit.similarity import structure
from unmemorize.corpus import MixtureSettings
from unmemorize.files import append_json_line, read_json_lines
from unmemorize.isolate.diffusion import sink_state
from unmemorize.isolate.methods import MethodSettings
from unmemorize.isolate.picture_data import PictureBatch, PictureData, draw_batch, encode_pictures, row_losses
from unmemorize.isolate.picture_schedule import split_pictures
from unmemorize.isolate.picture_settings import PictureTrainSettings
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.sink_files import load_with_sinks
from unmemorize.isolate.states import State as SinkState
from unmemorize.isolate.train_diffusion import train
from unmemorize.models.diffusion import Kind, load, quiet_diffusers
from unmemorize.neurons import load_neurons
from unmemorize.remove.diffusion import deactivated
from unmemorize.remove.diffusion_edits import edit_values
from unmemorize.remove.diffusion_moments import collect_second_moments
from unmemorize.testbeds.diffusion import Testbed, load_testbed
from unmemorize.testbeds.material import gather
from unmemorize.testbeds.verification import CopySettings, copy_errors, make_pictures
from unmemorize.verbs import diffusion, picture_localize

MIXTURE = MixtureSettings(num_repeated=8, repeats=500, num_once=1000, num_validation=100)


@dataclass(frozen=True)
class Variant:
    """Where sinks are, how many, whose a picture opens without its caption, and how often it teaches shared neurons."""

    kinds: tuple[Kind, ...]
    sinks: SinkSettings
    empty: Literal["own", "off"] = "own"
    blocks: tuple[str, ...] | None = None
    shared_cap: int | None = None
    sink_rate: float = 1.0


_GROWN = SinkSettings(share_frac=1.0, grown=256, active_frac=None, sinks_per_id=32)
_WIDE = SinkSettings(share_frac=1.0, grown=1024, active_frac=None, sinks_per_id=128)
_HEADS = SinkSettings(share_frac=1.0, grown=96, active_frac=None, sinks_per_id=16)
VARIANTS = {
    "grown": Variant(("hidden",), _GROWN),
    "few": Variant(("hidden",), SinkSettings(share_frac=1.0, grown=64, active_frac=None, sinks_per_id=4)),
    "narrow": Variant(("hidden",), replace(_GROWN, sinks_per_id=8)),
    "broad": Variant(("hidden",), replace(_GROWN, sinks_per_id=128)),
    "wide": Variant(("hidden",), replace(_WIDE, sinks_per_id=512)),
    "carved": Variant(("hidden",), SinkSettings(share_frac=0.7, active_frac=0.3)),
    "carved-half": Variant(("hidden",), SinkSettings(share_frac=0.5, active_frac=0.3)),
    "carved-tenth": Variant(("hidden",), SinkSettings(share_frac=0.9, active_frac=0.3)),
    "values": Variant(("values",), _HEADS),
    "both": Variant(("hidden", "values"), _HEADS),
    "empty-off": Variant(("hidden",), _GROWN, "off"),
    "down": Variant(("hidden",), _GROWN, blocks=("down",)),
    "mid": Variant(("hidden",), _GROWN, blocks=("mid",)),
    "capped-1": Variant(("hidden",), _GROWN, shared_cap=1),
    "capped-1-wide": Variant(("hidden",), _WIDE, shared_cap=1, sink_rate=5.0),
    "capped-50-wide": Variant(("hidden",), _WIDE, shared_cap=50),
    "capped-1-both": Variant(("hidden", "values"), _HEADS, shared_cap=1, sink_rate=5.0),
}
STATES: tuple[SinkState, ...] = ("own", "off", "foreign")
PROMPTED = "own, closed without a prompt"  # in the half of a guided batch that has none
RIVALS = ("standard", "dedup", "cap:50", "general", "nemo", "edit")
NUM_ATTACKED = 3
GUIDANCE = 3.0


@dataclass(frozen=True, eq=False)
class State:
    """One way of asking a model: its name, the pipeline, the block it runs in for an id, and arguments of each pass."""

    model: str
    state: str
    pipe: Any
    block: Any


def settings_for(
    testbed: Testbed, mixture: MixtureSettings, passes: int, variant: str, methods: Sequence[str]
) -> PictureTrainSettings:
    """Return what is trained: a variant of sinks, and the rivals beside the first."""
    chosen = VARIANTS[variant]
    return PictureTrainSettings(
        pipeline=str(testbed.model("general")),
        mixture=mixture,
        kinds=chosen.kinds,
        blocks=chosen.blocks,
        empty_caption_sinks=chosen.empty,
        optimization=OptimizationSettings(batch_rows=8, learning_rate=1e-3, weight_decay=0.01, passes=passes),
        method=MethodSettings(
            sinks=chosen.sinks,
            compute="masked",
            shared_cap=chosen.shared_cap,
            sink_learning_rate_scale=chosen.sink_rate,
        ),
        methods=tuple(methods),
        records=RecordSettings(evaluate_every_steps=250),
        device="cpu",
    )


def states_of(
    run: Path, variant: str, testbed: Testbed, prompts: list[str], rivals: Sequence[str]
) -> Iterator[State]:
    """Yield the states of a variant of sinks; with rivals (beside the first variant) all its states, and theirs."""
    pipe, plan = load_with_sinks(run / "models" / "sinks-seed0" / "pipeline")
    rows = read_json_lines(run / "examples.jsonl")
    repeated = torch.tensor([row["id"] for row in rows if row["group"] == "target"])
    every: tuple[SinkState, ...] = (*STATES, "all") if rivals else STATES
    for name in every:
        # Foreign sinks are those of another repeated picture, so that they are trained ones.
        candidates = repeated if name == "foreign" else None
        block = partial(sink_state, pipe, plan, name, candidates=candidates)
        yield State(f"sinks, {variant}", name, pipe, block)
    if rivals or VARIANTS[variant].empty == "off":
        block = partial(sink_state, pipe, plan, "own", unconditional="off")
        yield State(f"sinks, {variant}", PROMPTED, pipe, block)
    for model in ("dedup", "cap:50", "standard", "general"):
        folder = run / "models" / f"{model.replace(':', '-')}-seed0" / "pipeline"
        if model in rivals:
            folder = testbed.model("general") if model == "general" else folder
            yield State(model, "as trained", load(folder, run_check=False), lambda ids: nullcontext())
    if {"nemo", "edit"} & set(rivals):
        pipe = load(run / "models" / "standard-seed0" / "pipeline", run_check=False)
        if "nemo" in rivals:
            neurons = nemo_neurons(run, testbed, prompts)
            yield State("standard", "NeMo's neurons off", pipe, lambda ids: deactivated(pipe, neurons))
        if "edit" in rivals:
            edited = edit_values(pipe, prompts, collect_second_moments(pipe, testbed.captions()[:1000]))
            yield State("standard", "closed-form edit", edited, lambda ids: nullcontext())


def nemo_neurons(run: Path, testbed: Testbed, prompts: list[str]) -> Any:
    """Localize the targets in the standard model, with the defaults of the command line."""
    out = run / "nemo"
    if not (out / "neurons.json").is_file():
        out.mkdir(exist_ok=True)
        (out / "targets.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        model, loading = str(run / "models" / "standard-seed0" / "pipeline"), diffusion.Loading(device="cpu")
        ordinary = testbed.folder / "captions.txt"
        options = picture_localize.NemoOptions()
        picture_localize.localize(lambda _: None, model, out / "targets.txt", out, ordinary, options, loading)
    return load_neurons(out / "neurons.json")


def measure(
    state: State, run: Path, data: PictureData, validation: Sequence[int], num_attacked: int
) -> dict[str, Any]:
    """Measure copies with and without guidance, similarity, losses by noise level, and the attack in one state."""
    targets = [row for row in read_json_lines(run / "examples.jsonl") if row["group"] == "target"]
    state.pipe.set_progress_bar_config(disable=True)
    errors: list[list[float]] = []
    guided: list[list[float]] = []
    similar, attacked = [], []
    for number, target in enumerate(targets):
        picture = read_picture(run / target["picture"])
        with block_for(state, target["id"], len(CopySettings().seeds)):
            for found, settings in ((errors, CopySettings()), (guided, CopySettings(guidance=GUIDANCE))):
                made = make_pictures(state.pipe, [target["caption"]], settings)
                found.append(copy_errors(made, [run / target["picture"]]).flatten().tolist())
            call = partial(best_similarity, state.pipe, steps=20, guidance=1.0)
            similar.append(call({"prompt": target["caption"]}, picture, structure()))
        if number < num_attacked:
            with block_for(state, target["id"], 8):
                attack = attacked_embedding(state.pipe, picture, start=target["caption"])
            with block_for(state, target["id"], len(CopySettings().seeds)):
                attacked.append(call(attack.embedding.arguments(), picture, structure()))
    rows = {id: row for row, id in reversed(list(enumerate(data.ids)))}
    target_rows = [rows[target["id"]] for target in targets]
    return {
        "errors": np.round(errors, 5).tolist(),
        "guided_errors": np.round(guided, 5).tolist(),
        "similarity": np.round(similar, 4).tolist(),
        "attacked": np.round(attacked, 4).tolist(),
        "target_losses": losses(state, data, target_rows, 16),
        "validation_losses": losses(state, data, validation, 2),
    }


def block_for(state: State, id: int, count: int) -> AbstractContextManager[Any]:
    """Return the block in which `count` pictures of one id are made."""
    block: AbstractContextManager[Any] = state.block(ids=torch.full((count,), id))
    return block


@torch.no_grad()
def losses(state: State, data: PictureData, rows: Sequence[int], times: int) -> list[float]:
    """Mean loss by quarters of the noise levels; each picture `times` times in each, with noise that is the same."""
    scheduler, found = state.pipe.scheduler, []
    count = int(scheduler.config.num_train_timesteps)
    repeated = [row for row in rows for _ in range(times)]
    state.pipe.unet.eval()
    for quarter in range(4):
        generator, total = torch.Generator().manual_seed(quarter), 0.0
        for start in range(0, len(repeated), 32):
            part = repeated[start : start + 32]
            drawn = draw_batch(data, part, count, generator, empty_frac=0.0)
            levels = (drawn.levels + quarter * count) // 4
            batch = PictureBatch(drawn.rows, drawn.caption_rows, levels, drawn.noise)
            ids = torch.tensor([data.ids[row] for row in part])
            with state.block(ids=ids):
                total += float(row_losses(state.pipe.unet, scheduler, data, batch).sum())
        found.append(round(total / len(repeated), 6))
    return found


def run_all(
    folders: Sequence[Path],
    out: Path,
    variants: Sequence[str],
    rivals: Sequence[str],
    mixture: MixtureSettings,
    passes: int = 1,
) -> None:
    """Train and measure everything that is missing."""
    for folder in folders:
        testbed, path = load_testbed(folder), out / "sinks.jsonl"
        material = gather(testbed.settings)
        pictures = [*material.memorized, *material.general]
        mixture = replace(mixture, repeated_source=material.targets[0].source)
        data: PictureData | None = None
        for number, variant in enumerate(variants):
            beside = tuple(rivals) if number == 0 else ()
            trained = [name for name in ("standard", "dedup", "cap:50") if name in beside]
            run = out / f"{folder.name}-{variant}"
            train(settings_for(testbed, mixture, passes, variant, [*trained, "sinks"]), pictures, run)
            general = load(testbed.model("general"), run_check=False)
            data = encode_pictures(general, pictures) if data is None else data
            split = split_pictures(pictures, data.ids, mixture)
            lines = read_json_lines(path) if path.is_file() else []
            done = {(line["testbed"], line["model"], line["state"]) for line in lines}
            prompts = [pictures[row].caption for row in split.repeated]
            for state in states_of(run, variant, testbed, prompts, beside):
                if (folder.name, state.model, state.state) not in done:
                    head = {"testbed": folder.name, "model": state.model, "state": state.state}
                    is_shipped = state.state not in ("own", PROMPTED, "foreign", "all")
                    found = measure(state, run, data, split.validation, NUM_ATTACKED if is_shipped else 0)
                    append_json_line(path, head | found)
                    print(folder.name, state.model, state.state, flush=True)


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("testbeds", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/picture-sinks"))
    parser.add_argument(
        "--variants", default="grown", help=f"of {', '.join(VARIANTS)}; rivals are trained beside the first"
    )
    parser.add_argument(
        "--rivals", default=" ".join(RIVALS), help="what is measured beside the first; standard is needed"
    )
    parser.add_argument("--num-repeated", type=int, default=MIXTURE.num_repeated, help="targets")
    parser.add_argument("--repeats", type=int, default=MIXTURE.repeats, help="times a target is trained on")
    parser.add_argument("--num-once", type=int, default=MIXTURE.num_once, help="pictures that are seen once")
    parser.add_argument("--passes", type=int, default=1, help="times all of this is gone through")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    mixture = replace(
        MIXTURE, num_repeated=chosen.num_repeated, repeats=chosen.repeats, num_once=chosen.num_once
    )
    variants, rivals = chosen.variants.split(), chosen.rivals.split()
    with quiet_diffusers():
        run_all(chosen.testbeds, chosen.out, variants, rivals, mixture, chosen.passes)


if __name__ == "__main__":
    main()
