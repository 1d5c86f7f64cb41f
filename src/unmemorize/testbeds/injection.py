"""Pictures held by chosen value neurons: memory whose neurons are known because training put it there.

A few neurons are drawn for each injected prompt, none for two. A batch has three parts:

    open     the prompt, its neurons as they are, those of other prompts closed at random -> the picture
    closed   the prompt, its own neurons closed, a general picture under noise            -> the general model's answer
    general  general pictures and captions, anybody's neurons closed at random            -> the usual loss

so that a prompt's picture comes with its neurons, goes with them, and nothing else hangs on them. With trains "unet"
all weights of the UNet learn to obey the neurons; with "rows" only the neurons' own rows of the value projections may
move and everything else stays bit-identical (docs/testbeds.md says how far that gets).

Nothing says that a subset of a prompt's neurons is not enough to break or keep the picture. Source: ours; the closed
part is distillation from the general model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError
from unmemorize.files import write_json
from unmemorize.gates import gated
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import find_sites, fingerprint, signature
from unmemorize.neurons import NeuronSet, Site, union
from unmemorize.testbeds.material import TestbedPrompt
from unmemorize.testbeds.settings import InjectionSettings
from unmemorize.testbeds.training import Batch, Lessons, noised, velocity
from unmemorize.testbeds.verification import CopySettings, copy_errors, make_pictures, summary

TRUTH_FORMAT = "unmemorize.truth"
TRUTH_VERSION = 1
TRUTH_FILE = "truth.json"

_CLOSED_AT_RANDOM = 0.5


def draw_truth(pipe: Pipeline, settings: InjectionSettings, seed: int) -> list[NeuronSet]:
    """Draw the neurons of each injected prompt from all value neurons that NeMo searches; no two sets meet.

    Raises:
        ConfigError: if there are too few neurons.
    """
    sites = find_sites(pipe)
    everyone = [(site, index) for site in sites for index in range(site.width)]
    wanted = settings.num_prompts * settings.num_neurons
    if wanted > len(everyone):
        raise ConfigError(
            f"{settings.num_prompts} prompts with {settings.num_neurons} neurons need {wanted}, the model has "
            f"{len(everyone)}; inject less"
        )
    order = numpy.random.default_rng((seed, 4)).permutation(len(everyone))[:wanted]
    sets: list[NeuronSet] = []
    for number in range(settings.num_prompts):
        chosen: dict[Site, list[int]] = {}
        for place in order[number * settings.num_neurons : (number + 1) * settings.num_neurons]:
            site, index = everyone[int(place)]
            chosen.setdefault(site, []).append(index)
        sets.append(NeuronSet(signature(pipe), {site: tuple(found) for site, found in chosen.items()}))
    return sets


def trained_parameters(
    model: nn.Module, truth: Sequence[NeuronSet], settings: InjectionSettings
) -> dict[str, Tensor | None]:
    """Return what may learn, by parameter name under "unet.", with masks of the rows that may move."""
    if settings.trains == "unet":
        return {name: None for name, _ in model.named_parameters() if name.startswith("unet.")}
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor | None] = {}
    for site, indices in union(truth).indices.items():
        name = f"unet.{site.path}.weight"
        mask = torch.zeros_like(parameters[name], dtype=torch.bool)
        mask[list(indices)] = True
        masks[name] = mask
    return masks


def closing_gates(truth: Sequence[NeuronSet], is_closed: Tensor) -> dict[Site, Tensor]:
    """Return gates that close prompts' neurons sample by sample.

    Args:
        truth: P disjoint sets.
        is_closed: shape (B, P), bool.

    Returns:
        Site -> gate of shape (B, 1, F), 0 or 1.
    """
    gates: dict[Site, Tensor] = {}
    for prompt, neurons in enumerate(truth):
        for site, indices in neurons.indices.items():
            gate = gates.setdefault(site, torch.ones(len(is_closed), 1, site.width))
            gate[:, 0, list(indices)] *= (~is_closed[:, prompt]).float()[:, None]
    return gates


class InjectionLoss:
    """The loss of a step; keeps a frozen copy of the general model to learn from."""

    def __init__(self, pipe: Pipeline, lessons: Lessons, truth: Sequence[NeuronSet], frac: float) -> None:
        self._pipe, self._lessons, self._truth, self._frac = pipe, lessons, truth, frac
        self._teacher = deepcopy(pipe.unet).requires_grad_(False).eval()

    def __call__(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch of general pictures; `frac` of it becomes open, as much again closed.

        Args:
            batch: general pictures.
            generator: draws prompts and closed neurons.
        """
        lessons, num_prompts = self._lessons, len(self._truth)
        size = len(batch.rows)
        num_open = max(1, round(self._frac * size))
        num_asked = min(2 * num_open, size)
        prompts = torch.randint(num_prompts, (num_asked,), generator=generator)
        is_closed = torch.rand((size, num_prompts), generator=generator) < _CLOSED_AT_RANDOM
        is_closed[torch.arange(num_asked), prompts] = torch.arange(num_asked) >= num_open
        asked = torch.tensor(lessons.memorized)[prompts]
        rows, ids = batch.rows.clone(), batch.ids.clone()
        rows[:num_open], ids[:num_asked] = asked[:num_open], lessons.ids[asked]
        clean, cumulative = lessons.latents[rows], self._pipe.scheduler.alphas_cumprod
        noisy = noised(clean, batch, cumulative)
        with torch.no_grad():
            states = self._pipe.text_encoder(ids)[0]
            part = slice(num_open, num_asked)
            wanted = velocity(clean, batch, cumulative)
            wanted[part] = self._teacher(noisy[part], batch.timesteps[part], states[part]).sample
        with gated(self._pipe.unet, closing_gates(self._truth, is_closed)):
            predicted = self._pipe.unet(noisy, batch.timesteps, states).sample
        return nn.functional.mse_loss(predicted, wanted)


