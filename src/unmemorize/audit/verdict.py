"""One honest sentence about a comparison, from its figures. Pure.

It says how much of the memorization gap is closed, how much of the repetition benefit stays, and on which
side of the cap:R curve the method lies. A refused figure is named as refused. With fewer than three seeds the
figures of the single runs are given, and the sentence says what their intervals cover.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from unmemorize.audit.frontier import MIN_CURVE_POINTS, curve_repeats
from unmemorize.records import Measure, MethodResult, SeedResult


def verdict(methods: Sequence[MethodResult], headline: str | None) -> str:
    """Write the verdict.

    Args:
        methods: all methods of the comparison.
        headline: the method it is about; None if every method only repeats less.
    """
    chosen = next((method for method in methods if method.method == headline), None)
    if chosen is None:
        return _without_method(methods)
    state = chosen.seeds[0].state
    subject = f"With {chosen.label}" + (f" {state}" if state in ("off", "own", "all") else "")
    seeds, summary = chosen.seeds, chosen.summary
    gap = _share(summary.gap_closed_frac, [seed.gap_closed_frac for seed in seeds])
    kept = _share(summary.repetition_benefit_kept_frac, [seed.repetition_benefit_kept_frac for seed in seeds])
    parts = [f"{subject}, "]
    if gap:
        parts.append(f"{gap} of the memorization gap is closed")
    else:
        parts.append(f"the share of the memorization gap closed is refused ({_reason(chosen, 'gap')})")
    if kept:
        parts.append(f" while {kept} of the repetition benefit stays")
    else:
        parts.append(
            f" and the share of the repetition benefit kept is refused ({_reason(chosen, 'benefit')})"
        )
    parts.append(_frontier(chosen) if not _leads(chosen, methods) else _lead(chosen, methods))
    if len(seeds) == 1:
        parts.append(" (one training run; intervals are over documents, not over trainings)")
    elif len(seeds) == 2:
        parts.append(" (two training runs, too few for an interval over trainings)")
    return "".join(parts) + "."


def _without_method(methods: Sequence[MethodResult]) -> str:
    standard = next((method for method in methods if method.method == "standard"), methods[0])
    seeds, summary = standard.seeds, standard.summary
    validation = _loss(summary.validation_loss_nats, [seed.validation_loss_nats for seed in seeds])
    repeated = _loss(summary.repeated_loss_nats, [seed.repeated_loss_nats for seed in seeds])
    return (
        f"With {standard.label}, repeated text has a loss of {repeated} nats per token against {validation} "
        "on text never trained on; no method that isolates memorization was compared."
    )


def _leads(method: MethodResult, methods: Sequence[MethodResult]) -> bool:
    """Tell whether no seed's curve reaches the method's validation loss, while it memorizes less than the best point.

    Then nothing on the curve is equal, `beyond_curve_nats` is refused, and yet the answer is plain.
    """
    curve = [other for other in methods if curve_repeats(other.method) is not None]
    if curve_repeats(method.method) is not None or len(curve) < MIN_CURVE_POINTS:
        return False
    for own in method.seeds:
        rivals = [seed for other in curve for seed in other.seeds if seed.seed == own.seed]
        points = [_point(seed) for seed in (own, *rivals)]
        if len(rivals) < len(curve) or any(point is None for point in points):
            return False
        (validation, repeated), *others = [point for point in points if point is not None]
        best = min(others)
        if validation >= best[0] or repeated <= best[1]:
            return False
    return True


def _point(seed: SeedResult) -> tuple[float, float] | None:
    """Return a seed's place on the frontier plot: validation and repeated loss, nats; None if one is refused."""
    validation, repeated = seed.validation_loss_nats.value, seed.repeated_loss_nats.value
    return None if validation is None or repeated is None else (validation, repeated)


def _lead(method: MethodResult, methods: Sequence[MethodResult]) -> str:
    curve = [other for other in methods if curve_repeats(other.method) is not None]
    best = min(_mean_validation(other) for other in curve)
    return (
        f"; no point of the cap:R curve reaches its validation loss ({_mean_validation(method):.2f} against "
        f"{best:.2f} nats at best{', in every seed' if len(method.seeds) > 1 else ''}): it lies beyond the curve"
    )


def _mean_validation(method: MethodResult) -> float:
    return fmean(seed.validation_loss_nats.value or 0.0 for seed in method.seeds)


def _frontier(method: MethodResult) -> str:
    """Write the clause on the cap:R curve, with its leading separator."""
    single = method.seeds[0] if len(method.seeds) == 1 else None
    beyond = single.beyond_curve_nats if single else method.summary.beyond_curve_nats
    repeated = single.repeated_loss_nats if single else method.summary.repeated_loss_nats
    if beyond is None:
        return ""
    if beyond.value is None or beyond.ci95 is None or repeated.value is None:
        return f"; against the cap:R curve it is not judged ({beyond.refused or repeated.refused})"
    low, high = beyond.ci95
    rival = repeated.value - beyond.value
    text = (
        f"; the cap:R curve at the same validation loss has repeated loss {rival:.2f} against "
        f"{repeated.value:.2f} nats, a difference of {beyond.value:.2f} [{low:.2f}, {high:.2f}]: "
    )
    if low > 0:
        return text + f"{method.label} lies beyond the curve"
    if high < 0:
        return text + f"{method.label} lies behind the curve, where capping repeats is the better choice"
    return text + f"{method.label} cannot be told from the curve"


def _reason(method: MethodResult, figure: Literal["gap", "benefit"]) -> str | None:
    """Find why a figure is refused: within the run if there is only one, else over seeds."""
    source = method.seeds[0] if len(method.seeds) == 1 else method.summary
    return (source.gap_closed_frac if figure == "gap" else source.repetition_benefit_kept_frac).refused


def _share(summary: Measure, seeds: Sequence[Measure]) -> str | None:
    """Write a fraction in per cent: over seeds, else of the single runs, else nothing."""
    if summary.value is not None:
        return _percent(summary)
    if len(seeds) > 2 or any(seed.value is None for seed in seeds):
        return None
    return " and ".join(_percent(seed) for seed in seeds)


def _percent(measure: Measure) -> str:
    assert measure.value is not None, "the caller has looked"
    interval = f" [{100 * measure.ci95[0]:.0f}, {100 * measure.ci95[1]:.0f}]" if measure.ci95 else ""
    return f"{100 * measure.value:.0f}%{interval}"


def _loss(summary: Measure, seeds: Sequence[Measure]) -> str:
    for measure in (summary, *seeds):
        if measure.value is not None and measure.ci95 is not None:
            return f"{measure.value:.2f} [{measure.ci95[0]:.2f}, {measure.ci95[1]:.2f}]"
    return f"(refused: {summary.refused})"
