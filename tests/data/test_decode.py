"""Decoding against pictures whose right answer is known without Pillow's conversions."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from ssrl_jax.data import decode as module
from ssrl_jax.data.decode import GREY, DamagedImage, decode, decode_onto, fit

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def blocks(height=16, width=24):
  """Four flat colours, one in each quarter."""
  return CORNERS.repeat(height // 2, 0).repeat(width // 2, 1)


def encoded(im, format="PNG", **options):
  buffer = io.BytesIO()
  im.save(buffer, format, **options)
  return buffer.getvalue()


def shown(image, canvas=32):
  """The decoded picture without the rest of the canvas, as int for subtraction."""
  placed, (height, width) = decode(image, canvas=canvas)
  assert placed.shape == (canvas, canvas, 3)
  assert placed.dtype == np.uint8
  assert not placed[height:].any()
  assert not placed[:, width:].any()
  return placed[:height, :width].astype(int)


@pytest.mark.parametrize("form", ["bytes", "path", "pathlike", "pil", "array"])
def test_every_form_of_item_decodes_alike(form, tmp_path):
  pixels = blocks()
  data, path = encoded(Image.fromarray(pixels)), tmp_path / "a.png"
  path.write_bytes(data)
  forms = {
    **{"bytes": data, "path": str(path), "pathlike": path},
    **{"pil": Image.fromarray(pixels), "array": pixels},
  }
  image, extent = decode(forms[form], canvas=32)
  np.testing.assert_array_equal(image[:16, :24], pixels)
  np.testing.assert_array_equal(extent, [16, 24])
  assert extent.dtype == np.int32


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "PPM"])
def test_lossless_formats_are_exact(format):
  np.testing.assert_array_equal(shown(encoded(Image.fromarray(blocks()), format)), blocks())


@pytest.mark.parametrize(
  ("format", "options"),
  [("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"quality": 95}), ("JPEG2000", {})],
)
def test_lossy_formats_are_close(format, options):
  got = shown(encoded(Image.fromarray(blocks()), format, **options))
  assert np.abs(got - blocks().astype(int))[2:6, 2:10].max() <= 10


# What each EXIF value does to the stored picture, as NumPy says it.
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
  8: np.rot90,
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", UPRIGHT)
def test_exif_orientation_is_applied_once(value, format):
  exif = Image.Exif()
  exif[0x0112] = value
  options = {"lossless": True} if format == "WEBP" else {}
  data = encoded(Image.fromarray(blocks()), format, exif=exif, **options)
  np.testing.assert_array_equal(shown(data), UPRIGHT[value](blocks()))


def test_exif_orientation_is_applied_when_shrinking_a_jpeg():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(Image.fromarray(blocks(400, 600)), "JPEG", exif=exif, quality=95)
  got = shown(data)
  assert got.shape == (32, 21, 3)
  for rows, columns, colour in ((6, 4, CORNERS[1, 0]), (6, 16, CORNERS[0, 0])):
    assert np.abs(got[rows, columns] - colour).max() <= 10


def test_damaged_exif_does_not_damage_the_picture():
  data = encoded(Image.fromarray(blocks()), "JPEG", exif=b"Exif\x00\x00nonsense", quality=95)
  assert shown(data).shape == (16, 24, 3)


RAMP16 = np.linspace(0, 65535, 15 * 16).round().astype(np.uint16).reshape(15, 16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "array"])
def test_16_bit_grey_is_rescaled_not_clamped(format):
  image = RAMP16 if format == "array" else encoded(Image.fromarray(RAMP16), format)
  want = np.round(RAMP16.astype(np.float64) * 255 / 65535)
  got = shown(image)
  np.testing.assert_array_equal(got, np.stack([want] * 3, -1))
  assert 120 < got.mean() < 135


def test_float_picture_is_rescaled():
  ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
  want = np.stack([np.round(ramp * 255)] * 3, -1)
  np.testing.assert_array_equal(shown(encoded(Image.fromarray(ramp), "TIFF")), want)
  np.testing.assert_array_equal(shown(ramp), want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 200.0])
def test_float_picture_out_of_range_is_refused(value):
  ramp = np.zeros((8, 8), np.float32)
  ramp[3, 3] = value
  for image in (ramp, encoded(Image.fromarray(ramp), "TIFF")):
    with pytest.raises(DamagedImage, match=r"floating-point .* expected \[0, 1\]"):
      decode(image, canvas=32)


def test_32_bit_picture_out_of_range_is_refused():
  data = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
  with pytest.raises(DamagedImage, match="70000"):
    decode(data, canvas=32)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_grey(mode):
  rgba = np.concatenate([blocks(), np.full((16, 24, 1), 255, np.uint8)], -1)
  rgba[:8, :, 3] = 0
  rgba[8:, 12:, 3] = 51  # a fifth
  if mode == "RGBA":
    got, base = shown(encoded(Image.fromarray(rgba))), blocks().astype(float)
  else:
    level = np.full((16, 24, 1), 200, np.uint8)
    im = Image.fromarray(np.concatenate([level, rgba[:, :, 3:]], -1), "LA")
    got, base = shown(encoded(im)), np.full((16, 24, 3), 200)
  alpha = rgba[:, :, 3:] / 255
  assert np.abs(got - (alpha * base + (1 - alpha) * GREY)).max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff\xff"])
def test_palette_with_transparency_shows_grey(transparency):
  im = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("L")
  im.putpalette(CORNERS.tobytes())  # now mode P
  got = shown(encoded(im, transparency=transparency))
  want = CORNERS.copy()
  want[0, 1] = GREY
  np.testing.assert_array_equal(got, want)


def test_grey_and_bilevel_become_rgb():
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  np.testing.assert_array_equal(shown(encoded(Image.fromarray(grey))), np.stack([grey] * 3, -1))
  bits = grey > 100
  for image in (encoded(Image.fromarray(grey).point(lambda x: x > 100, "1")), bits):
    np.testing.assert_array_equal(shown(image), np.stack([bits * 255] * 3, -1))
  np.testing.assert_array_equal(shown(grey[:, :, None]), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_becomes_rgb(format):
  cmyk = np.zeros((16, 16, 4), np.uint8)
  cmyk[:8, :] = (255, 0, 0, 0)  # cyan
  cmyk[8:, :] = (0, 127, 0, 128)
  got = shown(encoded(Image.fromarray(cmyk, "CMYK"), format))
  want = (255 - cmyk[:, :, :3].astype(float)) * (255 - cmyk[:, :, 3:]) / 255
  assert np.abs(got - want)[2:6].max() <= (4 if format == "JPEG" else 1)
  assert np.abs(got - want)[10:14].max() <= (4 if format == "JPEG" else 1)


def test_an_open_picture_is_decoded_as_its_file_is():
  """Also where its format decides, as whether a JPEG's inks are inverted."""
  cmyk = Image.fromarray(np.full((16, 16, 4), (200, 10, 60, 30), np.uint8), "CMYK")
  data = encoded(cmyk, "JPEG")
  at = data.index(b"\xff\xee")  # Adobe's marker, and its length
  plain = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
  for each in (data, plain):
    np.testing.assert_array_equal(shown(Image.open(io.BytesIO(each))), shown(each))
  assert np.abs(shown(plain) - shown(data)).max() > 100


