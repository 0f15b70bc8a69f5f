"""One picture: read safely, cut square, to and from a tensor.

What comes out of `open_picture` is always the same thing, whatever the file held: 8-bit sRGB, upright, on white,
without metadata. The size is checked on the header, before any pixel is unpacked.

Shapes: a picture tensor is (3, height, width), float32, -1 black, 1 white.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 8192 * 8192  # 64 Mpx: 256 MB while it is unpacked
ONE_OF = "a PNG, JPEG, WebP or BMP file"
REMEDY = "save it again as an 8-bit RGB PNG or JPEG"

# Pillow's parsers raise all of these on files that are cut off or altered.
BROKEN = (OSError, SyntaxError, ValueError, EOFError)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# EXIF orientation -> what makes the stored pixels upright (TIFF 6.0, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 274


class PictureError(ValueError):
    """A picture file cannot be used; the message gives the file, what is wrong and the remedy."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_picture(path: str | Path) -> Image.Image:
    """The first frame of a picture file as 8-bit sRGB (mode RGB), upright, its transparency laid on white.

    An embedded ICC profile is applied; one that cannot be read, or is for another kind of pixel, counts as sRGB, as in
    browsers.
    Raises PictureError for anything but a whole PNG, JPEG, WebP or BMP file of at most `MAX_PIXELS`.
    """
    path = Path(path)
    _check_file(path)
    image = _flatten(_eight_bits(_decode(path)))
    image.info = {}  # otherwise the profile and EXIF of the file would be written out again with the picture
    return image


def fit_picture(
    image: Image.Image,
    resolution: int,
    *,
    center_crop: bool = True,
    crop: tuple[float, float] | None = None,
    flip: bool = False,
) -> Image.Image:
    """The picture cut square and scaled to (resolution, resolution), mirrored left to right if `flip`.

    The window is the largest square; `crop` = (x, y) places it, from left (0) to right (1) and from top to bottom, and
    goes before `center_crop`. Where the shorter side already has `resolution` pixels they are copied, not resampled.
    """
    x, y = _crop_position(resolution, center_crop, crop)
    side = min(image.size)
    left, top = round(x * (image.width - side)), round(y * (image.height - side))
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else square


def window(size: tuple[int, int], target: tuple[int, int], place: tuple[float, float]) -> tuple[float, float, float, float]:
    """The largest window (left, top, right, bottom) of a picture (width, height) that has the target's shape.

    `target` is (height, width); `place` puts the window from left (0) to right (1) and from top to bottom.
    """
    (width, height), (tall, wide) = size, target
    across, down = (width, width * tall / wide) if width * tall <= height * wide else (height * wide / tall, height)
    left, top = round(place[0] * (width - across)), round(place[1] * (height - down))
    return left, top, min(left + across, width), min(top + down, height)


def cut_picture(
    image: Image.Image, target: tuple[int, int], place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Image.Image:
    """The picture's window of the target's shape, scaled to `target` = (height, width), mirrored if `flip`.

    A square target gives what `fit_picture` gives; a mask (mode L) is cut alike.
    """
    box = window(image.size, target, place)
    cut = image.resize((target[1], target[0]), Image.Resampling.LANCZOS, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cut


def open_mask(path: str | Path) -> Image.Image:
    """A mask file as grey values: 255 counts fully, 0 not at all."""
    return open_picture(path).convert("L")


def open_alpha(path: str | Path) -> Image.Image | None:
    """A picture's own transparency as a mask, upright; None where all of it is opaque."""
    path = Path(path)
    _check_file(path)
    image = _decode(path)
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width), float32 in [-1, 1]: value / 127.5 - 1."""
    if image.mode != "RGB":
        raise ValueError(f"the picture has mode {image.mode}, only RGB becomes a tensor; convert it first")
    pixels = torch.from_numpy(np.array(image))  # np.array copies: the tensor must not share read-only memory
    return pixels.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1).contiguous()


def to_picture(tensor: Tensor) -> Image.Image:
    """A (3, height, width) tensor in [-1, 1] as an RGB picture; values beyond are clamped, since decoders overshoot."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"shape {tuple(tensor.shape)} is not (3, height, width); take one out of the batch")
    values = tensor.detach().to("cpu", torch.float32)
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"{bad} of {values.numel()} values are NaN or infinite, none may be; decode in float32")
    pixels = values.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _crop_position(resolution: int, center_crop: bool, crop: tuple[float, float] | None) -> tuple[float, float]:
    """Where the window lies, each in [0, 1], after checking all three settings."""
    problems = []
    if resolution < 1:
        problems.append(f"resolution is {resolution}, at least 1 is needed; 512 is usual")
    if crop is None and not center_crop:
        problems.append("center_crop=False leaves the window open; give crop=(x, y), each from 0 to 1")
    if crop is not None and not all(0 <= place <= 1 for place in crop):  # NaN fails here too
        problems.append(f"crop is {crop}, each part must lie in [0, 1]; (0.5, 0.5) is the centre")
    if problems:
        raise ValueError("; ".join(problems))
    return (0.5, 0.5) if crop is None else crop


