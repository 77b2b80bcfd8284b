"""One picture in any common form -> uint8 RGB at the top left of a square canvas of fixed side.

A picture larger than the canvas is shrunk, its aspect ratio kept, until its longer side fits; a
smaller one is left as it is. Everything that would reach training as silent nonsense is handled or
refused here: see `decode`.

Pillow is the judge of what is damaged; a sound JPEG's pixels come from libjpeg-turbo itself (the
same pixels, without Pillow's own copies of them), and kornia-rs shrinks with Pillow's antialiased
bicubic filter in half of Pillow's time: benchmarks/data.py.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import simplejpeg
from kornia_rs import imgproc
from PIL import Image, ImageChops

# Only formats that Pillow decodes by itself: a file may not choose to be, say, PostScript, for
# which Pillow would start an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# What shows through transparent pixels: the mean of ImageNet's mean colour (0.485, 0.456, 0.406).
GREY = 114

# A file that claims more is a lie or blank: deflate makes at most 8,256 bilevel pixels of a byte.
# 256 bytes that claimed 13,000 x 13,000 pixels of JPEG 2000 took 1.4 GB and gave one colour.
MAX_PIXELS_PER_BYTE = 10_000

_ORIENTATION = 0x0112  # EXIF tag; value -> what turns the stored picture upright
_UPRIGHT = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: np.rot90,
}

Picture = bytes | str | os.PathLike | Image.Image | np.ndarray


class DamagedImage(ValueError):
  """A picture that cannot be read, or whose values cannot be what they claim; names the file."""


def decode(image: Picture, *, canvas: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes one picture.

  Applied: EXIF orientation, palettes, CMYK to RGB, the first frame of an animation. Transparent
  pictures are composited on grey. 16-bit grey is rescaled by 65535 (Pillow's own conversion clamps
  it to white), as are integers of 32 bits; these are refused if all are at most 255, for they might
  be of 8. Floating point is rescaled by 1 and must be finite in [0, 1]. Colour profiles are
  ignored.

  Args:
    image: encoded bytes, the path of a file, a PIL image, or an array [H, W], [H, W, 1 | 3 | 4] of
      uint8, uint16, bool or float in [0, 1].
    canvas: S, the canvas's side in pixels.

  Returns:
    uint8 [S, S, 3], zero outside the picture; int32 [2], the picture's height and width on it.

  Raises:
    DamagedImage: truncated, empty, not a picture, values out of range, more than Pillow's limit of
      179 million pixels, or more than MAX_PIXELS_PER_BYTE.
  """
  placed = np.empty((canvas, canvas, 3), np.uint8)
  return placed, np.array(decode_onto(placed, image), np.int32)


def decode_onto(placed: np.ndarray, image: Picture) -> tuple[int, int]:
  """`decode` into `placed` uint8 [S, S, 3], all of which is written; returns height and width.

  If it raises, nothing is written.
  """
  pixels = decode_pixels(image, len(placed))
  height, width = pixels.shape[:2]
  placed[:height, :width] = pixels
  placed[height:] = 0
  placed[:height, width:] = 0
  return height, width


def decode_pixels(image: Picture, longer: int) -> np.ndarray:
  """As `decode`, without a canvas: uint8 [h, w, 3], no side being above `longer`."""
  if isinstance(image, np.ndarray):
    return _decode_array(image, longer)
  if isinstance(image, bytes | str | os.PathLike | Image.Image):
    return _decode_picture(image, longer)
  raise TypeError(f"image is a {type(image).__name__}; expected bytes, path, PIL image or array")


def read_file(path: str | os.PathLike) -> bytes:
  """The bytes of a picture's file; DamagedImage where it cannot be read."""
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as error:
    raise DamagedImage(f"{os.fspath(path)}: {error.strerror}") from error


def fit(width: int, height: int, canvas: int) -> tuple[int, int]:
  """Width and height of a picture on the canvas: longer side at most `canvas`, none below 1."""
  longer = max(width, height)
  if longer <= canvas:
    return width, height
  return max(1, round(width * canvas / longer)), max(1, round(height * canvas / longer))


def _decode_array(pixels: np.ndarray, canvas: int) -> np.ndarray:
  if not pixels.size:
    raise DamagedImage(f"array of shape {pixels.shape} has no pixels")
  if pixels.dtype.kind not in "bf" and pixels.dtype not in (np.uint8, np.uint16):
    raise ValueError(f"array of {pixels.dtype}: 8 or 16 bits? Give uint8 or uint16")
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    pixels = np.asarray(_array_to_rgb(pixels))
  return _shrink(pixels, fit(pixels.shape[1], pixels.shape[0], canvas))


def _decode_picture(image: bytes | str | os.PathLike | Image.Image, canvas: int) -> np.ndarray:
  try:
    if isinstance(image, Image.Image):
      copy = image.copy()
      copy.format = image.format  # which a copy loses: inks of JPEGs hang on it
      return _upright_rgb(copy, b"", canvas)
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    if (pixels := _plain_jpeg(data, canvas)) is not None:
      return pixels
    with Image.open(io.BytesIO(data), formats=FORMATS) as im:
      _check_claim(im.size, len(data))
      return _upright_rgb(im, data, canvas)
  except MemoryError:
    raise
  except Exception as e:
    # Pillow's plugins raise OSError, SyntaxError, ValueError, IndexError, struct.error and others
    # on damaged files. Its message for unknown bytes holds an address, different in every run.
    known = {DamagedImage: str(e), Image.UnidentifiedImageError: f"not one of {', '.join(FORMATS)}"}
    raise DamagedImage(f"{name_of(image)}: {known.get(type(e), f'{type(e).__name__}: {e}')}") from e


