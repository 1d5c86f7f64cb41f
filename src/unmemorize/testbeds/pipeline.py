"""A small text-to-image pipeline in the Stable Diffusion format: tokenizer, text encoder, UNet, VAE, scheduler.

Everything is the real class of transformers or diffusers, only small, so that the saved folder is read by
`DiffusionPipeline.from_pretrained` and by every tool for Stable Diffusion. Three things are special:

- The VAE is an exact identity up to rounding, so that the UNet works on pixels: its convolutions copy channels, and its
  latents are so small that the decoder's soft clamp 3 tanh(z / 3) is linear to 5e-5.
- Every word of the training captions is one token.
- Text enters the picture only where NeMo searches, in the down blocks and the middle block. Up blocks have no
  cross-attention, so that no memory can hide there behind a text-reading neuron.

Source: ours, with the classes of diffusers and transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmemorize.errors import RunFolderError, missing_extra
from unmemorize.models.base import quiet_transformers
from unmemorize.models.denoising import Pipeline
from unmemorize.models.diffusion import quiet_diffusers

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from unmemorize.testbeds.settings import NetworkSettings

START, END = "<|startoftext|>", "<|endoftext|>"

_WORD_END = "</w>"

_LATENT_SCALE = 0.05  # latents lie in -0.05 .. 0.05 before the pipeline's scaling factor
_VAE_CHANNELS = 4


def build_pipeline(
    captions: Sequence[str], settings: NetworkSettings, *, size_px: int, seed: int
) -> Pipeline:
    """Build an untrained pipeline.

    Args:
        captions: texts whose words the tokenizer must know.
        settings: sizes of UNet and text encoder.
        size_px: side of the pictures in pixels.
        seed: seed of the random weights; the global generator is left as it was.

    Raises:
        MissingExtra: without diffusers.
    """
    library = _diffusers()
    tokenizer = caption_tokenizer(captions, settings.length_tokens)
    with torch.random.fork_rng(devices=[]), quiet_diffusers():
        torch.manual_seed(seed)
        pipe: Pipeline = library.StableDiffusionPipeline(
            vae=identity_vae(),
            text_encoder=_text_encoder(tokenizer, settings),
            tokenizer=tokenizer,
            unet=_unet(settings, size_px),
            scheduler=library.DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type="v_prediction",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise missing_extra("diffusers", "images") from error
    return diffusers


def caption_tokenizer(captions: Sequence[str], length_tokens: int) -> CLIPTokenizer:
    """Make a CLIP tokenizer for which every word of the captions is one token; any other text falls into bytes.

    Args:
        captions: texts to take the words from; their order does not matter.
        length_tokens: tokens that a prompt is padded or cut to, start and end included.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    with quiet_transformers():
        backend: Any = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])._tokenizer
        words: set[str] = set()
        for caption in set(captions):
            split = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
            words.update(word for word, _ in split)
        merges = word_merges(sorted(words))
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        joined = [first + second for first, second in merges]
        tokens = [START, END, *letters, *(f"{letter}{_WORD_END}" for letter in letters), *joined]
        return CLIPTokenizer(
            vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
            merges=merges,  # type: ignore[arg-type]
            model_max_length=length_tokens,
            pad_token=END,
            unk_token=END,
        )


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges that make each word one token.

    A word is taken apart with the merges so far, and what is left is joined from the left by new ones. New merges come
    last, so that they cannot change how earlier words are joined.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + _WORD_END]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            place = pairs.index(pair)
            parts[place : place + 2] = [pair[0] + pair[1]]
    return list(ranks)


def identity_vae() -> Any:
    """Make an `AutoencoderTiny` that keeps pictures as they are; latents have the pictures' size and three channels.

    Returns:
        A VAE whose latents times its scaling factor are the pixels in -1 .. 1, to 5e-5.
    """
    vae = _diffusers().AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(_VAE_CHANNELS,),
        decoder_block_out_channels=(_VAE_CHANNELS,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        scaling_factor=1 / _LATENT_SCALE,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        _copy_channels(vae.encoder.layers[0], 1.0, 0.0)  # 0 .. 1, so that ReLUs let it pass
        _copy_channels(vae.encoder.layers[-1], 2 * _LATENT_SCALE, -_LATENT_SCALE)
        _copy_channels(vae.decoder.layers[0], 1 / (2 * _LATENT_SCALE), 0.5)
        _copy_channels(vae.decoder.layers[-1], 1.0, 0.0)
    return vae.requires_grad_(False).eval()


def _copy_channels(convolution: Any, factor: float, shift: float) -> None:
    for channel in range(3):
        convolution.weight[channel, channel, 1, 1] = factor
        convolution.bias[channel] = shift


def _text_encoder(tokenizer: CLIPTokenizer, settings: NetworkSettings) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    width = settings.text_width
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=settings.length_tokens,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _unet(settings: NetworkSettings, size_px: int) -> Any:
    widths = settings.widths
    num_plain = len(widths) - settings.num_text_blocks
    return _diffusers().UNet2DConditionModel(
        sample_size=size_px,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * num_plain + ("CrossAttnDownBlock2D",) * settings.num_text_blocks,
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.num_heads,  # the number of heads, in spite of its name
        cross_attention_dim=settings.text_width,
        norm_num_groups=settings.norm_groups,
    )


@torch.no_grad()
def encode_captions(pipe: Pipeline, captions: Sequence[str]) -> Tensor:
    """Return token ids of captions as the pipeline makes them, shape (N, T), int64."""
    encoded = pipe.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = encoded.input_ids
    return ids


def save_pipeline(pipe: Pipeline, folder: Path, *, weights: str = "float32") -> None:
    """Save a pipeline so that the folder appears whole; one that is there is left alone.

    Args:
        pipe: the pipeline; it is not changed.
        folder: destination.
        weights: dtype of the stored UNet, "float32" or "float16"; it is read back in float32 either way.

    Raises:
        RunFolderError: if it cannot be written.
    """
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with quiet_diffusers():
            pipe.save_pretrained(str(partial), safe_serialization=True)
            if weights != "float32":
                halved = deepcopy(pipe.unet).to(getattr(torch, weights))
                halved.save_pretrained(str(partial / "unet"), safe_serialization=True)
        partial.rename(folder)
    except OSError as error:
        raise RunFolderError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another folder"
        ) from error
