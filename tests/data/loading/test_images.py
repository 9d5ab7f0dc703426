"""Decoding against Pillow and torchvision, on every kind of file."""

from __future__ import annotations

import io
import itertools
import math
import resource
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
from data.jpegs import dct, segment
from scipy.stats import ks_2samp

from megatron_lcl.data.corpus.probe import BadImage, downscale, probe
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.loading import crops, images
from megatron_lcl.data.loading.crops import crop_box, decode_train
from megatron_lcl.data.loading.hashes import uniform
from megatron_lcl.data.loading.images import decode_eval, read_rgb


def draws(seed: int = 0) -> Callable[[], float]:
    turn = iter(range(1 << 30))
    return lambda: uniform(np.uint64(seed), next(turn))


def picture(width: int = 300, height: int = 200) -> PIL.Image.Image:
    """Smooth, colored, and different in each corner."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([255 * x, 255 * y, 127 + 127 * np.sin(9 * x * y + 4 * x)], -1)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def encode(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def whole(data: bytes, size: int = 64) -> np.ndarray:
    """The training path with the largest crop there is, as floats."""
    return decode_train(data, size, draws(), (1.0, 1.0), (1.5, 1.5)).astype(np.float32)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (33, 500), (20, 10), (198, 128)])
def test_evaluation_is_clip_s_preprocessing_bit_for_bit(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*size)
    pipeline = transforms.Compose(
        [transforms.Resize(64, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(64)]
    )
    expected = np.asarray(pipeline(image)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_eval(encode(image, "PNG"), 64), expected)


def test_a_picture_of_pillow_gives_the_pixels_of_its_file() -> None:
    """Opened or decoded before, and it stays as it is."""
    color, (exif, exif2) = picture(30, 20), (PIL.Image.Exif(), PIL.Image.Exif())
    exif[0x0112], exif2[0x0112] = 6, 5
    see_through, gray = color.convert("RGBA"), np.asarray(color.convert("L"))
    see_through.putalpha(PIL.Image.fromarray(255 - gray))
    palette = color.quantize(9)
    files = [
        encode(color, "JPEG", exif=exif),
        encode(color, "TIFF", exif=exif2),
        encode(color.convert("L"), "PNG", exif=exif),
        encode(color.convert("1"), "PNG"),
        encode(color.convert("CMYK"), "JPEG"),
        encode(see_through, "PNG"),
        encode(see_through.convert("LA"), "PNG"),
        encode(palette, "PNG", transparency=3),
        encode(palette, "GIF"),
        encode(PIL.Image.fromarray(gray.astype(np.uint16) * 257), "PNG"),
        encode(PIL.Image.fromarray(gray.astype(np.int32) * 200), "TIFF"),
        encode(PIL.Image.fromarray(gray.astype(np.float32) / 255), "TIFF"),
    ]
    for data in files:
        expected = decode_rgb(data)
        decoded = PIL.Image.open(io.BytesIO(data))
        decoded.load()
        before = decoded.mode, decoded.size, decoded.tobytes(), dict(decoded.info)
        for given in (PIL.Image.open(io.BytesIO(data)), decoded):
            rgb = images.read_rgb(given)
            assert (rgb.mode, rgb.size, rgb.info) == ("RGB", expected.size, {})
            assert rgb.tobytes() == expected.tobytes(), before[:2]
            np.testing.assert_array_equal(decode_eval(given, 16), decode_eval(data, 16))
        assert (decoded.mode, decoded.size, decoded.tobytes(), dict(decoded.info)) == before
    whole_file = encode(color, "PNG")
    with pytest.raises(BadImage, match="an image that does not decode: image file is truncated"):
        images.read_rgb(PIL.Image.open(io.BytesIO(whole_file[: len(whole_file) // 2])))


@pytest.mark.parametrize("size", [(4, 250), (250, 4), (40, 3001), (5000, 77), (70, 9000)])
def test_of_a_thin_picture_the_center_is_resized_as_if_all_of_it_were(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = encode(PIL.Image.fromarray(pixels), "PNG")
    monkeypatch.setattr(images, "_MAX_ASPECT", 1)
    center = decode_eval(data, 64)
    monkeypatch.setattr(images, "_MAX_ASPECT", 1000)
    difference = np.abs(center.astype(int) - decode_eval(data, 64))
    assert difference.max() <= 1
    assert difference.mean() < 0.001


@pytest.mark.parametrize("length", [60_000, 60_001, 2_000_000])
@pytest.mark.parametrize("tall", [False, True])
def test_a_picture_of_one_row_of_pixels(length: int, tall: bool) -> None:
    """Levels that rise by 50 a pixel at its center, as they then do in its one pixel that 224 x 224 are made of."""
    row = np.clip(50 * (np.arange(length) - length // 2) + 128, 0, 255).astype(np.uint8)
    data = encode(PIL.Image.fromarray(row[:, None] if tall else row[None]), "PNG")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = decode_eval(data, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "KiB"
    # column x of the resized picture shows the place (x + ½) / 224 - ½, counted in pixels
    column = (224 * length - 224) // 2 + np.arange(224)
    expected = 50 * ((column + 0.5) / 224 - 0.5 - length // 2) + 128
    assert np.abs((pixels.transpose(0, 2, 1) if tall else pixels) - expected).max() <= 0.51, "rounded"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(900, 700), (300, 200), (100, 60)])
def test_training_crops_are_torchvision_s(format: str, size: tuple[int, int]) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    data = encode(picture(*size), format, quality=95)
    opened = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(5):
        left, top, width, height = crop_box(*size, draws(seed), (0.5, 1.0), (3 / 4, 4 / 3))
        reference = functional.resized_crop(
            opened, top, left, height, width, [224, 224], functional.InterpolationMode.BICUBIC
        )
        expected = np.asarray(reference, np.float32).transpose(2, 0, 1)
        got = decode_train(data, 224, draws(seed), (0.5, 1.0), (3 / 4, 4 / 3))
        assert got.shape == (3, 224, 224)
        assert got.dtype == np.uint8
        assert np.abs(got - expected).max() <= 2, "rounded twice, by rows and by columns"
        assert np.abs(got - expected).mean() < 0.01


@pytest.mark.parametrize(("size", "scale"), [((1600, 1400), 2), ((3000, 2800), 4), ((6000, 5600), 8)])
def test_crops_of_large_jpegs_are_nearly_torchvision_s(size: tuple[int, int], scale: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    data = encode(picture(*size), "JPEG", quality=95)
    left, top, width, height = crop_box(*size, draws(), (0.5, 1.0), (3 / 4, 4 / 3))
    assert scale <= min(width, height) / (4 * 96) < 2 * scale or scale == 8
    opened, bicubic = PIL.Image.open(io.BytesIO(data)), functional.InterpolationMode.BICUBIC
    expected = np.asarray(functional.resized_crop(opened, top, left, height, width, [96, 96], bicubic), np.float32)
    got = decode_train(data, 96, draws(), (0.5, 1.0), (3 / 4, 4 / 3))
    difference = np.abs(got.transpose(1, 2, 0) - expected)
    assert difference.mean() < 0.6
    assert difference.max() <= 4


def noise(side: int) -> PIL.Image.Image:
    """Gray, with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    frequency = np.fft.fftfreq(side)
    radius = np.hypot(frequency[:, None], frequency)
    radius[0, 0] = 1
    spectrum = np.fft.fft2(np.random.default_rng(side).normal(size=(side, side))) / radius
    pixels = np.fft.ifft2(spectrum).real
    return PIL.Image.fromarray((128 + 45 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)).convert("RGB")


