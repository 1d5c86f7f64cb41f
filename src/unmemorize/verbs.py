"""The verbs of the command line: thin functions from options to the library, each returning an `Answer`.

A verb prints nothing; `cli.py` does. Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmemorize.corpus import IdKind
from unmemorize.errors import ConfigError

if TYPE_CHECKING:
    from unmemorize.isolate.settings import TrainSettings
    from unmemorize.models.language import MlpRow
    from unmemorize.records import Audit, ProgressCallback


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verb did.

    Attributes:
        data: the same for programs; whatever `json` can store.
        lines: the same for a person; the last line is the one worth copying.
        exit_code: 0, or 1 if an audit missed its bar.
    """

    data: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    exit_code: int = 0


def check(
    progress: ProgressCallback,
    model: Annotated[str, typer.Argument(help="Model folder or hub name.", metavar="MODEL")],
    row: Annotated[
        str | None, typer.Option(help="Site table row as JSON, for an architecture the table does not know.")
    ] = None,
) -> Answer:
    """Check that a language model's neurons can be gated and folded."""
    from unmemorize.models.language import check as self_check
    from unmemorize.models.language import fingerprint, load

    table_row = _row(row)
    loaded = load(model, row=table_row, run_check=False)
    results = self_check(loaded, table_row)
    name = fingerprint(loaded, table_row)
    checks = [{"name": r.name, "passed": r.passed, "detail": r.detail} for r in results]
    is_fine = all(r.passed for r in results)
    lines = [f"{'ok  ' if r.passed else 'FAIL'}  {r.name}: {r.detail}" for r in results]
    return Answer(
        data={"model": name, "passed": is_fine, "checks": checks},
        lines=[*lines, name],
        exit_code=0 if is_fine else 1,
    )


def plan(
    progress: ProgressCallback,
    pool: Annotated[int, typer.Option(help="Sinks per layer.")],
    sinks: Annotated[int, typer.Option(help="Sinks that an id owns in a layer.")],
    sources: Annotated[int, typer.Option(help="Ids that train.")],
    deletions: Annotated[int, typer.Option(help="Ids whose sinks are closed for good.")] = 0,
    tolerance: Annotated[
        float, typer.Option(help="Largest share of a surviving id's sinks that may be lost, 0 to 1.")
    ] = 0.1,
    scheme: Annotated[
        Literal["keyed", "disjoint", "published"], typer.Option(help="How sinks are drawn.")
    ] = "keyed",
) -> Answer:
    """Say what a pool of sinks can bear before anything is trained."""
    from dataclasses import asdict

    from unmemorize.isolate.planner import forecast, simulate

    sizes: dict[str, Any] = {
        "num_pool": pool,
        "num_sinks": sinks,
        "num_sources": sources,
        "num_deletions": deletions,
        "scheme": scheme,
    }
    expected = forecast(**sizes, tolerance_frac=tolerance)
    counted = simulate(**sizes)
    lines = [
        f"sinks shared by two ids             {expected.shared_sinks:8.2f}   (counted {counted.shared_sinks:.2f})",
        f"ids that own one sink               {expected.owners_per_sink:8.1f}",
        f"lost by an id that stays            {expected.collateral_frac:8.1%}   "
        f"(counted {counted.collateral_frac:.1%}, at worst {counted.worst_collateral_frac:.1%})",
        f"share of the pool lost              {expected.pool_lost_frac:8.1%}   "
        f"(counted {counted.pool_lost_frac:.1%})",
        f"deletions that cost others at most {tolerance:.0%}: {expected.max_safe_deletions}",
    ]
    return Answer(data={"forecast": asdict(expected), "simulation": asdict(counted)}, lines=lines)


