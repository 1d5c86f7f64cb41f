"""Which neurons of a language model hold texts that it recites. One front for all localizers.

A neuron is an input channel of the MLP's last projection: its activation is act(up(x)), or act(gate(x)) * up(x) in a
gated MLP. Every localizer gives each neuron a score (`NeuronScores`); `top` makes a neuron set of them, and
`recital.smallest_set` looks for the few neurons without which a text is no longer recited.

Methods, cheapest first: "random" and "magnitude" (controls), "activations", "outliers", "gradient", "contrast",
"slimming", "integrated-gradients-together", "hard-concrete", "integrated-gradients", "zero-out". `methods.py` has them
by name, docs/localize_language.md defines them and says where each one misleads.

Source: Chang, Thomason and Jia 2024; "gradient", "contrast" and "outliers" are ours (the last after Hintersdorf et al.
2024).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError, DataError
from unmemorize.localize.methods import COMPARED, METHODS, Job, LocalizeSettings, Method, score
from unmemorize.localize.neuron_scores import NeuronScores, ScoringCost, load_scores
from unmemorize.localize.neuron_statistics import NeuronStatistics
from unmemorize.localize.results import start_folder
from unmemorize.localize.suffix import measured, require_fitting
from unmemorize.models.language import MlpRow, find_mlps, fingerprint
from unmemorize.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "LocalizeSettings", "Method", "localize", "localize_each", "localize_into"]


def localize(
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: NeuronStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> NeuronScores:
    """Score every neuron by how much it holds of a set of memorized examples.

    Args:
        model: a causal language model; it is left as it was.
        examples: one example, or several that are scored together: their scores are averaged, learned masks are shared.
        method: one of `METHODS`.
        settings: by default `LocalizeSettings()`.
        statistics: "outliers" and "contrast": ordinary texts (`ordinary.collect_statistics`, "activation" and
            "derivative").
        row: site table row, for an architecture that the table does not know.
        progress: called during the work.

    Raises:
        DataError: if there are no examples, the model cannot read one, or it recites none of them.
        ConfigError: if the method is unknown, or lacks its statistics.
        NeuronSetMismatch: if the statistics belong to another model.
    """
    return next(iter(_localized(model, [examples], method, settings, statistics, row, progress)))


def localize_each(
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: NeuronStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[NeuronScores]:
    """Score neurons for each example by itself, one result after the other; arguments and errors as for `localize`.

    Examples that are not recited are scored too as long as one is; `details["is_recited"]` tells.
    """
    return _localized(model, [[example] for example in examples], method, settings, statistics, row, progress)


def localize_into(
    folder: str | Path,
    model: PreTrainedModel,
    examples: Sequence[MemorizedExample],
    method: Method = "gradient",
    settings: LocalizeSettings | None = None,
    *,
    statistics: NeuronStatistics | None = None,
    row: MlpRow | None = None,
    progress: ProgressCallback | None = None,
) -> list[NeuronScores]:
    """Do what `localize_each` does, keep every result in a run folder, and continue there if interrupted.

    The folder gets `localization.json` and `scores/<digest of the example>.safetensors`.

    Raises:
        RunFolderError: if the folder holds a run with another model, method, settings or statistics.
    """
    settings = settings or LocalizeSettings()
    header = {
        "family": "language",
        "model_id": fingerprint(model, row),
        "method": method,
        "settings": asdict(settings),
        "statistics": None if statistics is None else [statistics.model_id, statistics.digest],
    }
    start_folder(folder, header)
    paths = {
        example.digest: Path(folder) / "scores" / f"{example.digest}.safetensors" for example in examples
    }
    found = {digest: load_scores(path) for digest, path in paths.items() if path.is_file()}
    missing = {example.digest: example for example in examples if example.digest not in found}
    if missing or not examples:
        groups = [[example] for example in missing.values()]
        for scores in _localized(
            model, groups, method, settings, statistics, row, progress, examples=examples
        ):
            (digest,) = scores.examples
            scores.save(paths[digest])
            found[digest] = scores
    return [found[example.digest] for example in examples]


def _localized(
    model: PreTrainedModel,
    groups: Sequence[Sequence[MemorizedExample]],
    method: Method,
    settings: LocalizeSettings | None,
    statistics: NeuronStatistics | None,
    row: MlpRow | None,
    progress: ProgressCallback | None,
    examples: Sequence[MemorizedExample] | None = None,
) -> Iterator[NeuronScores]:
    """Check arguments at once, then score group by group; `examples` are those checked, by default those scored."""
    settings = settings or LocalizeSettings()
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    _require_statistics(method, statistics)
    everything = [example for group in groups for example in group] if examples is None else examples
    require_fitting(model, everything)
    is_recited = _require_recited(model, everything, settings)
    sites = tuple(mlp.site for mlp in find_mlps(model, row))
    job = Job(
        model=model,
        model_id=fingerprint(model, row),
        sites=sites,
        settings=settings,
        statistics=statistics,
        progress=progress,
    )
    unknown = sorted(set(settings.exclude_layers) - set(range(len(sites))))
    if unknown or not job.searched:
        raise ConfigError(
            f"exclude_layers is {settings.exclude_layers}; expected numbers from 0 to {len(sites) - 1}, and not all"
        )

    def results() -> Iterator[NeuronScores]:
        for number, group in enumerate(groups, start=1):
            started = time.monotonic()
            values, cost, details = score(job, group, method)
            recited = [is_recited[example.digest] for example in group]
            yield NeuronScores(
                model_id=job.model_id,
                sites=sites,
                values=values,
                method=method,
                cost=ScoringCost(forward_equivalents=cost, seconds=time.monotonic() - started),
                examples=tuple(example.digest for example in group),
                details={"settings": asdict(settings), "is_recited": recited, **details},
            )
            if progress is not None and len(groups) > 1:
                progress(Progress("localize", number, len(groups), "examples", method))

    return results()


def _require_statistics(method: Method, statistics: NeuronStatistics | None) -> None:
    wanted = COMPARED.get(method)
    if wanted is None and statistics is not None:
        raise ConfigError(
            f"{method!r} takes no statistics; leave them out or use one of {', '.join(COMPARED)}"
        )
    if wanted is not None and (statistics is None or statistics.quantity != wanted):
        given = "none" if statistics is None else f"statistics of {statistics.quantity}"
        raise ConfigError(
            f"{method!r} compares with ordinary text and got {given}; pass statistics= as "
            f"collect_statistics(..., quantity={wanted!r}) returns them"
        )


def _require_recited(
    model: PreTrainedModel, examples: Sequence[MemorizedExample], settings: LocalizeSettings
) -> dict[str, bool]:
    """Measure which examples are recited, by digest, and refuse if none is."""
    _, tokens = measured(model, examples, batch_size=settings.batch_size)
    shares = [int(n) / len(example.suffix) for n, example in zip(tokens, examples, strict=True)]
    if max(shares) < 1 and not settings.is_forced:
        raise DataError(
            f"the model recites 0 of {len(examples)} examples (the best goes wrong after {max(shares):.0%} of its "
            "suffix), so there is no memory to localize; pass memorized texts, a shorter suffix, or is_forced=True"
        )
    return {example.digest: share == 1 for example, share in zip(examples, shares, strict=True)}
