"""Verbs that make models or come before one: demo, train, testbed, plan, ids. What a user may say, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmemorize.corpus import IdKind
from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import Answer, file_with_options, integers
from unmemorize.verbs.families import Family

if TYPE_CHECKING:
    from unmemorize.records import ProgressCallback


def demo(
    progress: ProgressCallback,
    family: Annotated[
        Family,
        typer.Argument(
            help="language: trains small models. diffusion: mends the pipeline that ships.", metavar="FAMILY"
        ),
    ] = "language",
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, by default in runs/; run the same command again to continue."),
    ] = None,
    corpus: Annotated[str, typer.Option(help="Language: JSON Lines or text of your own.")] = "python-docs",
    text_column: Annotated[str, typer.Option(help="Language: column that holds the text.")] = "text",
    quick: Annotated[
        bool, typer.Option(help="Language: a few seconds of training: shows the way, not the effect.")
    ] = False,
    device: Annotated[str, typer.Option(help="Diffusion: cpu, cuda, mps, or auto.")] = "auto",
) -> Answer:
    """Watch memory being found, or isolated in training, and cut out, in minutes on a laptop."""
    from unmemorize.verbs import language, testbeds

    if family == "diffusion":
        return testbeds.demo(progress, out or Path("runs/demo-diffusion"), device)
    return language.demo(progress, out or Path("runs/demo"), corpus, text_column, quick)


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
    ids: Annotated[
        IdKind | None, typer.Option(help="What makes two documents, or pictures, the same.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="tiny, a config.json, or a model folder or hub name to start from.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--config", help="JSON file with any settings; options here override it.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Pictures: pipeline folder or hub name to start from.")
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(help="Pictures: folder or .npz of captioned pictures; trains text-to-image models."),
    ] = None,
    size_px: Annotated[
        int | None, typer.Option(help="Pictures: side in pixels; by default the pipeline's own.")
    ] = None,
) -> Answer:
    """Train models with several methods and seeds on one corpus, or on one collection of captioned pictures."""
    from unmemorize.isolate.settings import settings_from_json
    from unmemorize.isolate.train import train as run_training
    from unmemorize.verbs import picture_runs

    if pipeline is not None or pictures is not None or picture_runs.names_pipeline(settings):
        if corpus is not None or model is not None or text_column is not None:
            raise ConfigError("--corpus, --model and --text-column are for texts; give them or --pictures")
        return picture_runs.train(
            progress,
            out,
            settings,
            picture_runs.TrainOptions(
                pipeline=pipeline,
                pictures=pictures,
                size_px=size_px,
                ids=ids,
                methods=methods.split() if methods else None,
                seeds=integers(seeds),
            ),
        )
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


def testbed(
    progress: ProgressCallback,
    family: Annotated[Literal["diffusion"], typer.Argument(help="diffusion.", metavar="FAMILY")],
    out: Annotated[Path, typer.Option(help="Folder; run the same command again to continue.")],
    pictures: Annotated[
        str | None,
        typer.Option(
            help="General captioned pictures (folder or .npz beside captions.csv); drawn here by default."
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Captioned pictures to memorize; drawn here by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights, pictures and batches; 0 by default.")
    ] = None,
    size_px: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels; 24 by default.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--config", help="JSON file with any settings; options here override it.")
    ] = None,
) -> Answer:
    """Train small models whose memory is known: memorized, twin, and injected into chosen neurons."""
    from unmemorize.verbs import testbeds

    options = {"pictures.pictures": pictures, "pictures.targets": targets, "seed": seed, "size_px": size_px}
    return testbeds.testbed(progress, out, settings, options)
