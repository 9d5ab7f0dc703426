"""However many shards a corpus has, a process maps a bounded number of them; what is read does not change."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
from corpora import MakeCorpus, random_documents

from megatron_lcl.config import Corpus, Data
from megatron_lcl.curate.documents import ranges
from megatron_lcl.data.corpus import store
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.data.pages import inspect
from megatron_lcl.errors import UserError


def mapped(*folders: Path) -> set[str]:
    """The shards of which this process has files mapped."""
    lines = Path("/proc/self/maps").read_text()
    return {shard for folder in folders for shard in re.findall(rf"{folder}/[a-z]+-(\d+)\.", lines)}


def test_few_shards_are_mapped_at_once(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(30, 1, num_jpegs=20)
    corpora = [make_corpus(name, documents, num_shards=5) for name in ("a", "b")]
    expected = [open_corpus(corpora[0].path)[i] for i in range(30)]
    folders = [corpus.path for corpus in corpora]
    monkeypatch.setattr(store, "MAX_OPEN", 2)
    opened = [open_source(open_corpus(path), Data(), 4, 96, 4).corpus for path in folders]
    most, per_document = [len(mapped(*folders))], inspect._per_document

    def counted(*arguments: Any) -> Any:
        most.append(len(mapped(*folders)))
        return per_document(*arguments)

    monkeypatch.setattr(inspect, "_per_document", counted)
    for use in (
        inspect.stats,
        lambda corpus: ranges(corpus, 1000),
        lambda corpus: [corpus[i] for i in range(0, 30, 7)],
    ):
        for corpus in opened:
            use(corpus)
            most.append(len(mapped(*folders)))
    assert 0 < max(most) <= 2
    held = opened[0].shard(4)
    assert [opened[0][i] for i in range(30)] == expected
    assert opened[0].shard(4) is not held
    assert [bytes(held.image(0))] == [bytes(opened[0].shard(4).image(0))], "one that is in use stays as it is"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_how_many_are_open(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    corpus = make_corpus("a", random_documents(40, 2, num_jpegs=20), num_shards=5)

    def batches() -> list[Any]:
        data = Data(corpora=(Corpus(str(corpus.path)),), tokens_per_pack=512, images_per_pack=4, workers=workers)
        loader = PackedLoader(
            data, 4, 16, 96, global_batch=4, micro_batch=2, world_size=1, rank=0, steps=6, first_pack=0, train=True
        )
        return [(*(array.tolist() for array in batch.integers().values()), batch.images.sum()) for batch in loader]

    expected = batches()
    monkeypatch.setattr(store, "MAX_OPEN", 1)
    assert batches() == expected


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".arrow"])
def test_what_cannot_be_mapped_is_not_damaged(make_corpus: MakeCorpus, suffix: str) -> None:
    corpus = make_corpus("a", random_documents(4))
    os.truncate(corpus.path / f"images-00000{suffix}", 64 << 30)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 30), limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{suffix} cannot be mapped .* \(`sysctl -w vm.max_map_count="):
            Shard(corpus.path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
