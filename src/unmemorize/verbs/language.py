"""Verbs for language models: from options to the library. Heavy libraries are imported inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import (
    Answer,
    bar_line,
    check_answer,
    refuse_passed_over,
    table_row,
    upper_end,
)
from unmemorize.verbs.kept_sinks import kept_ids

if TYPE_CHECKING:
    from unmemorize.records import Audit, ProgressCallback

_DEMO_SHARE = 0.1  # of all neurons, in the demonstration
_DEMO_ORDINARY = 40  # texts that are asked for, as targets are; all the others too are read


def check(model: str, row: str | None) -> Answer:
    """Run the self-check of a model."""
    from unmemorize.models.language import MlpRow, fingerprint, load
    from unmemorize.models.language import check as self_check

    chosen = table_row(row, MlpRow)
    loaded = load(model, row=chosen, run_check=False)
    return check_answer(self_check(loaded, chosen), fingerprint(loaded, chosen))


def audit(
    progress: ProgressCallback,
    target: Path,
    examples: Path | None = None,
    out: Path | None = None,
    max_extraction: float | None = None,
    length: int = 256,
) -> Answer:
    """Measure a run of trainings, or one model."""
    if (target / "audit.json").is_file() or (target / "examples.jsonl").is_file():
        refuse_passed_over(
            audit,
            {"examples": examples, "out": out},
            f"{target} is a run folder and is audited on its own examples, into itself",
        )
        from unmemorize.audit.training import audit_training

        result, folder = audit_training(target, progress=progress), target
    else:
        if examples is None or out is None:
            raise ConfigError(f"{target} is no run folder; to audit a model give --examples and --out")
        result, folder = _audit_model(target, examples, out, length), out
    worst = max((upper_end(m.seeds[-1].extraction_rate_frac) for m in result.methods[-1:]), default=1.0)
    bar, code = bar_line("extraction", worst, max_extraction)
    lines = [result.verdict, *result.limits, *bar, str(folder / "audit.json")]
    return Answer(data=result.model_dump(mode="json"), lines=lines, exit_code=code)


def _audit_model(model: Path, examples: Path, out: Path, length_tokens: int) -> Audit:
    from unmemorize.audit.model import audit_model, read_examples
    from unmemorize.errors import RunFolderError
    from unmemorize.models.language import load
    from unmemorize.tokenizer import load_tokenizer

    if (out / "audit.json").exists():
        raise RunFolderError(f"{out} already holds an audit; choose another folder")
    loaded, tokenizer = load(model, run_check=False), load_tokenizer(model)
    result = audit_model(
        loaded, tokenizer, read_examples(examples, tokenizer, length_tokens), name=model.name
    )
    result.save(out / "audit.json")
    return result


def remove(
    model: Path, out: Path, neurons: Path | None, keep: str | None, way: Literal["excise", "fold"]
) -> Answer:
    """Remove neurons for good and prove that the result is a plain model."""
    import torch

    from unmemorize.gates import closed, gated
    from unmemorize.isolate.plan import load_plan
    from unmemorize.models.language import find_mlps, fingerprint, load
    from unmemorize.neurons import load_neurons
    from unmemorize.remove.folders import kept_if_proved, manifest_of
    from unmemorize.remove.language import excise, export, fold, prove_plain, tokenizer_beside

    kept = kept_ids(keep, model)
    loaded = load(model)
    if neurons is not None:
        chosen = load_neurons(neurons)
    else:
        if not (model / "sinks.json").exists():
            raise ConfigError(
                f"{model} has no sinks.json; give --neurons FILE, or a model trained with sinks"
            )
        layout = load_plan(model / "sinks.json")
        chosen = layout.pool() - layout.neurons_for(kept) if kept else layout.pool()
    smaller = (excise if way == "excise" else fold)(loaded, chosen)
    manifest = manifest_of(way, fingerprint(loaded), chosen)
    export(smaller, out, manifest=manifest, tokenizer=tokenizer_beside(model))
    tokens = torch.arange(32).remainder(int(loaded.config.get_text_config().vocab_size)).unsqueeze(0)
    with torch.no_grad(), gated(loaded, closed(chosen)):
        expected = loaded(input_ids=tokens).logits.float()
    with kept_if_proved(out):
        difference = (prove_plain(out, tokens) - expected).abs().max().item()
    widths = [find_mlps(m)[0].site.width for m in (loaded, smaller)]
    lines = [
        f"removed {len(chosen)} neurons; MLP width {widths[0]} -> {widths[1]}",
        f"loads without unmemorize; largest logit difference to the closed gate {difference:.2g}",
        str(out),
    ]
    data = {"folder": str(out), "num_neurons": len(chosen), "widths": widths, "logit_difference": difference}
    return Answer(data=data, lines=lines)


def demo(progress: ProgressCallback, out: Path, corpus: str, text_column: str, quick: bool) -> Answer:
    """Train small models, audit them, cut the sinks out, find the neurons of a model without sinks, and report."""
    from unmemorize.audit.training import audit_training
    from unmemorize.isolate.settings import demo_settings
    from unmemorize.isolate.train import train as run_training
    from unmemorize.report import write_report

    run_training(demo_settings(corpus, text_column, is_quick=quick), out, progress)
    result = audit_training(out, progress=progress)
    removed = out / "plain"
    if not removed.exists():
        remove(out / "models" / "sinks-seed0", removed, None, None, "excise")
    path = write_report([out])
    found = _localized(progress, out)
    data = {"run": str(out), "plain_model": str(removed), "report": str(path), "verdict": result.verdict}
    lines = [result.verdict, f"plain model: {removed}", *found, str(path)]
    return Answer(data=data | {"localized": found}, lines=lines)


def _localized(progress: ProgressCallback, run: Path) -> list[str]:
    """Find what holds the repeated texts of the model that was trained without sinks; returns lines to show."""
    from unmemorize.errors import DataError
    from unmemorize.isolate.runs import read_run
    from unmemorize.report import write_report
    from unmemorize.verbs import language_audit, language_localize, texts

    out, model = run / "localized", str(run / "models" / "standard-seed0")
    if not (out / "audit.json").is_file():
        examples, ordinary = _apart(run)
        # What a text holds beyond the training's rows was never seen, and would pass for forgotten.
        cut = texts.Cut(length=read_run(run).settings.model.length_tokens)
        methods = "gradient" if ordinary is None else "contrast gradient"
        options = language_localize.NeuronOptions(
            methods=methods, share=_DEMO_SHARE, select="global", cut=cut
        )
        try:
            language_localize.localize(progress, model, examples, out, ordinary, options, "cpu")
        except DataError as error:
            return [f"nothing to localize: {error}"]
        twin = language_audit.NeuronAuditOptions(twin=run / "models" / "dedup-seed0", ordinary=ordinary)
        language_audit.audit(progress, model, examples, out, None, twin, "cpu")
    verdict = json.loads((out / "audit.json").read_text(encoding="utf-8"))["verdict"]
    return [f"without sinks, after the fact: {verdict}", str(write_report([out]))]


def _apart(run: Path) -> tuple[Path, Path | None]:
    """Write a run's examples, with few of its ordinary texts, and the other ones; none shares a passage with a target.

    Returns:
        The file of examples, and that of the other ordinary texts; None if there are none.
    """
    from unmemorize.corpus.passages import shared_passages
    from unmemorize.files import read_json_lines, write_json_lines

    rows = read_json_lines(run / "examples.jsonl")
    ordinary = [row for row in rows if row["group"] == "ordinary"]
    targets = [row["text"] for row in rows if row["group"] == "target"]
    shared = {number for number, *_ in shared_passages(targets, [row["text"] for row in ordinary])}
    kept = [row for row in rows if row["group"] != "ordinary"]
    apart = [row for number, row in enumerate(ordinary) if number not in shared]
    files = []
    for name, some in (("apart", kept + apart[:_DEMO_ORDINARY]), ("ordinary", apart[_DEMO_ORDINARY:])):
        files.append(write_json_lines(run / f"{name}.jsonl", some) if some else None)
    assert files[0] is not None
    return files[0], files[1]
