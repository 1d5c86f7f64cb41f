"""`audit` of the neurons of a language model: states, placebo and curve, from options to the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmemorize.errors import ConfigError, RunFolderError
from unmemorize.verbs.answers import Answer, Precision, bar_line, figure_text, upper_end
from unmemorize.verbs.language_runs import read_localization
from unmemorize.verbs.texts import Cut, cut_at, digest_of, load_model, read_ordinary, read_texts, target_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unmemorize.audit.neurons import TextWay
    from unmemorize.localize.neuron_scores import NeuronScores
    from unmemorize.neurons import NeuronSet
    from unmemorize.records import Measure, NeuronAudit, NeuronState, ProgressCallback, TextLocalization

SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Shares on the curve, beside the one that was chosen."""


MEASURED = "measured"
"""Folder in the run that keeps what an interrupted audit has measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronAuditOptions:
    """What is compared; the verb says what the options mean."""

    neurons: Path | None = None
    mended: Path | None = None
    twin: Path | None = None
    ordinary: Path | None = None
    prefix: int | None = None
    suffix: int | None = None
    length: int | None = None
    seed: int = 0


def audit(
    progress: ProgressCallback,
    model: str,
    examples: Path,
    out: Path,
    max_extraction: float | None,
    options: NeuronAuditOptions,
    device: str = "auto",
    precision: Precision | None = None,
) -> Answer:
    """Measure before, after, placebo, and further folders; write `audit.json`. Interrupted, it continues."""
    from unmemorize.audit.examples import AuditSettings, continuations
    from unmemorize.audit.localized import site_neurons
    from unmemorize.audit.neurons import audit_ways
    from unmemorize.audit.training import decoder
    from unmemorize.isolate.engine import environment
    from unmemorize.models.language import find_mlps, require_same_model
    from unmemorize.neurons import load_neurons
    from unmemorize.records import NeuronAudit
    from unmemorize.tokenizer import load_tokenizer

    if (out / "audit.json").exists():
        raise RunFolderError(f"{out} already holds an audit; choose another folder")
    neurons = load_neurons(options.neurons or out / "neurons.json")
    stored = read_localization(out)
    cut = _cut(options, stored)
    tokenizer = load_tokenizer(model)
    texts = read_texts(examples, tokenizer, model, cut)
    target_cuts(texts, cut, examples)
    ordinary, limits = _kept_back(read_ordinary(options.ordinary, tokenizer, cut, texts), stored)
    loaded = load_model(model, device, precision)
    require_same_model(neurons, loaded)
    settings = AuditSettings(lengths=((cut.prefix, cut.suffix),), seed=options.seed)
    ways = _ways(loaded, neurons, options, device, precision)
    records, measured = audit_ways(ways, texts, ordinary, settings, kept_in=out / MEASURED, progress=progress)
    curve = _curve(
        out, loaded, stored, [t for t in texts if t.group == "target"], ordinary, settings, progress
    )
    headline = "mended" if options.mended else "after"
    result = NeuronAudit(
        title=f"Neurons of {Path(model).name}",
        verdict=_verdict({one.state: one for one in records}, headline),
        settings={
            "model": neurons.model_id,
            "headline_state": headline,
            "num_ordinary": len(ordinary),
            **_settings(options, cut, stored),
        },
        environment=environment(),
        states=records,
        continuations=continuations(texts, measured, decoder(tokenizer)),
        sites=site_neurons([mlp.site for mlp in find_mlps(loaded)], neurons),
        localized=[] if stored is None else stored.methods,
        agreement=[] if stored is None else stored.agreement,
        curve=curve,
        limits=limits,
    )
    result.save(out / "audit.json")
    after = next(one for one in records if one.state == headline)
    return _answer(out / "audit.json", result, after, max_extraction)


def _answer(path: Path, result: NeuronAudit, after: NeuronState, max_extraction: float | None) -> Answer:
    bar, code = bar_line("extraction", upper_end(_rate(after)), max_extraction)
    lines = [*(_line(one) for one in result.states), result.verdict, *result.limits, *bar, str(path)]
    return Answer(data=result.model_dump(mode="json"), lines=lines, exit_code=code)


def _settings(options: NeuronAuditOptions, cut: Cut, stored: TextLocalization | None) -> dict[str, Any]:
    """Say how texts were cut, how the run chose neurons (its curve does too), and the search whose set is audited."""
    given: dict[str, Any] = {
        "prefix_tokens": cut.prefix,
        "suffix_tokens": cut.suffix,
        "length_tokens": cut.length,
        "seed": options.seed,
    }
    if stored is None:
        return given
    given |= {"selection": stored.selection, "skipped_layers": stored.skipped_layers}
    if stored.search is not None and options.neurons is None:
        found = stored.search
        given["search"] = {
            "method": found.method,
            "leave_frac": found.leave_frac,
            "left_frac": found.left_frac,
        }
    return given


def _cut(options: NeuronAuditOptions, stored: TextLocalization | None) -> Cut:
    prefix, suffix, length = options.prefix, options.suffix, options.length
    return cut_at(
        (stored.prefix_tokens if stored else 32) if prefix is None else prefix,
        (stored.suffix_tokens if stored else 32) if suffix is None else suffix,
        (stored.length_tokens if stored else 256) if length is None else length,
    )


def _ways(
    model: PreTrainedModel,
    neurons: NeuronSet,
    options: NeuronAuditOptions,
    device: str,
    precision: Precision | None,
) -> list[TextWay]:
    from unmemorize.audit.neurons import TextWay

    placebo = neurons.placebo(seed=options.seed)
    ways = [
        TextWay("before", "as it is", model),
        TextWay("after", "neurons off", model, neurons, "The chosen neurons are multiplied by 0."),
        TextWay(
            "placebo", "random neurons off", model, placebo, "As many other neurons of each layer, drawn."
        ),
    ]
    for state, folder in (("mended", options.mended), ("twin", options.twin)):
        if folder is not None:
            ways.append(TextWay(state, state, load_model(folder, device, precision), None, folder.name))
    return ways


def _curve(
    out: Path,
    model: PreTrainedModel,
    stored: TextLocalization | None,
    targets: Any,
    ordinary: Any,
    settings: Any,
    progress: ProgressCallback,
) -> Any:
    """Return the curve over shares of the methods whose scores are in the run folder, and of the two controls."""
    from unmemorize.audit.neurons import deletion_curve
    from unmemorize.localize.neuron_scores import load_scores
    from unmemorize.models.language import fingerprint

    if stored is None or stored.model_id != fingerprint(model):
        return []
    paths = {one.method: out / "scores" / f"{one.method}.safetensors" for one in stored.methods}
    scores = {name: load_scores(path) for name, path in paths.items() if path.is_file()}
    scores.update(_controls(model, scores))
    shares = sorted({*SHARES, stored.share_frac})
    return deletion_curve(
        model,
        scores,
        shares,
        targets,
        ordinary,
        settings,
        per_layer=stored.selection == "per-layer",
        exclude_layers=stored.skipped_layers,
        kept_in=out / MEASURED,
        progress=progress,
    )


def _controls(model: PreTrainedModel, scores: dict[str, NeuronScores]) -> dict[str, NeuronScores]:
    """Score by chance and by size where the run did not; neither looks at a text."""
    from unmemorize.corpus.memorized import MemorizedExample
    from unmemorize.localize.language import LocalizeSettings, localize

    nothing = MemorizedExample(prefix=(1,), suffix=(1,))
    settings = LocalizeSettings(is_forced=True)
    controls: tuple[Literal["random", "magnitude"], ...] = ("random", "magnitude")
    return {name: localize(model, [nothing], name, settings) for name in controls if name not in scores}


def _rate(state: NeuronState) -> Measure | None:
    group = next((one for one in state.groups if one.group == "target"), None)
    return group.extraction[0].extraction_rate_frac if group and group.extraction else None


def _line(state: NeuronState) -> str:
    group = next(one for one in state.groups if one.group == "target")
    return (
        f"{state.label}: {figure_text(_rate(state), '.0%')} of targets verbatim, loss {figure_text(group.loss_nats)} "
        f"nats, ordinary perplexity {figure_text(state.ordinary_perplexity)}"
    )


def _verdict(states: dict[str, NeuronState], headline: str) -> str:
    rate = _rate(states["before"])
    if rate is None or rate.value is None:
        reason = "no targets" if rate is None else rate.refused
        return f"How much of the targets is repeated verbatim is refused in every state ({reason})."
    before, after, placebo = (
        figure_text(_rate(states[name]), ".0%") for name in ("before", headline, "placebo")
    )
    return (
        f"Of the targets, {before} are repeated verbatim before, {after} {states[headline].label}, and {placebo} with "
        "as many random neurons off."
    )


def _kept_back(
    ordinary: tuple[tuple[int, ...], ...], stored: TextLocalization | None
) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """Leave out ordinary texts that helped to choose the neurons, if others are left; returns limits to name too."""
    limits = [
        "Neurons that were chosen on these targets are measured on them; extraction is one way of asking, and a text "
        "that is no longer repeated may still be known: read the loss beside it."
    ]
    compared = set() if stored is None else set(stored.compared)
    apart = tuple(text for text in ordinary if digest_of(text) not in compared)
    if not ordinary:
        limits.append("Without ordinary texts nothing is said of what the model loses.")
    elif not apart:
        limits.append("All ordinary texts helped to choose the neurons: what the model loses is understated.")
    elif len(apart) < len(ordinary):
        limits.append(
            f"{len(ordinary) - len(apart)} ordinary texts helped to choose the neurons and are not measured."
        )
    return apart or ordinary, limits


def wants_neurons(out: Path | None, options: NeuronAuditOptions) -> bool:
    """Tell whether an audit is one of neurons: some are named, or the run folder holds those that were found."""
    if (
        options.neurons is None
        and (options.mended or options.twin)
        and not (out and (out / "neurons.json").is_file())
    ):
        raise ConfigError(
            "mended and twin are compared with the neurons: give --neurons FILE, or localize first"
        )
    return options.neurons is not None or bool(out and (out / "localization.json").is_file())
