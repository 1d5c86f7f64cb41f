"""`localize` for language models: which texts are memorized, and which neurons hold them.

The run folder gets `config.json` (what the run is of), `examples.jsonl`, `scores/METHOD.safetensors`, `neurons.json`
(the set of the first method, or of the search along it) and, last, `localization.json`; a search keeps the sets that it
tried in `search.jsonl`. Scores and sets that are there already are not computed again. The folder is kept by
`language_runs.py`, neurons are chosen by `language_search.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError, DataError
from unmemorize.verbs.answers import Answer, Precision
from unmemorize.verbs.language_runs import start_run, write_examples
from unmemorize.verbs.language_search import (
    best_share,
    few_neurons,
    require_layers,
    search_line,
    share_line,
)
from unmemorize.verbs.texts import (
    NUM_KEPT_BACK,
    Cut,
    digest_of,
    divided,
    load_model,
    read_ordinary,
    read_texts,
    target_cuts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unmemorize.corpus.memorized import MemorizedExample
    from unmemorize.localize.neuron_scores import NeuronScores
    from unmemorize.neurons import NeuronSet
    from unmemorize.records import (
        Agreement,
        LocalizedMethod,
        Measure,
        NeuronSelection,
        ProgressCallback,
        TextLocalization,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronOptions:
    """Options of `localize` that only language models have; the verb says what they mean. `leave` None: no search.

    `num_candidates`: neurons that zero-out tries, None for all.
    """

    methods: str = "gradient"
    share: float = 0.01
    select: NeuronSelection = "per-layer"
    skip_layers: tuple[int, ...] = ()
    leave: float | None = None
    num_candidates: int | None = None
    seed: int = 0
    cut: Cut = field(default_factory=Cut)
    is_forced: bool = False

    @property
    def names(self) -> list[str]:
        """The methods, each once, in order."""
        return list(dict.fromkeys(self.methods.replace(",", " ").split()))


def localize(
    progress: ProgressCallback,
    model: str,
    examples: Path,
    out: Path,
    ordinary: Path | None,
    options: NeuronOptions,
    device: str = "auto",
    precision: Precision | None = None,
) -> Answer:
    """Score the neurons of the memorized targets by every method, and keep the best of them."""
    from unmemorize.localize.methods import COMPARED
    from unmemorize.models.language import fingerprint
    from unmemorize.records import TextLocalization
    from unmemorize.tokenizer import load_tokenizer

    names, cut = _known(options), options.cut
    tokenizer = load_tokenizer(model)
    texts = read_texts(examples, tokenizer, model, cut)
    targets = target_cuts(texts, cut, examples)
    known = read_ordinary(ordinary, tokenizer, cut, texts)
    compared = [name for name in names if name in COMPARED]
    if compared and len(known) < NUM_KEPT_BACK:
        raise ConfigError(
            f"{compared[0]} compares with ordinary texts; give --ordinary FILE with {NUM_KEPT_BACK} texts or more"
        )
    seen, _ = divided(known)
    loaded = load_model(model, device, precision)
    require_layers(loaded, options)
    is_memorized, rate = _memorized(loaded, targets, cut, is_forced=options.is_forced)
    start_run(out, fingerprint(loaded), texts, known, options)
    write_examples(out, texts, tokenizer, dict(zip((t.name for t in targets), is_memorized, strict=True)))
    chosen = [t for t, is_one in zip(targets, is_memorized, strict=True) if is_one] or list(targets)
    found = _localized(out, loaded, chosen, seen, options, progress)
    result = TextLocalization(
        model_id=fingerprint(loaded),
        num_targets=len(targets),
        num_memorized=sum(is_memorized),
        extraction_rate_frac=rate,
        compared=[digest_of(text) for text in seen] if compared else [],
        **found,
    )
    result.save(out / "localization.json")
    return _answer(out, result, options)


def _localized(
    out: Path,
    model: PreTrainedModel,
    chosen: Sequence[MemorizedExample],
    seen: Sequence[tuple[int, ...]],
    options: NeuronOptions,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Score by every method, choose, and write `neurons.json`; returns what `localization.json` says of it."""
    names, cut = options.names, options.cut
    scores = {name: _scores(out, model, chosen, name, seen, options, progress) for name in names}
    sets = {name: best_share(found, options) for name, found in scores.items()}
    neurons, search = sets[names[0]], None
    if options.leave is not None:
        neurons, search = few_neurons(out, model, chosen, scores[names[0]], options.leave, progress)
    neurons.save(out / "neurons.json")
    return {
        "method": names[0],
        "share_frac": options.share,
        "selection": options.select,
        "skipped_layers": list(options.skip_layers),
        "prefix_tokens": cut.prefix,
        "suffix_tokens": cut.suffix,
        "length_tokens": cut.length,
        "methods": [_method(scores[name], sets[name]) for name in names],
        "agreement": _agreement(sets, scores[names[0]]),
        "search": search,
    }


def _answer(out: Path, result: TextLocalization, options: NeuronOptions) -> Answer:
    repeated = f"{result.num_memorized} of {result.num_targets} target texts are repeated verbatim"
    lines = [
        f"{repeated} {_interval(result.extraction_rate_frac)}",
        share_line(options),
        *(_line(found) for found in result.methods),
        *(
            f"{one.first} and {one.second} share {one.jaccard_frac:.0%} of their neurons "
            f"(chance {one.by_chance_frac:.1%})"
            for one in result.agreement
        ),
        *([] if result.search is None else [search_line(result.search)]),
        str(out / "neurons.json"),
    ]
    data = {"run": str(out), "neurons": str(out / "neurons.json"), **result.model_dump(mode="json")}
    return Answer(data=data, lines=lines)