@pytest.mark.parametrize("value", [1, 255])
def test_32_bit_picture_that_may_be_of_8_is_refused(value):
  im = Image.fromarray(np.full((4, 4), value, np.int32))
  for image in (im, encoded(im, "TIFF")):
    with pytest.raises(DamagedImage, match="32-bit picture with values up to 255"):
      decode(image, canvas=32)


def test_dark_16_bit_picture_is_dark():
  dark = np.full((4, 4), 200, np.uint16)
  for format in ("PNG", "TIFF", "PPM"):
    assert shown(encoded(Image.fromarray(dark), format)).max() == 1
  assert not shown(Image.fromarray(np.zeros((4, 4), np.int32))).any()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.int8])
def test_integers_whose_white_is_unknown_are_refused(dtype):
  with pytest.raises(ValueError, match=r"array of u?int.*: 8 or 16 bits\? Give uint8 or uint16"):
    shown(np.full((4, 4), 100, dtype))


def test_array_of_no_known_type_is_refused():
  with pytest.raises(ValueError, match="array of complex64"):
    shown(np.zeros((4, 4), np.complex64))


def test_animation_shows_its_first_frame():
  frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (250, 10)]
  for format in ("GIF", "WEBP"):
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert shown(data).min() >= 245


def box_mean(pixels, factor):
  h, w = pixels.shape[0] // factor, pixels.shape[1] // factor
  return pixels.reshape(h, factor, w, factor, 3).mean((1, 3))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "array"])
