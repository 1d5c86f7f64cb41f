"""The closed-form edit of `edits.py`, wired to text-to-image models whose values depend on the text alone.

Memorized inputs are the text states of the memorized prompts at chosen positions, the same for every layer. The start
token is left out by default: its state is the same in every prompt, so that changing it would change every picture.

Joint attention (SD 3, Flux) is refused. Its text states depend on latent and timestep, so that there is no fixed set of
memorized inputs, and an edit solved for one pass would promise nothing about another; use `fold` there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unmemorize.errors import ConfigError, DataError, ModelNotSupported
from unmemorize.gates import folded, is_plain_linear, module_at
from unmemorize.models.denoising import Pipeline, denoiser_of, with_denoiser
from unmemorize.models.diffusion import DenoiserRow, find_sites, require_same_model, row_for
from unmemorize.neurons import NeuronSet, Site
from unmemorize.remove.diffusion_moments import (
    marked_positions,
    require_text,
    text_fingerprint,
    text_states,
)
from unmemorize.remove.edits import Correction, Memorized, correction, drift_frac, kept_frac
from unmemorize.remove.moments import SecondMoments

Target = Literal["zero", "ordinary"]

POSITIONS = ("words", "end", "padding")
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EditFigures:
    """What an edit or a fold did to the value projections, measured on the weights as they are.

    Attributes:
        num_sites: layers with a changed weight.
        num_rows: changed rows (neurons).
        num_zero_rows: rows that are zero now and were not: what can be seen without the original.
        rank: largest rank of a layer's change (singular values above 1e-3 of the largest, which hides rounding).
        kept_frac: memorized values of the changed rows after, as a fraction of before; largest layer.
        excess_frac: the same for what these values have beyond those of the mean ordinary state at their position.
        drift_frac: change of the changed rows' ordinary values, as a fraction of them; largest layer.
    """

    num_sites: int
    num_rows: int
    num_zero_rows: int
    rank: int
    kept_frac: float
    excess_frac: float
    drift_frac: float

    def manifest(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def edit_values(
    pipe: Pipeline,
    prompts: Sequence[str],
    ordinary: SecondMoments,
    *,
    neurons: NeuronSet | None = None,
    sites: Sequence[Site] | None = None,
    strength: float = 0.01,
    target: Target = "ordinary",
    positions: Sequence[str] = POSITIONS,
    ridge_frac: float = 1e-3,
    row: DenoiserRow | None = None,
) -> Pipeline:
    """Return a pipeline whose values are quiet on memorized prompts and kept on ordinary ones; it shares other parts.

    Args:
        pipe: the pipeline; it is not changed.
        prompts: memorized prompts.
        ordinary: second moments of ordinary captions, collected on this text encoder.
        neurons: value neurons whose rows are edited; by default whole sites.
        sites: value sites that are edited; by default the row's default ones. Not together with `neurons`.
        strength: weight of the squared error at one memorized token, unitless; 0 changes nothing, infinity makes the
            target a constraint.
        target: what memorized tokens should give: "zero", or what the mean "ordinary" state at their position gives.
        positions: memorized positions: "start", "words", "end", "padding".
        ridge_frac: how much directions never seen in ordinary captions count, as a fraction of the mean direction.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        ConfigError: if settings contradict each other, or neurons are not value neurons.
        DataError: if there are no prompts.
        ModelNotSupported: if the denoiser has joint attention, or a layer has an adapter or is quantized.
        NeuronSetMismatch: if neurons or moments belong to another model.

    Source: ours; see `edits.py`.
    """
    rows = _rows(pipe, neurons, sites, row)
    solved = _solved(pipe, prompts, ordinary, strength, target, positions, ridge_frac, row)
    denoiser = denoiser_of(pipe)
    for site in rows:
        linear = module_at(denoiser, site.path)
        if not is_plain_linear(linear):
            raise ModelNotSupported(
                f"cannot edit {site.path}, a {type(linear).__name__}; merge its adapter or dequantize it first"
            )
    changed = folded(denoiser, {})  # a copy, refused while a gate is open
    with torch.no_grad():
        for site, chosen in rows.items():
            weight = module_at(changed, site.path).weight
            assert isinstance(weight, Tensor)
            index = torch.tensor([site.start + i for i in chosen], device=weight.device)
            weight[index] = solved.applied(weight[index])
    return with_denoiser(pipe, changed)


def edit_figures(
    before: Pipeline,
    after: Pipeline,
    prompts: Sequence[str],
    ordinary: SecondMoments,
    *,
    positions: Sequence[str] = POSITIONS,
    row: DenoiserRow | None = None,
) -> EditFigures:
    """Compare the value projections of two pipelines, whatever made the difference.

    Args:
        before: the original.
        after: the result of `edit_values` or `fold`.
        prompts: memorized prompts.
        ordinary: second moments of ordinary captions.
        positions: memorized positions that count.
        row: site table row, for a denoiser that the table does not know.

    Raises:
        DataError: if there are no prompts.
        NeuronSetMismatch: if the moments belong to another text encoder.
    """
    require_text(ordinary, text_fingerprint(before, row))
    silent = _memorized(before, prompts, None, positions, row)
    usual = _memorized(before, prompts, ordinary.position_means, positions, row)
    blocks = [name for name, _ in (row or row_for(before)).blocks]
    pairs = [
        tuple(_weight(pipe, site.path) for pipe in (before, after))
        for site in find_sites(before, blocks=blocks, row=row)
    ]
    moved = [((a != b).any(1), a, b) for a, b in pairs]
    changes = [(a[rows], b[rows]) for rows, a, b in moved if bool(rows.any())]
    zero_rows = [int(((b == 0).all(1) & ~(a == 0).all(1)).sum()) for a, b in changes]
    moment = ordinary.mean_product
    return EditFigures(
        num_sites=len(changes),
        num_rows=sum(len(a) for a, _ in changes),
        num_zero_rows=sum(zero_rows),
        rank=max((int(torch.linalg.matrix_rank(b - a, rtol=1e-3)) for a, b in changes), default=0),
        kept_frac=max((kept_frac(a, b, silent) for a, b in changes), default=1.0),
        excess_frac=max((kept_frac(a, b, usual) for a, b in changes), default=1.0),
        drift_frac=max((drift_frac(a, b, moment) for a, b in changes), default=0.0),
    )


def _solved(
    pipe: Pipeline,
    prompts: Sequence[str],
    ordinary: SecondMoments,
    strength: float,
    target: Target,
    positions: Sequence[str],
    ridge_frac: float,
    row: DenoiserRow | None,
) -> Correction:
    if target not in ("zero", "ordinary"):
        raise ConfigError(f"unknown target {target!r}; expected zero or ordinary")
    if ordinary.num_captions == 0:
        raise DataError("the second moments hold no captions; collect them from ordinary captions")
    require_text(ordinary, text_fingerprint(pipe, row))
    means = ordinary.position_means if target == "ordinary" else None
    memorized = _memorized(pipe, prompts, means, positions, row)
    return correction(memorized, ordinary.mean_product, strength=strength, ridge_frac=ridge_frac)


def _memorized(
    pipe: Pipeline,
    prompts: Sequence[str],
    means: Tensor | None,
    positions: Sequence[str],
    row: DenoiserRow | None,
) -> Memorized:
    """Return the moments of the memorized tokens; `means` of shape (T, D) is what should be seen in their place."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise DataError(
            "the prompt list is empty or holds an empty prompt; pass at least one prompt with words"
        )
    if not positions or isinstance(positions, str):
        raise ConfigError(f"positions {positions!r}: expected a sequence of start, words, end, padding")
    parts = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        states, attended = text_states(pipe, batch, row)
        chosen = marked_positions(pipe, batch, positions, states.shape[1]) & attended
        wanted = None if means is None else means.expand(states.shape)[chosen]
        parts.append(Memorized.of(states.cpu()[chosen], wanted))
    total = sum(parts[1:], start=parts[0])
    if total.count == 0:
        raise DataError(
            f"the prompts have no tokens at positions {', '.join(positions)}; name other positions"
        )
    return total


def _rows(
    pipe: Pipeline, neurons: NeuronSet | None, sites: Sequence[Site] | None, row: DenoiserRow | None
) -> Mapping[Site, tuple[int, ...]]:
    """Return the rows to edit, by site."""
    if neurons is not None and sites is not None:
        raise ConfigError("both neurons and sites were given; pass one of them")
    if neurons is None:
        chosen = tuple(sites) if sites is not None else find_sites(pipe, row=row)
        rows = {site: tuple(range(site.width)) for site in chosen}
    else:
        require_same_model(neurons, pipe, row)
        rows = dict(neurons.indices)
    known = set(find_sites(pipe, blocks=[name for name, _ in (row or row_for(pipe)).blocks], row=row))
    stray = [site.path for site in rows if site not in known]
    if stray or not rows:
        what = f"{stray[0]} is not a value site of this model" if stray else "there are no neurons to edit"
        raise ConfigError(f"{what}; pass neurons or sites of the value projections")
    return rows


def _weight(pipe: Pipeline, path: str) -> Tensor:
    weight = module_at(denoiser_of(pipe), path).weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().cpu()
