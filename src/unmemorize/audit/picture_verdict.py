"""One honest sentence about an audit of pictures, from its figures. Pure.

It says which share of the target prompts still reproduce their training picture, beside the same figure before, with a
placebo and in a twin, and how far the pictures of ordinary prompts have moved, beside the placebo. Too few targets for
a share are compared by their similarity to the training picture; what is refused as well is named as refused.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from unmemorize.records import Group, Measure, PictureGroup, PictureState, Similarity

PLACEBO = "placebo"  # states whose name starts so are placebos
TWIN = "twin"  # states whose name starts so are models that never saw the targets


def picture_verdict(states: Sequence[PictureState], *, headline: str | None = None) -> str:
    """Write the verdict.

    Args:
        states: all states; the first one is "before".
        headline: the state it is about; by default the first one after "before" that is no rival.
    """
    before, *others = states
    results = [state for state in others if not state.is_rival]
    result = next((state for state in others if state.state == headline), results[0] if results else None)
    if result is None:
        rivals = [clause for clause in (_rate_clause(state) for state in others) if clause]
        beside = f", beside {_joined(rivals)}" if rivals else ""
        return f"{_subject(before)}, {_rate(before, is_long=True)}{beside}{_threshold_note(before)}."
    shown = [before, *_named(others, PLACEBO), *_named(others, TWIN)]
    against = [clause for clause in (_rate_clause(state) for state in shown if state is not result) if clause]
    beside = f", against {_joined(against)}" if against else ""
    return (
        f"{_subject(result)}, {_rate(result, is_long=True)}{beside}"
        f"{_drift(result, next(iter(_named(others, PLACEBO)), None))}{_threshold_note(result)}."
    )


def _named(states: Sequence[PictureState], prefix: str) -> list[PictureState]:
    return [state for state in states if state.state.startswith(prefix)]


def _subject(state: PictureState) -> str:
    neurons = (
        f" ({state.num_neurons:,} neuron{'' if state.num_neurons == 1 else 's'})" if state.num_neurons else ""
    )
    return f"In state {state.label!r}{neurons}"


def _rate(state: PictureState, *, is_long: bool) -> str:
    figures = _first(state, "target")
    if figures is None:
        return "there are no target prompts"
    rate = figures.copy_rate_frac
    if rate is None:
        return "the targets have no training picture to compare with"
    if rate.value is None:
        similarity = figures.copy_similarity
        if similarity is None or similarity.value is None:
            return f"the share of target prompts that reproduce their training picture is refused ({rate.refused})"
        text = _number(similarity)
        best = f"the best pictures of {similarity.num} target prompts have a similarity of {text}"
        return f"{best} to their training picture" if is_long else text
    text = _percent(rate)
    return f"{text} of {rate.num} target prompts reproduce their training picture" if is_long else text


def _rate_clause(state: PictureState) -> str:
    figures = _first(state, "target")
    rate = figures.copy_rate_frac if figures else None
    similarity = figures.copy_similarity if figures else None
    if rate is None:
        return ""
    if rate.value is None:
        is_known = similarity is not None and similarity.value is not None
        return (
            f"{_number(similarity)} in state {state.label!r}" if similarity is not None and is_known else ""
        )
    return f"{_percent(rate)} in state {state.label!r}"


def _drift(result: PictureState, placebo: PictureState | None) -> str:
    """Write the clause on ordinary prompts, with its leading separator; empty without ordinary prompts."""
    figures = _first(result, "ordinary")
    kept = figures.kept_similarity if figures else None
    if figures is None or kept is None:
        return ""
    if kept.value is None:
        return f"; how far ordinary prompts have moved is refused ({kept.refused})"
    text = f"; pictures of {kept.num} ordinary prompts keep a similarity of {_number(kept)} to those before"
    other = _first(placebo, "ordinary") if placebo else None
    rival = other.kept_similarity if other else None
    if rival is not None and rival.value is not None:
        text += f", against {_number(rival)} with the placebo"
        text += _beyond(figures.kept_beyond_placebo)
    return text


def _beyond(difference: Measure | None) -> str:
    if difference is None or difference.ci95 is None:
        return ""
    low, high = difference.ci95
    if high < 0:
        return " (they move further than with the placebo)"
    return " (they move less than with the placebo)" if low > 0 else " (no difference can be told)"


def _threshold_note(state: PictureState) -> str:
    figures = _first(state, "target")
    return f" (measure: {figures.measure})" if figures and figures.copy_rate_frac is not None else ""


def _first(state: PictureState, name: Group) -> Similarity | None:
    """Return a group's figures by the audit's first measure."""
    group: PictureGroup | None = next((group for group in state.groups if group.group == name), None)
    return group.similarities[0] if group and group.similarities else None


def _joined(clauses: Sequence[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def _percent(measure: Measure) -> str:
    assert measure.value is not None, "the caller has looked"
    interval = f" [{100 * measure.ci95[0]:.0f}, {100 * measure.ci95[1]:.0f}]" if measure.ci95 else ""
    return f"{100 * measure.value:.0f}%{interval}"


def _number(measure: Measure) -> str:
    interval = f" [{measure.ci95[0]:.2f}, {measure.ci95[1]:.2f}]" if measure.ci95 else ""
    return f"{measure.value:.2f}{interval}"
