"""The verbs of the command line: what a user may say, handed to the family that the model belongs to.

A verb prints nothing; `cli.py` does. Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unmemorize.corpus import IdKind
from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import Answer, Positions, Precision, TextEdit, file_with_options, integers
from unmemorize.verbs.families import Family, family_of, folder_of

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

    model = folder_of(model)
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
    from unmemorize.verbs import pictures as picture_runs

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


def localize(
    progress: ProgressCallback,
    model: Annotated[str, typer.Argument(help="Model or pipeline, folder or hub name.", metavar="MODEL")],
    examples: Annotated[
        Path,
        typer.Option(
            help="What may be memorized: a table or a list of prompts or texts (.csv, .jsonl, .txt), with groups."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder; run the same command again to continue.")],
    ordinary: Annotated[
        Path | None,
        typer.Option(
            help="Ordinary prompts or texts, never memorized: activation statistics and threshold come from them."
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="Activation statistics made before (.safetensors), or the released ones (.npz)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Pipeline: NeMo fast (default), compat (as released) or paper (as written). Language model: gradient "
            "(default) or other localizers, separated by commas; neurons.json is that of the first."
        ),
    ] = None,
    ranking: Annotated[
        Literal["unusual", "gradient"],
        typer.Option(help="Order in which fast tries neurons: by z-score, or by a gradient."),
    ] = "unusual",
    clusters: Annotated[
        bool, typer.Option(help="Find one set for each group of near-duplicate prompts (fast only).")
    ] = False,
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
    seed: Annotated[int, typer.Option(help="Seed of the samples, or of a localizer that draws.")] = 1,
    blocks: Annotated[
        str | None, typer.Option(help="Blocks to search, separated by commas: down,mid,up ...")
    ] = None,
    positions: Annotated[
        Positions, typer.Option(help="Token positions whose activations are averaged; tail: end and padding.")
    ] = "all",
    column: Annotated[str | None, typer.Option(help="Column of the table that holds the prompt.")] = None,
    share: Annotated[
        float, typer.Option(help="Language model: share of each layer's neurons to choose, 0 to 1.")
    ] = 0.01,
    prefix: Annotated[int, typer.Option(help="Language model: tokens of a text that are given.")] = 32,
    suffix: Annotated[int, typer.Option(help="Language model: tokens that it is to repeat.")] = 32,
    length: Annotated[int, typer.Option(help="Language model: tokens to which texts are cut.")] = 256,
    force: Annotated[
        bool, typer.Option("--force", help="Language model: go on if no target is memorized.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps; auto takes the first accelerator.")] = "auto",
    dtype: Annotated[
        Precision | None, typer.Option(help="Dtype of the weights; by default the checkpoint's.")
    ] = None,
) -> Answer:
    """Find out what a model has memorized, prompts or texts, and which neurons hold it."""
    from unmemorize.verbs import diffusion, language_localize, texts

    model = folder_of(model)
    if family_of(model) == "language":
        wanted = language_localize.NeuronOptions(
            methods=method or "gradient",
            share=share,
            seed=seed,
            cut=texts.Cut(prefix=prefix, suffix=suffix, length=max(length, prefix + suffix)),
            is_forced=force,
        )
        return language_localize.localize(progress, model, examples, out, ordinary, wanted, device, dtype)
    options = diffusion.NemoOptions(
        mode=diffusion.mode_of(method),
        ranking=ranking,
        is_clustered=clusters,
        statistics=statistics,
        num_samples=num_samples,
        seed=seed,
        threshold=threshold,
        num_calibration=calibrate,
        blocks=blocks,
        positions=positions,
        column=column,
    )
    loading = diffusion.Loading(device=device, precision=dtype)
    return diffusion.localize(progress, model, examples, out, ordinary, options, loading)


def audit(
    progress: ProgressCallback,
    target: Annotated[str, typer.Argument(help="Run folder, model or pipeline.", metavar="RUN|MODEL")],
    examples: Annotated[
        Path | None,
        typer.Option(
            help="For a model: a run folder, or a .jsonl file with text and group; prompts for a pipeline."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="For a model: run folder to write audit.json to.")] = None,
    max_extraction: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if more than this share of targets may still be reproduced, 0 to 1."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="For a language model: tokens to which texts are cut; by default 256, or as localized."
        ),
    ] = None,
    neurons: Annotated[
        Path | None, typer.Option(help="Neurons to switch off; by default those of the run folder.")
    ] = None,
    ordinary: Annotated[
        Path | None, typer.Option(help="Language model: ordinary texts, for perplexity with neurons off.")
    ] = None,
    prefix: Annotated[
        int | None,
        typer.Option(help="With neurons: tokens given; by default those of the run folder, or 32."),
    ] = None,
    suffix: Annotated[int | None, typer.Option(help="With neurons: tokens to repeat; likewise.")] = None,
    rivals: Annotated[
        str,
        typer.Option(help="Pipeline: what to compare with: placebo first-layer padding tokens:4 adjusted."),
    ] = "placebo",
    mended: Annotated[
        Path | None, typer.Option(help="With neurons: folder after removal, to measure too.")
    ] = None,
    twin: Annotated[
        Path | None,
        typer.Option(help="With neurons: folder of one that never saw the targets, or less often."),
    ] = None,
    sscd: Annotated[
        list[Path] | None,
        typer.Option(help="Pipeline: SSCD model file (disc_mixup or disc_large); repeatable."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Pipeline: CLIP folder or hub name, for the alignment with prompts.")
    ] = None,
    num_seeds: Annotated[int, typer.Option(help="Pipeline: pictures per prompt and state.")] = 10,
    num_steps: Annotated[int, typer.Option(help="Pipeline: denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Pipeline: guidance scale.")] = 7.0,
    size_px: Annotated[
        int | None, typer.Option(help="Pipeline: side of the pictures in pixels; by default its own.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Pipeline: column that holds the prompt.")] = None,
    device: Annotated[str, typer.Option(help="With neurons: cpu, cuda, mps, or auto.")] = "auto",
    dtype: Annotated[Precision | None, typer.Option(help="With neurons: dtype of the weights.")] = None,
) -> Answer:
    """Measure what models reproduce of what they were trained on, in every state, with intervals."""
    from unmemorize.verbs import diffusion, language, language_audit
    from unmemorize.verbs import pictures as picture_runs

    target = folder_of(target)
    is_run = picture_runs.is_picture_run(Path(target))
    if family_of(target) != "diffusion" and not is_run:
        compared = language_audit.NeuronAuditOptions(
            neurons=neurons,
            mended=mended,
            twin=twin,
            ordinary=ordinary,
            prefix=prefix,
            suffix=suffix,
            length=length,
        )
        if language_audit.wants_neurons(out, compared):
            if examples is None or out is None:
                raise ConfigError("to audit neurons give --examples FILE (texts with groups) and --out RUN")
            return language_audit.audit(
                progress, target, examples, out, max_extraction, compared, device, dtype
            )
        return language.audit(progress, Path(target), examples, out, max_extraction, length or 256)
    if not is_run and (examples is None or out is None):
        raise ConfigError("to audit a pipeline give --examples FILE (prompts) and --out RUN")
    options = diffusion.PictureOptions(
        neurons=neurons,
        rivals=rivals,
        mended=mended,
        twin=twin,
        sscd=tuple(sscd or ()),
        clip=clip,
        num_seeds=num_seeds,
        num_steps=num_steps,
        guidance=guidance,
        size_px=size_px,
        column=column,
    )
    loading = diffusion.Loading(device=device, precision=dtype)
    if is_run:
        return picture_runs.audit(progress, Path(target), max_extraction, options, loading)
    assert examples is not None and out is not None
    return diffusion.audit(progress, target, examples, out, max_extraction, options, loading)


def remove(
    progress: ProgressCallback,
    model: Annotated[str, typer.Argument(help="Model or pipeline folder, as trained.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the plain model.")],
    neurons: Annotated[
        Path | None,
        typer.Option(
            help="Neuron file to remove; for a language model by default the pool of its sinks.json."
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Language model: ids whose sinks stay, separated by commas.")
    ] = None,
    way: Annotated[
        Literal["excise", "fold", "edit", TextEdit] | None,
        typer.Option(
            help="excise: narrower language model (its default); fold: zeros at equal width (default of pipelines); "
            "edit: pipelines, values quiet on the targets; rows of the neurons, or whole layers without --neurons; "
            "others: weight edits of language models, without neurons."
        ),
    ] = None,
    examples: Annotated[Path | None, typer.Option(help="For edits: prompts or texts that are to go.")] = None,
    ordinary: Annotated[
        Path | None, typer.Option(help="For edits: ordinary prompts or texts, to be preserved.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="For edit: column that holds the prompt.")] = None,
    prefix: Annotated[int, typer.Option(help="For output-vectors: tokens of a text that are given.")] = 32,
    budget: Annotated[
        float, typer.Option(help="Edits of language models: most that ordinary perplexity may rise, 0 to 1.")
    ] = 0.1,
    keep_undo: Annotated[
        bool,
        typer.Option(
            help="Pipelines and edits: keep the old values beside it; whoever has them has the memory."
        ),
    ] = False,
) -> Answer:
    """Remove neurons for good and write a plain model that loads without this library."""
    from unmemorize.verbs import diffusion, language, language_remove
    from unmemorize.verbs import pictures as picture_runs

    model = folder_of(model)
    if family_of(model) == "diffusion":
        if neurons is None and way != "edit" and (Path(model) / "sinks.json").is_file():
            return picture_runs.remove_sinks(Path(model), out, keep, way or "excise")
        is_usable = way == "edit" or (way in (None, "fold") and neurons is not None)
        if not is_usable or keep is not None:
            raise ConfigError("for a pipeline give --neurons FILE, or --way edit; --keep is for sinks")
        return diffusion.remove(
            progress,
            model,
            out,
            neurons,
            "edit" if way == "edit" else "fold",
            keep_undo,
            examples,
            ordinary,
            column,
        )
    if way == "edit":
        raise ConfigError("--way edit is for pipelines; for a language model use excise or fold")
    if way is None or way == "excise" or way == "fold":
        return language.remove(Path(model), out, neurons, keep, way or "excise")
    if neurons is not None or keep is not None:
        raise ConfigError(f"--way {way} edits weights without neurons; leave out --neurons and --keep")
    options = language_remove.EditOptions(
        way=way,
        examples=examples,
        ordinary=ordinary,
        budget=budget,
        keep_undo=keep_undo,
        prefix=prefix,
    )
    return language_remove.edit(progress, Path(model), out, options)


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
    from unmemorize.report import REPORT_NAME, write_report
    from unmemorize.verbs import pictures as picture_runs

    folders = [folder for run in runs for folder in picture_runs.audited(run)]
    path = write_report(folders, output or runs[0] / REPORT_NAME)
    return Answer(data={"report": str(path)}, lines=[str(path)])


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
    "testbed": testbed,
}