def train(
    progress: ProgressCallback,
    out: Annotated[Path, typer.Option(help="Run folder; run the same command again to continue.")],
    corpus: Annotated[
        str | None,
        typer.Option(help="A .jsonl, .txt or .parquet file, a datasets folder or name, or python-docs."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, separated by spaces: standard dedup cap:8 sinks goldfish ...")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.")] = None,
    ids: Annotated[IdKind | None, typer.Option(help="What makes two documents the same.")] = None,
    model: Annotated[
        str | None, typer.Option(help="tiny, a config.json, or a model folder or hub name to start from.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--config", help="JSON file with any settings; options here override it.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
) -> Answer:
    """Train language models with several methods and seeds on one corpus."""
    from unmemorize.isolate.train import train as run_training

    chosen = _train_settings(
        settings,
        {
            "corpus.path": corpus,
            "corpus.ids": ids,
            "corpus.text_column": text_column,
            "model.model": model,
            "methods": methods.split() if methods else None,
            "seeds": _integers(seeds),
        },
    )
    trained = run_training(chosen, out, progress)
    models = [str(run.folder) for run in trained]
    return Answer(data={"run": str(out), "models": models}, lines=[*models, f"next: unmemorize audit {out}"])


def audit(
    progress: ProgressCallback,
    target: Annotated[Path, typer.Argument(help="Run folder, or model folder.", metavar="RUN|MODEL")],
    examples: Annotated[
        Path | None, typer.Option(help="For a model: a run folder or a .jsonl file with text and group.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="For a model: run folder to write audit.json to.")] = None,
    max_extraction: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if more than this share of targets may be extractable, 0 to 1."),
    ] = None,
    length: Annotated[int, typer.Option(help="For a model: tokens to which texts are cut.")] = 256,
) -> Answer:
    """Measure what models know of repeated and of new text, in every state, with intervals."""
    if (target / "audit.json").is_file() or (target / "examples.jsonl").is_file():
        from unmemorize.audit.training import audit_training

        result, folder = audit_training(target, progress=progress), target
    else:
        if examples is None or out is None:
            raise ConfigError(f"{target} is no run folder; to audit a model give --examples and --out")
        result, folder = _audit_model(target, examples, out, length), out
    lines = [result.verdict, *result.limits]
    code = 0
    if max_extraction is not None:
        worst = max((_upper(m.seeds[-1].extraction_rate_frac) for m in result.methods[-1:]), default=1.0)
        code = int(worst > max_extraction)
        lines.append(
            f"extraction at most {worst:.1%} (95 %), bar {max_extraction:.1%}: {'missed' if code else 'met'}"
        )
    return Answer(
        data=result.model_dump(mode="json"), lines=[*lines, str(folder / "audit.json")], exit_code=code
    )


def remove(
    progress: ProgressCallback,
    model: Annotated[Path, typer.Argument(help="Model folder, as trained.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the plain model.")],
    neurons: Annotated[
        Path | None,
        typer.Option(help="Neuron file to remove; by default the pool of the model's sinks.json."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Ids whose sinks stay, separated by commas.")] = None,
    way: Annotated[
        Literal["excise", "fold"], typer.Option(help="excise: narrower model; fold: zeros at equal width.")
    ] = "excise",
) -> Answer:
    """Remove neurons for good and write a plain model that loads without this library."""
    import torch

    from unmemorize.gates import closed, gated
    from unmemorize.isolate.plan import load_plan
    from unmemorize.models.language import find_mlps, fingerprint, load
    from unmemorize.neurons import load_neurons
    from unmemorize.remove.language import excise, export, fold, prove_plain, tokenizer_beside

    loaded = load(model)
    if neurons is not None:
        chosen = load_neurons(neurons)
    else:
        layout = load_plan(model / "sinks.json")
        kept = _integers(keep)
        chosen = layout.pool() - layout.neurons_for(kept) if kept else layout.pool()
    smaller = (excise if way == "excise" else fold)(loaded, chosen)
    manifest = {
        "way": way,
        "model": fingerprint(loaded),
        "num_neurons": len(chosen),
        "neurons": {site.path: list(indices) for site, indices in chosen.indices.items()},
    }
    export(smaller, out, manifest=manifest, tokenizer=tokenizer_beside(model))
    tokens = torch.arange(32).remainder(int(loaded.config.get_text_config().vocab_size)).unsqueeze(0)
    with torch.no_grad(), gated(loaded, closed(chosen)):
        expected = loaded(input_ids=tokens).logits.float()
    difference = (prove_plain(out, tokens) - expected).abs().max().item()
    widths = [find_mlps(m)[0].site.width for m in (loaded, smaller)]
    lines = [
        f"removed {len(chosen)} neurons; MLP width {widths[0]} -> {widths[1]}",
        f"loads without unmemorize; largest logit difference to the closed gate {difference:.2g}",
        str(out),
    ]
    data = {"folder": str(out), "num_neurons": len(chosen), "widths": widths, "logit_difference": difference}
    return Answer(data=data, lines=lines)


def ids(
    progress: ProgressCallback,
    corpus: Annotated[
        str, typer.Argument(help="A .jsonl, .txt or .parquet file, or python-docs.", metavar="CORPUS")
    ],
    kind: Annotated[IdKind, typer.Option("--ids", help="What makes two documents the same.")] = "content",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    source_column: Annotated[str | None, typer.Option(help="Column that names the source.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many documents.")] = None,
) -> Answer:
    """Print the id of every document: row, id and source, separated by tabs."""
    from unmemorize.corpus import read_corpus

    documents = read_corpus(
        corpus, text_column=text_column, source_column=source_column, ids=kind, limit=limit
    )
    rows = [{"row": d.row, "id": d.id, "source": d.source} for d in documents]
    num_ids = len({d.id for d in documents})
    return Answer(
        data={"num_documents": len(rows), "num_ids": num_ids, "documents": rows},
        lines=[f"{d.row}\t{d.id}\t{d.source}" for d in documents],
    )


def report(
    progress: ProgressCallback,
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.", metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; report.html in the first run folder by default.")
    ] = None,
) -> Answer:
    """Make one self-contained HTML file from run folders."""
    from unmemorize.report import write_report

    path = write_report(runs, output)
    return Answer(data={"report": str(path)}, lines=[str(path)])


def demo(
    progress: ProgressCallback,
    out: Annotated[Path, typer.Option(help="Run folder; run the same command again to continue.")] = Path(
        "runs/demo"
    ),
    corpus: Annotated[str, typer.Option(help="JSON Lines or text of your own.")] = "python-docs",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    quick: Annotated[
        bool, typer.Option(help="A few seconds of training: shows the way, not the effect.")
    ] = False,
) -> Answer:
    """Watch memory being isolated in, and cut out of, a small language model, in minutes on a laptop."""
    from unmemorize.audit.training import audit_training
    from unmemorize.isolate.settings import demo_settings
    from unmemorize.isolate.train import train as run_training
    from unmemorize.report import write_report

    run_training(demo_settings(corpus, text_column, is_quick=quick), out, progress)
    result = audit_training(out, progress=progress)
    removed = out / "plain"
    if not removed.exists():
        remove(progress, out / "models" / "sinks-seed0", removed)
    path = write_report([out])
    data = {"run": str(out), "plain_model": str(removed), "report": str(path), "verdict": result.verdict}
    return Answer(data=data, lines=[result.verdict, f"plain model: {removed}", str(path)])


VERBS = {
    "demo": demo,
    "train": train,
    "audit": audit,
    "remove": remove,
    "report": report,
    "plan": plan,
    "check": check,
    "ids": ids,
}


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


def _upper(measure: Any) -> float:
    """Return the upper end of a measure's interval; 1 if it was refused, since nothing is known then."""
    return 1.0 if measure.ci95 is None else float(measure.ci95[1])


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of whole numbers; write them with commas: 0,1,2") from None


def _row(text: str | None) -> MlpRow | None:
    from pydantic import TypeAdapter, ValidationError

    from unmemorize.models.language import MlpRow

    if text is None:
        return None
    try:
        return TypeAdapter(MlpRow).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--row is not a table row at {place or 'its start'}: {first['msg']}") from error


def _train_settings(path: Path | None, overrides: dict[str, Any]) -> TrainSettings:
    """Read a settings file and lay the options over it; dotted names go one level down."""
    import json

    from unmemorize.isolate.settings import settings_from_json

    value: dict[str, Any] = {}
    if path is not None:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a readable JSON file: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{path} holds a {type(value).__name__}, expected an object with settings")
        # A run's own config.json may be given back as it is.
        value = value.get("settings", value)
    for name, choice in overrides.items():
        if choice is not None:
            *outer, last = name.split(".")
            place = value.setdefault(outer[0], {}) if outer else value
            place[last] = choice
    return settings_from_json(value)
