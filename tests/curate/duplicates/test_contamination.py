"""Protects decontamination: changed evaluation images are found and named, others are not, from whatever layout."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.corpora import write_corpus
from PIL import Image, ImageDraw

from megatron_lcl.curate.documents import Range
from megatron_lcl.curate.duplicates.alignment import COLOR_SIDE, SIDE, Picture, agreement
from megatron_lcl.curate.duplicates.evaluation import (
    EvaluationImages,
    Finder,
    contamination_facts,
    evaluation_facts,
    join_evaluation,
    write_index,
)
from megatron_lcl.curate.duplicates.facts import thumbnail
from megatron_lcl.curate.duplicates.join import gather
from megatron_lcl.curate.duplicates.settings import Decontamination
from megatron_lcl.curate.duplicates.views import COMPARED, WHOLE, first_guess
from megatron_lcl.errors import UserError

SETTINGS = Decontamination()


def picture(seed: int, side: int = 160) -> Image.Image:
    """Noise with the spectrum of photographs, amplitudes as 1 / frequency (Field, "Relations between the statistics of
    natural images and the response properties of cortical cells", 1987), in color."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    spectrum = np.fft.fft2(rng.normal(size=(3, side, side))) / np.maximum(frequency, 1 / side)
    pixels = np.fft.ifft2(spectrum).real
    pixels = pixels.mean(0) + 0.3 * pixels
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def gray(pixels: np.ndarray) -> Picture:
    """[SIDE, SIDE] → a picture without color."""
    return Picture(pixels, np.full((COLOR_SIDE, COLOR_SIDE, 2), 128, np.uint8))


def encoded(image: Image.Image, quality: int = 90, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, format, quality=quality)
    return out.getvalue()


def flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image, seed: int) -> Image.Image:
    """A tenth of the area."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.9, 1)
    width, height = round(image.width * share), round(image.height * 0.9 / share)
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def covered(image: Image.Image, seed: int) -> Image.Image:
    """A bar of a tenth of the area at some height, or a square at some place."""
    rng = np.random.default_rng(seed)
    image = image.copy()
    width, height = image.size
    size = (1.0, 0.1) if seed % 2 else (0.316, 0.316)
    left, top = rng.uniform(0, 1 - size[0]) * width, rng.uniform(0, 1 - size[1]) * height
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    ImageDraw.Draw(image).rectangle((left, top, left + size[0] * width, top + size[1] * height), fill=color)
    return image


CHANGES: dict[str, tuple[Callable[[Image.Image, int], bytes], float]] = {
    "half": (lambda i, seed: encoded(i.resize((80, 80))), 0.99),
    "stretched": (lambda i, seed: encoded(i.resize((300, 200))), 0.99),
    "JPEG 50": (lambda i, seed: encoded(i, 50), 0.99),
    "flip": (lambda i, seed: encoded(flipped(i)), 0.99),
    "crop": (lambda i, seed: encoded(cropped(i, seed)), 0.9),
    "flip and crop": (lambda i, seed: encoded(cropped(flipped(i), seed)), 0.9),
    "overlay": (lambda i, seed: encoded(covered(i, seed)), 0.9),
}


def make_index(folder: Path, images: list[Image.Image], size: int = 1000) -> Path:
    """The index of images, from tasks of `size`."""
    for name in ("images", "facts", "index"):
        (folder / name).mkdir(parents=True)
    for k, image in enumerate(images):
        (folder / "images" / f"{k:04d}.jpg").write_bytes(encoded(image, 95))
    files = []
    for first in range(0, len(images), size):
        files.append(folder / "facts" / f"{first:04d}.npz")
        last = min(len(images), first + size)
        np.savez(files[-1], **evaluation_facts(folder / "images", first, last, SETTINGS))
    write_index(files, folder / "index")
    return folder / "index"


def test_names_of_later_tasks_are_not_cut(tmp_path: Path) -> None:
    names = [["coco/1.jpg"], ["imagenet/n01440764/ILSVRC2012_val_00000293.JPEG", "coco/2.jpg"]]
    files = [tmp_path / f"{k}.npz" for k in range(2)]
    for file, own in zip(files, names, strict=True):
        np.savez(file, digest=np.zeros(len(own), np.uint64), name=np.array(own, np.str_))
    arrays, starts = gather(files, ("digest", "name"), tmp_path)
    assert (arrays["name"].tolist(), starts.tolist()) == ([*names[0], *names[1]], [0, 1, 3])


def recall(finder: Finder, images: list[Image.Image], change: Callable[[Image.Image, int], bytes]) -> float:
    """The share that is found and named."""
    found = [finder.find(change(image, k)) for k, image in enumerate(images)]
    return float(np.mean([match is not None and match[0] == k for k, match in enumerate(found)]))


def measured(folder: Path, num: int, num_others: int) -> None:
    images = [picture(k) for k in range(num)]
    finder = Finder(make_index(folder, images), SETTINGS)
    for name, (change, claimed) in CHANGES.items():
        assert recall(finder, images, change) >= claimed, name
    assert [k for k in range(num_others) if finder.find(encoded(picture(10**6 + k))) is not None] == []


def test_changed_images_are_found_and_named(tmp_path: Path) -> None:
    measured(tmp_path, 12, 30)


@pytest.mark.slow
def test_of_many_changed_images_as_many_as_are_claimed(tmp_path: Path) -> None:
    measured(tmp_path, 100, 400)


@pytest.mark.slow
def test_photographs_are_found_among_their_neighbors(tmp_path: Path) -> None:
    """Tiles of two photographs; half of the tiles of each are indexed, the others are not found. (Tiles out of focus
    are where crops and overlays are missed: docs/duplicates.md.)"""
    datasets = pytest.importorskip("sklearn.datasets")
    tiles = [
        Image.fromarray(photograph[top : top + 128, left : left + 128])
        for photograph in datasets.load_sample_images().images
        for top in range(0, 427 - 127, 128)
        for left in range(0, 640 - 127, 128)
    ]
    images, others = tiles[::2], tiles[1::2]
    images = [tile for tile in images if np.asarray(tile.convert("L")).std() >= 8]
    finder = Finder(make_index(tmp_path, images), SETTINGS)
    for name in ("half", "stretched", "JPEG 50", "flip"):
        assert recall(finder, images, CHANGES[name][0]) >= 0.99, name
    assert [k for k, tile in enumerate(others) if finder.find(encoded(tile)) is not None] == []


def test_the_measurement_sees_what_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lcl.curate.duplicates import evaluation

    images = [picture(k) for k in range(20)]
    index = make_index(tmp_path, images)
    narrow = Finder(index, Decontamination(whole_bits=2, third_bits=0))
    assert recall(narrow, images, CHANGES["crop"][0]) < 0.8
    monkeypatch.setattr(evaluation, "COMPARED", tuple(v._replace(flipped=False, shown=WHOLE) for v in COMPARED))
    finder = Finder(index, SETTINGS)
    assert recall(finder, images, CHANGES["JPEG 50"][0]) == 1
    assert recall(finder, images, CHANGES["flip"][0]) == 0


def test_the_first_guess_is_the_part_that_is_shown() -> None:
    big = np.asarray(picture(0, 256).convert("L"))
    small = gray(np.asarray(Image.fromarray(big).resize((SIDE, SIDE), Image.Resampling.BOX)))
    for view in COMPARED:
        left, top, right, bottom = (round(256 * edge) for edge in view.shown)
        part = Image.fromarray(big[top:bottom, left:right]).resize((SIDE, SIDE), Image.Resampling.BOX)
        assert agreement(gray(np.asarray(part)), small, first_guess(view.shown, SIDE)) > 0.95
    assert agreement(small.flipped(), small, first_guess(WHOLE, SIDE)) < 0.3


def test_noise_does_not_decide_the_hash_of_a_regular_pattern(tmp_path: Path) -> None:
    """Most of its coefficients are zero but for what the encoder adds."""
    column, row = np.meshgrid(np.arange(160), np.arange(160))
    patterns = [
        np.hypot(column % 32 - 16, row % 32 - 16) < 9,  # dots
        (column // 16 + row // 16) % 2,  # a checkerboard
        row / 159,  # a gradient
        np.hypot(column - 79.5, row - 79.5) < 60,  # a disc
        (row > 40) & (row < 100),  # a stripe
    ]
    images = [Image.fromarray((60 + 120 * pattern).astype(np.uint8)).convert("RGB") for pattern in patterns]
    finder = Finder(make_index(tmp_path, images), SETTINGS)
    for name in ("half", "stretched", "JPEG 50", "flip"):
        for k, image in enumerate(images):
            candidates = finder.candidates(thumbnail(CHANGES[name][0](image, k)))
            assert k in [number for number, _ in candidates], (name, k)


def test_a_dark_surface_with_an_edge_is_not_a_bright_one() -> None:
    dark, bright = (np.full((SIDE, SIDE), level, np.uint8) for level in (40, 90))
    dark[:, 56:], bright[:, 56:] = 10, 60
    assert agreement(gray(dark), gray(dark), first_guess(WHOLE, SIDE)) == 1
    assert agreement(gray(dark), gray(bright), first_guess(WHOLE, SIDE)) == 0


def test_a_line_along_a_side_is_not_every_other_line_there() -> None:
    """All detail of a frame's side, and of the top of a plot with a dot, lies in few blocks, most of which agree."""
    frame, plot = (np.full((SIDE, SIDE), 255, np.uint8) for _ in range(2))
    frame[1:3, 4:], plot[1:3] = 90, 60
    plot[40:44, 30:34] = 120
    for one, other in ((plot, frame), (plot.T.copy(), frame.T.copy())):
        assert agreement(gray(one), gray(other), first_guess(WHOLE, SIDE)) == 0
        assert agreement(gray(other), gray(other), first_guess(WHOLE, SIDE)) == 1


