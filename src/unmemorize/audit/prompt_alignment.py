"""Does a picture show what its prompt says? Cosine of CLIP's embeddings of both.

A removal that breaks the model lowers it; a removal that only stops copying should not. Prompts longer than the text
encoder's context are cut. Pictures are resized (short side, bicubic), cropped to a square and normalized as CLIP was
trained, so that no image library beyond Pillow is needed.

Source: Radford et al. 2021 (CLIP); Hessel et al. 2021 (as a score of pictures, without their factor of 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmemorize.audit.pictures import Picture, short_side_crop
from unmemorize.audit.statistics import Floats
from unmemorize.errors import ModelNotSupported, ShapeMismatch
from unmemorize.models.base import quiet_transformers
from unmemorize.models.weight_files import require_no_pickle, require_there

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, per colour
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipAlignment:
    """A CLIP model that compares prompts with pictures.

    Attributes:
        name: folder or hub name that it was loaded from.
        model: a transformers `CLIPModel` in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: pictures per pass.
    """

    name: str
    model: Any
    tokenizer: Any
    batch_size: int = 16

    @classmethod
    def load(cls, source: str | Path, *, device: str = "cpu", batch_size: int = 16) -> ClipAlignment:
        """Load a CLIP model.

        Args:
            source: folder or hub name for `CLIPModel.from_pretrained`; the literature uses ViT-B/32 of OpenAI.
            device: where it runs.
            batch_size: pictures per pass.

        Raises:
            ModelNotSupported: if the folder or name holds no CLIP model with a tokenizer.
        """
        from transformers import AutoTokenizer, CLIPModel

        require_there(source)
        require_no_pickle(source)
        try:
            loader: Any = CLIPModel
            with quiet_transformers():
                model, info = loader.from_pretrained(
                    str(source), use_safetensors=True, output_loading_info=True
                )
                tokenizer = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            text = str(error).strip().splitlines()
            raise ModelNotSupported(
                f"cannot load {source} as a CLIP model: {text[0] if text else type(error).__name__}; pass a folder "
                "with config, weights and tokenizer"
            ) from error
        missing = sorted(info["missing_keys"])
        if missing:  # drawn at random, they would make figures of noise
            raise ModelNotSupported(
                f"{source} lacks {len(missing)} weights of a CLIP model ({missing[0]} ...); pass a complete CLIP folder"
            )
        return cls(
            name=str(source),
            model=model.to(device).eval(),
            tokenizer=tokenizer,
            batch_size=batch_size,
        )

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"Cosine of the CLIP embeddings of prompt and picture ({self.name}); unitless, -1 to 1."

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], pictures: Sequence[Picture]) -> Floats:
        """Compare prompts with pictures, one by one.

        Args:
            prompts: N prompts.
            pictures: N pictures of any size, in the same order.

        Returns:
            Cosines, shape (N,), unitless.

        Raises:
            ShapeMismatch: if the numbers differ.
        """
        if len(prompts) != len(pictures):
            raise ShapeMismatch(
                f"got {len(prompts)} prompts and {len(pictures)} pictures, expected one picture a prompt"
            )
        context = int(self.model.config.text_config.max_position_embeddings)
        device = self.model.device
        scores = np.zeros(len(prompts))
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            tokens = self.tokenizer(
                list(prompts[rows]), padding=True, truncation=True, max_length=context, return_tensors="pt"
            )
            output = self.model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=clip_pixels(self.model, pictures[rows]),
            )
            text, image = output.text_embeds.float(), output.image_embeds.float()
            scores[rows] = torch.nn.functional.cosine_similarity(text, image).cpu().numpy()
        return scores


class ClipFeatures(nn.Module):
    """What CLIP sees in pictures, as features for FID and KID: (B, 3, H, W), uint8, to embeddings (B, D), float32.

    Distances under it are no FID under Inception's features and must not be compared with published ones.

    Source: Kynkäänniemi et al. 2023 (CLIP's embeddings of pictures in place of Inception's features).
    """

    def __init__(self, alignment: ClipAlignment) -> None:
        super().__init__()
        self.model = alignment.model

    def forward(self, pictures: Tensor) -> Tensor:
        """Embed pictures."""
        arrays = list(pictures.permute(0, 2, 3, 1).cpu().numpy())
        vision = self.model.vision_model(pixel_values=clip_pixels(self.model, arrays))
        features: Tensor = self.model.visual_projection(vision.pooler_output)
        return features.float()


def clip_pixels(model: Any, pictures: Sequence[Picture]) -> Tensor:
    """Resize, crop and normalize B pictures as CLIP was trained.

    Args:
        model: a transformers `CLIPModel`; it says how large its pictures are.
        pictures: pictures of any size.

    Returns:
        Shape (B, 3, S, S), standardized colours, on the model's device and in its dtype.
    """
    side = int(model.config.vision_config.image_size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    cropped = np.stack([short_side_crop(picture, side, side, "bicubic") for picture in pictures])
    pixels = (torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return pixels.to(model.device, model.dtype)
