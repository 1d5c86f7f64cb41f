"""What localization found, as the records that reports show: one row a prompt, one row a site. Pure; torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from unmemorize.errors import DataError
from unmemorize.localize.results import PromptResult
from unmemorize.neurons import NeuronSet, Site
from unmemorize.records import Group, LocalizedPrompt, SiteNeurons


def localized_prompts(results: Sequence[PromptResult], groups: Mapping[str, Group]) -> list[LocalizedPrompt]:
    """Turn localization's results into records.

    Args:
        results: one a prompt.
        groups: prompt -> its group in the audit.

    Raises:
        DataError: if a prompt has no group.
    """
    rows = []
    for result in results:
        if result.prompt not in groups:
            raise DataError(f"localized prompt {result.prompt!r} is not in the audit; name its group")
        rows.append(
            LocalizedPrompt(
                prompt=result.prompt,
                group=groups[result.prompt],
                best_pair=result.best_pair,
                is_memorized=result.is_memorized,
                num_initial=sum(map(len, result.initial)),
                num_refined=sum(map(len, result.refined)),
                initial_score=result.initial_score,
                refined_score=result.refined_score,
                threshold=result.threshold,
                is_replaced=result.is_replaced,
                sample_forwards=result.cost.sample_forwards,
                seconds=result.cost.seconds,
            )
        )
    return rows


def site_neurons(
    sites: Sequence[Site], chosen: NeuronSet, results: Sequence[PromptResult] = ()
) -> list[SiteNeurons]:
    """List the neurons that are switched off, site by site, with the number of prompts each was found for.

    Args:
        sites: all sites that were searched, in the order in which they run.
        chosen: the neurons that are switched off.
        results: localization's results at the same sites; without them no counts are given.

    Raises:
        DataError: if a chosen neuron lies at another site.
    """
    outside = [site for site in chosen.indices if site not in set(sites)]
    if outside:
        raise DataError(
            f"neurons were chosen at {outside[0].path}, which is not among the sites; name all sites"
        )
    counts = {site: Counter[int]() for site in sites}
    for result in results:
        for site, indices in zip(sites, result.refined, strict=False):
            counts[site].update(set(indices))
    return [
        SiteNeurons(
            path=site.path,
            width=site.width,
            indices=list(indices),
            num_prompts=[counts[site][index] for index in indices] if results else [],
        )
        for site in sites
        for indices in [chosen.indices.get(site, ())]
    ]
