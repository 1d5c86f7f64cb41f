"""Ids of pictures: equal pixels, near duplicates, sources."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from unmemorize.corpus.picture_ids import near_duplicate_picture_ids, picture_id, picture_ids
from unmemorize.errors import ConfigError, DataError
from unmemorize.ids import source_id


def picture(seed: int, side_px: int = 64) -> np.ndarray:
    """Smooth random colours, like a photograph out of focus."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side_px, side_px), Image.Resampling.BICUBIC))


def encoded_again(pixels: np.ndarray, quality: int = 75) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def test_equal_pixels_have_equal_ids_and_no_others_do() -> None:
    first = picture(0)
    assert picture_id(first) == picture_id(np.asfortranarray(first)) == picture_id(first[::-1][::-1])
    changed = first.copy()
    changed[3, 4, 1] ^= 1
    flat = np.zeros((4, 6, 3), dtype=np.uint8)
    others = [changed, flat, flat.reshape(6, 4, 3), flat.reshape(2, 12, 3), first[::-1], picture(1)]
    ids = [picture_id(p) for p in [first, *others]]
    assert len(set(ids)) == len(ids) and all(1 <= id < 2**63 for id in ids)
    assert picture_id(flat) == 6987449683998500724, "ids never change between versions"


def test_copies_that_were_encoded_or_scaled_share_an_id() -> None:
    originals = [picture(seed) for seed in range(20)]
    copies = [encoded_again(p) for p in originals]
    large = [np.asarray(Image.fromarray(p).resize((128, 128), Image.Resampling.BICUBIC)) for p in originals]
    ids = near_duplicate_picture_ids([*originals, *copies, *large])
    assert ids[:20] == ids[20:40] == ids[40:]
    assert len(set(ids)) == 20, "strangers stay apart"
    assert len({picture_id(p) for p in [*originals, *copies]}) == 40
    backwards = near_duplicate_picture_ids([*originals, *copies, *large][::-1])
    assert backwards == ids[::-1]
    own = {picture_id(p) for p in [*originals, *copies, *large]}
    assert set(ids) <= own


def test_the_threshold_is_the_root_mean_square_difference() -> None:
    grey = np.full((32, 32, 3), 100, dtype=np.uint8)
    lighter = grey + 10  # 10 / 255 = 0.0392
    assert len(set(near_duplicate_picture_ids([grey, lighter], threshold_frac=0.0391))) == 2
    assert len(set(near_duplicate_picture_ids([grey, lighter], threshold_frac=0.0393))) == 1
    chain = [grey + 5 * step for step in range(5)]
    assert len(set(near_duplicate_picture_ids(chain, threshold_frac=0.02))) == 1, (
        "groups are connected components"
    )


def test_many_pictures_cross_the_chunks() -> None:
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (1500, 2, 2, 3), dtype=np.uint8))
    pictures.append((pictures[3].astype(int) + np.where(pictures[3] < 128, 1, -1)).astype(np.uint8))
    ids = near_duplicate_picture_ids(pictures, threshold_frac=0.01)
    assert ids[-1] == ids[3] and len(set(ids)) == 1500
    assert near_duplicate_picture_ids([]) == []


def test_kinds() -> None:
    pictures = [picture(0), encoded_again(picture(0)), picture(1)]
    assert picture_ids(pictures) == [picture_id(p) for p in pictures]
    assert picture_ids(pictures, "near-duplicate") == near_duplicate_picture_ids(pictures)
    assert picture_ids(pictures, "source", sources=["a", "a", "b"]) == [source_id(n) for n in "aab"]


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match=r"float64 of shape \(4, 4, 3\), expected uint8"):
        picture_id(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"shape \(4, 4\), expected uint8 of shape \(height, width, 3\)"):
        picture_id(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(ConfigError, match="threshold_frac is 0, expected above 0"):
        near_duplicate_picture_ids([], threshold_frac=0)
    with pytest.raises(ConfigError, match="unknown kind of id 'hash'"):
        picture_ids([], "hash")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="need a name for each of the 1 pictures"):
        picture_ids([picture(0)], "source", sources=[""])
