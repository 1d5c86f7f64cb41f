"""What closing sinks costs ordinary prompts, by the audits of runs on pictures: means over runs with t intervals.

    unmemorize audit RUN --clip JUDGE --reference JUDGE/unseen --num-seeds 4 --num-steps 20 --guidance 1
    python recipes/picture_quality_table.py RUN0 RUN1 RUN2 --clip JUDGE

A row a state. Of ordinary prompts: cosine of prompt and picture under CLIP, as it is and less that of the first method
on the same run; likeness of a prompt's pictures to each other (lower is more diverse); likeness to the first method's
picture of the same noise; KID, where it was measured; change of the denoising loss. Of targets: likeness of the best
seed to the training picture. With `--clip` it also says what alignment real pictures have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from picture_sinks_table import over

from unmemorize.audit.pictures import read_picture
from unmemorize.audit.prompt_alignment import ClipAlignment
from unmemorize.records import Measure, PictureAudit, PictureGroup, load_any_audit

Pick = Callable[[PictureGroup], Measure | None]


def figures(audits: Sequence[PictureAudit], state: str, group: str, pick: Pick) -> list[float]:
    """Return a figure of one state for every audit that has it."""
    found = [
        pick(part)
        for audit in audits
        for row in audit.states
        if row.label == state
        for part in row.groups
        if part.group == group
    ]
    return [measure.value for measure in found if measure is not None and measure.value is not None]


def relative_loss(group: PictureGroup) -> Measure | None:
    """Change of the denoising loss against the first method, in percent of the first method's."""
    now, change = group.denoising_loss, group.denoising_loss_change
    if now is None or change is None or now.value is None or change.value is None:
        return None
    return change.model_copy(update={"value": 100 * change.value / (now.value - change.value)})


def kid_of(group: PictureGroup) -> Measure | None:
    """Pick the kernel distance to real pictures."""
    return group.kid


def table(audits: Sequence[PictureAudit]) -> list[str]:
    """Lay out a row for every state."""
    columns: list[tuple[str, str, Pick, int, str]] = [
        ("likeness to targets", "target", lambda group: group.similarities[0].copy_similarity, 2, ""),
        ("alignment", "ordinary", lambda group: group.alignment, 3, ""),
        ("alignment, change", "ordinary", lambda group: group.alignment_change, 3, ""),
        ("likeness between seeds", "ordinary", lambda group: group.similarities[0].seed_similarity, 3, ""),
        ("likeness to before", "ordinary", lambda group: group.similarities[0].kept_similarity, 3, ""),
        ("validation loss", "ordinary", relative_loss, 1, " %"),
        ("KID", "ordinary", kid_of, 2, ""),
    ]
    heads = " | ".join([*(name for name, *_ in columns), "KID, change"])
    lines = [f"| state | {heads} |", "| --- " * (len(columns) + 2) + "|"]
    for state in (row.label for row in audits[0].states):
        cells = [
            over(figures(audits, state, group, pick), digits, unit)
            for _, group, pick, digits, unit in columns
        ]
        lines.append(f"| {state} | {' | '.join([*cells, over(kid_change(audits, state), 2)])} |")
    return lines


def kid_change(audits: Sequence[PictureAudit], state: str) -> list[float]:
    """Return KID less that of the first method, for every audit that measured both."""
    first = audits[0].states[0].label
    pairs = [
        (figures([audit], state, "ordinary", kid_of), figures([audit], first, "ordinary", kid_of))
        for audit in audits
    ]
    return [now[0] - before[0] for now, before in pairs if now and before and state != first]


def bounds(clip: str, runs: Sequence[Path], audits: Sequence[PictureAudit]) -> str:
    """Say what alignment real pictures of ordinary prompts have, with their own prompt and with the next one's."""
    judge, own, other = ClipAlignment.load(clip), [], []
    for run, audit in zip(runs, audits, strict=True):
        rows = [row for row in audit.prompts if row.group == "ordinary" and row.picture]
        prompts = [row.prompt for row in rows]
        real = [read_picture(run / row.picture) for row in rows]
        own.append(float(judge.scores(prompts, real).mean()))
        other.append(float(judge.scores(prompts[1:] + prompts[:1], real).mean()))
    return f"Alignment of real pictures: {over(own, 3)}; of real pictures with another's prompt: {over(other, 3)}."


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--clip", help="folder of the CLIP model, for what real pictures have")
    chosen = parser.parse_args()
    folders = [path.parent for run in chosen.runs for path in sorted(run.glob("audits/seed*/audit.json"))]
    audits = []
    for folder in folders:
        audit = load_any_audit(folder / "audit.json")
        assert isinstance(audit, PictureAudit), f"{folder} holds no audit of pictures"
        audits.append(audit)
    print("\n".join(table(audits)))
    if chosen.clip:
        print(f"\n{bounds(chosen.clip, folders, audits)}")


if __name__ == "__main__":
    main()