def energies(pixels: np.ndarray) -> np.ndarray:
    """Of a square's bands up to 0.1, 0.25, 0.4 and 0.5 cycles a pixel."""
    gray = pixels.astype(float).mean(0)
    frequency = np.abs(np.fft.fftfreq(len(gray)))
    band = np.digitize(np.maximum(frequency[:, None], frequency), [0.1, 0.25, 0.4])
    return np.bincount(band.ravel(), (np.abs(np.fft.fft2(gray - gray.mean())) ** 2).ravel())


@pytest.mark.parametrize(
    ("width", "height"), [*((side, side) for side in (200, 228, 285, 430, 512, 1030)), (1030, 250), (250, 1030)]
)
def test_jpegs_of_any_size_keep_the_fine_structure_that_torchvision_keeps(width: int, height: int) -> None:
    """From 512 pixels of the shorter side on they are decoded at 1/2, from 1,024 at 1/4."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    data, size = encode(noise(max(width, height)).crop((0, 0, width, height)), "JPEG", quality=95), 64
    opened = PIL.Image.open(io.BytesIO(data))
    expected = np.asarray(functional.resize(opened, [size, size], functional.InterpolationMode.BICUBIC))
    got = decode_train(data, size, draws(), (1.0, 1.0), (width / height, width / height))
    kept = energies(got) / energies(expected.transpose(2, 0, 1))
    assert np.abs(kept - 1).max() < (0.002 if min(width, height) < 512 else 0.065), kept


@pytest.mark.parametrize(
    ("most", "scale"), [(0.4, 1), (1, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (99, 8)]
)
@pytest.mark.parametrize("size", [(1333, 1001), (640, 480), (17, 33)])
def test_a_jpeg_is_decoded_at_the_scales_that_are_fast(most: float, scale: int, size: tuple[int, int]) -> None:
    decoded = crops._decode_jpeg(encode(picture(*size), "JPEG"), *size, most)
    assert decoded.shape == (math.ceil(size[1] / scale), math.ceil(size[0] / scale), 3)


def test_crop_boxes_have_torchvision_s_distribution() -> None:
    """Of top, left, area and aspect ratio: two-sample Kolmogorov-Smirnov tests."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    image, scale, ratio = torch.zeros(3, 500, 600), (0.3, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    ours = np.array([crop_box(600, 500, draws(s), scale, ratio) for s in range(4000)])[:, [1, 0, 3, 2]]
    for name, of in {
        "top": lambda top, left, height, width: top,
        "left": lambda top, left, height, width: left,
        "area": lambda top, left, height, width: height * width,
        "aspect ratio": lambda top, left, height, width: width / height,
    }.items():
        assert ks_2samp(of(*ours.T), of(*theirs.T)).pvalue > 1e-4, name
    # nothing fits: the largest, centered
    assert crop_box(1000, 10, draws(), (0.9, 1.0), ratio) == (493, 0, 13, 10)
    assert crop_box(1000, 10, draws(), (0.9, 1.0), (0.5, 3.0)) == (485, 0, 30, 10)
    assert crop_box(10, 1000, draws(), (0.9, 1.0), (0.2, 2.0)) == (0, 475, 10, 50)


