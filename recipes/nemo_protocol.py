"""The published protocol of NeMo on one pipeline, in one command that continues where it stopped.

    python recipes/nemo_protocol.py MODEL --memorized memorized.csv --ordinary unmemorized.csv --out RUN \
        --statistics sd14_activation_statistics.npz --sscd sscd_disc_mixup.torchscript.pt --clip CLIP

With `--coco` and `--controls` it goes on to what `nemo_robustness.py` describes: locality, permanence, quality, attack.

Localizes every memorized prompt, scores ordinary prompts at the gate, makes pictures in all states (10 seeds that
localization has not seen, 50 steps, guidance 7), folds the neurons into a plain folder, audits that too, and writes
`protocol.md`: for each kind of prompt (column `type`: VM, TM) and state the median and the median absolute deviation
over prompts, as the paper reports them, beside what `audit.json` holds. `--limit` tries it on a few prompts first.

Tables need a prompt column (`caption`), and may have `type`, `mean_sscd` and `picture`. Without training pictures the
column SSCD_orig stays empty. Source: Hintersdorf et al. 2024, sections 4 and appendix; kinds and states as there.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import nemo_robustness
import numpy as np

from unmemorize.audit.detection import detection
from unmemorize.audit.picture_figures import PictureSimilarities, similarities_of_state
from unmemorize.audit.pictures import read_picture
from unmemorize.audit.similarity import SimilarityMeasure
from unmemorize.cli import ProgressPrinter
from unmemorize.corpus.prompts import Prompt, read_prompts
from unmemorize.files import write_atomic
from unmemorize.localize.grouping import clusters
from unmemorize.records import PictureAudit, load_any_audit
from unmemorize.verbs import diffusion, picture_localize, picture_measures

RIVALS = "placebo first-layer padding tokens:1 tokens:4 tokens:10 adjusted"


def main(words: list[str] | None = None) -> Path:
    """Run every stage that is not done yet; returns where `protocol.md` is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memorized", type=Path, required=True, help="table of memorized prompts")
    parser.add_argument(
        "--ordinary", type=Path, required=True, help="table of prompts that are not memorized"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--statistics", type=Path, help="released activation statistics; else from --ordinary"
    )
    parser.add_argument("--method", default="fast", choices=["fast", "compat", "paper"])
    parser.add_argument(
        "--calibrate", type=int, default=0, help="ordinary prompts for the threshold; 0: 0.428"
    )
    parser.add_argument("--sscd", type=Path, action="append", default=[])
    parser.add_argument("--clip")
    parser.add_argument("--limit", type=int, help="first prompts of either kind")
    parser.add_argument("--rivals", default=RIVALS)
    parser.add_argument("--num-seeds", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--size-px", type=int)
    parser.add_argument("--device", default="auto")
    nemo_robustness.add_options(parser)
    chosen = parser.parse_args(words)
    progress = ProgressPrinter(sys.stderr)
    loading = diffusion.Loading(device=chosen.device)
    examples, prompts = _examples(chosen)
    found = picture_localize.NemoOptions(
        mode=chosen.method, statistics=chosen.statistics, num_calibration=chosen.calibrate
    )
    picture_localize.localize(
        progress, chosen.model, examples, chosen.out, _apart(chosen, prompts), found, loading
    )
    neurons, plain = chosen.out / "neurons.json", chosen.out / "plain"
    if not plain.exists():
        diffusion.remove(progress, chosen.model, plain, neurons, "fold", False, None, None, None)
    options = picture_measures.PictureOptions(
        rivals=chosen.rivals,
        mended=plain,
        sscd=tuple(chosen.sscd),
        clip=chosen.clip,
        num_seeds=chosen.num_seeds,
        num_steps=chosen.num_steps,
        guidance=chosen.guidance,
        size_px=chosen.size_px,
    )
    diffusion.audit(progress, chosen.model, examples, chosen.out, None, options, loading)
    audit = load_any_audit(chosen.out / "audit.json")
    assert isinstance(audit, PictureAudit)
    measures = picture_measures.measures_of(options.sscd, "cpu")
    more = nemo_robustness.measure(nemo_robustness.asked(chosen, run=chosen.out)).read_text().rstrip()
    text = "\n\n".join([_detection(audit), *(_table(audit, prompts, chosen, m) for m in measures), more])
    print(text)
    return write_atomic(chosen.out / "protocol.md", text + "\n")


def _examples(chosen: Any) -> tuple[Path, dict[str, Prompt]]:
    """Put both tables into one with groups, so that the run folder says what it was made from."""
    targets = read_prompts(chosen.memorized, limit=chosen.limit)
    ordinary = read_prompts(chosen.ordinary, group="ordinary", limit=chosen.limit)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("prompt", "group", "type", "picture"))
    for prompt in (*targets, *ordinary):
        pictures = "|".join(str(picture.resolve()) for picture in prompt.pictures)
        writer.writerow((prompt.text, prompt.group, prompt.kind, pictures))
    path = write_atomic(chosen.out / "prompts.csv", table.getvalue())
    return path, {prompt.text: prompt for prompt in (*targets, *ordinary)}


