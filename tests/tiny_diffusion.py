"""Tiny random pipelines of every supported kind, built from configs; nothing is downloaded.

The text sides are real CLIP and T5 encoders of two layers with a vocabulary that is made here. Pictures are 128 pixels
at most; none of these models knows anything.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

torch.set_num_threads(1)  # tiny models lose time to threads

KINDS = ("sd1", "sd2", "sdxl", "pixart", "sd3", "flux")
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "lighthouse",
    "red",
    "blue",
    "cat",
    "house",
    "tree",
    "moon",
    "river",
    "stone",
    "lamp",
    "garden",
]


def tiny_pipeline(kind: str, *, seed: int = 0) -> Any:
    """Build one pipeline: sd1, sd2 (v-prediction), sdxl, pixart, sd3 or flux."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters and a few words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        rules.write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
        return CLIPTokenizer(
            str(vocabulary),
            str(rules),
            model_max_length=77,
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level stand-in for a T5 tokenizer: words, then the end token, then padding."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


def _clip(tokenizer: CLIPTokenizer, *, has_projection: bool = False, width: int = 32) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if has_projection else CLIPTextModel)(config)


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def _vae(channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=128,
        **more,
    )


def _unet(cross_width: int = 32, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=cross_width,
        norm_num_groups=4,
        **more,
    )


def _ddim(**more: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **more,
    )


def _stable_diffusion(**scheduler: Any) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    unet = _unet(
        64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 1, 2, 2),
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, has_projection=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _pixart() -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_vae(),
        transformer=transformer,
        scheduler=_ddim(),
    )


def _sd3() -> StableDiffusion3Pipeline:
    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=32,
    )
    text_encoder_3 = T5EncoderModel(
        T5Config(vocab_size=len(long_tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip(tokenizer, has_projection=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, has_projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=long_tokenizer,
    )


def _flux() -> FluxPipeline:
    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(long_tokenizer),
        tokenizer_2=long_tokenizer,
        transformer=transformer,
    )


_BUILDERS: dict[str, Any] = {
    "flux": _flux,
    "pixart": _pixart,
    "sd1": _stable_diffusion,
    "sd2": lambda: _stable_diffusion(prediction_type="v_prediction"),
    "sd3": _sd3,
    "sdxl": _sdxl,
}


def denoiser_arguments(pipe: Any, num_rows: int) -> dict[str, Any]:
    """What a pipeline hands its denoiser for so many prompts without guidance; pictures of 64 pixels."""
    from unmemorize.gates import first_arguments
    from unmemorize.models.denoising import denoiser_of

    denoiser = denoiser_of(pipe)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    if isinstance(pipe, PixArtSigmaPipeline):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    prompts = [" ".join(WORDS[i : i + 4]) for i in range(num_rows)]
    with torch.no_grad():
        args, kwargs = first_arguments(
            denoiser, lambda: pipe(prompt=prompts, generator=torch.Generator().manual_seed(0), **options)
        )
    return dict(inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments) | {"return_dict": False}


def tiny_clip(folder: Path) -> Path:
    """Save a tiny CLIP with both encoders and its tokenizer; returns the folder."""
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
