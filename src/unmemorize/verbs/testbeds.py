"""Verbs around models whose memory is known: building a testbed, and the demonstration on the one that ships."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.verbs.answers import Answer, file_with_options

if TYPE_CHECKING:
    from unmemorize.records import ProgressCallback

_NUM_ORDINARY = 20  # prompts of the demonstration; the testbed has more
_NUM_SEEDS, _NUM_STEPS, _GUIDANCE = 4, 20, 1.5


def testbed(progress: ProgressCallback, out: Path, settings: Path | None, options: dict[str, Any]) -> Answer:
    """Build a testbed, or what is still missing of it."""
    from unmemorize.testbeds.diffusion import VERIFICATION_FILE, build_testbed
    from unmemorize.testbeds.settings import settings_from_json

    built = build_testbed(settings_from_json(file_with_options(settings, options)), out, progress)
    groups = {group: len(built.of_group(group)) for group in ("target", "neighbour", "heldout", "ordinary")}
    lines = [f"{group}: {count} prompts" for group, count in groups.items()] + [
        f"what the models reproduce: {out / VERIFICATION_FILE}",
        str(out),
    ]
    return Answer(
        data={"testbed": str(out), "groups": groups, "verification": str(out / VERIFICATION_FILE)},
        lines=lines,
    )


def demo(progress: ProgressCallback, out: Path, device: str) -> Answer:
    """Find, switch off, fold away and audit what the shipped pipeline has memorized, and report."""
    from unmemorize.report import write_report
    from unmemorize.testbeds.shipped import shipped_testbed
    from unmemorize.verbs import diffusion, picture_localize, picture_measures

    shipped = shipped_testbed()
    model, twin = shipped.model("memorized"), shipped.model("twin")
    examples, ordinary = _prompts(shipped, out)
    loading = diffusion.Loading(device=device)
    found = picture_localize.localize(
        progress, str(model), examples, out, ordinary, picture_localize.NemoOptions(), loading
    )
    neurons, plain = out / "neurons.json", out / "plain"
    if not plain.exists():
        diffusion.remove(progress, str(model), plain, neurons, "fold", False, None, None, None)
    options = picture_measures.PictureOptions(
        neurons=neurons,
        mended=plain,
        twin=twin,
        num_seeds=_NUM_SEEDS,
        num_steps=_NUM_STEPS,
        guidance=_GUIDANCE,
        title="What the shipped pipeline reproduces",
    )
    audited = diffusion.audit(progress, str(model), examples, out, None, options, loading)
    path = write_report([out])
    data = {
        "run": str(out),
        "plain_model": str(plain),
        "report": str(path),
        "verdict": audited.data["verdict"],
    }
    lines = [*found.lines[:-1], audited.data["verdict"], f"plain pipeline: {plain}", str(path)]
    return Answer(data=data, lines=lines)


def _prompts(shipped: Any, out: Path) -> tuple[Path, Path]:
    """Write the prompts of the demonstration and the captions for statistics into the run folder."""
    from unmemorize.files import write_atomic

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("prompt", "group", "picture"))
    for group in ("target", "neighbour", "heldout", "ordinary"):
        chosen = shipped.of_group(group)
        for prompt in chosen[:_NUM_ORDINARY] if group == "ordinary" else chosen:
            writer.writerow((prompt.prompt, prompt.group, prompt.picture.resolve()))
    write_atomic(out / "prompts.csv", table.getvalue())
    write_atomic(out / "captions.txt", "\n".join(shipped.captions()) + "\n")
    return out / "prompts.csv", out / "captions.txt"
