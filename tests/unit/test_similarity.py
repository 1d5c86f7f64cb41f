"""Similarity of pictures: copies are found at every size, other pictures are told apart, thresholds come from data."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.drawings import CHANGES, drawing
from unmemorize.audit.copy_threshold import threshold_from_controls, threshold_from_references
from unmemorize.audit.pictures import read_picture, short_side_crop, write_picture
from unmemorize.audit.similarity import (
    SSCD_THRESHOLD,
    sscd,
    structure,
    structure_vectors,
)
from unmemorize.errors import ConfigError, DataError, ModelNotSupported

NUM = 40


@pytest.fixture(scope="module")
def originals() -> Tensor:
    return structure_vectors([drawing(seed) for seed in range(NUM)])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size_px", [32, 64, 512])
def test_a_changed_copy_is_nearer_than_any_other_picture(
    originals: Tensor, change: str, size_px: int
) -> None:
    num = 4 if size_px == 512 else 12
    copies = structure_vectors([CHANGES[change](drawing(seed, size_px)) for seed in range(num)])
    table = copies @ originals.T
    own = table[torch.arange(num), torch.arange(num)]
    table[torch.arange(num), torch.arange(num)] = -1
    assert own.min() > 0.9
    assert (own > table.max(1).values + 0.1).all()


def test_equal_pictures_have_similarity_one_and_others_little() -> None:
    measure = structure()
    assert measure.similarity(drawing(0), drawing(0)) == pytest.approx(1, abs=1e-5)
    assert measure.similarity(drawing(0), drawing(0, 512)) > 0.98
    others = [measure.similarity(drawing(seed), drawing(seed + 1)) for seed in range(0, 20, 2)]
    assert max(others) < 0.7
    assert measure.copy_threshold is None


def test_brightness_and_contrast_change_nothing_where_nothing_is_cut_off() -> None:
    picture = (drawing(3).astype(float) * 0.5 + 40).astype(np.uint8)
    assert structure().similarity(picture, picture + 60) == pytest.approx(1, abs=1e-4)
    assert structure().similarity(drawing(3), picture) > 0.995


def test_known_blind_spots() -> None:
    """What docs/metrics.md says misleads: shifts, mirror images, and pictures without edges."""
    measure, picture = structure(), drawing(5)
    assert measure.similarity(picture, picture[:, ::-1].copy()) < 0.7
    assert measure.similarity(picture, np.roll(picture, 8, axis=1)) < 0.7
    flat = np.full((64, 64, 3), 200, dtype=np.uint8)
    assert measure.similarity(flat, flat) == 0


def test_no_pictures_make_no_vectors() -> None:
    assert structure_vectors([]).shape == (0, 6 * 32 * 32)


class TinyNetwork(nn.Module):
    """The mean colour of what arrives, so that a test can say what a preparation must give."""

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.cat(
            [pictures.mean(dim=(2, 3)), torch.full((len(pictures), 1), pictures.shape[2] / 100)], 1
        )


class NotVectors(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures


def saved(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(path))
    return path


def test_sscd_prepares_pictures_as_each_variant_wants(tmp_path: Path) -> None:
    path = saved(TinyNetwork(), tmp_path / "tiny.torchscript.pt")
    picture = np.zeros((50, 100, 3), dtype=np.uint8)
    picture[:, 25:75] = (255, 127, 0)  # the middle: all of the centre crop, half of the squashed picture
    mixup, large = sscd(path), sscd(path, "sscd_disc_large")
    assert (mixup.name, large.name) == ("sscd_disc_mixup", "sscd_disc_large")
    assert mixup.copy_threshold == large.copy_threshold == SSCD_THRESHOLD
    colour = torch.tensor([255, 127, 0]) / 255
    seen = (colour - 0.5) / 0.5
    expected = nn.functional.normalize(torch.cat([seen, torch.tensor([2.24])]), dim=0)
    assert large.embed([picture])[0] == pytest.approx(expected.numpy(), abs=1e-4)
    seen = (colour / 2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = nn.functional.normalize(torch.cat([seen, torch.tensor([3.2])]), dim=0)
    assert mixup.embed([picture])[0] == pytest.approx(expected.numpy(), abs=1e-2)
    assert mixup.similarity(picture, picture) == pytest.approx(1, abs=1e-6)
    many = sscd(path, batch_size=2).embed([picture] * 5)
    assert many.shape == (5, 4)


def test_what_is_no_sscd_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match="does not exist; pass the TorchScript file"):
        sscd(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ModelNotSupported, match="is no TorchScript file"):
        sscd(tmp_path / "text.pt")
    with pytest.raises(ModelNotSupported, match="does not turn pictures into vectors"):
        sscd(saved(NotVectors(), tmp_path / "maps.pt")).embed([drawing(0)])
    with pytest.raises(ConfigError, match="choose among sscd_disc_mixup, sscd_disc_large"):
        sscd(tmp_path / "text.pt", "sscd_big")  # type: ignore[arg-type]


def test_controls_set_a_threshold_that_one_in_a_hundred_reaches() -> None:
    values = np.linspace(0, 0.5, 400).reshape(400, 1) - np.array([[0.0, 0.1]])
    chosen = threshold_from_controls(values)
    assert (values.max(1) >= chosen.value).mean() <= 0.01
    assert chosen.value is not None and chosen.value > values.max(1)[-5]
    assert "397th smallest of 400" in chosen.rule
    few = threshold_from_controls(values[:50])
    assert few.value is not None and few.value > values[:50].max()
    assert few.value == pytest.approx(values[:50].max(), abs=1e-12)
    with pytest.raises(DataError, match="of 20 never-trained prompts or more"):
        threshold_from_controls(values[:19])


def test_training_pictures_set_a_threshold_that_they_do_not_reach(originals: Tensor) -> None:
    groups = [originals[:3], originals[3:4], originals[4:4], originals[5:8]]
    chosen = threshold_from_references(groups, ["a", "b", "none", "c"])
    flat, owners = torch.cat(groups), [0, 0, 0, 1, 3, 3, 3]
    pairs = {(i, j): float(flat[i] @ flat[j]) for i in range(7) for j in range(7) if owners[i] != owners[j]}
    best = max(pairs, key=lambda pair: pairs[pair])
    assert chosen.value == pytest.approx(max(pairs.values()), abs=1e-6)
    names = ["a", "b", "none", "c"]
    assert repr(names[owners[best[0]]]) in chosen.rule and repr(names[owners[best[1]]]) in chosen.rule
    alike = threshold_from_references([originals[:1], originals[:1], originals[1:2]], ["a", "a", "b"])
    assert alike.value == pytest.approx(float(originals[0] @ originals[1]), abs=1e-6)
    with pytest.raises(DataError, match="needs training pictures of two prompts"):
        threshold_from_references(groups[:1], ["a"])


def test_pictures_are_read_as_they_look(tmp_path: Path) -> None:
    picture = drawing(1)
    assert np.array_equal(read_picture(write_picture(tmp_path / "a" / "x.png", picture)), picture)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").shape == (3, 4, 3)
    assert short_side_crop(np.zeros((100, 60, 3), dtype=np.uint8), 30, 20).shape == (20, 20, 3)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(DataError, match="pass the path of a PNG or JPEG file"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(DataError, match="expected \\(height, width, 3\\) and uint8"):
        read_picture(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
