"""How `localize` chooses among scored neurons of a language model: the best share, or the few that break a recital."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unmemorize.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unmemorize.corpus.memorized import MemorizedExample
    from unmemorize.localize.neuron_scores import NeuronScores
    from unmemorize.neurons import NeuronSet
    from unmemorize.records import NeuronSearch, ProgressCallback
    from unmemorize.verbs.language_localize import NeuronOptions


def require_layers(model: PreTrainedModel, options: NeuronOptions) -> None:
    """Refuse layers that the model does not have, and skipping all of them.

    Raises:
        ConfigError: if there is no such layer, or none is left.
    """
    from unmemorize.models.language import find_mlps

    num_layers = len(find_mlps(model))
    unknown = [layer for layer in options.skip_layers if not 0 <= layer < num_layers]
    if unknown or len(options.skip_layers) == num_layers:
        what = f"names layer {unknown[0]}" if unknown else "leaves no layer"
        raise ConfigError(f"--skip-layers {what}; expected numbers from 0 to {num_layers - 1}, and not all")


def best_share(scores: NeuronScores, options: NeuronOptions) -> NeuronSet:
    """Return the best share, of every layer or of all layers together, without the skipped ones."""
    is_per_layer = options.select == "per-layer"
    return scores.top(options.share, per_layer=is_per_layer, exclude_layers=options.skip_layers)


def share_line(options: NeuronOptions) -> str:
    """Say which share is chosen of what."""
    of = "each layer" if options.select == "per-layer" else "all layers together"
    skipped = ", ".join(map(str, options.skip_layers))
    layers = "layers" if len(options.skip_layers) > 1 else "layer"
    return (
        f"chosen: the best {options.share:.3g} of {of}{f', {layers} {skipped} left out' if skipped else ''}"
    )


def few_neurons(
    out: Path,
    model: PreTrainedModel,
    chosen: Sequence[MemorizedExample],
    scores: NeuronScores,
    leave_frac: float,
    progress: ProgressCallback,
) -> tuple[NeuronSet, NeuronSearch]:
    """Return few neurons that break the recital of all texts, those of the finished run in the folder or new ones.

    Every set that was switched off is kept in `search.jsonl`, and an interrupted search continues there.

    Args:
        out: the run folder; what it holds is of this run.
        model: the model; it is left as it was.
        chosen: the texts.
        scores: the ranking to search along.
        leave_frac: most of a text's likelihood that may be left, 0 to 1.
        progress: called after every set that was switched off.

    Raises:
        DataError: if no set along the ranking reaches it.
    """
    from unmemorize.localize.recital import BreakSettings, smallest_set
    from unmemorize.neurons import load_neurons
    from unmemorize.records import NeuronSearch
    from unmemorize.verbs.language_runs import read_localization

    stored = read_localization(out)
    if stored is not None and stored.search is not None and (out / "neurons.json").is_file():
        neurons = load_neurons(out / "neurons.json")
        if (neurons.model_id, _by_layer(scores, neurons)) == (
            scores.model_id,
            stored.search.neurons_per_layer,
        ):
            return neurons, stored.search
    settings = BreakSettings(threshold_frac=leave_frac, gives_up=True)
    found = smallest_set(model, chosen, scores, settings, path=out / "search.jsonl", progress=progress)
    if not found.is_broken:
        raise DataError(
            f"no set along the ranking by {scores.method} leaves {leave_frac:.2g} of the likelihood or less in every "
            f"text: with all {len(found.neurons)} neurons off {max(found.effects_frac):.2g} is left; raise --leave, "
            "or skip fewer layers"
        )
    before, after = (_likelihood(model, chosen, neurons) for neurons in (None, found.neurons))
    return found.neurons, NeuronSearch(
        method=scores.method,
        leave_frac=leave_frac,
        left_frac=max(found.effects_frac),
        num_texts=len(chosen),
        likelihood_before_frac=before,
        likelihood_after_frac=after,
        num_neurons=len(found.neurons),
        neurons_per_layer=_by_layer(scores, found.neurons),
        num_sets=found.num_evaluated,
        forward_equivalents=found.cost.forward_equivalents,
        seconds=round(found.cost.seconds, 3),
    )


def search_line(found: NeuronSearch) -> str:
    """Say what the search found, in one line."""
    return (
        f"search along {found.method}: {found.num_neurons} neurons off leave at most {found.left_frac:.2g} of the "
        f"likelihood in each of {found.num_texts} texts (asked for: {found.leave_frac:.2g}); likelihood of a suffix "
        f"token {found.likelihood_before_frac:.3g} -> {found.likelihood_after_frac:.3g}; {found.num_sets} sets tried, "
        f"{found.seconds:.1f} s"
    )


def _by_layer(scores: NeuronScores, neurons: NeuronSet) -> list[int]:
    return [len(neurons.indices.get(site, ())) for site in scores.sites]


def _likelihood(
    model: PreTrainedModel, examples: Sequence[MemorizedExample], neurons: NeuronSet | None
) -> float:
    """Return the geometric mean probability of a suffix token over all texts, 0 to 1."""
    from unmemorize.gates import closed
    from unmemorize.localize.suffix import measured

    losses, _ = measured(model, examples, gates=None if neurons is None else closed(neurons))
    return float((-losses.double().mean()).exp())