def _apart(chosen: Any, prompts: dict[str, Prompt]) -> Path | None:
    """Return ordinary prompts for statistics and threshold, unless the published ones serve."""
    is_published = chosen.statistics is not None and chosen.calibrate == 0
    return None if is_published else Path(chosen.ordinary)


def _detection(audit: PictureAudit) -> str:
    """Say how well the gate's score tells memorized from ordinary prompts."""
    scores = {
        group: [row.best_pair for row in audit.localized if row.group == group]
        for group in ("target", "ordinary")
    }
    quality = detection(scores["target"], scores["ordinary"])
    passed = sum(row.is_memorized for row in audit.localized if row.group == "ordinary")
    lines = [f"Gate {audit.gate_threshold}: {passed} of {len(scores['ordinary'])} ordinary prompts pass."]
    for name, figure in (("AUC", quality.auc), ("TPR at 1 % FPR", quality.tpr_at_fpr)):
        lines.append(f"{name}: {figure.refused or f'{figure.value:.4f}, 95 % {figure.ci95}'}")
    return "  \n".join(lines)


def _kinds(audit: PictureAudit, prompts: dict[str, Prompt], chosen: Any) -> dict[str, list[int]]:
    """Return the rows of each kind of prompt, of one prompt a cluster, and of strictly verbatim ones.

    Strict: the table's `mean_sscd` exceeds 0.7, the mean over seeds and not the largest. Near duplicates make up a
    third of the published prompts, so that figures by cluster say more.
    """
    names = [prompts[row.prompt].kind or row.group for row in audit.prompts]
    firsts = {group[0] for group in clusters([row.prompt for row in audit.prompts])}
    with Path(chosen.memorized).open(encoding="utf-8", newline="") as stream:
        table = [{str(name).lower(): cell for name, cell in row.items()} for row in csv.DictReader(stream)]
    strict = {
        row.get("caption") or row.get("prompt") for row in table if float(row.get("mean_sscd") or 0) > 0.7
    }
    found: dict[str, list[int]] = {}
    for number, (name, row) in enumerate(zip(names, audit.prompts, strict=True)):
        found.setdefault(name, []).append(number)
        if row.prompt in firsts:
            found.setdefault(f"{name}, one a cluster", []).append(number)
        if row.prompt in strict:
            found.setdefault(f"{name}, strict", []).append(number)
    return found


def _table(audit: PictureAudit, prompts: dict[str, Prompt], chosen: Any, measure: SimilarityMeasure) -> str:
    """Lay out medians and median absolute deviations over prompts, by kind and state."""
    kinds = _kinds(audit, prompts, chosen)
    references = [
        np.stack([measure.embed([read_picture(path)])[0].numpy() for path in prompts[row.prompt].pictures])
        if prompts[row.prompt].pictures
        else np.zeros((0, 0), dtype=np.float32)
        for row in audit.prompts
    ]
    lines = [f"{measure.name}, median ± median absolute deviation over prompts\n"]
    lines += ["| kind | state | SSCD_orig | SSCD_gen | D_SSCD |", "| --- | --- | --- | --- | --- |"]
    before = None
    for state in audit.states:
        vectors = np.stack(
            [
                measure.embed([read_picture(chosen.out / path) for path in row.made[state.state]]).numpy()
                for row in audit.prompts
            ]
        )
        found = similarities_of_state(vectors, references, before)
        before = vectors if before is None else before
        for kind, rows in kinds.items():
            lines.append(f"| {kind} | {state.label} | {' | '.join(_cells(found, rows))} |")
    return "\n".join(lines)


def _cells(found: PictureSimilarities, rows: list[int]) -> list[str]:
    original = [float(np.median(found.copy_NS[number])) for number in rows]
    generated = (
        [1.0] * len(rows) if found.kept_NS is None else [float(np.median(found.kept_NS[n])) for n in rows]
    )
    return [_spread(values) for values in (original, generated, [float(found.between_N[n]) for n in rows])]


def _spread(values: list[float]) -> str:
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return ""
    middle = np.median(known)
    return f"{middle:.2f} ± {np.median(np.abs(known - middle)):.2f}"


if __name__ == "__main__":
    main()
