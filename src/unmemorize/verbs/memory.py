"""Verbs that measure and remove memory: audit, remove, report; what a user may say, option by option.

Each hands what was said to the family that the model belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import UNLEARNING, Answer, Precision, TextEdit, refuse_passed_over
from unmemorize.verbs.families import family_of, folder_of, require_outside

if TYPE_CHECKING:
    from unmemorize.records import ProgressCallback


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
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Pipeline: real pictures (folder, table, .npz), for FID and KID of ordinary prompts' pictures by the "
            "features of --clip; never those of the targets."
        ),
    ] = None,
    num_seeds: Annotated[int, typer.Option(help="Pipeline: pictures per prompt and state.")] = 10,
    num_steps: Annotated[int, typer.Option(help="Pipeline: denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Pipeline: guidance scale.")] = 7.0,
    size_px: Annotated[
        int | None, typer.Option(help="Pipeline: side of the pictures in pixels; by default its own.")
    ] = None,
    copy_threshold: Annotated[
        float | None,
        typer.Option(
            help="Pipeline: similarity by structure from which a picture is a copy, 0 to 1; by default computed."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Pipeline: column that holds the prompt.")] = None,
    device: Annotated[str, typer.Option(help="With neurons: cpu, cuda, mps, or auto.")] = "auto",
    dtype: Annotated[Precision | None, typer.Option(help="With neurons: dtype of the weights.")] = None,
) -> Answer:
    """Measure what models reproduce of what they were trained on, in every state, with intervals."""
    from unmemorize.verbs import diffusion, language, language_audit, picture_measures, picture_runs

    if max_extraction is not None and not 0 <= max_extraction <= 1:
        raise ConfigError(f"--max-extraction is {max_extraction}, expected a share from 0 to 1")
    require_outside(out, target)
    target = folder_of(target)
    is_run = picture_runs.is_picture_run(Path(target))
    if family_of(target) != "diffusion" and not is_run:
        refuse_passed_over(
            audit,
            {
                "rivals": rivals,
                "sscd": sscd or None,
                "clip": clip,
                "reference": reference,
                "num_seeds": num_seeds,
                "num_steps": num_steps,
                "guidance": guidance,
                "size_px": size_px,
                "copy_threshold": copy_threshold,
                "column": column,
            },
            "for pipelines and runs on pictures, without effect on a language model",
        )
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
        refuse_passed_over(
            audit,
            {"ordinary": ordinary, "prefix": prefix, "suffix": suffix},
            "only with --neurons, or in a folder that localize wrote",
        )
        length_tokens = 256 if length is None else length
        return language.audit(progress, Path(target), examples, out, max_extraction, length_tokens)
    refuse_passed_over(
        audit,
        {
            "ordinary": ordinary,
            "prefix": prefix,
            "suffix": suffix,
            "length": length,
        },
        "for language models, without effect on pictures",
    )
    if not is_run and (examples is None or out is None):
        raise ConfigError("to audit a pipeline give --examples FILE (prompts) and --out RUN")
    options = picture_measures.PictureOptions(
        neurons=neurons,
        rivals=rivals,
        mended=mended,
        twin=twin,
        sscd=tuple(sscd or ()),
        clip=clip,
        reference=reference,
        num_seeds=num_seeds,
        num_steps=num_steps,
        guidance=guidance,
        size_px=size_px,
        copy_threshold=copy_threshold,
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
        str | None,
        typer.Option(
            help="Ids whose sinks stay, separated by commas; those of a pipeline's grown pool beside the plain folder."
        ),
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
    protect: Annotated[
        Path | None,
        typer.Option(
            help="For curvature: texts of an ability that should stay (.jsonl with text, .csv, .txt)."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="For edit: column that holds the prompt.")] = None,
    prefix: Annotated[int, typer.Option(help="For output-vectors: tokens of a text that are given.")] = 32,
    budget: Annotated[
        float, typer.Option(help="Edits of language models: most that ordinary perplexity may rise, 0 to 1.")
    ] = 0.1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Unlearning (gradient-..., npo, simnpo): step size, 1e-4 by default; less for larger models."
        ),
    ] = None,
    keep_undo: Annotated[
        bool,
        typer.Option(
            help="Pipelines and edits: keep the old values beside it; whoever has them has the memory."
        ),
    ] = False,
) -> Answer:
    """Remove neurons for good and write a plain model that loads without this library."""
    from unmemorize.verbs import diffusion, language, language_remove, picture_runs

    model = folder_of(model)
    if protect is not None and way != "curvature":
        raise ConfigError(
            f"--protect is for --way curvature of language models; {f'--way {way}' if way else 'cutting neurons out'} "
            "does not look at it: leave it out"
        )
    if learning_rate is not None and way not in UNLEARNING:
        raise ConfigError(
            f"--learning-rate is for unlearning ({', '.join(UNLEARNING)}); "
            f"{f'--way {way}' if way else 'cutting neurons out'} has none: leave it out"
        )
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
        refuse_passed_over(
            remove,
            {
                "keep_undo": keep_undo,
                "examples": examples,
                "ordinary": ordinary,
                "column": column,
                "budget": budget,
            },
            "for edits; cutting neurons out of a language model looks at no texts and leaves the old folder as it was",
        )
        if keep is not None and neurons is not None:
            raise ConfigError("--keep chooses among sinks, --neurons names what goes; give one of them")
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
        protect=protect,
        learning_rate=learning_rate,
    )
    return language_remove.edit(progress, Path(model), out, options)


def report(
    progress: ProgressCallback,
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.", metavar="RUN...")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; report.html in the first run folder by default.")
    ] = None,
) -> Answer:
    """Make one self-contained HTML file from run folders."""
    from unmemorize.report import REPORT_NAME, write_report
    from unmemorize.verbs import picture_runs

    folders = [folder for run in runs for folder in picture_runs.audited(run)]
    path = write_report(folders, output or runs[0] / REPORT_NAME)
    return Answer(data={"report": str(path)}, lines=[str(path)])
