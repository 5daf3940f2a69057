"""Pictures of every kind must just work; files that only look like pictures end in one clear line."""

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iared2.data.pictures import MAX_PIXELS, find_pictures, read_picture, show
from iared2.errors import DataError
from iared2.report import pictures


@pytest.fixture
def photo() -> Image.Image:
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([4 * x, 6 * y, 255 - 4 * x], -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def difference(got: Image.Image, wanted: Image.Image) -> float:
    return float(np.abs(np.asarray(got, np.float32) - np.asarray(wanted, np.float32)).mean())


# ---- what must just work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [("a.png", "RGB", 0), ("a.jpg", "RGB", 4), ("a.webp", "RGB", 12), ("a.bmp", "RGB", 0), ("a.tiff", "RGB", 0), ("cmyk.jpg", "CMYK", 6)],
)
def test_formats_give_the_same_pixels(tmp_path, photo, name, mode, tolerance):
    photo.convert(mode).save(tmp_path / name)
    picture = read_picture(tmp_path / name)
    assert picture.image.mode == "RGB"
    assert picture.size == (40, 60)
    assert difference(picture.image, photo) <= tolerance
    assert bool(picture.notes) == (mode == "CMYK")


def test_sixteen_bit_grey_keeps_its_full_scale(tmp_path):
    ramp = np.linspace(0, 65535, 60, dtype=np.uint16)[None].repeat(40, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    picture = read_picture(tmp_path / "deep.png")
    levels = np.asarray(picture.image)[0, :, 0]
    assert levels[0] == 0
    assert levels[-1] == 255
    assert (np.diff(levels.astype(int)) > 0).all()
    assert "16-bit" in picture.notes[0]


def test_float_pictures_are_stretched_and_nan_is_no_value(tmp_path):
    values = np.linspace(-3, 7, 2400, dtype=np.float32).reshape(40, 60)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "f.tiff")
    levels = np.asarray(read_picture(tmp_path / "f.tiff").image)
    assert levels.min() == 0
    assert levels.max() == 255


def test_palette_and_alpha_are_laid_on_white(tmp_path, photo):
    photo.quantize(64).save(tmp_path / "palette.png")
    assert difference(read_picture(tmp_path / "palette.png").image, photo) < 20
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    picture = read_picture(tmp_path / "clear.png")
    assert np.asarray(picture.image).min() == 255
    assert "white" in picture.notes[0]
    transparent = photo.quantize(16)
    transparent.save(tmp_path / "t.png", transparency=0)
    assert "white" in read_picture(tmp_path / "t.png").notes[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, photo, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose that stores it
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo if orientation == 1 else photo.transpose(Image.Transpose(undo[orientation]))
    stored.save(tmp_path / "turned.png", exif=exif)
    picture = read_picture(tmp_path / "turned.png")
    assert difference(picture.image, photo) == 0
    assert bool(picture.notes) == (orientation != 1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_an_animation_the_first_frame_is_used_and_it_says_so(tmp_path, photo, name):
    later = [photo.rotate(90), photo.rotate(180)]
    photo.save(tmp_path / name, save_all=True, append_images=later)
    picture = read_picture(tmp_path / name)
    assert difference(picture.image, photo) < 15
    assert any("first of 3" in note for note in picture.notes)


# ---- what must end in one clear line ---------------------------------------------------------------------------


def check_refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_picture(path)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    for word in words:
        assert word in line


def test_files_that_are_no_pictures(tmp_path, photo):
    (tmp_path / "text.jpg").write_text("not a picture")
    check_refused(tmp_path / "text.jpg", "not a picture")
    (tmp_path / "empty.jpg").touch()
    check_refused(tmp_path / "empty.jpg", "empty")
    check_refused(tmp_path / "missing.jpg", "no such file")
    (tmp_path / "folder.jpg").mkdir()
    check_refused(tmp_path / "folder.jpg", "not a regular file")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    check_refused(tmp_path / "pipe.jpg", "not a regular file")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n")  # Pillow would run Ghostscript
    check_refused(tmp_path / "script.eps", "not a picture")


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.tiff"])
def test_truncated_files(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    noise.save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    check_refused(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes_as_another_error(tmp_path, photo):
    rng = np.random.default_rng(1)
    for kind in ("jpg", "png", "gif", "webp", "tiff", "bmp", "avif"):
        path = tmp_path / f"damaged.{kind}"
        photo.save(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(30):
            broken = whole.copy()
            broken[rng.integers(0, len(broken), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(broken.tobytes())
            with suppress(DataError):  # fine too; anything else is not
                read_picture(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(20000, 20000), (MAX_PIXELS // 9000 + 1, 9000), (60000, 60000)])
def test_bombs_are_refused_by_their_header(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    check_refused(tmp_path / "bomb.png", "at most 100 million")


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7)])
def test_pictures_too_small_to_have_patches(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "dot.png")
    check_refused(tmp_path / "dot.png", f"{size[0]}x{size[1]}", "too small")


def test_names_of_any_bytes_can_be_shown(tmp_path, photo):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe\n.png"))
    photo.save(os.fsencode(path), "PNG")
    assert read_picture(path).size == (40, 60)
    shown = show(path)
    assert "\n" not in shown
    shown.encode("utf-8")


# ---- finding ---------------------------------------------------------------------------------------------------


def test_folders_patterns_and_files_each_once(tmp_path, photo):
    for name in ("b.jpg", "a.PNG", "sub/c.gif", ".hidden.jpg", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo.save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found, failed = find_pictures([tmp_path, tmp_path / "*.jpg", tmp_path / "b.jpg"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.PNG", "b.jpg", "sub/c.gif"]
    assert not failed


def test_a_name_with_brackets_is_not_a_pattern(tmp_path, photo):
    photo.save(tmp_path / "a[1].jpg")
    assert find_pictures([tmp_path / "a[1].jpg"]) == ([tmp_path / "a[1].jpg"], [])


def test_results_of_earlier_runs_are_left_out_but_photos_beside_them_are_not(tmp_path, photo):
    for folder in ("out/a", "b"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("overlay_group1.png", "hierarchy.png"):
            photo.save(tmp_path / folder / name)
        (tmp_path / folder / "kept.npy").touch()
    photo.save(tmp_path / "out/b.jpg")
    for source in (tmp_path, tmp_path / "**/*.*"):
        assert find_pictures([source]) == ([tmp_path / "out/b.jpg"], [])
    assert find_pictures([tmp_path / "b/hierarchy.png"]) == ([tmp_path / "b/hierarchy.png"], [])  # named one by one


def test_two_ways_to_write_a_path_are_one_photo(tmp_path, photo):
    (tmp_path / "a").mkdir()
    photo.save(tmp_path / "a/x.jpg")
    assert len(find_pictures([tmp_path / "a/x.jpg", tmp_path / "a/../a/x.jpg"])[0]) == 1


def test_sources_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    sources = [tmp_path / "empty", tmp_path / "nothing", tmp_path / "*.jpg", "a\0b"]
    found, failed = find_pictures(sources)
    assert not found
    wanted = ("no pictures", "no such file", "no file matches", "no such file")
    assert len(failed) == len(wanted)
    assert all(words in failure.reason for words, failure in zip(wanted, failed, strict=True))


def test_many_groups_stand_in_several_rows() -> None:
    photo = Image.new("RGB", (400, 400))
    nine = pictures.hierarchy(photo, [np.ones((4, 4), bool)] * 9)
    two = pictures.hierarchy(photo, [np.ones((4, 4), bool)] * 2)
    assert nine.width < 2 * two.width
    assert nine.height == 2 * two.height + pictures.GAP
