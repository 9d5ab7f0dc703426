"""Held-out retrieval and generation: against a brute-force count, and over processes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from data.corpora import Piece, jpeg, random_documents, write_corpus
from processes import run_processes
from s3_fixtures import upload
from s3_server import Proxy

from megatron_lcl import LCL, open_corpus
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Data, Evaluate, Language, Model, Objective, Vision
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.corpus.document import Text
from megatron_lcl.data.loading import shared_memory
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import heldout, heldout_packs
from megatron_lcl.evaluate.heldout import (
    HeldOutEvaluation,
    check_tasks,
    evaluate_checkpoint,
    evaluate_heldout,
)
from megatron_lcl.evaluate.heldout_results import Example, HeldOut, table
from megatron_lcl.evaluate.rules import heldout_data
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.report.page import write_report
from megatron_lcl.run_folder import EXAMPLES, HELDOUT
from megatron_lcl.train import heldout as in_training

ALL = 99
"""examples, more than there are pairs"""
TINY = Model(Vision(16, 8, 32, 1, 2, 64), Language(48, 517, 32, 1, 2, 64), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    documents = random_documents(14, seed=5, mean_text=12.0) * 2  # each context is as near as its copy
    for d in range(4):  # of an image that stands twice each place is right, whatever the third image is; or is none
        twice, rival = ((jpeg(100 + 2 * d + n), None, None) for n in range(2))
        documents.append([[d, 7], twice, [d, 8, 9], twice, *([[d], rival] if d else [])])
    write_corpus(folder / "corpus", documents, num_shards=2)
    return folder


def settings(folder: Path) -> Config:
    data = Data(tokens_per_pack=64, images_per_pack=3, workers=0, cache=str(folder / "cache"))
    return Config(model=TINY, data=data)


def own_model(config: Model = TINY) -> LCL:
    model = LCL(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("log_scale", "logit_bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("bias", [None, -3.0])
@torch.no_grad()
def test_equals_a_brute_force_count(folder: Path, bias: float | None) -> None:
    config, model = settings(folder), own_model(dataclasses.replace(TINY, logit_bias=bias))
    corpus = open_corpus(folder / "corpus")
    result, examples = evaluate_heldout(model, config, folder / "corpus", ALL, progress=False)
    # a pack is one sequence of the model's context, with as many images as it has places for
    data = Data(({"path": str(folder / "corpus")},), 48, (48 - 2) // (4 + 2), cache=str(folder / "cache"))
    data = dataclasses.replace(data, image_first=0.0, workers=0)
    loader = PackedLoader(data, TINY.vision.num_patches, 16, 48, train=False)
    image, text, document, content, context, nll, targets = [], [], [], [], [], 0.0, 0
    for batch in loader:
        out = model.layers(batch)
        nll, targets = nll + float(out.generation), targets + batch.num_targets
        for sequence in loader.provenance(batch.packs[0]):
            before: list[bytes] = []
            for shown in sorted(sequence.images, key=lambda i: i.soi):
                stored = bytes(corpus.shard(shown.shard).image(shown.image))
                if batch.image_soi[shown.slot] >= 0:
                    image.append(out.image_features[shown.slot].double().numpy())
                    text.append(out.text_features[shown.slot].double().numpy())
                    document.append(sequence.document)
                    content.append(stored)
                    context.append((tuple(batch.tokens[sequence.start : shown.soi].tolist()), tuple(before)))
                before.append(stored)
    n = len(image)
    similarity = np.array(image) @ np.array(text).T
    images, contexts = list(dict.fromkeys(content)), list(dict.fromkeys(context))
    pairs = set(zip(content, context, strict=True))
    assert len(images) < n > len(contexts), "images and contexts repeat"
    assert max(sum(i == one for i, _ in pairs) for one in images) > 1, "one image has several contexts"

    def score(one: bytes, read: Any) -> float:
        return float(similarity[content.index(one), context.index(read)])

    def rank(scores: dict[Any, float], right: Sequence[Any]) -> int:
        best = max(scores[j] for j in right)
        return 1 + sum(scores[j] > best - 1e-6 for j in scores if j not in right)

    def shown(example: Example) -> bytes:
        return bytes(corpus.shard(example.pair.shard).image(example.pair.image))

    own_contexts = {i: [c for c in contexts if (i, c) in pairs] for i in images}
    own_images = {c: [i for i in images if (i, c) in pairs] for c in contexts}
    place = [rank({c: score(i, c) for c in contexts}, own_contexts[i]) for i in images]
    back = [rank({i: score(i, c) for i in images}, own_images[c]) for c in contexts]
    among, chances = [], []
    for d, c in dict.fromkeys(zip(document, context, strict=True)):
        inside = {i: score(i, c) for i, other in zip(content, document, strict=True) if other == d}
        right = [i for i in inside if (i, c) in pairs]
        if len(right) < len(inside):
            among.append(rank(inside, right))
            chances.append(len(right) / len(inside))

    def chance(own: dict[Any, list[Any]], answers: int, k: int) -> float:
        return 1 - float(np.mean([math.comb(answers - len(r), k) / math.comb(answers, k) for r in own.values()]))

    at_10 = chance(own_contexts, len(contexts), 10)
    back_at_10 = chance(own_images, len(images), 10)
    logits = math.exp(float(model.head.log_scale)) * similarity
    if model.head.logit_bias is None:
        loss = np.mean([np.log(np.exp(a).sum()) for a in (*logits, *logits.T)]) - np.diagonal(logits).mean()
    else:  # of each pair right or wrong, summed over an image's contexts
        logits += float(model.head.logit_bias)
        loss = np.log1p(np.exp(np.where(np.eye(n), -logits, logits))).sum() / n
    expected = {
        "documents": len(corpus),
        "pairs": n,
        "targets": targets,
        "distinct_images": len(images),
        "distinct_contexts": len(contexts),
        "contexts_with_rivals": len(among),
        "image_to_context_recall_at_1": np.mean(np.array(place) <= 1),
        "image_to_context_recall_at_10": np.mean(np.array(place) <= 10),
        "context_to_image_recall_at_1": np.mean(np.array(back) <= 1),
        "context_to_image_recall_at_10": np.mean(np.array(back) <= 10),
        "chance_at_1": chance(own_contexts, len(contexts), 1),
        "chance_at_10": at_10,
        "context_to_image_chance_at_1": chance(own_images, len(images), 1),
        "context_to_image_chance_at_10": back_at_10,
        "median_rank": float(np.median(place)),
        "image_in_document_recall_at_1": np.mean(np.array(among) <= 1),
        "chance_in_document": np.mean(chances),
        "contrastive_loss": loss,
        "bits_per_token": nll / targets / math.log(2),
    }
    assert n > 20
    assert {k: getattr(result, k) for k in expected} == pytest.approx(expected, rel=1e-5)
    low, high = result.intervals["image_to_context_recall_at_10"]
    assert low <= result.image_to_context_recall_at_10 <= high
    told = [(e.rank, e.pair.document) for e in examples]
    assert told == sorted(told), "those of one rank in the corpus's order"
    assert [e.rank for e in examples] == sorted(place), "of distinct images"
    assert all(len(own_contexts[shown(e)]) == e.num_contexts for e in examples)
    for example in examples:
        scores = {read: score(shown(example), read) for read in contexts}
        near = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
        assert example.right == tuple(read in own_contexts[shown(example)] for read in near)
    assert any(any(example.right) for example in examples)
    for pair in (pair for example in examples for pair in (example.pair, *example.nearest)):
        items = corpus[pair.document].items
        whole = "".join(item.text if isinstance(item, Text) else "\n" for item in items)
        ours, theirs = (re.sub("\n+", "\n", re.sub(r"[^\S\n]", "", text)) for text in (pair.context, whole))
        assert ours[-200:] in theirs
    assert any("\n" in example.pair.context for example in examples)
    assert all(len({pair.context for pair in example.nearest}) > 1 for example in examples)
    many = dataclasses.replace(result, chance_at_10=1 / 5120)
    for of, told_chance in ((result, f"{100 * at_10:.2g}%"), (many, "0.02%")):
        forward, backward = (getattr(of, f"{way}_recall_at_10") for way in ("image_to_context", "context_to_image"))
        assert f"→ context recall@10  {forward:7.1%}   chance {told_chance:>5}   " in table(of)
        assert f"→ image recall@10  {backward:7.1%}   chance {f'{100 * back_at_10:.2g}%':>5}   " in table(of)


def over_processes(rank: int, folder: Path) -> list[tuple[HeldOut, list[Example]]]:
    """As data-parallel replicas, then as one replica of which the first process reads and the last has the outputs."""
    dist.init_process_group("gloo")
    try:
        world, alone = Axis.of_group(dist.group.WORLD), Axis(ranks=(rank,))
        replicas = Mesh(world, data=world, pipeline=alone, tensor=alone, model_parallel=alone, data_tensor=world)
        pipeline = Mesh(world, data=alone, pipeline=world, model_parallel=world, data_tensor=alone)
        return [_evaluate(folder, mesh) for mesh in (replicas, pipeline)]
    finally:
        dist.destroy_process_group()


def _evaluate(folder: Path, mesh: Mesh) -> tuple[HeldOut, list[Example]]:
    model = own_model()

    def forward(read: Sequence[PackedBatch] | None, num: int) -> list[Any]:
        assert (read is not None) == mesh.loads_data
        batches = mesh.model_parallel.broadcast_object(read)
        assert batches is not None
        assert len(batches) == num
        last = mesh.pipeline.rank == mesh.pipeline.size - 1
        return [(batch, model.layers(batch) if last else None) for batch in batches]

    evaluation = HeldOutEvaluation(settings(folder), folder / "corpus", mesh, forward, tokens=100, at_once=3)
    assert evaluation.micro_batch == 2
    first, second = evaluation.run(), evaluation.run(num_examples=ALL, intervals=True)
    assert dataclasses.replace(second[0], intervals={}) == first[0], "an evaluation changes the next"
    return second


@pytest.mark.slow
def test_three_processes_measure_what_one_does(folder: Path) -> None:
    alone, examples = evaluate_heldout(own_model(), settings(folder), folder / "corpus", ALL, progress=False)
    for of_layout in zip(*run_processes(over_processes, 3, folder), strict=True):
        for result, _ in of_layout:
            assert result.intervals.keys() == alone.intervals.keys()
            assert result.numbers() == pytest.approx(alone.numbers(), rel=1e-5)
            assert (result.documents, result.pairs, result.targets) == (alone.documents, alone.pairs, alone.targets)
        told = of_layout[0][1]
        assert told == examples
        assert len({e.rank for e in examples}) < len(examples) == alone.distinct_images, "some are equal"
        assert all(e.pair.context for e in told)


def test_what_processes_encode_is_measured_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several batches, which are encoded one after the other here."""
    monkeypatch.setattr(heldout, "_TOKENS", 4 * 48)
    model, config = own_model(dataclasses.replace(TINY, logit_bias=-3.0)), settings(folder)
    jobs_of: list[int] = []

    def in_turn(jobs: Sequence[Any], bar: Any) -> list[bytes]:
        jobs_of.append(len(jobs))
        return [job(number, 1, bar.update) for number, job in enumerate(jobs)]

    monkeypatch.setattr(heldout, "in_processes", in_turn)
    source: Any = lambda _: (model, config)  # noqa: E731
    (one, examples), (two, same_examples) = (
        evaluate_heldout(model, config, folder / "corpus", ALL, False, source=source, processes=n) for n in (1, 2)
    )
    assert jobs_of == [2]
    assert two.numbers() == pytest.approx(one.numbers(), rel=1e-6)
    assert same_examples == examples


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_processes_of_the_command_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches: of one a single process is started."""
    write_corpus(tmp_path / "corpus", random_documents(14, seed=5, mean_text=12.0) * 8, num_shards=2)
    in_processes, jobs_of = heldout.in_processes, list[int]()

    def counted(jobs: Sequence[Any], bar: Any) -> list[bytes]:
        jobs_of.append(len(jobs))
        return in_processes(jobs, bar)

    monkeypatch.setattr(heldout, "in_processes", counted)
    data = Data(workers=0, cache=str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    save_checkpoint(own_model(), Config(model=TINY, data=data), tmp_path / "run")
    found: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for processes in ("1", "2"):
        output = tmp_path / processes
        words = ["evaluate", str(tmp_path / "run"), "--corpus", str(tmp_path / "corpus"), "--output", str(output)]
        assert main([*words, "--device", "cpu", "--processes", processes]) == 0
        found[processes] = tuple(json.loads((output / name).read_text()) for name in (HELDOUT, EXAMPLES))  # type: ignore[assignment]
    assert jobs_of == [2]
    (one, examples), (two, same_examples) = found["1"], found["2"]
    assert one["pairs"] > 20
    assert one["bits_per_token"] > 0
    intervals, same_intervals = one.pop("intervals"), two.pop("intervals")
    assert two == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in one.items()}
    assert same_intervals == intervals
    assert same_examples == examples


def test_processes_and_devices_of_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(own_model(), Config(model=TINY), tmp_path)
    words = ["evaluate", str(tmp_path), "--corpus", str(folder / "corpus")]
    for more, said in (
        (["--processes", "0"], "0 processes; give a number from 1"),
        (["--device", "nowhere"], "the device 'nowhere' cannot be used"),
        (["--batch-size", "2"], "--batch-size goes with --data"),
        (["--seed", "2"], "--seed goes with --data"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


def test_tasks_are_those_that_the_objective_trains(folder: Path) -> None:
    assert check_tasks(Config(), ()) == ("retrieval", "generation")
    assert check_tasks(Config(), ("generation",)) == ("generation",)
    clip = Config(objective=Objective(name="clip"))
    assert check_tasks(clip, ()) == ("retrieval",)
    with pytest.raises(ValueError, match="clip does not train what generation measures"):
        check_tasks(clip, ("generation",))
    config = dataclasses.replace(settings(folder), objective=Objective(name="generation"))
    result, examples = evaluate_heldout(own_model(), config, folder / "corpus", progress=False)
    assert result.bits_per_token is not None
    assert result.image_to_context_recall_at_1 is None
    assert not examples
    assert "recall" not in table(result)


def test_numbers_do_not_depend_on_the_settings_of_training(tmp_path: Path) -> None:
    """The same corpus and weights give the same pairs, whatever `data.*` and the objective were."""
    matched = random_documents(12, seed=6, matched=True, mean_text=12.0)
    documents = [*random_documents(14, seed=5, mean_text=12.0), *matched]
    write_corpus(tmp_path / "corpus", documents, num_shards=2)
    model = own_model()

    def measured(objective: str = "lcl", **data: Any) -> tuple[HeldOut, list[Example]]:
        section = Data(workers=0, cache=str(tmp_path / "cache"), **data)
        config = Config(model=TINY, data=section, objective=Objective(name=objective))
        return evaluate_heldout(model, config, tmp_path / "corpus", progress=False)

    result, examples = measured(tokens_per_pack=256)
    assert result.pairs > 20
    assert result.rules["version"] == 3
    assert result.rules["sequence_tokens"] == 48
    assert measured(tokens_per_pack=1024) == (result, examples)
    assert measured(tokens_per_pack=40, images_per_pack=1) == (result, examples)
    other: dict[str, Any] = {"min_similarity": 0.0, "max_images_per_segment": 3, "min_images": 0, "max_images": 1}
    other |= {"image_first": 1.0, "pair_layout": "reference", "contrast_leading_images": True, "seed": 7}
    assert measured(**other) == (result, examples)
    # what another objective does not train is not measured; what it does is the same
    clip, clip_examples = measured("clip")
    assert clip_examples == examples
    assert clip == dataclasses.replace(result, targets=0, bits_per_token=None)
    generation, _ = measured("generation")
    assert (generation.targets, generation.bits_per_token) == (result.targets, result.bits_per_token)


def test_a_context_too_short_for_an_image_is_measured_on_lone_texts(tmp_path: Path) -> None:
    """Objective clip can train it; there is one pair for each image with a text."""
    model = LCL(dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, context_length=8)))
    write_corpus(tmp_path / "corpus", [[(jpeg(d), None, None), [d + 1, d + 2]] for d in range(9)])
    config = Config(model.config, Data(workers=0, cache=str(tmp_path / "cache")), Objective(name="clip"))
    result, _ = evaluate_heldout(model.eval(), config, tmp_path / "corpus", progress=False)
    assert (result.rules["sequences"], result.images, result.pairs) == ("pairs", 9, 9)


@pytest.mark.parametrize("layout", ["document", "reference"])
def test_every_pair_is_measured(tmp_path: Path, layout: Any) -> None:
    """Half of them stood image first; and of a long caption the image began a sequence without it."""
    captions = [[d + 1, d + 2, *range(10, 10 + 3 * d)] for d in range(40)]
    pairs: list[list[Piece]] = [[(jpeg(d), None, None), caption] for d, caption in enumerate(captions)]
    write_corpus(tmp_path / "corpus", pairs, source="webdataset")
    config = Config(TINY, Data(workers=0, cache=str(tmp_path / "cache"), pair_layout=layout))
    result, examples = evaluate_heldout(own_model(), config, tmp_path / "corpus", num_examples=99, progress=False)
    assert (result.documents, result.images, result.pairs) == (40, 40, 40)
    # every token but the image's own is a target once: text, `<soi>`, and `<eot>` of each sequence
    sequences = [1 if len(caption) + 6 <= 46 else math.ceil((len(caption) + 6) / 46) for caption in captions]
    assert result.targets == sum(len(caption) + 1 for caption in captions) + sum(sequences)
    assert all(example.pair.context for example in examples)


def test_images_that_do_not_decode_are_counted_and_said(tmp_path: Path) -> None:
    bad = b"\xff\xd8 this was a picture"
    write_corpus(tmp_path / "corpus", [[[d + 1, 2], (bad if d % 4 == 3 else jpeg(d), None, None)] for d in range(120)])
    config = Config(TINY, Data(workers=0, cache=str(tmp_path / "cache"), max_bad_images=1))
    result, _ = evaluate_heldout(own_model(), config, tmp_path / "corpus", progress=False)
    assert (result.pairs, result.images, len(result.bad_images)) == (90, 90, 30)
    assert "shard 0, image 3: " in result.bad_images[0]
    assert "30 do not decode" in table(result)
    write_corpus(tmp_path / "undecodable", [[[1], (bad, None, None)]])
    config = dataclasses.replace(config, objective=Objective(name="clip"))
    with pytest.raises(UserError, match=r"nothing for retrieval \(1 of its images do not decode\)"):
        evaluate_heldout(own_model(), config, tmp_path / "undecodable", progress=False)


def test_several_processes_name_bad_images_in_the_order_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bar ends full. (In this process, one after the other.)"""
    bars = []

    def one_after_the_other(jobs: Sequence[Any], bar: Any) -> list[bytes]:
        bars.append(bar)
        return [job(number, 1, bar.update) for number, job in enumerate(jobs)]

    monkeypatch.setattr(heldout, "in_processes", one_after_the_other)
    monkeypatch.setattr(heldout, "_TOKENS", 48)
    images = [b"\xff\xd8 was picture %d" % d if d % 2 else jpeg(d) for d in range(30)]
    write_corpus(tmp_path / "corpus", [[[d + 1, 2], (image, None, None)] for d, image in enumerate(images)])
    config = Config(TINY, Data(workers=0, cache=str(tmp_path / "cache")))
    source: Any = mock.Mock(return_value=(own_model(), config))
    named = [
        evaluate_heldout(own_model(), config, tmp_path / "corpus", source=source, processes=processes)[0].bad_images
        for processes in (1, 3)
    ]
    assert len({*named[0]}) == 15
    assert named[0] == named[1]
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [12], "ten packs"