def test_what_is_blank_makes_no_two_drawings_the_same() -> None:
    """Of most blocks there is nothing to be seen."""
    one, other = (np.full((SIDE, SIDE), 200, np.uint8) for _ in range(2))
    for seed, drawing in enumerate((one, other)):
        drawing[16:48, 16:40] = np.random.default_rng(seed).integers(0, 256, (32, 24))
    assert agreement(gray(one), gray(one), first_guess(WHOLE, SIDE)) == 1
    assert agreement(gray(one), gray(other), first_guess(WHOLE, SIDE)) < 0.3


def test_wholes_and_thirds_are_near_within_bounds_of_their_own(tmp_path: Path) -> None:
    index = make_index(tmp_path, [picture(0)])
    for settings, of_whole in (
        (Decontamination(whole_bits=64, third_bits=0), True),
        (Decontamination(whole_bits=0, third_bits=64), False),
    ):
        ((_, view),) = Finder(index, settings).candidates(thumbnail(encoded(picture(1))))
        assert (COMPARED[view].asked == 0) == of_whole


def test_a_surface_with_an_edge_is_found_when_it_was_resized(tmp_path: Path) -> None:
    """By more than the levels that blank blocks may differ: the edge is blurred."""
    levels = np.full((321, 321), 200, np.uint8)
    levels[:, 187:] = 20
    surface = Image.fromarray(levels).convert("RGB")
    half = surface.resize((160, 160), Image.Resampling.BICUBIC)
    finder = Finder(make_index(tmp_path, [surface]), SETTINGS)
    assert finder.find(encoded(half, 90)) == (0, 1.0)