def test_large_picture_is_shrunk_without_aliasing(format):
  y, x = np.mgrid[:256, :512]
  smooth = 128 + 60 * np.sin(x / 60) + 40 * np.cos(y / 50)
  checks = 40 * ((x + y) % 2) - 20  # would alias into full-contrast patterns without a filter
  pixels = np.stack([smooth + checks] * 3, -1).round().astype(np.uint8)
  image = Image.fromarray(pixels)
  data = encoded(image, format, **({"quality": 95} if format == "JPEG" else {}))\
    if format != "array" else pixels  # fmt: skip
  got = shown(data, canvas=64)
  assert got.shape == (32, 64, 3)
  assert np.abs(got - box_mean(pixels.astype(float), 8)).max() <= 6


def test_small_picture_is_not_enlarged():
  assert shown(np.full((1, 1, 3), 9, np.uint8)).shape == (1, 1, 3)
  np.testing.assert_array_equal(shown(np.full((32, 3, 3), 9, np.uint8)), np.full((32, 3, 3), 9))


@pytest.mark.parametrize(
  ("size", "want"),
  [((4000, 1), (32, 1)), ((1, 4000), (1, 32)), ((33, 32), (32, 31)), ((640, 480), (32, 24))],
)
def test_longer_side_fits_and_shorter_stays_at_least_one(size, want):
  assert fit(*size, 32) == want
  assert shown(encoded(Image.new("RGB", size, (9, 9, 9)))).shape == (want[1], want[0], 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0, 1, 10, 0.3, 0.6, 0.95])