def test_images_are_page_locked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way to a GPU, of the slots in use: not by the loader's thread, which has all, most of them empty."""
    loaders: list[dict[str, Any]] = []
    plain, locked = heldout_packs.PackedLoader, []

    def made(*arguments: Any, **keywords: Any) -> PackedLoader:
        loaders.append(keywords)
        return plain(*arguments, **keywords)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        locked.append(tensor)
        return tensor

    def sent(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    monkeypatch.setattr(heldout_packs, "PackedLoader", made)
    model = mock.Mock(parameters=lambda: iter([mock.Mock(device=torch.device("cuda"))]))
    evaluation = heldout._of_model(model, settings(folder), folder / "corpus", Axis(), 1)
    config = dataclasses.replace(settings(folder), evaluate=Evaluate(corpus=str(folder / "corpus")))
    nothing: Any = None
    in_training.HeldOutMeter(config, Mesh(Axis(), Axis()), nothing, nothing, nothing, nothing, lambda: 0)
    assert len(loaders) == 2
    assert not any(keywords.get("pin_memory") for keywords in loaders)
    assert evaluation.packs is not None
    batch = next(iter(evaluation.packs.loader))
    used = heldout_packs.slots_in_use(batch, with_targets=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pin)
        patch.setattr(torch.Tensor, "to", sent)
        used.to("cuda")
    assert [len(tensor) for tensor in locked if tensor.dtype == torch.uint8] == [batch.num_images]
    assert batch.num_images < len(batch.images)


def test_a_corpus_in_object_storage_is_kept_where_the_config_says(
    place: str, s3: Proxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the user's cache folder, no small file fetched twice, and of the reading what the config says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    data = Data(workers=0, cache=str(tmp_path / "cache"), storage_cache_gb=0.0, look_ahead=3)
    config = Config(model=TINY, data=data)
    (tmp_path / "run").mkdir()
    save_checkpoint(own_model(), config, tmp_path / "run")
    upload(folder / "corpus", place)
    told = evaluate_checkpoint(tmp_path / "run", Path(place), tmp_path / "run")
    assert told.replace(place, "") == evaluate_checkpoint(tmp_path / "run", folder / "corpus").replace(
        str(folder / "corpus"), ""
    )
    fetched = [r.path for r in s3.requests if r.method == "GET" and r.path.endswith((".idx", ".arrow", ".json"))]
    small = [path for path in fetched if not path.endswith("corpus.json")]
    assert len(small) == len({*small}) >= 4, small
    write_report(tmp_path / "run")
    assert not (tmp_path / "user" / "megatron_lcl").exists()
    own = heldout_data(config, place)
    assert (own.cache, own.storage_cache_gb, own.look_ahead, own.workers) == (data.cache, 0.0, 3, 0)


def test_another_machine_than_the_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no such cache folder, and in its shared memory no room for the run's loader processes."""
    data = Data(workers=2, cache=str(tmp_path / "config.yaml" / "cache"))
    save_checkpoint(own_model(), Config(model=TINY, data=data), tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: 1000)
    read = []
    monkeypatch.setattr(heldout_packs, "heldout_data", lambda *config: read.append(heldout_data(*config)) or read[-1])
    evaluate_checkpoint(tmp_path, folder / "corpus")
    assert [(data.workers, data.cache) for data in read] == [(0, None)]
    assert (tmp_path / "user" / "megatron_lcl").is_dir()


def test_documents_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    model = LCL(dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, vocab_size=520)))
    save_checkpoint(model, Config(model=model.config), tmp_path)
    with pytest.raises(UserError, match="has 517 ids, the model 520"):
        evaluate_checkpoint(tmp_path, folder / "corpus")


def test_an_output_that_cannot_be_is_known_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(own_model(), Config(model=TINY), tmp_path)
    monkeypatch.setattr(heldout, "evaluate_heldout", None)
    for output in (tmp_path / "config.yaml", tmp_path / "config.yaml" / "out"):
        with pytest.raises(UserError, match=f"cannot write results into {output}"):
            evaluate_checkpoint(tmp_path, folder / "corpus", output)


def test_an_untrained_model_as_a_baseline(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(own_model(), Config(model=TINY), tmp_path)
    told = evaluate_checkpoint(f"random:{tmp_path}?seed=3", folder / "corpus")
    config = Config(TINY, Data(workers=0, cache=str(tmp_path / "cache")))
    result, _ = evaluate_heldout(LCL(TINY, seed=3).eval(), config, folder / "corpus", progress=False)
    assert told == table(result)
