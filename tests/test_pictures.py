"""Pictures: what each kind of file must turn into, stated in pixel values, and what must be refused."""

from __future__ import annotations

import os
import pickle
import random
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from share_diffusion.pictures import MAX_PIXELS, PictureError, fit_picture, open_picture, to_picture, to_tensor

PHOTOS = Path(__file__).parents[1].parent / "shared" / "dreambooth"
SCENE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)  # 5 high, 7 wide, every value once: no symmetry


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG file written out by hand, for kinds that Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


def linear_profile(space: bytes) -> bytes:
    """A minimal ICC profile whose values are linear light: sRGB's primaries (or grey) with gamma 1."""

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    line = b"curv" + bytes(4) + struct.pack(">I", 0)
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249), b"kTRC": line}
    if space == b"RGB ":
        primaries = {b"r": (0.4360, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7141)}
        tags = {b"wtpt": tags[b"wtpt"]} | {name + b"XYZ": xyz(*values) for name, values in primaries.items()}
        tags |= {name + b"TRC": line for name in primaries}
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = open_picture(path)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


# EXIF orientation -> the sides of the scene that row 0 and column 0 of the file show (TIFF 6.0, tag 274).
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def corner(scene: np.ndarray, *sides: str) -> list[int]:
    return scene[0 if "top" in sides else -1, 0 if "left" in sides else -1].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    upright = pixels(save(tmp_path / name, Image.fromarray(SCENE), exif=exif, lossless=True))
    row, column = SIDES[orientation]
    assert corner(upright, row, column) == SCENE[0, 0].tolist()
    assert corner(upright, row, OPPOSITE[column]) == SCENE[0, -1].tolist()
    assert corner(upright, OPPOSITE[row], column) == SCENE[-1, 0].tolist()
    assert sorted(upright.reshape(-1, 3).tolist()) == sorted(SCENE.reshape(-1, 3).tolist())


def test_an_unknown_orientation_leaves_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 9
    assert (pixels(save(tmp_path / "a.png", Image.fromarray(SCENE), exif=exif)) == SCENE).all()


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, colour: int, channels: int) -> None:
    ramp = np.arange(256, dtype=np.uint16) * 257  # the 16-bit value that means the same as each 8-bit one
    values = np.repeat(ramp[:, None], channels, 1)
    if channels in (2, 4):
        values[:, -1] = 65535
    path = tmp_path / "ramp.png"
    path.write_bytes(png(256, 1, 16, colour, b"\0" + values.astype(">u2").tobytes()))
    assert (pixels(path)[0] == np.arange(256)[:, None]).all()


def test_sixteen_bit_grey_is_rounded_and_its_transparent_value_is_white(tmp_path: Path) -> None:
    values = np.array([0, 128, 129, 270, 30000, 65535], dtype=">u2")
    path = tmp_path / "grey.png"
    path.write_bytes(png(6, 1, 16, 0, b"\0" + values.tobytes(), tRNS=struct.pack(">H", 30000)))
    assert pixels(path)[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255]


def test_palette_one_bit_and_grey(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 90, 255]], dtype=np.uint8))
    assert pixels(save(tmp_path / "grey.png", grey))[0].tolist() == [[0] * 3, [90] * 3, [255] * 3]
    assert pixels(save(tmp_path / "bit.png", grey.convert("1", dither=Image.Dither.NONE)))[0, 2].tolist() == [255] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(save(tmp_path / "palette.png", palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    clear = save(tmp_path / "clear.png", palette, transparency=bytes([255, 0]))
    assert pixels(clear)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    keyed = save(tmp_path / "keyed.png", palette.convert("RGB"), transparency=(10, 20, 30))
    assert pixels(keyed)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_alpha_is_laid_on_white(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [10, 20, 30, 255], [100, 0, 200, 51]]], dtype=np.uint8))
    found = pixels(save(tmp_path / name, image, lossless=True, exact=True))[0]
    assert found[:2].tolist() == [[255, 255, 255], [10, 20, 30]]
    assert np.abs(found[2] - (0.2 * np.array([100, 0, 200]) + 0.8 * 255)).max() <= 1  # 51 / 255 = 0.2


def test_cmyk_jpeg(tmp_path: Path) -> None:
    for ink, colour in [((255, 0, 0, 0), (0, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))]:
        path = save(tmp_path / "ink.jpg", Image.new("CMYK", (8, 8), ink), quality=100)
        assert np.abs(pixels(path).astype(int) - colour).max() <= 2