def test_a_whole_picture_is_compared_as_such_though_a_part_of_it_has_the_nearest_hash() -> None:
    """Stripes cannot be aligned along themselves."""
    stripes = np.zeros((SIDE, SIDE), np.uint8)
    stripes[:20], stripes[40:] = 80, 200
    assert agreement(gray(stripes), gray(stripes), first_guess((0, 0.075, 1, 1), SIDE)) == 1


@pytest.mark.parametrize("change", ["half", "crop", "flip and crop"])
def test_colors_tell_what_gray_levels_do_not(change: str, tmp_path: Path) -> None:
    """A drawing in other colors is another one; a picture that was made gray is the same."""
    ring = np.hypot(*np.meshgrid(np.arange(-79.5, 80), np.arange(-79.5, 80)))
    ring = (ring > 55) & (ring < 70) | (ring < 20)
    blue, gray_one, red = (0, 0, 255), (29, 29, 29), (97, 0, 0)  # all of the same gray level
    drawings = [
        Image.fromarray(np.where(ring[..., None], np.array(color), 255).astype(np.uint8))
        for color in (blue, gray_one, red)
    ]
    assert len({drawing.convert("L").tobytes() for drawing in drawings}) == 1
    for number, names in ((0, {0, 1}), (1, {1}), (2, {1, 2})):
        finder = Finder(make_index(tmp_path / str(number), [drawings[number]]), SETTINGS)
        found = {k for k, drawing in enumerate(drawings) if finder.find(CHANGES[change][0](drawing, 3))}
        assert found == names


