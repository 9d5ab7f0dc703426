"""Data layouts, the feature cache, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.corpora import write_corpus
from PIL import Image
from PIL import features as pillow
from s3_fixtures import upload
from users import as_other, mode_of, needs_root, shared_folder, succeeds, umask

from megatron_lcl.cli import main
from megatron_lcl.curate.duplicates.evaluation import EvaluationImages
from megatron_lcl.data.corpus.probe import image_suffixes
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import features
from megatron_lcl.evaluate.features import FeatureStore
from megatron_lcl.evaluate.heldout_ranks import Ranked
from megatron_lcl.evaluate.heldout_results import HeldOut, with_recalls
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Metric, Result, table, write_json, write_picture
from megatron_lcl.evaluate.retrieval import retrieval
from megatron_lcl.evaluate.sources import all_pictures, open_images
from megatron_lcl.evaluate.zero_shot import accuracy, classify


def pixels(data: ImageSet, i: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data.images[i].read())))


def write_tar(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_folder(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    train, test = open_images(folder, "train"), open_images(folder, "test")
    assert (len(train), len(test)) == (300, 200)
    assert test.classes == train.classes
    assert test.classes[3] == "3 three"
    images, labels = digits
    for i in (0, 57, 199):
        number = int(Path(test.images[i].name).stem)
        assert test.need_labels()[i] == labels[number]
        assert (pixels(test, i) == (images[number] * 255).round()).all()


def test_webdataset_in_clip_benchmarks_layout(folder: Path, tmp_path: Path, encoder) -> None:  # type: ignore[no-untyped-def]
    test = open_images(folder, "test")
    (tmp_path / "test").mkdir()
    for shard, indices in enumerate(np.array_split(np.arange(200), 3)):
        samples = {}
        for i in indices:
            samples[f"./s{i:05d}.png"] = test.images[i].read()
            samples[f"./s{i:05d}.cls"] = str(test.need_labels()[i]).encode()
        write_tar(tmp_path / "test" / f"{shard}.tar", samples)
    (tmp_path / "classnames.txt").write_text("\n".join(name.split()[1] for name in test.classes))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}\nthe digit {c}\n")
    data = open_images(tmp_path, "test")
    assert [data.images[i].read() for i in range(200)] == [blob.read() for blob in test.images]
    assert (data.need_labels() == test.need_labels()).all()
    assert data.templates == ("a drawing of a {c}", "the digit {c}")
    result = accuracy(
        encoder, data, classify(encoder, data, FeatureStore(tmp_path, progress=False).features(encoder, data))
    )
    assert result.metrics["accuracy"].value > 0.7
    assert result.settings["templates"] == 2


def test_webdataset_without_names(folder: Path, tmp_path: Path, encoder) -> None:  # type: ignore[no-untyped-def]
    """Classes are numbers then, and a list of names may have more than the split has images of."""
    image = open_images(folder, "test").images[0].read()
    write_tar(tmp_path / "0.tar", {"a.png": image, "a.cls": b"0", "b.png": image, "b.cls": b"2"})
    data = open_images(tmp_path)
    assert (data.classes, data.numbered) == (("0", "1", "2"), True)
    with pytest.raises(UserError, match=r"has no names of its 3 classes.*classnames.txt.*--class-names FILE\)$"):
        classify(encoder, data, np.zeros((2, 64)))
    assert open_images(tmp_path, class_names=["a", "b", "c", "d"]).need_names() == ("a", "b", "c", "d")
    assert open_images(tmp_path, class_names=["0", "1", "2"]).need_names() == ("0", "1", "2")
    with pytest.raises(ValueError, match="2 class names do not match"):
        open_images(tmp_path, class_names=["a", "b"])
    with pytest.raises(ValueError, match="no split 'tset'"):
        open_images(tmp_path, "tset")


def test_a_split_of_a_webdataset_has_the_names_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = open_images(folder, "test").images[0].read()
    for name in ("train", "part"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {"a.png": image, "a.cls": b"1"})
    (tmp_path / "classnames.txt").write_text("mill\nlake\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}\n")
    monkeypatch.chdir(tmp_path / "train")
    for path, split in ((tmp_path, "train"), (tmp_path / "train", None), (Path(), None), (tmp_path, "part")):
        data = open_images(path, split)
        assert (data.need_names(), data.templates) == (("mill", "lake"), ("a drawing of a {c}",))
    assert open_images(tmp_path / "part").numbered, "it may be any folder that lies there"
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a drawing\n")
    with pytest.raises(UserError, match=f"^{tmp_path}/zeroshot_classification_templates.txt, line 1: the template"):
        open_images(tmp_path / "train")
    (tmp_path / "train" / "classnames.txt").write_text("own\nnames\n")
    (tmp_path / "train" / "zeroshot_classification_templates.txt").write_text("the {c}\n")
    data = open_images(tmp_path / "train")
    assert (data.need_names(), data.templates) == (("own", "names"), ("the {c}",))


def test_webdataset_captions_and_karpathy(folder: Path, tmp_path: Path, encoder) -> None:  # type: ignore[no-untyped-def]
    test = open_images(folder, "test")
    chosen = [int(np.flatnonzero(test.need_labels() == c)[0]) for c in range(10)]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    samples, entries = {}, []
    (tmp_path / "val2014").mkdir()
    for c, i in enumerate(chosen):
        samples |= {f"{c}.png": test.images[i].read(), f"{c}.txt": f"a {words[c]}\nthe {words[c]}\n".encode()}
        (tmp_path / "val2014" / f"{c}.png").write_bytes(test.images[i].read())
        sentences = [{"raw": f"a {words[c]}"}, {"raw": f"the {words[c]} "}]
        entries.append({"filepath": "val2014", "filename": f"{c}.png", "split": "test", "sentences": sentences})
    entries.append(entries[0] | {"split": "restval"})
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds" / "0.tar", samples)
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    results = []
    for data in (open_images(tmp_path / "wds"), open_images(tmp_path / "dataset_coco.json", images=tmp_path)):
        assert data.need_captions()[3] == ("a three", "the three")
        features = FeatureStore(tmp_path, progress=False).features(encoder, data)
        results.append(retrieval(encoder, data, features).metrics)
    assert results[0] == results[1]
    assert results[0]["image → text recall@5"].value >= 0.8
    with pytest.raises(ValueError, match="restval"):
        open_images(tmp_path / "dataset_coco.json", "validation", tmp_path)
    with pytest.raises(ValueError, match="not there"):
        open_images(tmp_path / "dataset_coco.json", images=tmp_path / "wds")


def test_images_are_what_pillow_opens_and_others_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    kinds = ("jpg", "JFIF", "jpe", "jp2", "pgm")
    assert (".avif" in image_suffixes()) == pillow.check("avif")
    (tmp_path / "cat").mkdir()
    for kind in (*kinds, "heic", "txt"):
        (tmp_path / "cat" / f"a.{kind}").write_bytes(out.getvalue())
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    assert {Path(blob.name).suffix[1:] for blob in open_images(tmp_path).images} == set(kinds)
    assert caplog.messages == [f"{tmp_path}: not all files are read (1 .heic, such as a.heic)"]
    caplog.clear()
    members = {f"{i}.{kind}": out.getvalue() for i, kind in enumerate((*kinds, "heic"))}
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", members | {f"{i}.cls": b"0" for i in range(6)})
    assert len(open_images(tmp_path / "tars")) == 5
    assert caplog.messages == [f"{tmp_path / 'tars'}: not all files are read (1 .heic, such as 5.heic)"]
    for kind in kinds:
        (tmp_path / "cat" / f"a.{kind}").unlink()
    (tmp_path / "tars" / "0.tar").unlink()
    (tmp_path / "tars").rmdir()
    with pytest.raises(ValueError, match=r"cat has no images \(1 .heic, such as a.heic\)"):
        open_images(tmp_path)


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    """What notebooks and file systems put beside an image, wherever the data set itself lies."""
    root = tmp_path / ".data"
    for split in ("train", "test"):
        for name in ("0.png", "._0.png", ".ipynb_checkpoints/0-checkpoint.png", "more/1.png", "more/.trash/2.png"):
            (root / split / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / "cat" / name).write_bytes(b"image")
    (root / "cover.png").write_bytes(b"image")
    (root / "._cover.png").write_bytes(b"image")
    own = [str(root / "test/cat" / name) for name in ("0.png", "more/1.png")]
    assert [blob.name for blob in open_images(root).images] == own
    assert [blob.name for blob in all_pictures(root)] == [str(root / "cover.png"), *own]
    for file in own:
        Path(file).unlink()
    with pytest.raises(ValueError, match=r"cat has no images$"):
        open_images(root)


def test_features_are_cached_by_content(
    folder: Path,
    tmp_path: Path,
    encoder,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = ImageSet("x", open_images(folder, "test").images[:50])
    store = FeatureStore(tmp_path, batch_size=16, progress=False)
    before = encoder.calls
    first = store.features(encoder, data)
    assert first.shape == (50, 64)
    assert np.array_equal(first[7], pixels(open_images(folder, "test"), 7).ravel().astype(np.float32) / 255)
    computed = encoder.calls
    assert computed > before
    assert np.array_equal(store.features(encoder, data), first)
    assert encoder.calls == computed  # read, not computed
    patches = store.features(encoder, data, "patches")
    assert (patches.shape, patches.dtype) == ((50, 16, 4), np.float16)
    computed = encoder.calls
    other = store.features(encoder, ImageSet("x", data.images[::-1]))
    assert np.array_equal(other, first[::-1])
    assert encoder.calls > computed
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file left
    monkeypatch.setattr(features, "DECODING", features.DECODING + 1)  # the same bytes may be other pixels
    computed = encoder.calls
    store.features(encoder, data)
    assert encoder.calls > computed


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077], ids=oct)
def test_the_umask_says_who_may_read_features(folder: Path, tmp_path: Path, encoder, mask: int) -> None:  # type: ignore[no-untyped-def]
    with umask(mask):
        (tmp_path / "file").touch()
        data = ImageSet("x", open_images(folder, "test").images[:3])
        FeatureStore(tmp_path / "cache", progress=False).features(encoder, data)
    (file,) = (tmp_path / "cache").iterdir()
    assert mode_of(file) == mode_of(tmp_path / "file")


@needs_root
def test_features_that_another_user_keeps_are_one_line(folder: Path, encoder) -> None:  # type: ignore[no-untyped-def]
    def reads() -> None:
        with pytest.raises(
            UserError, match=r"npy was written by another user, .*; name another folder \(--cache DIR\)"
        ):
            FeatureStore(cache, progress=False).features(encoder, data)

    with shared_folder(0o2777) as cache:
        shutil.copytree(folder / "test", cache / "images")
        data = ImageSet("x", open_images(cache / "images").images[:3])
        with umask(0o077):
            FeatureStore(cache, progress=False).features(encoder, data)
        assert succeeds(as_other(reads))


def test_bad_data(folder: Path, tmp_path: Path, encoder) -> None:  # type: ignore[no-untyped-def]
    def refused(words: str, call: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)

    refused("there is no", lambda: open_images(tmp_path / "none"))
    (tmp_path / "nothing").mkdir()
    refused("no class folders", lambda: open_images(tmp_path / "nothing"))
    refused("no split 'tset'; there are the folders test, train", lambda: open_images(folder, "tset"))
    (tmp_path / "split" / "train").mkdir(parents=True)
    refused("no split 'test', but train", lambda: open_images(tmp_path / "split"))
    refused("9 class names do not match", lambda: open_images(folder, "test", class_names=["x"] * 9))
    refused("no {c}|no \\{c\\}", lambda: open_images(folder, "test", templates=["a photo"]))
    (tmp_path / "names").write_bytes(b"first\n\nthird \xff\n")
    refused(
        f"{tmp_path / 'names'}, line 3: not UTF-8", lambda: open_images(folder, "test", class_names=tmp_path / "names")
    )
    (tmp_path / "texts").write_text("a {c}\n\n  a photo\n")
    at = f"{tmp_path / 'texts'}, line 3: the template 'a photo' has no"
    refused(at, lambda: open_images(folder, "test", templates=tmp_path / "texts"))
    (tmp_path / "few").write_text("one\n")
    refused(
        f"{tmp_path / 'few'}: 1 class names do not match",
        lambda: open_images(folder, "test", class_names=tmp_path / "few"),
    )
    refused("no captions", lambda: open_images(folder, "test").need_captions())
    (tmp_path / "a" / "full").mkdir(parents=True)
    (tmp_path / "a" / "empty").mkdir()
    (tmp_path / "a" / "full" / "x.png").write_bytes(b"not an image")
    refused("empty has no images", lambda: open_images(tmp_path / "a"))
    (tmp_path / "a" / "empty").rmdir()
    broken = open_images(tmp_path / "a")
    store = FeatureStore(tmp_path / "c")
    refused("x.png: .*does not decode", lambda: store.features(encoder, broken))
    assert not (tmp_path / "c").exists()
    mixed = ImageSet("x", (*open_images(folder, "test").images[:3], *broken.images))
    refused("x.png: .*does not decode", lambda: store.features(encoder, mixed))
    assert list((tmp_path / "c").iterdir()) == []
    (tmp_path / "w").mkdir()
    write_tar(tmp_path / "w" / "0.tar", {"a.png": b"x", "a.cls": b"cat"})
    refused("index of a class", lambda: open_images(tmp_path / "w"))
    write_tar(tmp_path / "w" / "0.tar", {"a.png": b"x", "a.cls": b"1", "b.png": b"x"})
    refused("2 images but 1 labels", lambda: open_images(tmp_path / "w"))
    (tmp_path / "w" / "0.tar").write_bytes(b"x" * 1000)
    refused("not a readable .tar", lambda: open_images(tmp_path / "w"))
    (tmp_path / "k.json").write_text('{"images": [{"split": "test"}]}')
    refused("not a COCO-Karpathy", lambda: open_images(tmp_path / "k.json"))


def test_recalls_of_held_out_pairs_counted_by_hand() -> None:
    """Four images, three contexts, two of which have a rival in their document."""
    documents = np.zeros(4, np.int64)
    ranked = (
        Ranked(np.array([1, 10, 11, 2]), np.array([1, 2, 1, 1]), 3, documents),
        Ranked(np.array([1, 11, 2]), np.array([1, 2, 2]), 4, documents[:3]),
        Ranked(np.array([1, 2]), np.array([1, 1]), np.array([3, 2]), documents[:2]),
    )
    found = with_recalls(HeldOut("c", documents=3, pairs=5, targets=0), ranked, intervals=False)
    assert (found.distinct_images, found.distinct_contexts, found.contexts_with_rivals) == (4, 3, 2)
    assert (found.pairs, found.median_rank) == (5, 6)
    assert (found.image_to_context_recall_at_1, found.image_to_context_recall_at_10) == (0.25, 0.75)
    assert (found.context_to_image_recall_at_1, found.context_to_image_recall_at_10) == (1 / 3, 2 / 3)
    assert (found.chance_at_1, found.chance_at_10) == (pytest.approx((1 + 2 + 1 + 1) / 4 / 3), 1)
    assert found.context_to_image_chance_at_1 == pytest.approx((1 + 2 + 2) / 3 / 4)
    assert found.context_to_image_chance_at_10 == 1
    assert found.image_in_document_recall_at_1 == 0.5
    assert found.chance_in_document == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_results_as_table_json_and_picture(tmp_path: Path) -> None:
    metrics = {"accuracy": Metric(0.5, 0.4, 0.6, 0.1), "top 5": Metric(1.0, 1.0, 1.0)}
    results = [Result("k-NN", "ours", "digits", 10, metrics, {"k": 5}), Result("zero-shot", "b", "digits", 10, metrics)]
    lines = table(results).splitlines()
    assert len(lines) == 5
    assert "0.4000 – 0.6000" in lines[1]
    write_json(results, tmp_path / "r.json")
    loaded = json.loads((tmp_path / "r.json").read_text())
    assert loaded[0]["metrics"]["accuracy"] == {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}
    write_picture(results, tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size[0] > 400


def test_corpus(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lcl.data.prepare.preprocess import preprocess

    lines = []
    for label in range(3):
        a, b = sorted((folder / "test" / open_images(folder, "test").classes[label]).glob("*.png"))[:2]
        items = [{"image": str(a.relative_to(folder))}, {"text": f"after the first {label}"}, {"text": f"far {label}"}]
        if label == 2:  # between two texts
            items.insert(0, {"text": "before the last"})
        matched = {"image": str(b.relative_to(folder)), "similarity": 0.5, "matched_text_index": 0}
        lines.append(json.dumps({"items": [*items, matched] if label == 1 else items}))
    c = next(p for p in (folder / "test").rglob("*.png") if p not in (a, b))
    several = ["a digit", "some digit", "a digit", "the last"]
    items = [{"image": str(c.relative_to(folder))}, *({"text": text} for text in several)]
    lines.append(json.dumps({"kind": "captions", "items": items}))
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    preprocess(format="jsonl", input=tmp_path / "docs.jsonl", images=folder, output=tmp_path / "corpus", vocab_size=400)
    with monkeypatch.context() as unread:  # that is for when it is known that nothing else is wrong
        unread.setattr(Shard, "image", lambda *_: pytest.fail("an image was read"))
        data = open_images(tmp_path / "corpus")
    with pytest.raises(ValueError, match="no splits"):
        open_images(tmp_path / "corpus", "test")
    texts = [captions[0] for captions in data.need_captions()]
    assert texts[0] == "after the first 0"
    assert "before the last" in texts
    assert len(data) == 5
    (number,) = (i for i in range(5) if data.images[i].read() == c.read_bytes())
    assert data.need_captions()[number] == ("a digit", "some digit", "the last")
    assert all(len(captions) == 1 for i, captions in enumerate(data.need_captions()) if i != number)
    assert texts.count("after the first 1") == 2  # one next to its text, one matched to it
    assert pixels(data, 0).shape == (8, 8)


def test_a_corpus_in_object_storage(
    place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images and texts are those of the disk; other data is not read from there, and its URL is named as given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = sorted((folder / "test").rglob("*.png"))[:4]
    pieces = [[[k + 1, k + 2], (file.read_bytes(), None, None)] for k, file in enumerate(images)]
    disk = write_corpus(tmp_path / "corpus", pieces, 2)
    upload(disk.path, place)
    data, same = open_images(place), open_images(disk.path)
    assert (data.name, data.captions, data.digests) == (place, same.captions, same.digests)
    assert [blob.read() for blob in pickle.loads(pickle.dumps(data.images))] == [p.read_bytes() for p in images]
    assert [blob.name for blob in all_pictures(Path(place))] == [blob.name for blob in data.images]
    assert [EvaluationImages(place).read(k)[1] for k in range(4)] == [p.read_bytes() for p in images]
    knn = ["evaluate", "open_clip:x", "--task", "knn", "--data"]
    for command, said in (
        ([*knn, place], f"{place} has no labels"),
        ([*knn, f"{place}/folder"], f"{place}/folder is not a corpus"),
        ([*knn, place, "--split", "test"], f"{place} is a corpus, which has no splits"),
        ([*knn, str(folder), "--images", place], "--images is s3://…: use a path of a file system here"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err