def srgb_of_linear(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: the sRGB value of linear light, both in [0, 1]."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("space", "mode"), [(b"RGB ", "RGB"), (b"RGB ", "P"), (b"GRAY", "L"), (b"RGB ", "RGBA")])
def test_an_icc_profile_is_applied(tmp_path: Path, space: bytes, mode: str) -> None:
    grey = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(grey).convert("RGB").convert(mode)
    found = pixels(save(tmp_path / "linear.png", image, icc_profile=linear_profile(space)))[0]
    wanted = 255 * srgb_of_linear(np.asarray(image.convert("RGB"))[0] / 255)
    assert np.abs(found - wanted)[8:].max() < 1.5  # below 8, Little CMS is coarse for grey


@pytest.mark.parametrize("profile", [b"no profile at all", linear_profile(b"GRAY"), linear_profile(b"RGB ")[:200]])
def test_a_profile_that_does_not_fit_counts_as_srgb(tmp_path: Path, profile: bytes) -> None:
    assert (pixels(save(tmp_path / "a.png", Image.fromarray(SCENE), icc_profile=profile)) == SCENE).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    other = Image.new("RGB", (7, 5), "red")
    path = save(tmp_path / name, Image.fromarray(SCENE), save_all=True, append_images=[other], lossless=True)
    assert (pixels(path) == SCENE).all()


def test_name_and_place_do_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "with space, Ünïcode 猫"
    folder.mkdir()
    path = save(folder / "a.png", Image.fromarray(SCENE)).rename(folder / "wrong ending é.JPG")
    assert (pixels(path) == SCENE).all()
    assert (np.asarray(open_picture(str(path))) == SCENE).all()


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP of a few bytes that declares a large canvas."""
    tiny = BytesIO()
    Image.new("RGB", (8, 8)).save(tiny, "WEBP", lossless=True)
    frame = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4) + tiny.getvalue()[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<II", 10, 2) + size + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_the_webp_header_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(webp_canvas(130, 70))
    assert open_picture(path).size == (130, 70)


def webp_still(width: int, height: int, lossless: bool) -> bytes:
    """A small WebP picture whose header declares another size."""
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "WEBP", lossless=lossless)
    content = bytearray(stream.getvalue())
    if lossless:
        bits = int.from_bytes(content[21:25], "little") >> 28 << 28 | (height - 1) << 14 | width - 1
        content[21:25] = bits.to_bytes(4, "little")
    else:
        content[26:30] = struct.pack("<HH", width, height)
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (12000, 8000), (16000, 16000)])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    small = BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    frame = small.getvalue().index(b"\xff\xc0") + 5
    bombs = {
        "png": png(width, height, 8, 2, bytes(1000)),
        "jpeg": small.getvalue()[:frame] + struct.pack(">HH", height, width) + small.getvalue()[frame + 4 :],
        "canvas": webp_canvas(width, height),
        "lossless": webp_still(width, height, True),
        "lossy": webp_still(width, height, False),
    }
    for content in bombs.values():
        path.write_bytes(content)
        start = time.perf_counter()
        with pytest.raises(PictureError, match="scale it down") as caught:
            open_picture(path)
        assert time.perf_counter() - start < 0.5
        assert f"{width * height:,} pixels" in str(caught.value)
        assert f"{MAX_PIXELS:,}" in str(caught.value)


@pytest.mark.parametrize("content", [webp_canvas(9000, 9000), webp_still(9000, 9000, True), webp_still(9000, 9000, False)])
def test_a_webp_bomb_never_reaches_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    opened = []
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args))
    path = tmp_path / "bomb.webp"
    path.write_bytes(content)
    with pytest.raises(PictureError, match="81,000,000 pixels"):
        open_picture(path)
    assert not opened  # opening it alone takes Pillow 8 bytes for each declared pixel


def test_the_largest_size_passes_the_header_check(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(png(8192, 8192, 1, 0, bytes(100)))
    with pytest.raises(PictureError, match="damaged or cut off"):  # and not: too large
        open_picture(path)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{ending}", Image.fromarray(noise))
    whole = path.read_bytes()
    for part in (0.3, 0.7, 0.95):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(PictureError, match="save it again"):
            open_picture(path)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"", "empty (0 bytes)"),
        (b"<!DOCTYPE html><html>", "<!DOCTYPE html>"),
        (b"\0\0\0\x18ftypheic", "ftypheic"),
        (b"GIF89a" + bytes(20), "GIF89a"),
        (b"<svg xmlns=", "<svg xmlns="),
        (b"%!PS-Adobe-3.0 EPSF", "%!PS-Adobe"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, value: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match="PNG, JPEG, WebP or BMP") as caught:
        open_picture(path)
    assert value in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name, reason in [
        ("pipe.png", "not a regular file"),
        ("", "not a regular"),
        ("x", "not there"),
        ("dangling.png", "not"),
    ]:
        with pytest.raises(PictureError, match=reason):
            open_picture(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Tag data:UserWarning")
def test_altered_bytes_raise_nothing_else(tmp_path: Path) -> None:
    random_byte = random.Random(0)
    refused = 0
    exif = Image.Exif()
    exif[274] = 6
    for ending in ("png", "jpg", "webp", "bmp"):
        path = save(tmp_path / f"a.{ending}", Image.fromarray(SCENE), exif=exif, icc_profile=linear_profile(b"RGB "))
        whole = path.read_bytes()
        for _ in range(150):
            altered = bytearray(whole)
            altered[random_byte.randrange(len(whole))] = random_byte.randrange(256)
            path.write_bytes(altered)
            try:
                assert open_picture(path).mode == "RGB"
            except PictureError:
                refused += 1
    assert 0 < refused < 600


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PictureError(Path("a.png"), "is bad; mend it")))
    assert (str(error), error.path, error.reason) == ("a.png: is bad; mend it", Path("a.png"), "is bad; mend it")
    assert isinstance(error, ValueError)


# fit_picture


def test_the_window_lies_where_crop_says() -> None:
    wide, tall = Image.fromarray(SCENE), Image.fromarray(SCENE.transpose(1, 0, 2).copy())
    for place, left in [(0.0, 0), (0.5, 1), (0.9, 2), (1.0, 2)]:  # 7 - 5 = 2 pixels to move in
        window = SCENE[:, left : left + 5]
        assert (np.asarray(fit_picture(wide, 5, crop=(place, 0.3))) == window).all()
        assert (np.asarray(fit_picture(tall, 5, crop=(0.3, place))) == window.transpose(1, 0, 2)).all()
        assert (np.asarray(fit_picture(wide, 5, crop=(place, 0), center_crop=False)) == window).all()
        assert (np.asarray(fit_picture(wide, 5, crop=(place, 0), flip=True)) == window[:, ::-1]).all()
    assert (np.asarray(fit_picture(wide, 5)) == SCENE[:, 1:6]).all()


def test_a_square_of_the_right_size_is_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (np.asarray(fit_picture(Image.fromarray(noise), 64)) == noise).all()


def test_cutting_while_scaling_equals_scaling_then_cutting() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    whole = np.asarray(noise.resize((64, 32), Image.Resampling.LANCZOS))
    for place, left in [(0.0, 0), (0.5, 16), (1.0, 32)]:
        assert (np.asarray(fit_picture(noise, 32, crop=(place, 0))) == whole[:, left : left + 32]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 3), (33, 64), (100, 100)])
def test_one_colour_stays_one_colour(size: tuple[int, int]) -> None:
    fitted = fit_picture(Image.new("RGB", size, (3, 130, 250)), 48)
    assert fitted.size == (48, 48)
    assert (np.asarray(fitted) == (3, 130, 250)).all()


def test_all_wrong_settings_are_named_at_once() -> None:
    image = Image.fromarray(SCENE)
    with pytest.raises(ValueError, match=r"resolution is 0, at least 1.*512.*crop is \(1.5, nan\).*\[0, 1\].*0.5"):
        fit_picture(image, 0, crop=(1.5, float("nan")))
    with pytest.raises(ValueError, match=r"center_crop=False.*give crop"):
        fit_picture(image, 4, center_crop=False)


# tensors


def test_the_ends_of_the_range() -> None:
    row = torch.tensor([-1.0, 0.2, 1.0])  # 0.2 = 153 / 127.5 - 1
    image = Image.fromarray(np.array([[[0] * 3, [153] * 3, [255] * 3]], dtype=np.uint8))
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 1, 3), torch.float32)
    torch.testing.assert_close(tensor[1, 0], row)


def test_pictures_and_tensors_round_trip_exactly() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for array in (every, SCENE):
        assert (np.asarray(to_picture(to_tensor(Image.fromarray(array)))) == array).all()
    tensor = to_tensor(Image.fromarray(SCENE))
    assert (tensor[2] == torch.from_numpy(SCENE[..., 2].copy()) / 127.5 - 1).all()
    assert (np.asarray(to_picture(tensor.double().requires_grad_())) == SCENE).all()


def test_values_beyond_the_range_are_clamped() -> None:
    assert np.asarray(to_picture(torch.tensor([-7.0, 1.01, 0.0]).view(3, 1, 1)))[0, 0].tolist() == [0, 255, 128]


def test_what_is_no_picture_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) is not \(3, height, width\); take one"):
        to_picture(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="2 of 12 values are NaN or infinite, none may be; decode in float32"):
        to_picture(torch.tensor([float("nan"), float("inf")] + [0.0] * 10).view(3, 2, 2))
    with pytest.raises(ValueError, match=r"mode L, only RGB .*; convert"):
        to_tensor(Image.new("L", (4, 4)))


@pytest.mark.real
def test_photographs() -> None:
    photos = sorted(PHOTOS.glob("*/00.jpg"))
    if not photos:
        pytest.skip("the photographs are not there: shared/dreambooth beside the repository")
    for photo in photos:
        fitted = np.asarray(fit_picture(open_picture(photo), 64)).astype(float)
        assert fitted.shape == (64, 64, 3)
        with Image.open(photo) as image:
            plain = np.asarray(image.convert("RGB")).astype(float)
        side = min(plain.shape[:2])
        top, left = (plain.shape[0] - side) // 2, (plain.shape[1] - side) // 2
        assert np.abs(fitted.mean((0, 1)) - plain[top : top + side, left : left + side].mean((0, 1))).max() < 1