def _check_claim(size: tuple[int, int], num_bytes: int) -> None:
  if size[0] * size[1] > MAX_PIXELS_PER_BYTE * num_bytes:
    raise DamagedImage(f"claims {size[0]} x {size[1]} pixels in {num_bytes} bytes")


def name_of(image: Picture) -> str:
  if isinstance(image, bytes):
    return f"picture of {len(image)} bytes"
  if isinstance(image, Image.Image):
    return str(getattr(image, "filename", "") or f"PIL image {image.mode} {image.size}")
  if isinstance(image, np.ndarray):
    return f"array of shape {image.shape}"
  return os.fspath(image)


def _upright_rgb(im: Image.Image, data: bytes, canvas: int) -> np.ndarray:
  """Decodes, shrinks and turns an image that was opened from `data`."""
  pixels = None
  if im.format == "JPEG" and im.mode in ("L", "RGB"):
    pixels = _sound_jpeg(data, fit(*im.size, canvas))
  if pixels is None:
    im.load()
    pixels = np.asarray(_to_rgb(im))
  size, turn = fit(*im.size, canvas), orientation(im)  # after loading, which turns TIFF itself
  pixels = _shrink(pixels, size)
  return _UPRIGHT[turn](pixels) if turn in _UPRIGHT else pixels


def _plain_jpeg(data: bytes, canvas: int) -> np.ndarray | None:
  """The picture of a JPEG that needs nothing of what Pillow knows; None: Pillow is to open it."""
  if not _says_nothing_more(data):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  most = min(MAX_PIXELS_PER_BYTE * len(data), Image.MAX_IMAGE_PIXELS or math.inf)
  if colours not in ("Gray", "YCbCr") or height * width > most:
    return None
  size = fit(width, height, canvas)
  pixels = _sound_jpeg(data, size)
  return pixels if pixels is None else _shrink(pixels, size)


def _says_nothing_more(data: bytes) -> bool:
  """Whether a JPEG has no segment APP1 before its scan: there an orientation would stand."""
  if not data.startswith(b"\xff\xd8"):
    return False
  at = 2
  while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xe1":
    if data[at + 1 : at + 2] == b"\xda":
      return True
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
  return False


def _sound_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
  """RGB of a grey or YCbCr JPEG without the least fault, at a scale not below twice `size`.

  None: anything else, which Pillow decodes or refuses. So the decoder changes no verdict.
  """
  try:  # scales above 1/2 would be slower than the whole picture
    return simplejpeg.decode_jpeg(
      data, min_height=2 * size[1], min_width=2 * size[0], min_factor=2, strict=True
    )
  except ValueError:
    return None


def orientation(im: Image.Image) -> int:
  """The EXIF tag, 1 to 8, 1 being upright; from 5 on width and height are exchanged."""
  try:
    value = im.getexif().get(_ORIENTATION)
  except Exception:  # damaged EXIF does not make a damaged picture
    return 1
  return value if value in _UPRIGHT else 1


def _to_rgb(im: Image.Image) -> Image.Image:
  if im.mode.startswith("I") or im.mode == "F":
    pixels = np.asarray(im)
    if im.format == "TIFF" and im.mode.startswith("I;16") and im.tag_v2.get(262) == 0:
      pixels = 65535 - pixels  # white is 0, which Pillow knows of 8 bits only
    # Pillow has scaled a PPM to 16 bits; of another file's 32 it says nothing.
    if im.mode == "I" and im.format != "PPM" and 0 < pixels.max() < 256:
      raise DamagedImage("32-bit picture with values up to 255: 8 or 16 bits? Store it as either")
    return _array_to_rgb(pixels)
  if im.has_transparency_data:
    return _on_grey(im.convert("RGBA"))
  if im.mode == "CMYK" and im.format == "JPEG" and "adobe" not in im.info:
    im = ImageChops.invert(im)  # Pillow takes every CMYK JPEG for one of Adobe's, inverted
  return im.convert("RGB")


def _array_to_rgb(pixels: np.ndarray) -> Image.Image:
  if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
    raise ValueError(f"array of shape {pixels.shape}; expected [H, W] or [H, W, 1 | 3 | 4]")
  pixels = _to_uint8(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
  im = Image.fromarray(pixels)
  return _on_grey(im) if im.mode == "RGBA" else im.convert("RGB")


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
  """Rescales by what the type can hold; int32 is how Pillow opens some 16-bit files."""
  if pixels.dtype == np.uint8:
    return pixels
  if pixels.dtype == bool:
    return pixels * np.uint8(255)
  low, high = pixels.min(), pixels.max()
  if pixels.dtype.kind == "f":
    if not (low >= 0 and high <= 1):  # also false for NaN
      raise DamagedImage(f"floating-point picture with values in [{low}, {high}]; expected [0, 1]")
    return np.round(pixels * 255).astype(np.uint8)
  if low < 0 or high > 65535:
    raise DamagedImage(f"{pixels.dtype} picture with values in [{low}, {high}]; expected 16 bits")
  return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # round(x * 255 / 65535)


def _on_grey(rgba: Image.Image) -> Image.Image:
  background = Image.new("RGBA", rgba.size, (GREY, GREY, GREY, 255))
  return Image.alpha_composite(background, rgba).convert("RGB")


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """uint8 [H, W, 3] to `size` (width, height), antialiased bicubic."""
  if (pixels.shape[1], pixels.shape[0]) == size:
    return pixels
  return imgproc.resize(np.ascontiguousarray(pixels), (size[1], size[0]), "bicubic")
