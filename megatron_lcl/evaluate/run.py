"""Several evaluations of several encoders on one data set: results as a table, JSON and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megatron_lcl.convert.find import step_in_run
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.captioning import captioning, check_captioning
from megatron_lcl.evaluate.checking import BadBlob, find_bad, without_bad
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.encoders.load import EncoderSource
from megatron_lcl.evaluate.features import FeatureStore, Kind, Shapes, default_cache, need_patches
from megatron_lcl.evaluate.gallery import Gallery, make_gallery, write_gallery
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.knn import check_neighbors, knn, with_training
from megatron_lcl.evaluate.probes import attentive_probe, linear_probe
from megatron_lcl.evaluate.results import Result, make_output, table, write_json, write_picture
from megatron_lcl.evaluate.retrieval import retrieval
from megatron_lcl.evaluate.settings import Settings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.trained import POOLED, check_trained, untrained_pool
from megatron_lcl.evaluate.workers import check_workers
from megatron_lcl.evaluate.zero_shot import accuracy, classify
from megatron_lcl.run_folder import RESULTS

TASKS = ("zero-shot", "retrieval", "knn", "linear-probe", "attentive-probe", "captioning")
_NEED_TRAINING = frozenset({"knn", "linear-probe", "attentive-probe"})
_NEED_CAPTIONS = frozenset({"retrieval", "captioning"})


def evaluate(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    data: str | Path,
    output: str | Path | None = None,
    split: str | None = None,
    train_split: str = "train",
    images: str | Path | None = None,
    class_names: str | Path | None = None,
    templates: str | Path | None = None,
    tokenizer: str | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    batch_size: int = 64,
    processes: int = 1,
    devices: Sequence[str] = ("cpu",),
    progress: bool = True,
    skip_bad_images: bool = False,
    about: str = "",
) -> list[Result]:
    """Run `tasks` (of TASKS) on every model (see `load_encoder`); data as `open_images` takes it.

    k-NN and probes learn on `train_split`, all tasks are measured on `split` (None: as `open_images` says). `output`: a
    folder for results.json, results.txt, results.png, captions.jsonl, and gallery.json, with which a report shows the
    pictures of the first model's zero-shot classification; it is made before the first image is read, and filled when
    all is measured. `about`: what the pictures are, in a sentence, for the report.
    Features are computed by `processes` processes, the i-th on the i-th of `devices`, and cached in the folder `cache`
    (None: `default_cache`). Raises UserError, in one line and before anything is computed, for data or models that do
    not fit the tasks, and where the features would not fit the disk.

    All images are checked before any is encoded. UserError naming those that do not decode; or, with
    `skip_bad_images`, they are skipped, counted in the results, and named in the file bad_images.txt of `output`.
    """
    _check_request(models, tasks, devices, batch_size, processes)
    specs = [str(model) for model in models]
    settings = settings or Settings()
    if settings.zero_shot.prompts and templates is not None:
        raise UserError(f"the prompts {list(settings.zero_shot.prompts)} and the file {templates}; give one of the two")
    test = open_images(data, split, images, class_names, settings.zero_shot.prompts or templates)
    train = None
    if _NEED_TRAINING & set(tasks):
        train, test = with_training(data, train_split, test, images, class_names)
        if "knn" in tasks:
            check_neighbors(settings.knn.k, train)
    if _NEED_CAPTIONS & set(tasks):
        test.need_captions()
    if "zero-shot" in tasks:
        test.need_names()
        test.warn_of_ids()
    for spec in specs:
        check_trained(spec, tasks)
        if progress and (said := untrained_pool(spec, tasks)):
            tqdm.write(said, file=sys.stderr)

    # what cannot be loaded, fits no task, or has no room, is to be known before the first one's hours
    wanted = tokenizer, tuple(devices), tasks, settings, progress
    encoder = _load(specs[0], *wanted)
    known = [_known(encoder), *(_known(_load(spec, *wanted)) for spec in specs[1:])]
    shapes = [of_model for of_model, _ in known]
    if "attentive-probe" in tasks:
        for each in shapes:
            need_patches(each.name, each.of_image["patches"])
    if output is not None:
        make_output(Path(output))
    store = FeatureStore(default_cache() if cache is None else Path(cache), batch_size, processes, progress)
    bad = (
        find_bad(test, store.folder, progress),
        find_bad(train, store.folder, progress) if train is not None else [],
    )
    test = without_bad(test, bad[0], skip_bad_images)
    if train is not None:
        train = without_bad(train, bad[1], skip_bad_images)
        if "knn" in tasks:
            check_neighbors(settings.knn.k, train)
    store.check_room(shapes, _cached(tasks, train, test, settings))

    results: list[Result] = []
    written: list[tuple[str, list[str]]] = []
    gallery: Gallery | None = None
    for number, (spec, (_, source)) in enumerate(zip(specs, known, strict=True)):
        if number:  # the same checkpoint, also of a run that has saved another one meanwhile
            encoder = source(0)
            encoder.name = spec
        step = None if output is None else _step(Path(output), source)
        for task in tasks:
            if task == "captioning":
                assert isinstance(encoder, OurEncoder)
                result, captions = captioning(encoder, test, settings.captioning, seed, batch_size, processes, progress)
                written.append((spec, captions))
            elif task in _NEED_TRAINING:
                assert train is not None
                result = _trained(task, encoder, train, test, store, settings, seed, devices[0])
            elif task == "retrieval":
                result = retrieval(encoder, test, store.features(encoder, test), progress=progress)
            else:
                features = store.features(encoder, test)
                classified = classify(encoder, test, features, progress)
                result = accuracy(encoder, test, classified)
                if output is not None and gallery is None:
                    gallery = make_gallery(test, features, classified, replace(result, step=step), about)
            if bad[1] and task in _NEED_TRAINING:
                result = replace(result, settings={**result.settings, "bad train images": len(bad[1])})
            results.append(replace(result, fingerprint=encoder.fingerprint, num_bad=len(bad[0]), step=step))
    if output is not None:
        _write(Path(output), results, test, written, [*bad[0], *bad[1]], gallery)
    return results


def _check_request(
    models: Sequence[str | Path], tasks: Sequence[str], devices: Sequence[str], batch_size: int, processes: int
) -> None:
    for name, given in {"models": models, "tasks": tasks, "devices": devices}.items():
        if isinstance(given, str | Path):
            raise UserError(
                f"{name} = {str(given)!r} is one, where there may be several; give a list: [{str(given)!r}]"
            )
    if not models or not devices:
        raise UserError(f"models = {list(models)} and devices = {list(devices)}; give at least one of each")
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise UserError(f"unknown task {', '.join(unknown) or '(none given)'}; there are {', '.join(TASKS)}")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}; give a number from 1")
    check_workers(processes, devices)


def _load(
    spec: str, tokenizer: str | None, devices: tuple[str, ...], tasks: Sequence[str], settings: Settings, progress: bool
) -> Encoder:
    """A model on the first device; UserError where it cannot do one of the tasks."""
    encoder = EncoderSource(spec, tokenizer, devices)(0)
    if progress and encoder.untrained_pooled and set(POOLED) & set(tasks):
        tqdm.write(encoder.untrained_pooled, file=sys.stderr)
    if {"zero-shot", "retrieval"} & set(tasks):
        encoder.encode_texts(["a text"])  # says at once if it cannot
    if "captioning" in tasks:
        assert isinstance(encoder, OurEncoder), "check_trained has refused others"
        check_captioning(encoder, settings.captioning.prompt)
    return encoder


def _known(encoder: Encoder) -> tuple[Shapes, Callable[[int], Encoder]]:
    """What stays of an encoder that is loaded again later."""
    assert encoder.source is not None, "load_encoder sets it"
    return Shapes.of(encoder), encoder.source


def _step(output: Path, source: Callable[[int], Encoder]) -> int | None:
    """`Result.step` of what `source` makes."""
    return step_in_run(output, Path(source.spec)) if isinstance(source, EncoderSource) else None


def _cached(
    tasks: Sequence[str], train: ImageSet | None, test: ImageSet, settings: Settings
) -> list[tuple[ImageSet, Kind]]:
    """The features that the tasks want in the cache."""
    kinds: dict[str, Kind] = {task: "pooled" for task in tasks if task not in ("captioning", "attentive-probe")}
    if "attentive-probe" in tasks and settings.attentive_probe.features == "cached":
        kinds["attentive-probe"] = "patches"
    of_train = {kind for task, kind in kinds.items() if task in _NEED_TRAINING} if train is not None else set()
    return [(train, kind) for kind in of_train if train is not None] + [(test, kind) for kind in set(kinds.values())]


def _trained(
    task: str,
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    store: FeatureStore,
    settings: Settings,
    seed: int,
    device: str,
) -> Result:
    sets = train, test
    if task == "attentive-probe":
        own = settings.attentive_probe
        apart = 1 + max(own.seeds)  # two evaluations share no probe
        own = replace(own, seeds=tuple(seed * apart + of_probe for of_probe in own.seeds))
        streamed = own.features == "streamed"
        patches = store.patches(encoder, train, streamed), store.patches(encoder, test, streamed)
        return attentive_probe(encoder.name, *sets, *patches, own, device, store.progress)
    pooled = store.features(encoder, train), store.features(encoder, test)
    if task == "knn":
        of_knn = settings.knn
        return knn(encoder.name, *sets, *pooled, of_knn.k, of_knn.temperature, device)
    return linear_probe(encoder.name, *sets, *pooled, settings.linear_probe, seed, device, store.progress)


def _write(
    folder: Path,
    results: list[Result],
    test: ImageSet,
    written: list[tuple[str, list[str]]],
    bad: list[BadBlob],
    gallery: Gallery | None,
) -> None:
    write_json(results, folder / RESULTS)
    replace_text(folder / "results.txt", table(results) + "\n")
    write_picture(results, folder / "results.png")
    if gallery is not None:
        write_gallery(gallery, folder)
    if written:
        lines = [
            json.dumps({"model": spec, "image": blob.name, "caption": text}) + "\n"
            for spec, captions in written
            for blob, text in zip(test.images, captions, strict=True)
        ]
        replace_text(folder / "captions.jsonl", "".join(lines))
    if bad:
        replace_text(folder / "bad_images.txt", "".join(f"{b.name}: {b.reason}\n" for b in bad))