def test_blank_pictures_are_found_by_their_bytes_only(tmp_path: Path) -> None:
    blank = Image.new("RGB", (100, 100), (200, 180, 160))
    index = make_index(tmp_path, [blank, picture(0)])
    finder = Finder(index, SETTINGS)
    assert finder.find(encoded(blank, 95)) == (0, 1.0)
    assert finder.find(encoded(blank, 40)) is None
    assert finder.find(encoded(picture(0), 95)) == (1, 1.0)


def test_a_corpus_with_evaluation_images(tmp_path: Path) -> None:
    images = [picture(k) for k in range(4)]
    one = make_index(tmp_path / "one", images)
    two = make_index(tmp_path / "two", images, size=1)  # however it is cut
    for name in ("hash", "detailed", "thumbnail", "color", "digest"):
        assert (one / f"{name}.npy").read_bytes() == (two / f"{name}.npy").read_bytes()
    other = encoded(picture(50))
    documents = [
        [[1, 2], (encoded(flipped(images[2])), None, None), (other, None, None)],
        [(b"no image", None, None), [3]],
        [(other, None, None), [4], (encoded(images[0], 60), None, None), (encoded(flipped(images[2])), None, None)],
    ]
    for shards in (1, 3):
        corpus = write_corpus(tmp_path / f"corpus-{shards}", documents, shards)
        files = []
        for shard in range(shards):
            files.append(tmp_path / f"{shards}-{shard}.npz")
            last = corpus.shard(shard).num_documents
            np.savez(files[-1], **contamination_facts(corpus, Range(0, shard, 0, last, 0), one, SETTINGS))
        removals = join_evaluation(files, one)
        assert removals.document.tolist() == [0, 2, 2]
        assert removals.item.tolist() == [1, 2, 3]
        assert (removals.value >= SETTINGS.min_agreement).all()
        assert [Path(name).name for name in removals.matched] == ["0002.jpg", "0000.jpg", "0002.jpg"]


def test_a_set_is_listed_once_for_all_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lcl.evaluate import sources

    listed = []
    original = sources.all_pictures
    monkeypatch.setattr(sources, "all_pictures", lambda *given: listed.append(given) or original(*given))
    make_index(tmp_path, [picture(k, 64) for k in range(3)], size=1)
    assert len(listed) == 1


def test_a_set_whose_only_folders_are_other_splits(tmp_path: Path) -> None:
    """No option of `curate` names a split: its folder does."""
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        (tmp_path / split / "class" / "a.jpg").write_bytes(encoded(picture(0, 64)))
    with pytest.raises(UserError, match=f"has no split 'test'.* or give its folder, such as {tmp_path / 'train'}$"):
        EvaluationImages(tmp_path)
    assert len(EvaluationImages(tmp_path / "train")) == 1


def test_evaluation_images_lie_in_any_layout(tmp_path: Path) -> None:
    data = [encoded(picture(k, 64)) for k in range(3)]
    plain, classes, tars = (tmp_path / name for name in ("plain", "classes", "tars"))
    plain.mkdir()
    for k, content in enumerate(data):
        (plain / f"{k}.jpg").write_bytes(content)
        (classes / f"class {k}").mkdir(parents=True)
        (classes / f"class {k}" / "a.jpg").write_bytes(content)
    (tars / "test").mkdir(parents=True)
    with tarfile.open(tars / "test" / "0.tar", "w") as tar:
        for k, content in enumerate(data):
            for name, part in ((f"{k}.jpg", content), (f"{k}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    pieces = [[(content, None, None)] for content in data]  # without texts, which `evaluate` would want
    corpus = write_corpus(tmp_path / "corpus", pieces, 2)
    for source in (plain, classes, tars, corpus.path):
        images = EvaluationImages(source)
        assert [images.read(k)[1] for k in range(len(images))] == data
        assert str(source) in images.read(2)[0]
    for source in (classes, tars):  # a picture beside them is one more, not the only one
        (source / "cover.png").write_bytes(encoded(picture(9, 64), format="PNG"))
        images = EvaluationImages(source)
        names = [Path(images.read(k)[0]).name for k in range(len(images))]
        assert len(names) == 4
        assert "cover.png" in names
    (plain / "notes").mkdir()
    (plain / "notes" / "read.me").write_text("no picture")
    assert len(EvaluationImages(plain)) == 3
    with pytest.raises(UserError, match="there is no"):
        EvaluationImages(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no evaluation images"):
        write_index([], tmp_path)