def _known(options: NeuronOptions) -> list[str]:
    """Return the methods' names; refuse what is unknown or out of range before anything is loaded."""
    from unmemorize.localize.methods import METHODS

    names = options.names
    unknown = next((name for name in names if name not in METHODS), None)
    if unknown is not None or not names:
        raise ConfigError(
            f"unknown method {unknown or ''!r} for a language model; expected one or more of {', '.join(METHODS)}"
        )
    if not 0 < options.share <= 1:
        raise ConfigError(f"share is {options.share}, expected a fraction above 0 and at most 1")
    if options.num_candidates is not None and (options.num_candidates < 1 or "zero-out" not in names):
        raise ConfigError(
            f"candidates is {options.num_candidates}; it is how many neurons zero-out tries: expected 1 or more, and "
            "zero-out among the methods"
        )
    if options.leave is not None and not 0 <= options.leave < 1:
        raise ConfigError(f"leave is {options.leave}, expected a fraction from 0 to below 1")
    return names


def _memorized(
    model: PreTrainedModel, targets: Sequence[MemorizedExample], cut: Cut, *, is_forced: bool
) -> tuple[list[bool], Measure]:
    """Let the model go on after every prefix; refuse if it repeats none."""
    from unmemorize.audit.language import extract
    from unmemorize.audit.statistics import wilson, wilson_interval

    test = extract(model, [target.tokens for target in targets], cut.prefix, cut.suffix)
    is_exact = [bool(flag) for flag in test.scores.is_exact]
    if not any(is_exact) and not is_forced:
        low, high = wilson_interval(0, len(targets))
        raise DataError(
            f"the model repeats 0 of {len(targets)} target texts verbatim ({low:.0%} to {high:.0%}) after {cut.prefix} "
            f"tokens, so there is no memory of {cut.suffix} tokens to localize; give --force to go on"
        )
    return is_exact, wilson(sum(is_exact), len(targets))


def _scores(
    out: Path,
    model: PreTrainedModel,
    chosen: Sequence[MemorizedExample],
    name: str,
    seen: Sequence[tuple[int, ...]],
    options: NeuronOptions,
    progress: ProgressCallback,
) -> NeuronScores:
    """Return a method's scores: those in the run folder, or new ones."""
    from unmemorize.localize.language import LocalizeSettings, localize
    from unmemorize.localize.methods import COMPARED
    from unmemorize.localize.neuron_scores import ScoringCost, load_scores
    from unmemorize.localize.ordinary import collect_statistics, passes

    path = out / "scores" / f"{name}.safetensors"
    if path.is_file():
        return load_scores(path)
    settings = LocalizeSettings(
        seed=options.seed,
        is_forced=True,
        exclude_layers=options.skip_layers,
        num_candidates=options.num_candidates,
    )
    statistics, spent, started = None, ScoringCost(), time.monotonic()
    if name in COMPARED:
        kept = (
            out / "scores" / f"{name}.statistics.safetensors"
        )  # a long collection that is interrupted goes on
        statistics = collect_statistics(model, seen, quantity=COMPARED[name], path=kept, progress=progress)
        spent = ScoringCost(forward_equivalents=passes(statistics), seconds=time.monotonic() - started)
    found = localize(model, chosen, name, settings, statistics=statistics, progress=progress)  # type: ignore[arg-type]
    found = replace(found, cost=found.cost + spent)
    found.save(path)
    return found


def _method(scores: NeuronScores, chosen: NeuronSet) -> LocalizedMethod:
    from unmemorize.records import LocalizedMethod

    return LocalizedMethod(
        method=scores.method,
        num_neurons=len(chosen),
        neurons_per_layer=[len(chosen.indices.get(site, ())) for site in scores.sites],
        forward_equivalents=scores.cost.forward_equivalents,
        seconds=round(scores.cost.seconds, 3),
    )


def _agreement(sets: dict[str, NeuronSet], scores: NeuronScores) -> list[Agreement]:
    """Compare all pairs of sets; chance is two random draws of the same sizes at every site."""
    from itertools import combinations

    from unmemorize.localize.locality import overlap
    from unmemorize.records import Agreement

    widths = {site: site.width for site in scores.sites}
    rows = []
    for (first, one), (second, other) in combinations(sets.items(), 2):
        expected = sum(
            len(one.indices.get(site, ())) * len(other.indices.get(site, ())) / width
            for site, width in widths.items()
        )
        rows.append(
            Agreement(
                first=first,
                second=second,
                jaccard_frac=overlap(one, other),
                by_chance_frac=expected / max(1.0, len(one) + len(other) - expected),
            )
        )
    return rows


def _line(found: LocalizedMethod) -> str:
    num_layers = sum(map(bool, found.neurons_per_layer))
    return (
        f"{found.method}: {found.num_neurons} neurons in {num_layers} layer{'s' if num_layers != 1 else ''}; "
        f"{found.forward_equivalents:.0f} forward-equivalents, {found.seconds:.1f} s"
    )


def _interval(rate: Measure) -> str:
    if rate.value is None or rate.ci95 is None:
        return f"(rate refused: {rate.refused})"
    return f"({rate.value:.0%}, 95 % interval {rate.ci95[0]:.0%} to {rate.ci95[1]:.0%})"
