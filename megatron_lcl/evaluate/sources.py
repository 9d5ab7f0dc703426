"""Readers of evaluation images: class folders, WebDatasets in CLIP_benchmark's layout, captions in JSON, corpora."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.files import CORPUS_MANIFEST
from megatron_lcl.data.corpus.indexed import IMAGE, TEXT
from megatron_lcl.data.corpus.probe import image_suffixes
from megatron_lcl.data.corpus.store import Corpus, is_corpus, open_corpus
from megatron_lcl.data.prepare.importers.tars import DAMAGE, tar_files
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.image_set import DEFAULT_TEMPLATE, NAMES, Blob, CorpusBlob, FileBlob, ImageSet
from megatron_lcl.filesystem import below, is_dir, is_file, matching
from megatron_lcl.model.reference_format import some

_NO_PICTURE = frozenset({".txt", ".json", ".csv", ".tsv", ".xml", ".md", ".db", ".ini", ".cls"})
"""files that may lie beside pictures; others that are left out are told"""
logger = logging.getLogger(__name__)
_TEMPLATES = "zeroshot_classification_templates.txt"


def open_images(
    path: str | Path,
    split: str | None = None,
    images: str | Path | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    templates: str | Path | Sequence[str] | None = None,
) -> ImageSet:
    """The images of `path`, whichever layout it has.

    * a folder of class folders, `path/[split/]CLASS/*.jpg` (class names are the folders', by code points);
    * a WebDataset in CLIP_benchmark's layout: `path/[split/]*.tar` with `.cls` or `.txt` beside each image,
      `classnames.txt` and `zeroshot_classification_templates.txt` in `path`, or above it where `path` is the folder of
      a split;
    * a COCO-Karpathy JSON file (`images` is the folder of its images), whose `split` is one of the file's own;
    * a JSON file in the format of COCO's captions, as NoCaps's is: `images` with `file_name` and, in NoCaps, `domain`,
      and `annotations` with their captions;
    * a corpus of ours, also one in object storage by its URL: each image with its matched text, or the nearest one;
      where a document is an image and its captions, with all of them.

    `split`: None takes `test` where there is one, else all of a folder that has no splits. `class_names` and
    `templates` (a text file with one a line, or a list) replace those found. Raises UserError, in one line, for a
    layout that is none of these, a split that is not there, an empty class, or class names that do not match.
    """
    corpus, path = open_corpus(path) if is_corpus(path) else None, Path(path)
    if corpus is not None:
        if split is not None:
            raise UserError(
                f"{corpus.where} is a corpus, which has no splits; give another corpus in place of {split!r}"
            )
        found = _corpus(corpus)
    elif is_file(path):
        found = _captions_json(path, split, Path(images) if images else path.parent)
    elif is_dir(path):
        folder = _split_folder(path, split)
        tars = matching(folder, "*.tar")
        found = _webdataset(path, tars) if tars else _folder(folder)
    else:
        raise UserError(f"there is no {path}")
    names: Sequence[str] = _lines(class_names) or found.classes
    numbered = found.labels is not None and not names
    if found.labels is not None and numbered:
        names = [str(i) for i in range(int(found.labels.max()) + 1)]
    if found.labels is not None and len(names) <= int(found.labels.max()):
        raise UserError(
            f"{_list_of(class_names)}{len(names)} class names do not match {path}, whose labels go up to "
            f"{int(found.labels.max())}"
        )
    if class_names is not None and found.classes and len(names) != len(found.classes):
        raise UserError(
            f"{_list_of(class_names)}{len(names)} class names do not match the {len(found.classes)} classes of {path}"
        )
    chosen = _lines(templates) or found.templates
    bad = [template for template in chosen if "{c}" not in template]
    if bad:
        at = _place(_beside(path, _TEMPLATES) if templates is None else templates, bad[0])
        raise UserError(f"{at}the template {bad[0]!r} has no {{c}} for the class name")
    names_from = found.names_from
    if class_names is not None:
        names_from = str(class_names) if isinstance(class_names, str | Path) else "class_names"
    return replace(found, classes=tuple(names), templates=tuple(chosen), numbered=numbered, names_from=names_from)


_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})


def _split_folder(path: Path, split: str | None) -> Path:
    """Where the images of a split are."""
    folders = sorted(p.name for p in path.iterdir() if is_dir(p) and not p.name.startswith("."))
    if split is None and "test" not in folders:
        if folders and set(folders) <= _SPLITS:  # not classes
            raise UserError(
                f"{path} has no split 'test', but {', '.join(folders)}; say which to measure on (--split), or give "
                f"its folder, such as {path / folders[0]}"
            )
        return path
    if (split or "test") not in folders:
        raise UserError(f"{path} has no split {split!r}; there are the folders {some(folders) or '(none)'}")
    return path / (split or "test")


def _folder(folder: Path) -> ImageSet:
    classes = sorted(p for p in folder.iterdir() if is_dir(p) and not p.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders, no .tar files and no {CORPUS_MANIFEST}")
    blobs: list[Blob] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, sub in enumerate(classes):
        files = _visible(sub, below(sub))
        pictures = [p for p in files if p.suffix.lower() in image_suffixes()]
        if not pictures:
            raise UserError(f"the class folder {sub} has no images{_instead(files)}")
        blobs += [FileBlob(file) for file in pictures]
        labels += [label] * len(pictures)
        others += [file for file in files if file.suffix.lower() not in image_suffixes()]
    _tell(folder, others)
    return ImageSet(str(folder), tuple(blobs), np.array(labels), tuple(p.name for p in classes))


def _visible(folder: Path, found: Iterable[Path]) -> list[Path]:
    """Those of the paths below a folder that are files, sorted. Not hidden ones, nor what hidden folders have: a copy
    that an editor or a file system has put there (`.ipynb_checkpoints/0-checkpoint.png`, `._0.png`) is no image more.
    """
    shown = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(p for p in shown if is_file(p))


def all_pictures(path: Path) -> Sequence[Blob]:
    """The images that `open_images` reads; but of a folder without .tar files all pictures in and below it; where it
    has splits, below the folder `test`. Pictures that lie in the folder itself are always read.

    UserError where there is no such set.
    """
    if not is_dir(path) or is_corpus(path):
        return open_images(path).images
    folder = _split_folder(path, None)
    tars = matching(folder, "*.tar")
    files = _visible(path, {*path.iterdir(), *(() if tars else below(folder))})
    pictures = [FileBlob(p) for p in files if p.suffix.lower() in image_suffixes()]
    if tars:
        return (*open_images(path).images, *pictures)
    _tell(path, [p for p in files if p.suffix.lower() not in image_suffixes()])
    return pictures


def _tell(where: Path, names: Iterable[PurePath]) -> None:
    """Warn of files that are left out."""
    if said := _instead(names):
        logger.warning("%s: not all files are read%s", where, said)


def _instead(names: Iterable[PurePath]) -> str:
    """` (3 .heic, such as a.heic)`: those that might be pictures, though by their names none that Pillow opens here."""
    left_out = [p for p in names if not p.name.startswith(".") and p.suffix.lower() not in _NO_PICTURE]
    kinds = Counter(p.suffix.lower() or "without suffix" for p in left_out)
    return f" ({some([f'{n:,} {kind}' for kind, n in kinds.items()])}, such as {left_out[0].name})" if left_out else ""


def _webdataset(root: Path, tars: list[Path]) -> ImageSet:
    blobs: list[Blob] = []
    labels: list[int] = []
    captions: list[tuple[str, ...]] = []
    others: list[PurePath] = []
    for path in tars:
        samples: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            with path.open("rb") as tar:
                for _, member in tar_files(tar):
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    samples[f"{folder}/{stem}"][f".{suffix.lower()}"] = member.offset_data, member.size
        except DAMAGE as error:
            raise UserError(f"{path} is not a readable .tar: {error}; write or download it again") from None
        for key, parts in samples.items():
            image = next((suffix for suffix in parts if suffix in image_suffixes()), None)
            if image is None:
                others += [PurePath(key + suffix) for suffix in parts]
                continue
            blobs.append(FileBlob(path, *parts[image], member=key.lstrip("./") + image))
            if ".cls" in parts:
                labels.append(_class_index(path, key, FileBlob(path, *parts[".cls"]).read()))
            if ".txt" in parts:
                lines = FileBlob(path, *parts[".txt"]).read().decode(errors="replace").split("\n")
                captions.append(tuple(line.strip() for line in lines if line.strip()))
    if not blobs:
        raise UserError(f"the .tar files of {tars[0].parent} have no images{_instead(others)}")
    _tell(tars[0].parent, others)
    for kind, values in (("labels", labels), ("captions", captions)):
        if values and len(values) != len(blobs):
            raise UserError(f"{tars[0].parent} has {len(blobs)} images but {len(values)} {kind}")
    templates, names = _beside(root, _TEMPLATES), _beside(root, *NAMES)
    return ImageSet(
        str(tars[0].parent),
        tuple(blobs),
        np.array(labels) if labels else None,
        tuple(_lines(names)) if labels else (),  # without a list of names they are numbers
        tuple(captions) if captions and all(captions) else None,
        tuple(_lines(templates)) if templates else (DEFAULT_TEMPLATE,),
        names_from=str(names or ""),
    )


def _beside(root: Path, *names: str) -> Path | None:
    """The first of these files of a WebDataset that is there: in `root`, or, where that is a split's folder, above."""
    folders = [root, root.absolute().parent] if root.absolute().name in _SPLITS else [root]
    return next((folder / name for folder in folders for name in names if is_file(folder / name)), None)


def _class_index(path: Path, key: str, data: bytes) -> int:
    try:
        index = int(data)
    except ValueError:
        index = -1
    if index < 0:
        raise UserError(f"{path}: {key}.cls holds {data[:20]!r}, not the index of a class")
    return index


def _captions_json(path: Path, split: str | None, folder: Path) -> ImageSet:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "annotations" in content:
            return _coco(path, content, split, folder)
        return _karpathy(path, content["images"], split or "test", folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a COCO-Karpathy JSON file, nor one of COCO's or NoCaps's captions: {type(error).__name__} "
            f"{error}"
        ) from None


def _karpathy(path: Path, entries: list[dict[str, Any]], split: str, folder: Path) -> ImageSet:
    chosen = [e for e in entries if e["split"] == split]
    files = [folder / e.get("filepath", "") / e["filename"] for e in chosen]
    captions = tuple(tuple(s["raw"].strip() for s in e["sentences"]) for e in chosen)
    if not chosen:
        raise UserError(f"{path} has no images in the split {split!r}; it has {sorted({e['split'] for e in entries})}")
    if not is_file(files[0]):  # some copies leave out filepath's folder
        files = [folder / file.name for file in files]
    return ImageSet(f"{path} ({split})", _files(path, files), captions=captions)


def _coco(path: Path, content: dict[str, Any], split: str | None, folder: Path) -> ImageSet:
    """`images`: id, file_name, in NoCaps domain; `annotations`: image_id, caption."""
    if split is not None:
        raise UserError(f"{path} is one split by itself; leave out {split!r}")
    entries, captions = content["images"], defaultdict[Any, list[str]](list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    ids, domains = [e["id"] for e in entries], [e.get("domain") for e in entries]
    if not entries:
        raise UserError(f"{path} has no images")
    if bare := [e["file_name"] for e in entries if e["id"] not in captions]:
        raise UserError(f"{path} has no caption of {len(bare):,} of its {len(ids):,} images, first {bare[0]}")
    if some_without := sum(domain is None for domain in domains) % len(domains):
        raise UserError(f"{path} has no domain of {some_without:,} of its {len(ids):,} images")
    return ImageSet(
        str(path),
        _files(path, [folder / e["file_name"] for e in entries]),
        captions=tuple(tuple(captions[i]) for i in ids),
        domains=None if domains[0] is None else tuple(domains),
    )


def _files(path: Path, files: list[Path]) -> tuple[FileBlob, ...]:
    """The images that the file `path` names."""
    missing = [file for file in files if not is_file(file)]
    if missing:
        raise UserError(
            f"{path} names {len(files):,} images, of which {len(missing):,} are not there, first {missing[0]}; give "
            "the folder of its images"
        )
    return tuple(FileBlob(file) for file in files)


def _corpus(corpus: Corpus) -> ImageSet:
    """Of its texts and of where images stand; the images themselves are not read."""
    blobs: list[Blob] = []
    captions: list[tuple[str, ...]] = []
    documents = ((shard, local) for shard in corpus.shards for local in range(shard.num_documents))
    for d, (shard, local) in enumerate(documents):
        start, stop = map(int, shard.document_offsets[local : local + 2])
        texts = [k for k in range(start, stop) if shard.modes[k] == TEXT]
        pictures = [k for k in range(start, stop) if shard.modes[k] == IMAGE]
        for position, k in enumerate(pictures if texts else ()):
            matched = int(shard.matched_text[shard.placement_of[k]])
            if corpus.kinds[shard.number] == "captions":
                own = texts
            else:
                own = [texts[matched] if 0 <= matched < len(texts) else min(texts, key=lambda t: (abs(t - k), t > k))]
            blobs.append(CorpusBlob(corpus, d, position))
            decoded = (corpus.tokenizer.decode(shard.tokens.sequence(text)) for text in own)
            captions.append(tuple(dict.fromkeys(decoded)))
    if not blobs:
        raise UserError(f"the corpus {corpus.where} has no image with a text")
    return ImageSet(corpus.where, tuple(blobs), captions=tuple(captions))


def _lines(source: str | Path | Sequence[str] | None) -> list[str]:
    """Lines of a file, or the list itself; empty for None. UserError names the line that is no text."""
    if not isinstance(source, str | Path):
        return list(source or ())
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _list_of(source: str | Path | Sequence[str] | None) -> str:
    return f"{source}: " if isinstance(source, str | Path) else ""


def _place(source: str | Path | Sequence[str] | None, text: str) -> str:
    """`FILE, line N: ` where a text stands in a file of lines; empty for a list."""
    if not isinstance(source, str | Path):
        return ""
    lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    number = next(number for number, line in enumerate(lines, 1) if line.strip() == text)
    return f"{source}, line {number}: "
