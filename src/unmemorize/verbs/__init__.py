"""The verbs of the command line: what a user may say, handed to the family that the model belongs to.

A verb prints nothing; `cli.py` does. Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmemorize.corpus import IdKind
from unmemorize.verbs.answers import Answer, file_with_options, integers
from unmemorize.verbs.families import family_of

if TYPE_CHECKING:
    from unmemorize.records import ProgressCallback

__all__ = ["VERBS", "Answer"]


def check(
    progress: ProgressCallback,
    model: Annotated[str, typer.Argument(help="Model or pipeline folder, or hub name.", metavar="MODEL")],
    row: Annotated[
        str | None, typer.Option(help="Site table row as JSON, for an architecture the table does not know.")
    ] = None,
) -> Answer:
    """Check that a model's neurons can be gated and folded."""
    from unmemorize.verbs import diffusion, language

    if family_of(model) == "diffusion":
        return diffusion.check(model, row)
    return language.check(model, row)


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
    from unmemorize.isolate.settings import settings_from_json
    from unmemorize.isolate.train import train as run_training

    options = {
        "corpus.path": corpus,
        "corpus.ids": ids,
        "corpus.text_column": text_column,
        "model.model": model,
        "methods": methods.split() if methods else None,
        "seeds": integers(seeds),
    }
    trained = run_training(settings_from_json(file_with_options(settings, options)), out, progress)
    models = [str(run.folder) for run in trained]
    return Answer(data={"run": str(out), "models": models}, lines=[*models, f"next: unmemorize audit {out}"])


def localize(
    progress: ProgressCallback,
    model: Annotated[str, typer.Argument(help="Pipeline folder or hub name.", metavar="MODEL")],
    examples: Annotated[
        Path, typer.Option(help="What may be memorized: a table or a list of prompts (.csv, .jsonl, .txt).")
    ],
    out: Annotated[Path, typer.Option(help="Run folder; run the same command again to continue.")],
    ordinary: Annotated[
        Path | None,
        typer.Option(
            help="Ordinary prompts, never memorized: activation statistics and threshold come from them."
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="Activation statistics made before (.safetensors), or the released ones (.npz)."),
    ] = None,
    method: Annotated[
        Literal["fast", "compat", "paper"], typer.Option(help="NeMo: fast, as released, or as written.")
    ] = "fast",
    threshold: Annotated[
        float | None,
        typer.Option(help="Threshold of gate and search; by default calibrated on the ordinary prompts."),
    ] = None,
    calibrate: Annotated[
        int, typer.Option(help="Ordinary prompts to calibrate on; 0: the published threshold of SD 1.4.")
    ] = 50,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples per prompt; by default 4 for fast, else 10.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 1,
    blocks: Annotated[
        str | None, typer.Option(help="Blocks to search, separated by commas: down,mid,up ...")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the table that holds the prompt.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps; auto takes the first accelerator.")] = "auto",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Dtype of the weights; by default the checkpoint's."),
    ] = None,
) -> Answer:
    """Find out which prompts reproduce training pictures, and which neurons hold them."""
    from unmemorize.verbs import diffusion

    options = diffusion.NemoOptions(
        mode=method,
        statistics=statistics,
        num_samples=num_samples,
        seed=seed,
        threshold=threshold,
        num_calibration=calibrate,
        blocks=blocks,
        column=column,
    )
    loading = diffusion.Loading(device=device, precision=dtype)
    return diffusion.localize(progress, model, examples, out, ordinary, options, loading)


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
    from unmemorize.verbs import language

    return language.audit(progress, target, examples, out, max_extraction, length)


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
    from unmemorize.verbs import language

    return language.remove(model, out, neurons, keep, way)


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
    from unmemorize.verbs import language

    return language.demo(progress, out, corpus, text_column, quick)


VERBS: dict[str, Callable[..., Answer]] = {
    "demo": demo,
    "train": train,
    "localize": localize,
    "audit": audit,
    "remove": remove,
    "report": report,
    "plan": plan,
    "check": check,
    "ids": ids,
}