def _check_file(path: Path) -> None:
    """Refuse what cannot be opened as a file, before a pipe or device could block."""
    if not os.path.isfile(path):
        raise PictureError(path, f"is {'not a regular file' if os.path.exists(path) else 'not there'}; give {ONE_OF}")
    if not os.access(path, os.R_OK):
        raise PictureError(path, "may not be read by you; change its permissions")
    if not path.stat().st_size:
        raise PictureError(path, f"is empty (0 bytes); copy it again or give {ONE_OF}")


def _decode(path: Path) -> Image.Image:
    """The pixels as stored, turned upright."""
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(32)
            _check_size(_webp_size(head))
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.size)
                image.load()
                turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
                return image.copy() if turn is None else image.transpose(turn)
    except BOMB as error:
        pixels = int(re.findall(r"\d+", str(error))[0])
        limit = f"{MAX_PIXELS:,} (8192 x 8192)"
        raise PictureError(path, f"unpacks to {pixels:,} pixels, more than {limit}; scale it down first") from error
    except Image.UnidentifiedImageError as error:
        reason = f"cannot be recognised as {ONE_OF}: it begins with {head[:16]!r}; {REMEDY}"
        raise PictureError(path, reason) from error
    except BROKEN as error:
        raise PictureError(path, f"is damaged or cut off ({error}); copy it again or {REMEDY}") from error


def _check_size(size: tuple[int, int]) -> None:
    """Refuse decompression bombs at our limit, in the way Pillow does at its own (which may be switched off)."""
    if size[0] * size[1] > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{size[0] * size[1]} pixels")


def _webp_size(head: bytes) -> tuple[int, int]:
    """The size that a WebP header declares, (0, 0) for other files.

    Pillow cannot be asked: opening a WebP file of 100 bytes takes 8 bytes for each pixel of the canvas it declares.
    """
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture as 8 bits, 257 steps to one; Pillow's own conversion clips at 255 and turns it white."""
    if image.mode != "I;16":
        return image
    values = np.asarray(image).astype(np.uint32)
    if (transparent := image.info.get("transparency")) is not None:
        values = np.where(values == transparent, 65535, values)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return grey


def _flatten(image: Image.Image) -> Image.Image:
    """The picture in sRGB on white."""
    if not image.has_transparency_data:
        return _to_srgb(image)
    layered = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(_to_srgb(layered.convert("RGB")), mask=layered.getchannel("A"))
    return paper


def _to_srgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, its colours taken from its ICC profile to sRGB."""
    plain = image.convert("RGB")
    profile = image.info.get("icc_profile") or b""
    mode = image.mode if image.mode in ("L", "CMYK") else "RGB"
    if profile[16:20] != {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}[mode]:
        return plain
    try:
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image.convert(mode), io.BytesIO(profile), srgb, outputMode="RGB") or plain
    except ImageCms.PyCMSError:
        return plain
