"""What the published protocol asks beyond one audit: is a removal local, does it last, and does it hold under attack?

    python recipes/nemo_robustness.py MODEL RUN [--coco captions.csv --clip CLIP] [--controls never_trained.csv]

RUN is what `nemo_protocol.py` left (that command also runs this one). Adds four sections to `RUN/robustness.md`, and
continues where it stopped:

    locality     overlap of the neurons of one picture's prompts, of different pictures, and of random sets
    permanence   targets with other schedulers, step counts and guidance, before and after, in RUN/permanence
    quality      FID and KID under CLIP's features on captions with pictures (COCO), before and after, in RUN/quality
    attack       an optimized text embedding (Adam 0.1, batch 8) against the mended pipeline by budget and start, for
                 targets and for pictures that it never saw; RUN/attacks.jsonl has one line an attack

An attacker brings the picture along: a result says something only beside the same attack on pictures that were never
trained on. Tables have `caption` and `picture`. Source: the protocol in our documentation of NeMo; the attack follows
arXiv 2507.16880; sections and controls are ours.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding_attack import attack_all, attack_table, shown

from unmemorize.audit.diffusion import audit_pictures
from unmemorize.audit.picture_quality import PictureQuality
from unmemorize.audit.pictures import PromptCase
from unmemorize.audit.prompt_alignment import ClipAlignment, ClipFeatures
from unmemorize.audit.similarity import SimilarityMeasure
from unmemorize.audit.statistics import bootstrap_mean
from unmemorize.audit.ways import PictureAuditSettings, Way
from unmemorize.cli import ProgressPrinter
from unmemorize.corpus.prompts import Prompt, read_prompts
from unmemorize.errors import ModelNotSupported
from unmemorize.files import write_atomic
from unmemorize.localize.clusters import read_results
from unmemorize.localize.grouping import clusters
from unmemorize.localize.locality import locality
from unmemorize.models.diffusion import fingerprint
from unmemorize.verbs import diffusion, picture_measures

SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
STEPS = (10, 25, 100)
GUIDANCE = (1.0, 3.0, 12.0)
SEEDS = (1000, 1001, 1002, 1003)
COPY = 0.7  # similarity from which the literature calls a picture a copy under SSCD


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure; tables and models as on the command line."""

    model: str
    run: Path
    coco: Path | None = None
    clip: str | None = None
    controls: Path | None = None
    sscd: tuple[Path, ...] = ()
    budgets: tuple[int, ...] = (10, 25, 50, 100)
    num_attacked: int = 50
    num_steps: int = 50
    guidance: float = 7.0
    size_px: int | None = None
    device: str = "auto"


def main(words: list[str] | None = None) -> Path:
    """Measure what is missing; returns where `robustness.md` is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("run", type=Path)
    add_options(parser)
    parser.add_argument("--sscd", type=Path, action="append", default=[])
    parser.add_argument("--clip", help="CLIP folder or hub name")
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--size-px", type=int)
    parser.add_argument("--device", default="auto")
    path = measure(asked(parser.parse_args(words)))
    print(path.read_text())
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this file has."""
    parser.add_argument("--coco", type=Path, help="table of captions and real pictures, for FID and KID")
    parser.add_argument("--controls", type=Path, help="table of captions and pictures never trained on")
    parser.add_argument("--budgets", default="10,25,50,100", help="steps of the attack")
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--num-attacked", type=int, default=50, help="targets, and controls, to attack")


def asked(chosen: Any, **others: Any) -> Asked:
    """Read what was asked for from the words of a command."""
    names = (
        "model",
        "run",
        "coco",
        "clip",
        "controls",
        "num_attacked",
        "num_steps",
        "guidance",
        "size_px",
        "device",
    )
    values = {name: getattr(chosen, name) for name in names if name not in others}
    budgets = tuple(sorted(int(word) for word in chosen.budgets.split(",")))
    return Asked(**values, **others, sscd=tuple(chosen.sscd), budgets=budgets)


def measure(asked: Asked) -> Path:
    """Measure what is missing and write `robustness.md`."""
    tell = ProgressPrinter(sys.stderr)
    loading = diffusion.Loading(device=asked.device)
    before, mended = (diffusion.opened(folder, loading) for folder in (asked.model, asked.run / "plain"))
    for pipe in (before, mended):
        pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts(asked.run / "prompts.csv")
    memorized = {one.prompt for one in read_results(asked.run).results if one.is_memorized}
    targets = [p for p in prompts if p.group == "target" and p.text in memorized]
    if not targets:
        return write_atomic(asked.run / "robustness.md", "No target is memorized: nothing was removed.\n")
    similar = picture_measures.measures_of(asked.sscd, str(before.device))[0]
    sections = [
        _locality(asked.run, before),
        _permanence(asked, before, mended, targets, similar, tell),
        _quality(asked, before, mended, tell),
        _attack(asked, mended, prompts, targets, similar, tell),
    ]
    return write_atomic(asked.run / "robustness.md", "\n\n".join(sections) + "\n")


