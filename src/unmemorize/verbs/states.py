"""States that an audit of text-to-image models compares: the model as it is, neurons off, rivals, other pipelines.

Rivals are named in words, separated by spaces: `placebo` (as many random neurons at each site), `first-layer`,
`padding` or `padding:TOKEN` (padded with another token, by default "!"), `tokens:N` (N random tokens in the prompt),
`adjusted` (the embedding of Wen et al.).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import ConfigError

if TYPE_CHECKING:
    from unmemorize.audit.ways import Way
    from unmemorize.localize.results import PromptResult
    from unmemorize.models.denoising import Pipeline
    from unmemorize.neurons import NeuronSet, Site
    from unmemorize.remove.mitigations import Mitigation

RIVALS = ("placebo", "first-layer", "padding:TOKEN", "tokens:N", "adjusted")


def states(
    pipe: Pipeline,
    neurons: NeuronSet,
    *,
    rivals: str = "placebo",
    own: Mapping[str, NeuronSet] | None = None,
    others: Mapping[str, Pipeline] | None = None,
) -> list[Way]:
    """Build the states of an audit, the model as it is first.

    Args:
        pipe: the pipeline.
        neurons: the neurons that are switched off for every prompt (state "after").
        rivals: names of rivals, separated by spaces.
        own: prompt -> its own neurons, for a state in which only these are off for it (state "own").
        others: name -> further pipelines: "mended" is a result, every other one a rival (for example "twin").

    Raises:
        ConfigError: if a rival is unknown.
        NeuronSetMismatch: if the neurons belong to another model.
    """
    from unmemorize.audit.ways import Way
    from unmemorize.models.diffusion import fingerprint
    from unmemorize.remove.mitigations import switched_off

    model_id = fingerprint(pipe)
    found = [Way(state="before", label="before", pipe=pipe, identity=model_id)]
    off = switched_off(
        pipe, neurons, description="The neurons found for all targets are off, for every prompt."
    )
    found.append(_way("after", "after", pipe, off, f"{model_id} {_digest(neurons)}", is_rival=False))
    if own:
        found.append(_own(pipe, own, model_id))
    for name, other in (others or {}).items():
        text = "The pipeline after removal." if name == "mended" else "Another pipeline, for comparison."
        is_rival = name != "mended"
        identity = fingerprint(other)
        found.append(
            Way(state=name, label=name, pipe=other, description=text, is_rival=is_rival, identity=identity)
        )
    for word in rivals.split():
        kind, _, number = word.partition(":")
        state = f"{kind}-{number}" if number.isdigit() else kind
        rival = _rival(word, pipe, neurons)
        found.append(
            _way(state, rival.name, pipe, rival, f"{model_id} {_digest(neurons)} {word}", is_rival=True)
        )
    return found


def own_neurons(
    results: Sequence[PromptResult], model_id: str, sites: Sequence[Site]
) -> dict[str, NeuronSet]:
    """Return each memorized prompt's own neurons."""
    return {r.prompt: r.neurons(model_id, sites) for r in results if r.is_memorized and any(r.refined)}


def _own(pipe: Pipeline, own: Mapping[str, NeuronSet], model_id: str) -> Way:
    from unmemorize.audit.ways import Way
    from unmemorize.remove.diffusion import deactivated

    digest = " ".join(f"{prompt}:{_digest(chosen)}" for prompt, chosen in sorted(own.items()))
    return Way(
        state="own",
        label="own neurons off",
        pipe=pipe,
        description="For each target its own neurons are off, and nothing for other prompts.",
        num_neurons=max(map(len, own.values())),
        identity=f"{model_id} {digest}",
        case_context=lambda case: (
            deactivated(pipe, own[case.prompt]) if case.prompt in own else nullcontext()
        ),
    )


def _way(
    state: str, label: str, pipe: Pipeline, mitigation: Mitigation, identity: str, *, is_rival: bool
) -> Way:
    from unmemorize.audit.ways import Way

    arguments: Callable[[str, tuple[int, ...]], Mapping[str, Any]] | None = None
    if mitigation.changes_prompt:

        def arguments(prompt: str, seeds: tuple[int, ...]) -> Mapping[str, Any]:
            return mitigation.arguments(prompt)

    return Way(
        state=state,
        label=label,
        pipe=pipe,
        description=mitigation.description,
        is_rival=is_rival,
        num_neurons=mitigation.num_neurons,
        identity=identity,
        context=mitigation.context,
        arguments=arguments,
    )


def _rival(word: str, pipe: Pipeline, neurons: NeuronSet) -> Mitigation:
    from unmemorize.remove import mitigations

    kind, _, number = word.partition(":")
    if kind == "tokens" and number.isdigit() and int(number) > 0:
        return mitigations.random_tokens(pipe, num_tokens=int(number))
    if kind == "padding":
        return mitigations.swapped_padding(pipe, token=number or "!")
    makers: dict[str, Callable[[], Mitigation]] = {
        "placebo": lambda: mitigations.placebo(pipe, neurons),
        "first-layer": lambda: mitigations.first_value_layer(pipe),
        "adjusted": lambda: mitigations.adjusted_embedding(pipe),
    }
    if word not in makers:
        raise ConfigError(f"unknown rival {word!r}; expected {', '.join(RIVALS)}")
    return makers[word]()


def _digest(neurons: NeuronSet) -> str:
    import hashlib

    text = ";".join(f"{site.path}:{','.join(map(str, chosen))}" for site, chosen in neurons.indices.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pipelines(named: Mapping[str, Path | None], load: Callable[[Path], Pipeline]) -> dict[str, Pipeline]:
    """Load the pipelines that were named."""
    return {name: load(folder) for name, folder in named.items() if folder is not None}
