"""One denoising step of any text-to-image pipeline, as a value that can be run again for chosen samples.

A pipeline knows best how to encode a prompt, draw latents and call its denoiser. `record` lets it work up to the first
call of the denoiser and stops there, so no architecture needs code of its own; `DenoiserCall.predict` makes that call,
for any of the recorded samples, at any step, under gates that differ from sample to sample.

Nothing is denoised here: every call sees the initial latents.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, ModelNotSupported
from unmemorize.gates import first_arguments, gated
from unmemorize.neurons import Site

Pipeline: TypeAlias = Any
"""A diffusers pipeline. Its parts are registered at run time, so no type describes them."""

_NUM_STEPS = 50  # of a schedule that is not run; some schedulers cannot make one of a few steps
_UNBATCHED = ("txt_ids", "img_ids")  # positions, shared by all rows


def denoiser_of(pipe: Pipeline) -> nn.Module:
    """Return a pipeline's denoiser: its `unet` or its `transformer`. A denoiser is returned as it is.

    Raises:
        ModelNotSupported: if it has neither.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ModelNotSupported(
        f"{type(pipe).__name__} has no unet and no transformer; pass a text-to-image pipeline"
    )


def with_denoiser(pipe: Pipeline, denoiser: nn.Module) -> Pipeline:
    """Return a pipeline with another denoiser, all other parts shared; for a denoiser, the other denoiser."""
    if isinstance(pipe, nn.Module):
        return denoiser
    name = "unet" if denoiser_of(pipe) is getattr(pipe, "unet", None) else "transformer"
    edited = copy.copy(pipe)
    edited.register_modules(**{name: denoiser})
    return edited


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserCall:
    """What a pipeline hands its denoiser at the first step, for one prompt and several samples.

    Attributes:
        denoiser: the module that is called.
        latents: initial latents as the denoiser sees them, shape (N, C, H, W), or (N, S, C) where they are packed.
        conditions: every other argument, tensors with one row (or two with guidance: empty prompt, then the prompt).
        timesteps: timesteps of the schedule as the denoiser takes them, shape (steps,), in its own unit.
        rows: 1, or 2 with guidance.
        signal_frac: scheduler's (signal, noise) factors at each timestep, shape (steps, 2); see `clean_direction`.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
    """

    denoiser: nn.Module
    latents: Tensor
    conditions: Mapping[str, Any]
    timesteps: Tensor
    rows: int
    signal_frac: Tensor
    prediction_type: str

    def predict(
        self,
        samples: Sequence[int],
        *,
        step_idx: int = 0,
        gates: Mapping[Site, Tensor] | None = None,
        has_gradient: bool = False,
    ) -> Tensor:
        """Run the denoiser on some of the samples; a sample may be named more than once.

        Args:
            samples: indices into `latents`, length M.
            step_idx: which timestep of the schedule the denoiser is told; the latents stay the initial ones.
            gates: site -> gate of shape (F,) or (M, F), unitless, in the order of `samples`.
            has_gradient: whether predictions can be differentiated with respect to the gates. Weights are held constant
                during the call, which also keeps the memory for their gradients free.

        Returns:
            Raw predictions, shape (rows, M, ...), in the denoiser's dtype.
        """
        count = len(samples)
        names = list(inspect.signature(type(self.denoiser).forward).parameters)[1:]
        arguments: dict[str, Any] = {
            **_expanded(self.conditions, self.rows, count),
            names[0]: self.latents[list(samples)].repeat(self.rows, *[1] * (self.latents.dim() - 1)),
            "timestep": self.timesteps[step_idx].to(self.latents.device).expand(self.rows * count),
            "return_dict": False,
        }
        spread = {
            site: gate if gate.dim() == 1 else gate.repeat(self.rows, 1).unsqueeze(1)
            for site, gate in (gates or {}).items()
        }
        with (
            torch.set_grad_enabled(has_gradient),
            constant_weights(self.denoiser),
            gated(self.denoiser, spread),
        ):
            output: Tensor = self.denoiser(**arguments)[0]
        return output.reshape(self.rows, count, *output.shape[1:])

    def clean_direction(self, prediction: Tensor, samples: Sequence[int], *, step_idx: int = 0) -> Tensor:
        """Turn predictions into maps that point from the latent towards the clean picture, up to sign and scale.

        For noise prediction this is predicted noise minus latent, as in the source. Velocity, sample and flow
        predictions are turned into the quantity that equals it up to a factor when the latent is all noise.

        Args:
            prediction: shape (M, ...), as one row of `predict`.
            samples: the M samples it belongs to.
            step_idx: the step it was made at.

        Returns:
            Maps, shape (M, C, H, W), float32.

        Source: Hintersdorf et al. 2024, section 3.1 for noise prediction; ours for the others.
        """
        latents = self.latents[list(samples)].float()
        prediction = prediction.float()
        if prediction.dim() == 4 and prediction.shape[1] == 2 * latents.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # the second half is a learned variance
        signal, noise = self.signal_frac[step_idx].tolist()
        if self.prediction_type == "v_prediction":
            maps = noise * prediction - signal * latents
        elif self.prediction_type == "sample":
            maps = -prediction
        else:
            maps = prediction - latents
        return self._unpacked(maps)

    def _unpacked(self, maps: Tensor) -> Tensor:
        if maps.dim() == 4:
            return maps
        positions = self.conditions.get("img_ids")
        if positions is None:
            raise ModelNotSupported(
                f"{type(self.denoiser).__name__} packs its latents in an unknown way; pass a pipeline of the table"
            )
        height, width = (int(positions[:, axis].max()) + 1 for axis in (1, 2))
        patches = maps.reshape(len(maps), height, width, -1, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(maps), -1, 2 * height, 2 * width)