def _locality(run: Path, pipe: Any) -> str:
    stored = read_results(run)
    found = [one for one in stored.results if one.is_memorized]
    sets = [one.neurons(fingerprint(pipe), stored.sites) for one in found]
    row = {one.prompt: number for number, one in enumerate(found)}
    groups = [[row[prompt] for prompt in group] for group in clusters(list(row))]
    overlaps = locality(sets, groups)
    lines = [
        f"## Locality\n\n{len(found)} memorized prompts in {len(groups)} groups of near duplicates; "
        f"{overlaps.num_empty} sets are empty. Mean overlap (Jaccard) over groups.\n",
        "| pairs | found | random, same sizes |\n| --- | --- | --- |",
    ]
    for name, pairs in (("within", "within a group"), ("across", "across groups")):
        cells = [shown(bootstrap_mean(getattr(overlaps, key))) for key in (name, f"{name}_random")]
        lines.append(f"| {pairs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _variants(pipe: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (name, pipeline, arguments of the call) for schedulers that suit a pipeline, step counts and guidance."""
    known = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
    for name in SCHEDULERS:
        if name in known and name != type(pipe.scheduler).__name__:
            other = copy.copy(pipe)
            other.register_modules(scheduler=known[name].from_config(pipe.scheduler.config))
            yield name.removesuffix("Scheduler").lower(), other, {}
    for steps in STEPS:
        yield f"steps-{steps}", pipe, {"num_inference_steps": steps}
    for scale in GUIDANCE:
        yield f"guidance-{scale:g}", pipe, {"guidance_scale": scale}


def _way(name: str, variant: str, pipe: Any, arguments: dict[str, Any]) -> Way:
    return Way(
        state=f"{variant}-{name}",
        label=f"{variant}, {name}",
        pipe=pipe,
        is_rival=name == "before",
        identity=f"{name} {variant}",
        arguments=(lambda prompt, seeds: arguments) if arguments else None,
    )


def _permanence(
    asked: Asked, before: Any, mended: Any, targets: Sequence[Prompt], similar: SimilarityMeasure, tell: Any
) -> str:
    ways = [Way(state="before", label="before", pipe=before)]
    ways += [Way(state="mended", label="mended", pipe=mended)]
    for name, pipe in (("before", before), ("mended", mended)):
        ways += [_way(name, *variant) for variant in _variants(pipe)]
    settings = PictureAuditSettings(
        seeds=SEEDS, num_steps=asked.num_steps, guidance=asked.guidance, size_px=asked.size_px
    )
    cases = [PromptCase(prompt=p.text, group="target", pictures=p.pictures) for p in targets]
    audit = audit_pictures(
        cases, ways, settings, asked.run / "permanence", measures=[similar], headline="mended", progress=tell
    )
    lines = [
        f"## Permanence\n\n{len(targets)} targets, {len(SEEDS)} seeds; {similar.name}.\n",
        "| way | copies | similarity to the training picture | between seeds |\n| --- | --- | --- | --- |",
    ]
    for state in audit.states:
        row = state.groups[0].similarities[0]
        figures = (row.copy_rate_frac, row.copy_similarity, row.seed_similarity)
        lines.append(f"| {state.label} | {' | '.join(map(shown, figures))} |")
    return "\n".join(lines)


def _quality(asked: Asked, before: Any, mended: Any, tell: Any) -> str:
    if asked.coco is None or asked.clip is None:
        return "## Quality\n\nNot measured: give --coco (captions and real pictures) and --clip."
    captions = read_prompts(asked.coco, group="ordinary")
    real = [picture for caption in captions for picture in caption.pictures]
    clip = ClipAlignment.load(asked.clip, device=str(before.device))
    quality = PictureQuality(features=ClipFeatures(clip), reference=real, name=f"CLIP {asked.clip}")
    ways = [Way(state=name, label=name, pipe=pipe) for name, pipe in (("before", before), ("mended", mended))]
    audit = audit_pictures(
        [PromptCase(prompt=caption.text, group="ordinary") for caption in captions],
        ways,
        PictureAuditSettings(
            seeds=SEEDS, num_steps=asked.num_steps, guidance=asked.guidance, size_px=asked.size_px
        ),
        asked.run / "quality",
        alignment=clip,
        quality=quality,
        progress=tell,
    )
    lines = [
        f"## Quality\n\n{len(captions):,} captions, {len(SEEDS)} seeds, {len(real):,} real pictures.\n",
        "| state | FID (CLIP) | KID (CLIP) | alignment |\n| --- | --- | --- | --- |",
    ]
    for state in audit.states:
        group = state.groups[0]
        lines.append(f"| {state.label} | {' | '.join(map(shown, (group.fid, group.kid, group.alignment)))} |")
    return "\n".join(lines)


def _attack(
    asked: Asked,
    mended: Any,
    prompts: Sequence[Prompt],
    targets: Sequence[Prompt],
    similar: SimilarityMeasure,
    tell: Any,
) -> str:
    controls = [] if asked.controls is None else read_prompts(asked.controls, group="ordinary")
    attacked = [("target", p) for p in targets if p.pictures][: asked.num_attacked]
    attacked += [("control", p) for p in controls if p.pictures][: asked.num_attacked]
    if len({kind for kind, _ in attacked}) < 2:
        return "## Attack\n\nNot measured: it needs training pictures of the targets, and --controls to compare with."
    try:
        rows = attack_all(
            mended,
            attacked,
            asked.run / "attacks.jsonl",
            similar,
            budgets=asked.budgets,
            other=next((p.text for p in prompts if p.group == "ordinary"), ""),
            num_steps=asked.num_steps,
            guidance=asked.guidance,
            size_px=asked.size_px,
            tell=tell,
        )
    except ModelNotSupported as error:
        return f"## Attack\n\nNot measured: {error}."
    return f"## Attack\n\n{attack_table(rows, similar.name)}"


if __name__ == "__main__":
    main()