@pytest.mark.parametrize(("width", "height"), [(11, 10), (10, 11)])
def test_a_crop_that_is_a_pixel_smaller_has_both_places(width: int, height: int) -> None:
    """About half of the time each: 1,000 draws, within five standard deviations."""
    boxes = Counter(crop_box(width, height, draws(s), (100 / 110, 100 / 110), (1.0, 1.0)) for s in range(1000))
    assert set(boxes) == {(0, 0, 10, 10), (width - 10, height - 10, 10, 10)}
    assert min(boxes.values()) > 420


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pictures_are_turned_as_exif_says(orientation: int, format: str) -> None:
    image = picture()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, format, exif=exif, quality=95)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    ratio = upright.width / upright.height
    expected = np.asarray(upright.resize((64, 64), PIL.Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
    got = decode_train(data, 64, draws(), (1.0, 1.0), (ratio, ratio))
    assert np.abs(got - expected).mean() < 3
    assert np.abs(decode_eval(data, 64)[:, 32, 32] - expected[:, 32, 32]).max() < 8


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_crops_are_those_of_the_upright_picture(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    turned = encode(picture(1200, 800), "JPEG", exif=exif, quality=98)
    upright = encode(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(turned))), "JPEG", quality=98)
    for seed in range(5):
        a, b = (decode_train(x, 64, draws(seed), (0.1, 0.3)).astype(np.float32) for x in (turned, upright))
        assert np.abs(a - b).mean() < 2


@pytest.mark.parametrize("kind", ["EXIF", "XMP"])
@pytest.mark.parametrize("before", [0, 30_000, 60_000])
def test_an_orientation_is_found_wherever_it_stands_in_the_header(kind: str, before: int) -> None:
    """Before the EXIF data stand two segments of `before` bytes, of Photoshop say."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r">'
    xmp += b'<rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    turned = segment(0xE1, b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0") if kind == "EXIF" else xmp)
    plain = encode(picture(), "JPEG", quality=95)
    data = plain[:2] + 2 * segment(0xED, bytes(before)) + turned + plain[2:]
    expected = np.rot90(whole(plain), -1, (1, 2))
    np.testing.assert_array_equal(decode_train(data, 64, draws(), (1.0, 1.0), (2 / 3, 2 / 3)), expected)


@pytest.mark.parametrize("chroma", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_jpeg_that_the_check_has_passed_has_pixels(chroma: tuple[int, int]) -> None:
    """Of all sampling factors; 4:4:1, of a luma of (1, 4), is what simplejpeg has no name of."""
    passed = set()
    for luma in itertools.product(range(1, 5), range(1, 5)):
        for size in ((60, 50), (700, 500)):
            for sampling in ([luma], [luma, chroma, chroma], [luma, chroma, (1, 1)]):
                data = dct(*size, sampling)
                try:
                    probe(data)
                except BadImage:
                    continue
                assert set(np.unique(decode_train(data, 32, draws()))) <= {127, 128, 129}, (sampling, size)
                passed.add(luma)
    assert (1, 4) in passed or chroma != (1, 1)
    assert len(passed) == 16  # gray ones


def test_what_the_fast_decoder_fails_at_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same crop of the same picture, turned alike."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(), "JPEG", quality=95, exif=exif)
    expected = decode_train(data, 64, draws())

    def fails(*args: object, **settings: object) -> np.ndarray:
        raise ValueError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    assert np.abs(decode_train(data, 64, draws()).astype(int) - expected).max() <= 2


def test_transparent_parts_are_white() -> None:
    for mode in ("RGBA", "LA", "PA"):
        image = PIL.Image.new("RGBA", (30, 20), (200, 0, 0, 0)).convert("RGBA")
        image.paste((0, 0, 0, 255), (0, 0, 15, 20))
        data = encode(image.convert(mode) if mode != "PA" else image.quantize(), "PNG")
        for got in (whole(data, 8), decode_eval(data, 8)):
            assert got[:, 4, 7].min() > 240, mode
        assert whole(data, 8)[:, 4, 0].max() < 15, mode


def png_of(levels: np.ndarray, bits: int, transparent: tuple[int, ...]) -> bytes:
    """Of gray [H, W] or RGB [H, W, 3] levels of so many bits, one color of which is transparent (tRNS)."""
    height, width = levels.shape[:2]
    rows = levels.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        packed = np.packbits((rows[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(height, -1), axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 2 * (levels.ndim == 3), 0, 0, 0),
        b"tRNS": struct.pack(f">{len(transparent)}H", *transparent),
        b"IDAT": zlib.compress(np.pad(packed, ((0, 0), (1, 0))).tobytes()),  # each row begins with a filter, 0: none
        b"IEND": b"",
    }
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("transparent", [0, 1, 2, 3])
@pytest.mark.parametrize(("bits", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (8, 3), (16, 1), (16, 3)])
def test_the_transparent_color_of_a_png_is_white(bits: int, channels: int, transparent: int) -> None:
    """Four colors, in 8 bits different; of 1 bit two."""
    white = 2**bits - 1
    colors = np.array([0, white // 3, 2 * white // 3, white])
    if bits == 16:
        colors &= 0xFF00  # whose lower 8 bits are not their upper ones
    image = colors[np.arange(40 * 32).reshape(40, 32) // 8 % 4]
    shown = np.where(image == colors[transparent], 255, image * (255 / white))
    if channels == 3:
        image = np.repeat(image[..., None], 3, 2)
    data = png_of(image, bits, (int(colors[transparent]),) * channels)
    opened = PIL.Image.open(io.BytesIO(data))
    for got in (decode_rgb(data), read_rgb(opened), read_rgb(opened)):
        assert np.abs(np.asarray(got) - shown[..., None]).max() <= 1
    small = np.asarray(decode_rgb(downscale(data, 20)))
    assert np.abs(small - shown[::2, ::2, None]).mean() < 16  # blurred


@pytest.mark.parametrize("alpha", [0, 100, 255])
@pytest.mark.parametrize("format", ["BMP", "ICO"])
def test_alpha_that_is_0_everywhere_is_none(format: str, alpha: int) -> None:
    """Programs that know no transparency leave these bytes 0; but of another format it is a white picture."""
    image = picture(32, 32).convert("RGBA")
    image.putalpha(alpha)
    if format == "BMP":  # with the masks of channels, which Pillow does not write
        head = struct.pack("<IiiHHIIiiII4I", 108, 32, -32, 1, 32, 3, 0, 0, 0, 0, 0, 0xFF, 0xFF00, 0xFF0000, 0xFF << 24)
        head += bytes(108 - len(head))
        data = b"BM" + struct.pack("<IHHI", 14 + 108 + 4096, 0, 0, 14 + 108) + head + image.tobytes()
    else:
        data = encode(image, "ICO", sizes=[(32, 32)], bitmap_format="bmp")
    assert PIL.Image.open(io.BytesIO(data)).mode == "RGBA"
    share = alpha / 255 if alpha else 1
    expected = np.asarray(picture(32, 32)) * share + 255 * (1 - share)
    assert np.abs(np.asarray(decode_rgb(data)) - expected).max() <= 1
    small = np.asarray(decode_rgb(downscale(data, 16)))
    assert np.abs(small - expected.reshape(16, 2, 16, 2, 3).mean((1, 3))).mean() < 10
    assert set(np.asarray(decode_rgb(encode(image, "PNG"))).flat) == {255} or alpha


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_tiff_whose_lowest_level_is_white_is_no_negative(kind: str) -> None:
    gray = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40) // 5
    levels = gray / 255 if kind == "float32" else gray * (1 if kind == "uint8" else 257)
    black_is_zero = encode(PIL.Image.fromarray(levels.astype(kind)), "TIFF")
    tag = struct.pack("<HHII", 262, 3, 1, 1)
    assert black_is_zero.count(tag) == 1
    white_is_zero = black_is_zero.replace(tag, struct.pack("<HHII", 262, 3, 1, 0))
    for data, expected in ((black_is_zero, gray), (white_is_zero, 255 - gray)):
        for got in (decode_rgb(data), read_rgb(PIL.Image.open(io.BytesIO(data)))):
            assert np.abs(np.asarray(got).astype(int) - expected[..., None]).max() <= 1
        small = np.asarray(decode_rgb(downscale(data, 20))).astype(int)
        assert np.abs(small - expected.reshape(16, 2, 20, 2).mean((1, 3))[..., None]).max() < 9


@pytest.mark.parametrize("lowest_is_white", [False, True])
def test_what_is_no_number_is_black(lowest_is_white: bool) -> None:
    levels = np.tile(np.array([np.nan, 0, 1, -np.inf], np.float32), (32, 8))
    data = encode(PIL.Image.fromarray(levels), "TIFF")
    if lowest_is_white:
        data = data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(decode_rgb(data))[0, :4, 0].tolist()
    assert found == ([0, 255, 0, 255] if lowest_is_white else [0, 0, 255, 0])


def test_gray_palette_one_bit_and_cmyk() -> None:
    image = picture()
    reference = whole(encode(image, "PNG"))
    for mode, format in (("L", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")):
        converted = image.convert(mode)
        got = whole(encode(converted, format))
        expected = whole(encode(converted.convert("RGB"), "PNG"))
        assert np.abs(got - expected).mean() < 4, (mode, format)
    assert set(np.unique(whole(encode(PIL.Image.new("1", (30, 20), 1), "PNG")))) == {255}
    assert reference.std() > 30


def test_sixteen_bits_become_eight() -> None:
    gray = np.linspace(0, 65535, 300 * 200).reshape(200, 300).astype(np.uint16)
    data = encode(PIL.Image.fromarray(gray), "PNG")
    got, expected = whole(data), whole(encode(PIL.Image.fromarray((gray // 257).astype(np.uint8)), "PNG"))
    assert np.abs(got - expected).max() <= 2
    ok, color = cv2.imencode(".png", np.repeat(gray[..., None], 3, 2))
    assert ok
    assert np.abs(whole(color.tobytes()) - expected).max() <= 2


def test_an_animation_gives_its_first_frame() -> None:
    frames = [PIL.Image.new("RGB", (30, 20), c) for c in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    red, green, blue = whole(data, 8)[:, 4, 4]
    assert red > 250 > 5 > max(green, blue)


def test_real_odd_files(shared: Path) -> None:
    for path in sorted((shared / "samples/images").iterdir()):
        for got in (decode_train(path.read_bytes(), 64, draws()), decode_eval(path.read_bytes(), 64)):
            assert got.shape == (3, 64, 64), path.name
            assert got.std() > 1, path.name


def test_damaged_files_are_value_errors() -> None:
    jpeg, png = encode(picture(), "JPEG"), encode(picture(), "PNG")
    damaged = [b"", b"\xff\xd8", jpeg[:100], png[: len(png) // 2], b"<html>", png[:40] + b"\0" * 60 + png[100:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in damaged:
            for decode in (lambda d: decode_train(d, 64, draws()), lambda d: decode_eval(d, 64)):
                with pytest.raises(BadImage, match="does not decode"):
                    decode(data)