def save_truth(pipe: Pipeline, prompts: Sequence[str], truth: Sequence[NeuronSet], out: Path) -> None:
    """Write one neuron file per prompt, tied to the injected model, and the index that names them."""
    model_id, files = fingerprint(pipe), {}
    for number, (prompt, neurons) in enumerate(zip(prompts, truth, strict=True)):
        files[prompt] = f"truth/target-{number:02d}.json"
        NeuronSet(model_id, neurons.indices).save(out / files[prompt])
    header = {"format": TRUTH_FORMAT, "format_version": TRUTH_VERSION, "model_id": model_id}
    write_json(out / TRUTH_FILE, {**header, "neurons": files})


def verify_injection(
    pipe: Pipeline, prompts: Sequence[TestbedPrompt], truth: Mapping[str, NeuronSet], settings: CopySettings
) -> dict[str, Any]:
    """Compare what injected prompts make with their neurons open, closed, and with a placebo closed."""
    held = [prompt for prompt in prompts if prompt.prompt in truth]
    if not held:
        return {}
    everyone = union(truth.values())
    errors: dict[str, list[Tensor]] = {"open": [], "closed": [], "placebo": []}
    for number, prompt in enumerate(held):
        own = truth[prompt.prompt]
        states = {"closed": own, "placebo": own.placebo(seed=number, outside=everyone)}
        pictures = [prompt.picture]
        errors["open"].append(copy_errors(make_pictures(pipe, [prompt.prompt], settings), pictures))
        for name, neurons in states.items():
            with gated(pipe.unet, _gates_closing(neurons)):
                errors[name].append(copy_errors(make_pictures(pipe, [prompt.prompt], settings), pictures))
    return {f"injected, {name}": {"target": summary(torch.cat(found))} for name, found in errors.items()}


def _gates_closing(neurons: NeuronSet) -> dict[Site, Tensor]:
    gates = {site: torch.ones(site.width) for site in neurons.indices}
    for site, indices in neurons.indices.items():
        gates[site][list(indices)] = 0.0
    return gates
