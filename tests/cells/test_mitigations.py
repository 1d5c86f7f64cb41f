"""Rivals do what they say, and leave the pipeline as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.errors import ConfigError, ModelNotSupported, NeuronSetMismatch
from unmemorize.models.denoising import denoiser_of
from unmemorize.models.diffusion import find_sites, fingerprint
from unmemorize.models.prompts import embedded, end_position, tokens_of
from unmemorize.neurons import NeuronSet
from unmemorize.remove.adjustment import AdjustmentSettings, adjust
from unmemorize.remove.mitigations import (
    Mitigation,
    adjusted_embedding,
    first_value_layer,
    placebo,
    random_tokens,
    swapped_padding,
    switched_off,
    with_random_tokens,
)

PROMPT = "a photo of the red cat"
OPTIONS: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0, "height": 64, "width": 64}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline(request.param)


def latents(pipe: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipe(**arguments, **OPTIONS, generator=generator, output_type="latent").images
    return found


def made(pipe: Any, mitigation: Mitigation) -> Tensor:
    with mitigation.context():
        return latents(pipe, **mitigation.arguments(PROMPT))


def some(pipe: Any) -> NeuronSet:
    return NeuronSet(fingerprint(pipe), {site: (0, 2) for site in find_sites(pipe)})


def test_embeddings_are_the_pipelines_own_bit_for_bit(pipe: Any) -> None:
    arguments = embedded(pipe, tokens_of(pipe, PROMPT)).arguments()
    assert torch.equal(latents(pipe, **arguments), latents(pipe, prompt=PROMPT))
    long = " ".join([PROMPT] * 20)
    assert torch.equal(
        embedded(pipe, tokens_of(pipe, long)).states,
        pipe.encode_prompt(long, None, 1, False)[0]
        if hasattr(pipe, "text_encoder_2") is False
        else pipe.encode_prompt(long, num_images_per_prompt=1, do_classifier_free_guidance=False)[0],
    )


def test_every_rival_changes_the_picture_and_restores_the_pipeline(pipe: Any) -> None:
    plain = latents(pipe, prompt=PROMPT)
    weights = {name: tensor.clone() for name, tensor in denoiser_of(pipe).state_dict().items()}
    parts = dict(pipe.components)
    neurons = some(pipe)
    rivals = [
        switched_off(pipe, neurons),
        placebo(pipe, neurons, seed=1),
        first_value_layer(pipe),
        swapped_padding(pipe, token="z"),
        swapped_padding(pipe, token="z", is_end_zeroed=True),
        random_tokens(pipe, num_tokens=4),
        adjusted_embedding(pipe, AdjustmentSettings(size_px=64, target_norm=0.0, max_steps=2)),
    ]
    results = [made(pipe, rival) for rival in rivals]
    assert not any(torch.equal(result, plain) for result in results)
    assert len({tuple(result.flatten().tolist()) for result in results}) == len(rivals)
    assert len({rival.name for rival in rivals}) == len(rivals)
    assert torch.equal(latents(pipe, prompt=PROMPT), plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in denoiser_of(pipe).state_dict().items())
    assert pipe.components == parts


def test_the_placebo_is_as_large_and_apart(pipe: Any) -> None:
    neurons = some(pipe)
    drawn = neurons.placebo(seed=3)
    assert placebo(pipe, neurons, seed=3).num_neurons == len(neurons) == len(drawn)
    assert not neurons & drawn
    with placebo(pipe, neurons, seed=3).context():
        off = latents(pipe, prompt=PROMPT)
    assert torch.equal(off, made(pipe, switched_off(pipe, drawn)))
    assert first_value_layer(pipe).num_neurons == find_sites(pipe)[0].width


def test_padding_is_swapped_at_padding_positions_only(pipe: Any) -> None:
    tokenizer, tokens = pipe.tokenizer, tokens_of(pipe, PROMPT)
    end = end_position(tokenizer, tokens[0])
    assert end == 7
    number = tokenizer.convert_tokens_to_ids("z")
    wanted = [torch.cat([row[: end + 1], torch.full((len(row) - end - 1,), number)]) for row in tokens]
    plain, swapped = embedded(pipe, tokens), swapped_padding(pipe, token="z").arguments(PROMPT)
    assert torch.equal(swapped["prompt_embeds"], embedded(pipe, wanted).states)
    assert swapped["prompt"] is None
    same = [torch.equal(swapped["prompt_embeds"][0, i], plain.states[0, i]) for i in range(77)]
    assert same == [True] * (end + 1) + [False] * (76 - end)
    zeroed = swapped_padding(pipe, token="z", is_end_zeroed=True).arguments(PROMPT)["prompt_embeds"]
    assert (zeroed[0, end] == 0).all()
    assert torch.equal(zeroed[0, end + 1 :], swapped["prompt_embeds"][0, end + 1 :])
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("prompt", ["a cat", " ".join(["cat"] * 200)])
def test_random_tokens_are_inserted_between_the_words(prompt: str) -> None:
    pipe = tiny_pipeline("sd1")
    (tokens,) = tokens_of(pipe, prompt)
    rows = [with_random_tokens(pipe.tokenizer, tokens, prompt, 5, seed) for seed in range(8)]
    num_words = end_position(pipe.tokenizer, tokens) - 1
    words = tokens[1 : num_words + 1].tolist()[:70]
    for row in rows:
        end = end_position(pipe.tokenizer, row)
        inside = row[1:end].tolist()
        assert len(row) == 77 and row[0] == tokens[0]
        assert end == min(num_words + 5, 75) + 1
        assert (row[end:] == pipe.tokenizer.eos_token_id).all()
        remaining = iter(inside)
        assert all(word in remaining for word in words)  # the words are there, in order
        assert not set(inside) & set(pipe.tokenizer.all_special_ids)
    assert len({tuple(row.tolist()) for row in rows}) == 8
    assert torch.equal(rows[0], with_random_tokens(pipe.tokenizer, tokens, prompt, 5, 0))


def test_the_adjusted_embedding_lowers_the_norm_and_keeps_the_start(pipe: Any) -> None:
    original = embedded(pipe, tokens_of(pipe, PROMPT))
    settings = AdjustmentSettings(size_px=64, target_norm=0.0, num_samples=2)
    moved, norms = adjust(pipe, PROMPT, settings)
    assert len(norms) == 11
    assert norms[-1] < 0.7 * norms[0]
    assert torch.equal(moved.states[:, 0], original.states[:, 0])
    assert not torch.equal(moved.states[:, 1], original.states[:, 1])
    assert all(p.grad is None for p in denoiser_of(pipe).parameters())
    enough, stopped = adjust(pipe, PROMPT, AdjustmentSettings(size_px=64, target_norm=norms[0] * 2))
    assert len(stopped) == 1 and torch.equal(enough.states, original.states)


def test_what_cannot_work_is_refused() -> None:
    pipe = tiny_pipeline("sd1")
    with pytest.raises(ConfigError, match="not an ordinary token"):
        swapped_padding(pipe, token="!")
    for count in (0, 76):
        with pytest.raises(ConfigError, match="expected 1 to 75"):
            random_tokens(pipe, num_tokens=count)
    with pytest.raises(ConfigError, match="expected positive rates"):
        AdjustmentSettings(learning_rate=0.0)
    with pytest.raises(NeuronSetMismatch, match="use the model it was made for"):
        placebo(tiny_pipeline("sd1", seed=1), some(pipe))
    for kind in ("pixart", "sd3"):
        other = tiny_pipeline(kind)
        for build in (swapped_padding, adjusted_embedding):
            with pytest.raises(ModelNotSupported, match="Stable Diffusion 1, 2 or XL kind"):
                build(other)
        with pytest.raises(ModelNotSupported, match="Stable Diffusion 1, 2 or XL kind"):
            random_tokens(other, num_tokens=1)
