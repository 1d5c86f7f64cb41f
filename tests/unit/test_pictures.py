"""Pictures from archives and folders, and what is said of bad ones."""

import csv
import json

import numpy
import pytest
from PIL import Image

from unmemorize.audit.pictures import read_picture
from unmemorize.corpus.pictures import find_pictures, read_pictures, resized
from unmemorize.errors import ConfigError, DataError
from unmemorize.testbeds.drawings import draw_pictures, draw_scenes


def write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def archive(tmp_path):
    """Three pictures of 8 x 8 beside their captions; the second caption is empty."""
    images = numpy.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(numpy.uint8)
    numpy.savez(tmp_path / "images_8.npz", images=images)
    write_table(
        tmp_path / "captions.csv", [{"row": i, "caption": c} for i, c in enumerate(("one", "", "three"))]
    )
    return tmp_path, images


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (12, 8), colour).save(tmp_path / name)
    write_table(
        tmp_path / "metadata.csv",
        [{"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "blue"}],
    )
    return tmp_path


def test_archive_rows_keep_their_captions(archive):
    folder, images = archive
    pictures = read_pictures(folder / "images_8.npz", size_px=8)
    assert [picture.caption for picture in pictures] == ["one", "three"]
    assert (pictures[1].pixels == images[2]).all()
    assert (read_pictures(folder, size_px=8, limit=1)[0].pixels == images[0]).all()


def test_a_folder_gives_the_archive_of_the_size_asked_for(archive):
    folder, _ = archive
    numpy.savez(folder / "images_4.npz", images=numpy.full((3, 4, 4, 3), 7, numpy.uint8))
    assert read_pictures(folder, size_px=4)[0].pixels.max() == 7
    assert read_pictures(folder, size_px=8)[0].pixels.max() > 7


def test_pictures_are_averaged_down(archive):
    folder, images = archive
    small = read_pictures(folder / "images_8.npz", size_px=4)[0].pixels
    slow = [
        [images[0][2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3).mean(0) for x in range(4)]
        for y in range(4)
    ]
    assert (small == numpy.rint(numpy.array(slow))).all()


def test_image_files_are_cut_to_the_central_square(folder):
    pictures = read_pictures(folder, size_px=5)
    assert [(p.caption, p.name) for p in pictures] == [("red", "a.png"), ("blue", "b.png")]
    assert pictures[0].pixels.shape == (5, 5, 3)
    assert (pictures[1].pixels == (0, 0, 255)).all()


def test_json_lines_name_pictures_too(folder):
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "caption": "so blue"}) + "\n")
    assert [picture.caption for picture in read_pictures(folder, size_px=4)] == ["so blue"]


def test_grey_archives_become_colour(tmp_path):
    numpy.savez(tmp_path / "x.npz", images=numpy.full((1, 4, 4), 9, numpy.uint8))
    write_table(tmp_path / "captions.csv", [{"caption": "grey"}])
    assert read_pictures(tmp_path / "x.npz", size_px=4)[0].pixels.shape == (4, 4, 3)


def test_wide_pictures_lose_their_sides():
    pixels = numpy.zeros((4, 10, 3), numpy.uint8)
    pixels[:, 3:7] = 200
    assert (resized(pixels, 2) == 200).all()


def test_what_is_missing_is_named(archive, tmp_path):
    folder, _ = archive
    with pytest.raises(DataError, match="has no column 'figure', only"):
        read_pictures(folder, size_px=8, caption_column="figure")
    with pytest.raises(
        DataError, match=r"nowhere does not exist; expected a \.npz archive or a folder of pictures"
    ):
        read_pictures(tmp_path / "nowhere", size_px=8)
    write_table(folder / "captions.csv", [{"caption": "one"}])
    with pytest.raises(DataError, match="holds 3 pictures and .* 1 rows; make them agree"):
        read_pictures(folder, size_px=8)
    (folder / "captions.csv").unlink()
    with pytest.raises(
        DataError, match=r"captions\.csv does not exist; put the captions beside the pictures"
    ):
        read_pictures(folder / "images_8.npz", size_px=8)
    with pytest.raises(DataError, match="holds no metadata.csv, metadata.jsonl, captions.csv"):
        read_pictures(folder, size_px=8)


