"""Verbs that look into a model: check and localize; what a user may say, option by option.

Each hands what was said to the family that the model belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmemorize.errors import ConfigError
from unmemorize.verbs.answers import Answer, Positions, Precision, integers, refuse_passed_over
from unmemorize.verbs.families import family_of, folder_of, require_outside

if TYPE_CHECKING:
    from unmemorize.records import ProgressCallback


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
        float, typer.Option(help="Language model: share of the neurons to choose, 0 to 1; see --select.")
    ] = 0.01,
    select: Annotated[
        Literal["per-layer", "global"] | None,
        typer.Option(
            help="Language model: the share is that of each layer (per-layer, the default) or of all layers together."
        ),
    ] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            help="Language model: layers that give no neurons, separated by commas; the first is 0."
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Language model: neurons.json is not the share, but few neurons along the first method's ranking "
            "without which no memorized target keeps its likelihood.",
        ),
    ] = False,
    leave: Annotated[
        float | None,
        typer.Option(help="With --search: most of a target's likelihood that may be left, 0 to 1 (0.5)."),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Language model: neurons that zero-out leaves out, the best by gradient; by default all."
        ),
    ] = None,
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
    from unmemorize.verbs import diffusion, language_localize, picture_localize, texts

    require_outside(out, model)
    model = folder_of(model)
    if family_of(model) == "language":
        refuse_passed_over(
            localize,
            {
                "statistics": statistics,
                "ranking": ranking,
                "clusters": clusters,
                "threshold": threshold,
                "calibrate": calibrate,
                "num_samples": num_samples,
                "blocks": blocks,
                "positions": positions,
                "column": column,
            },
            "for pipelines, without effect on a language model",
        )
        if leave is not None and not search:
            raise ConfigError("--leave says when --search ends; give --search too, or take it away")
        wanted = language_localize.NeuronOptions(
            methods=method or "gradient",
            share=share,
            select=select or "per-layer",
            skip_layers=tuple(sorted(set(integers(skip_layers) or ()))),
            leave=(0.5 if leave is None else leave) if search else None,
            num_candidates=candidates,
            seed=seed,
            cut=texts.cut_at(prefix, suffix, length),
            is_forced=force,
        )
        return language_localize.localize(progress, model, examples, out, ordinary, wanted, device, dtype)
    refuse_passed_over(
        localize,
        {
            "share": share,
            "select": select,
            "skip_layers": skip_layers,
            "search": search,
            "leave": leave,
            "candidates": candidates,
            "prefix": prefix,
            "suffix": suffix,
            "length": length,
            "force": force,
        },
        "for language models, without effect on a pipeline",
    )
    options = picture_localize.NemoOptions(
        mode=picture_localize.mode_of(method),
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
    return picture_localize.localize(progress, model, examples, out, ordinary, options, loading)