@contextmanager
def constant_weights(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters out of the graphs that are built while the block is open; flags are restored."""
    held = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@torch.no_grad()
def record(
    pipe: Pipeline,
    prompt: str,
    *,
    num_samples: int = 1,
    seeds: Sequence[int] = (0,),
    num_steps: int = _NUM_STEPS,
    guidance: float = 0.0,
    size_px: int | None = None,
) -> DenoiserCall:
    """Record a pipeline's first denoiser call for one prompt. No denoiser pass is made.

    Args:
        pipe: any text-to-image pipeline.
        prompt: the prompt, encoded by the pipeline itself.
        num_samples: samples to draw latents for.
        seeds: one seed for all samples (one draw on the CPU generator), or one per sample.
        num_steps: length of the schedule, in steps.
        guidance: guidance scale, unitless; above 1 the call has two rows.
        size_px: height and width of the picture in pixels; by default the pipeline's own.

    Raises:
        ConfigError: if the number of seeds fits neither.
    """
    if len(seeds) not in (1, num_samples):
        raise ConfigError(f"{len(seeds)} seeds for {num_samples} samples; pass one seed, or one per sample")
    settings: dict[str, Any] = {"num_steps": num_steps, "guidance": guidance, "size_px": size_px}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    _, drawn = _first_call(pipe, [prompt], num_samples, generators, **settings)
    _, single = _first_call(pipe, [prompt], 1, generators[:1], **settings)
    denoiser = denoiser_of(pipe)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    latents = drawn[names[0]][-num_samples:]
    rows = single[names[0]].shape[0]
    schedule = torch.as_tensor(pipe.scheduler.timesteps).float().cpu()
    first = torch.as_tensor(single["timestep"]).float().reshape(-1)[0].cpu()
    timesteps = schedule if bool(first == schedule[0]) else schedule * (first / schedule[0])
    rest = {
        name: value for name, value in single.items() if name not in (names[0], "timestep", "return_dict")
    }
    kind, factors = _noise_schedule(pipe.scheduler, schedule)
    return DenoiserCall(
        denoiser=denoiser,
        latents=latents,
        conditions=rest,
        timesteps=timesteps,
        rows=rows,
        signal_frac=factors,
        prediction_type=kind,
    )


def encoded(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    """Return what the denoiser receives as `encoder_hidden_states`, shape (N, T, D), for N prompts."""
    states: Tensor = conditions(pipe, prompts)["encoder_hidden_states"]
    return states


@torch.no_grad()
def conditions(pipe: Pipeline, prompts: Sequence[str], *, size_px: int | None = None) -> dict[str, Any]:
    """Return what a pipeline hands its denoiser beside latents and timestep, one row a prompt, without guidance.

    Args:
        pipe: any text-to-image pipeline.
        prompts: N prompts, encoded by the pipeline itself.
        size_px: height and width of the picture in pixels; by default the pipeline's own.

    Returns:
        Arguments of the denoiser by name: tensors of N rows, also inside dictionaries; None is left out.
    """
    denoiser, arguments = _first_call(pipe, list(prompts), 1, [torch.Generator()], _NUM_STEPS, 0.0, size_px)
    names = list(inspect.signature(denoiser.forward).parameters)
    skipped = {names[0], "timestep", "return_dict"}
    return {name: value for name, value in arguments.items() if name not in skipped and value is not None}


def picked(value: Any, rows: Tensor, num_rows: int, name: str = "") -> Any:
    """Pick rows of every tensor of `num_rows` rows, inside nested dictionaries too."""
    if isinstance(value, Mapping):
        return {key: picked(part, rows, num_rows, str(key)) for key, part in value.items()}
    if (
        isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape[0] == num_rows
        and name not in _UNBATCHED
    ):
        return value[rows.to(value.device)]
    return value


def joined(parts: Sequence[Any], name: str = "") -> Any:
    """Put the rows of several `conditions` one after another."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts], str(key)) for key in first}
    if isinstance(first, Tensor) and first.dim() > 0 and name not in _UNBATCHED:
        return torch.cat(list(parts))
    return first


def _first_call(
    pipe: Pipeline,
    prompts: list[str],
    num_samples: int,
    generators: list[torch.Generator],
    num_steps: int,
    guidance: float,
    size_px: int | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Run a pipeline up to its denoiser and return the arguments by name."""
    denoiser = denoiser_of(pipe)
    wanted: dict[str, Any] = {
        "prompt": prompts,
        "num_images_per_prompt": num_samples,
        "num_inference_steps": num_steps,
        "guidance_scale": guidance,
        "generator": generators if len(generators) > 1 else generators[0],
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    if size_px is not None:
        wanted |= {"height": size_px, "width": size_px}
    known = inspect.signature(type(pipe).__call__).parameters
    had_bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        args, kwargs = first_arguments(
            denoiser, lambda: pipe(**{name: value for name, value in wanted.items() if name in known})
        )
    finally:
        pipe.set_progress_bar_config(**had_bar)
        with suppress(AttributeError):
            pipe.maybe_free_model_hooks()
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    return denoiser, dict(bound.arguments)


def _expanded(value: Any, rows: int, count: int, name: str = "") -> Any:
    """Repeat every row of every batched tensor `count` times, inside nested dictionaries too."""
    if isinstance(value, Mapping):
        return {key: _expanded(part, rows, count, str(key)) for key, part in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows and name not in _UNBATCHED:
        return value.repeat_interleave(count, dim=0)
    return value


def _noise_schedule(scheduler: Any, timesteps: Tensor) -> tuple[str, Tensor]:
    """Return the prediction type and the (signal, noise) factors at each timestep, shape (steps, 2)."""
    kind = scheduler.config.get("prediction_type")
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if kind is None or cumulative is None:
        return "flow" if cumulative is None else "epsilon", torch.tensor([[0.0, 1.0]]).expand(
            len(timesteps), 2
        )
    kept = cumulative.float().cpu()[timesteps.long().clamp(0, len(cumulative) - 1)]
    return str(kind), torch.stack([kept.sqrt(), (1 - kept).sqrt()], dim=1)
