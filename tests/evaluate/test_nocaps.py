"""NoCaps: its file as it is published, and the scores of each domain against pycocoevalcap on that domain alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import captioning as module
from megatron_lcl.evaluate.captioning import captioning, tokenize
from megatron_lcl.evaluate.checking import find_bad, without_bad
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.settings import CaptioningSettings
from megatron_lcl.evaluate.sources import open_images

DOMAINS = ("in-domain", "near-domain", "out-domain")
NOUNS = "dog cat lizard tractor piano lantern anvil canoe kite".split()  # noqa: SIM905


def nocaps() -> dict[str, Any]:
    """Nine images with ten captions each, in the order and with the keys of nocaps_val_4500_captions.json."""
    images, annotations = [], []
    for i, noun in enumerate(NOUNS):
        name = f"{i:016x}"
        images.append({
            "license": 0, "file_name": f"{name}.jpg", "coco_url": f"https://example.org/val/{name}.jpg", "height": 8,
            "width": 8, "date_captured": "2018-11-06 11:04:33", "id": i, "open_images_id": name,
            "domain": DOMAINS[(i * 2) % 3 if i < 6 else 1],
        })  # fmt: skip
        for c in range(10):
            words = f"A {noun} number {c % 3} stands on the {['floor', 'grass'][c % 2]}, alone."
            annotations.append({"image_id": i, "id": 10 * i + c, "caption": words + " " * (c == 4)})
    info = {"url": "", "date_created": "2018/11/06", "version": "0.1", "description": "nocaps validation dataset"}
    return {"licenses": [], "info": info, "images": images, "annotations": annotations[::-1]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    content = nocaps()
    (tmp_path / "val").mkdir()
    for i, entry in enumerate(content["images"]):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(tmp_path / "val" / entry["file_name"])
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps(content))
    return path


def test_the_file(file: Path) -> None:
    data = open_images(file, images=file.parent / "val")
    assert len(data) == 9
    assert [Path(blob.name).stem for blob in data.images] == [f"{i:016x}" for i in range(9)]
    captions = data.need_captions()
    assert {len(several) for several in captions} == {10}
    assert all(NOUNS[i] in text and text == text.strip() for i, several in enumerate(captions) for text in several)
    assert data.domains is not None
    assert {d: data.domains.count(d) for d in DOMAINS} == {"in-domain": 2, "near-domain": 5, "out-domain": 2}
    (file.parent / "val" / f"{3:016x}.jpg").write_bytes(b"")
    left = without_bad(data, find_bad(data, file.parent / "cache"), skip=True)
    assert left.domains == data.domains[:3] + data.domains[4:]


def test_what_does_not_fit(file: Path) -> None:
    def refused(words: str, change: Any = None, split: str | None = None) -> None:
        content = nocaps()
        if change:
            change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as error:
            open_images(file, split, images=file.parent / "val")
        assert "\n" not in str(error.value)

    refused("one split by itself; leave out 'val'", split="val")
    refused("no caption of 9 of its 9 images", lambda c: c["annotations"].clear())
    refused("no domain of 1 of its 9 images", lambda c: c["images"][2].pop("domain"))
    refused(
        "not a COCO-Karpathy JSON file, nor one of COCO's or NoCaps's", lambda c: c["annotations"][0].pop("caption")
    )
    refused("has no images", lambda c: c["images"].clear())
    refused("names 9 images, of which 1 are not there", lambda c: c["images"][1].update(file_name="gone.jpg"))


def test_scores_of_each_domain(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    pytest.importorskip("sacrebleu")
    data = open_images(file, images=file.parent / "val")
    written = [f"a {noun} number {i % 2} stands on the {'grass' * (i % 3 > 0)} alone" for i, noun in enumerate(NOUNS)]
    monkeypatch.setattr(module, "caption", lambda *_: written)

    class Named:
        name = "ours"

    def scores(of: ImageSet) -> dict[str, float]:
        return {name: m.value for name, m in captioning(Named(), of, CaptioningSettings())[0].metrics.items()}  # type: ignore[arg-type]

    found = scores(data)
    parts = {"entire": range(9), **{d: [i for i in range(9) if data.domains[i] == d] for d in DOMAINS}}  # type: ignore[index]
    assert list(found) == [f"{metric}, {part}" for part in parts for metric in ("BLEU-4", "CIDEr")]
    for part, own in parts.items():
        truth = {i: tokenize(data.need_captions()[i]) for i in own}
        ours = {i: tokenize([written[i]]) for i in own}
        assert found[f"CIDEr, {part}"] == pytest.approx(cider.compute_score(truth, ours)[0])
        assert found[f"BLEU-4, {part}"] == pytest.approx(bleu.compute_score(truth, ours, verbose=0)[0][3])
    assert len({round(value, 6) for name, value in found.items() if name.startswith("CIDEr")}) == 4

    # COCO's own caption files have no domains
    content = nocaps()
    for entry in content["images"]:
        del entry["domain"]
    file.write_text(json.dumps(content))
    plain = scores(open_images(file, images=file.parent / "val"))
    assert plain == {metric: found[f"{metric}, entire"] for metric in ("BLEU-4", "CIDEr")}