def test_truncated_file_is_damaged(format, kept, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  data = encoded(Image.fromarray(noise), format)
  path = tmp_path / f"holiday.{format.lower()}"
  path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
  with pytest.raises(DamagedImage, match="holiday"):
    decode(str(path), canvas=32)


def test_last_bytes_of_a_jpeg_missing_is_damaged():
  data = encoded(Image.fromarray(blocks(64, 64)), "JPEG")
  with pytest.raises(DamagedImage, match="truncated"):
    decode(data[:-20], canvas=64)


@pytest.mark.parametrize("data", [b"<html><body>404</body></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_damaged(data):
  with pytest.raises(DamagedImage, match=f"picture of {len(data)} bytes: not one of JPEG"):
    decode(data, canvas=32)


def test_missing_file_is_damaged_and_named(tmp_path):
  with pytest.raises(DamagedImage, match=r"gone\.png: FileNotFoundError"):
    decode(tmp_path / "gone.png", canvas=32)


def test_decompression_bomb_is_damaged():
  data = bytearray(encoded(Image.new("1", (1, 1)), "BMP"))
  data[18:26] = np.array([20_000, 20_000], "<i4").tobytes()  # width and height of the header
  with pytest.raises(DamagedImage, match="DecompressionBombError"):
    decode(bytes(data), canvas=32)


def test_claim_of_far_more_pixels_than_bytes_is_damaged(tmp_path):
  data = bytearray(encoded(Image.new("L", (10, 10)), "GIF"))
  data[6:10] = np.array([9000, 9000], "<u2").tobytes()  # width and height of the screen
  (tmp_path / "a.gif").write_bytes(data)
  for image in (bytes(data), tmp_path / "a.gif"):
    with pytest.raises(DamagedImage, match=rf"claims 9000 x 9000 pixels in {len(data)} bytes"):
      decode(image, canvas=32)
  blank = Image.new("1", (4000, 4000))  # what compresses best
  assert shown(encoded(blank)).shape == (32, 32, 3)


def test_what_cannot_be_an_image_is_an_error_of_the_source():
  with pytest.raises(TypeError, match="NoneType"):
    decode(None, canvas=32)
  with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\)") as error:
    decode(np.zeros((2, 4, 4, 3), np.uint8), canvas=32)
  assert not isinstance(error.value, DamagedImage)
  with pytest.raises(DamagedImage, match="no pixels"):
    decode(np.zeros((0, 4, 3), np.uint8), canvas=32)


def test_photographs_match_a_full_decode(data_dir):
  with zipfile.ZipFile(data_dir / "imagenette128" / "val.zip") as z:
    names = [n for n in sorted(z.namelist()) if n.lower().endswith((".jpg", ".jpeg"))][:40]
    assert names
    for name in names:
      data = z.read(name)
      image, (height, width) = decode(data, canvas=48)
      full = Image.open(io.BytesIO(data)).convert("RGB")
      want = full.resize((int(width), int(height)), Image.Resampling.BICUBIC)
      assert max(height, width) == min(48, max(full.size))
      difference = np.abs(image[:height, :width] - np.asarray(want, float)).mean()
      assert difference < 2.5, name


# Sound JPEGs skip Pillow's decoder; all rules must be those of the Pillow path.


def scene(height, width, scale=1):
  """Smooth colours, an edge and a little noise."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width] / scale
  waves = [128 + 70 * np.sin(x / a + y / b) for a, b in ((5, 9), (8, 6), (11, 7))]
  pixels = np.stack(waves, -1) + 60 * (x > width // 2 / scale)[..., None]
  return np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


def pillow_alone(monkeypatch, image, canvas):
  with monkeypatch.context() as patch:
    patch.setattr(module, "_sound_jpeg", lambda *_: None)
    return decode(image, canvas=canvas)


@pytest.fixture
def turbo(monkeypatch):
  """Whether libjpeg-turbo decoded each picture so far."""
  decoder, used = module._sound_jpeg, []

  def spy(*arguments):
    pixels = decoder(*arguments)
    used.append(pixels is not None)
    return pixels

  monkeypatch.setattr(module, "_sound_jpeg", spy)
  return used


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (16, 16), (33, 47), (95, 130)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_turbo_gives_the_pixels_of_pillow(size, options, turbo, monkeypatch):
  for mode, subsampling in (("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)):
    im = Image.fromarray(scene(*size)).convert(mode)
    data = encoded(im, "JPEG", quality=90, subsampling=subsampling, **options)
    for canvas in (130, 33):
      got, extent = decode(data, canvas=canvas)
      want, want_extent = pillow_alone(monkeypatch, data, canvas)
      np.testing.assert_array_equal(extent, want_extent)
      assert np.abs(got.astype(int) - want).max() <= 1
  assert all(turbo)


@pytest.mark.parametrize("size", [(320, 480), (301, 487)])
@pytest.mark.parametrize("canvas", [120, 80, 30])
def test_decoding_at_a_scale_is_close_to_the_whole_picture(size, canvas, turbo, monkeypatch):
  for subsampling in (0, 2):
    data = encoded(Image.fromarray(scene(*size, 8)), "JPEG", quality=95, subsampling=subsampling)
    got, extent = decode(data, canvas=canvas)
    want, _ = pillow_alone(monkeypatch, data, canvas)
    assert np.abs(got.astype(int) - want)[: extent[0], : extent[1]].mean() <= 2
  assert all(turbo)


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("canvas", [240, 80, 40])
def test_turbo_turns_as_pillow_does(value, canvas, turbo, monkeypatch):
  exif = Image.Exif()
  exif[0x0112] = value
  data = encoded(Image.fromarray(blocks(160, 240)), "JPEG", exif=exif, quality=95)
  got, extent = decode(data, canvas=canvas)
  want, want_extent = pillow_alone(monkeypatch, data, canvas)
  np.testing.assert_array_equal(extent, want_extent)
  assert np.abs(got.astype(int) - want).mean() <= 1
  assert turbo == [True]


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_four_colours_and_other_formats_are_left_to_pillow(mode, turbo):
  decode(encoded(Image.new(mode, (9, 9)), "JPEG" if mode == "CMYK" else "PNG"), canvas=32)
  assert not any(turbo)


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf=\
"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff=\
"http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'


@pytest.mark.parametrize("before", [b"", b"\xff\xfe\0\x08\xff\xda\xff\xe1rest"])
def test_orientation_is_found_behind_other_segments(before, monkeypatch):
  """Also behind a comment that looks like a scan; in XMP, of which Pillow takes it too."""
  if before:
    before = before[:2] + (len(before) - 2).to_bytes(2, "big") + before[4:]
  data = encoded(Image.fromarray(blocks(16, 32)), "JPEG", quality=95)
  segment = b"\xff\xe1" + (len(XMP) + 2).to_bytes(2, "big") + XMP
  turned, extent = decode(data[:2] + before + segment + data[2:], canvas=32)
  assert extent.tolist() == [32, 16]
  upright, _ = decode(data[:2] + before + data[2:], canvas=32)
  np.testing.assert_array_equal(turned[:, :16], np.rot90(upright[:16], -1))


def test_turbo_and_pillow_judge_damage_alike(turbo, monkeypatch):
  data = encoded(Image.fromarray(scene(40, 56)), "JPEG", quality=80)
  rng, verdicts = np.random.default_rng(0), []
  for _ in range(300):
    damaged = bytearray(data[: len(data) - max(0, rng.integers(-200, 50))])
    for place in rng.integers(0, len(damaged), rng.integers(0, 3)):
      damaged[place] = rng.integers(256)
    damaged = bytes(damaged)
    try:
      want, _ = pillow_alone(monkeypatch, damaged, 32)
    except DamagedImage:
      verdicts.append(False)
      with pytest.raises(DamagedImage):
        decode(damaged, canvas=32)
    else:
      verdicts.append(True)
      assert np.abs(decode(damaged, canvas=32)[0].astype(int) - want).max() <= 1
  assert 20 < sum(verdicts) < 280
  assert any(turbo)


@pytest.mark.parametrize(("size", "canvas"), [((90, 120), 64), ((90, 120), 50), ((64, 9), 20)])
def test_shrinking_is_pillows_bicubic(size, canvas):
  pixels = scene(*size)
  got = shown(pixels, canvas=canvas)
  want = Image.fromarray(pixels).resize(fit(size[1], size[0], canvas), Image.Resampling.BICUBIC)
  difference = np.abs(got - np.asarray(want, int))
  assert difference.max() <= 8
  assert difference.mean() <= 0.6


def test_decoding_onto_a_used_canvas_writes_all_of_it_or_nothing():
  placed = np.full((32, 32, 3), 77, np.uint8)
  with pytest.raises(DamagedImage):
    decode_onto(placed, b"")
  assert (placed == 77).all()
  assert decode_onto(placed, blocks()) == (16, 24)
  np.testing.assert_array_equal(placed, decode(blocks(), canvas=32)[0])


def test_16_bit_tiff_whose_white_is_zero_is_turned_round():
  file = io.BytesIO()
  levels = np.array([[0, 65535]], np.uint16)
  Image.fromarray(levels).save(file, "TIFF", tiffinfo={262: 0})
  pixels, _ = decode(file.getvalue(), canvas=2)
  assert pixels[0, :, 0].tolist() == [255, 0]
