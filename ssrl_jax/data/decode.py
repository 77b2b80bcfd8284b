"""One picture in any common form -> uint8 RGB at the top left of a square canvas of fixed side.

A picture larger than the canvas is shrunk, its aspect ratio kept, until its longer side fits; a
smaller one is left as it is. Everything that would reach training as silent nonsense is handled or
refused here: see `decode`.
"""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image

# Only formats that Pillow decodes by itself: a file may not choose to be, say, PostScript, for
# which Pillow would start an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# What shows through transparent pixels: the mean of ImageNet's mean colour (0.485, 0.456, 0.406).
GREY = 114

_ORIENTATION = 0x0112  # EXIF tag; value -> what turns the stored picture upright
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

Picture = bytes | str | os.PathLike | Image.Image | np.ndarray


class DamagedImage(ValueError):
  """A picture that cannot be read, or whose values cannot be what they claim; names the file."""


def decode(image: Picture, *, canvas: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes one picture.

  Applied: EXIF orientation, palettes, CMYK to RGB, the first frame of an animation. Transparent
  pictures are composited on grey. 16-bit grey is rescaled by 65535 (Pillow's own conversion clamps
  it to white), floating point by 1 and must be finite in [0, 1]. Colour profiles are ignored.

  Args:
    image: encoded bytes, the path of a file, a PIL image, or an array [H, W], [H, W, 1 | 3 | 4] of
      uint8, uint16, bool or float in [0, 1].
    canvas: S, the canvas's side in pixels.

  Returns:
    uint8 [S, S, 3], zero outside the picture; int32 [2], the picture's height and width on it.

  Raises:
    DamagedImage: truncated, empty, not a picture, values out of range, or more than Pillow's limit
      of 179 million pixels.
  """
  pixels = decode_pixels(image, canvas)
  height, width = pixels.shape[:2]
  placed = np.zeros((canvas, canvas, 3), np.uint8)
  placed[:height, :width] = pixels
  return placed, np.array([height, width], np.int32)


def decode_pixels(image: Picture, longer: int) -> np.ndarray:
  """As `decode`, without a canvas: uint8 [h, w, 3], no side being above `longer`."""
  if isinstance(image, np.ndarray):
    return _decode_array(image, longer)
  if isinstance(image, bytes | str | os.PathLike | Image.Image):
    return np.asarray(_decode_picture(image, longer))
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
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    pixels = np.asarray(_array_to_rgb(pixels))
  size = (pixels.shape[1], pixels.shape[0])
  if max(size) > canvas:
    pixels = np.asarray(_resize(Image.fromarray(pixels), fit(*size, canvas)))
  return pixels


def _decode_picture(image: bytes | str | os.PathLike | Image.Image, canvas: int) -> Image.Image:
  try:
    if isinstance(image, Image.Image):
      return _upright_rgb(image.copy(), canvas)
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    with Image.open(file, formats=FORMATS) as im:
      return _upright_rgb(im, canvas)
  except MemoryError:
    raise
  except Exception as e:
    # Pillow's plugins raise OSError, SyntaxError, ValueError, IndexError, struct.error and others
    # on damaged files. Its message for unknown bytes holds an address, different in every run.
    known = {DamagedImage: str(e), Image.UnidentifiedImageError: f"not one of {', '.join(FORMATS)}"}
    raise DamagedImage(f"{_name(image)}: {known.get(type(e), f'{type(e).__name__}: {e}')}") from e


def _name(image: bytes | str | os.PathLike | Image.Image) -> str:
  if isinstance(image, bytes):
    return f"picture of {len(image)} bytes"
  if isinstance(image, Image.Image):
    return str(getattr(image, "filename", "") or f"PIL image {image.mode} {image.size}")
  return os.fspath(image)


def _upright_rgb(im: Image.Image, canvas: int) -> Image.Image:
  """Decodes, turns and shrinks. JPEG: at 1/2, 1/4 or 1/8, not below twice the final size."""
  width, height = fit(*im.size, canvas)
  drafted = im.draft(im.mode, (2 * width, 2 * height))
  im.load()
  turn = orientation(im)  # after loading, in which Pillow turns TIFF itself
  rgb = _to_rgb(im)
  if turn in _UPRIGHT:
    rgb = rgb.transpose(_UPRIGHT[turn])
  if not drafted:
    return _resize(rgb, fit(*rgb.size, canvas))
  return _resize(rgb, (height, width) if turn >= 5 else (width, height))


def orientation(im: Image.Image) -> int:
  """The EXIF tag, 1 to 8, 1 being upright; from 5 on width and height are exchanged."""
  try:
    value = im.getexif().get(_ORIENTATION)
  except Exception:  # damaged EXIF does not make a damaged picture
    return 1
  return value if value in _UPRIGHT else 1


def _to_rgb(im: Image.Image) -> Image.Image:
  if im.mode.startswith("I") or im.mode == "F":
    return _array_to_rgb(np.asarray(im))
  if im.has_transparency_data:
    return _on_grey(im.convert("RGBA"))
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


def _resize(im: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Antialiased; a far larger picture is first reduced by whole numbers, as Pillow's thumbnail."""
  if im.size == size:
    return im
  return im.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