def test_pictures_that_cannot_be_read_are_named(folder):
    (folder / "b.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(DataError, match=r"cannot read the picture .*b\.png .*; replace it or drop its row"):
        read_pictures(folder, size_px=4)
    (folder / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png does not exist, but the table names it"):
        read_pictures(folder, size_px=4)
    write_table(folder / "metadata.csv", [{"text": "red"}])
    with pytest.raises(DataError, match="row 1 has no file_name, only"):
        read_pictures(folder, size_px=4)


def test_pictures_are_turned_as_their_camera_says(folder):
    image = pytest.importorskip("PIL.Image")
    lying = image.new("RGB", (8, 4), "red")
    lying.paste("blue", (0, 0, 4, 4))  # the left half is the top, once it is turned by a quarter to the right
    exif = image.Exif()
    exif[0x0112] = 6
    lying.save(folder / "b.png", exif=exif)
    upright = read_picture(folder / "b.png")
    assert upright.shape == (8, 4, 3)
    assert upright[0, :, 2].min() == 255 and upright[-1, :, 0].min() == 255
    one = next(p for p in read_pictures(folder, size_px=4) if p.name == "b.png")
    assert one.pixels[0, :, 2].min() == 255 and one.pixels[-1, :, 0].min() == 255


def test_pictures_that_pillow_would_spoil_or_not_open_are_refused(folder, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    read = (lambda: read_pictures(folder, size_px=4), lambda: read_picture(folder / "b.png"))
    image.new("I;16", (8, 8), 40_000).save(folder / "b.png")
    for reader in read:
        with pytest.raises(DataError, match=r"cannot read .*b\.png .*more than 8 bits a channel"):
            reader()
    image.new("RGB", (8, 8)).save(folder / "b.png")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 50)  # 64 are worth a warning, above 100 an error
    for reader in read:
        reader()
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 20)
    for reader in read:
        with pytest.raises(DataError, match=r"cannot read .* \(it is too large: .*b?"):
            reader()


def test_archives_are_never_unpickled(archive):
    folder, _ = archive
    numpy.savez(folder / "images_8.npz", images=numpy.array([{"a": 1}] * 3, dtype=object))
    with pytest.raises(DataError, match="expected a NumPy archive of plain arrays"):
        read_pictures(folder, size_px=8)
    numpy.savez(folder / "images_8.npz", images=numpy.zeros((3, 8, 8, 3)))
    with pytest.raises(DataError, match=r"holds float64 of shape \(3, 8, 8, 3\); expected uint8"):
        read_pictures(folder, size_px=8)
    (folder / "images_8.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="cannot read .*images_8.npz"):
        read_pictures(folder, size_px=8)
    numpy.savez(folder / "images_8.npz", pictures=numpy.zeros((3, 8, 8, 3), numpy.uint8))
    with pytest.raises(DataError, match="has no array 'images'"):
        read_pictures(folder, size_px=8)


def test_sizes_below_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="size_px is 0, expected 1 or more"):
        read_pictures(tmp_path, size_px=0)
    with pytest.raises(ConfigError, match="limit is 0, expected 1 or more"):
        read_pictures(tmp_path, size_px=8, limit=0)


def test_drawings_follow_from_seed_and_number_alone():
    few, many = draw_pictures(3, seed=1, size_px=12), draw_pictures(5, seed=1, size_px=12)
    assert all(
        a.caption == b.caption and (a.pixels == b.pixels).all() for a, b in zip(few, many, strict=False)
    )
    other = draw_pictures(3, seed=2, size_px=12)
    assert any(a.caption != b.caption for a, b in zip(few, other, strict=True))


def test_a_drawing_shows_the_colours_of_its_caption():
    from unmemorize.testbeds.drawings import COLOURS

    for picture in draw_pictures(40, seed=0, size_px=24):
        words = picture.caption.split()
        shape_colour = COLOURS[next(word for word in words if word in COLOURS)]
        distance = abs(picture.pixels.astype(int) - shape_colour).sum(-1).min()
        assert distance <= 30, picture.caption


def test_scenes_differ_in_caption_and_picture():
    scenes = draw_scenes(24, seed=0, size_px=12)
    assert len({scene.caption for scene in scenes}) == 24
    pixels = numpy.stack([scene.pixels for scene in scenes]).astype(float) / 255
    errors = ((pixels[:, None] - pixels[None]) ** 2).mean((2, 3, 4)) + numpy.eye(24)
    assert errors.min() > 0.01


def test_pictures_are_found_without_captions(folder, tmp_path):
    files = [folder / "a.png", folder / "b.png"]
    assert find_pictures(folder) == find_pictures(folder / "metadata.csv") == files
    (folder / "named.jsonl").write_text(json.dumps({"picture": "b.png|a.png", "text": ""}) + "\n")
    assert find_pictures(folder / "named.jsonl") == files[::-1]
    inner = folder / "inner"
    inner.mkdir()
    numpy.savez(inner / "grey.npz", images=numpy.full((2, 4, 4), 7, numpy.uint8))
    for found in (find_pictures(inner), find_pictures(inner / "grey.npz")):
        assert [(one.shape, one.max()) for one in found] == [((4, 4, 3), 7)] * 2
    Image.new("RGB", (4, 4)).save(inner / "c.JPG")
    assert find_pictures(folder) == [*files, inner / "c.JPG"]


def test_where_no_pictures_are_found_it_says_why(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere holds no pictures or does not exist; expected a folder"):
        find_pictures(tmp_path / "nowhere")
    inner = folder / "inner"
    inner.mkdir()
    with pytest.raises(DataError, match="inner holds no pictures; expected image files"):
        find_pictures(inner)
    for name in ("one.npz", "two.npz"):
        numpy.savez(inner / name, images=numpy.zeros((1, 4, 4), numpy.uint8))
    with pytest.raises(DataError, match=r"holds 2 archives \(one.npz, two.npz\); name one of them"):
        find_pictures(inner)
    write_table(folder / "names.csv", [{"file_name": "a.png"}, {"file_name": "missing.png"}])
    with pytest.raises(DataError, match=r"missing.png does not exist, but .*names.csv names it"):
        find_pictures(folder / "names.csv")
    write_table(folder / "words.csv", [{"text": "red"}])
    with pytest.raises(DataError, match="row 1 has neither picture nor file_name, only"):
        find_pictures(folder / "words.csv")
