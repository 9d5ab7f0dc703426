"""A disk that fills up, a real one: one line that names the file, and whatever was there before is still whole."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert.conftest import TINY, random_model
from data.helpers import byte_level
from data.writers import picture, write_jsonl

from megatron_lcl.cli import main
from megatron_lcl.config import Config, load, to_yaml
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.files import new_array, save_array, sync
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.tokenizer import JsonTokenizer
from megatron_lcl.data.prepare import preprocess_task as pipeline
from megatron_lcl.data.prepare.preprocess import WORK, preprocess
from megatron_lcl.demo import manual
from megatron_lcl.errors import describe_os_error, is_mendable
from megatron_lcl.evaluate.heldout_results import Example, HeldOut, Pair, write_heldout
from megatron_lcl.evaluate.results import Metric, Result, write_json, write_picture
from megatron_lcl.model.reference_format import open_clip_config
from megatron_lcl.run_folder import LOCK
from megatron_lcl.train.resilience.lock import lock_run_folder
from megatron_lcl.train.telemetry import Telemetry, read_metrics

FREE = 4 << 10
SIZES = "image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40 documents, and a run folder on it."""
    folder, rng = tmp_path_factory.mktemp("documents"), random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop ", k=400)) for _ in range(40)]
    write_jsonl([Document((Text(t), Image(picture(i, 80, 60)), Text(t))) for i, t in enumerate(texts)], folder / "in")
    vocab_size = preprocess("jsonl", folder / "in", folder / "corpus", vocab_size=400).vocab_size
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").touch()
    file = folder / "run" / "config.yaml"
    file.write_text(
        f"model: {{vision: {{{SIZES}}}, language: {{vocab_size: {vocab_size}}}}}\n"
        f"train: {{output: {folder / 'run'}, global_batch: 2}}\n"
        f"data: {{corpora: {folder / 'corpus'}, cache: {folder / 'cache'}, tokens_per_pack: 512}}\n"
    )
    file.write_text(to_yaml(load(file)))
    model = random_model()
    (folder / "model").mkdir()
    save_checkpoint(model, Config(model=TINY), folder / "model")
    torch.save(model.state_dict_open_clip(), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(open_clip_config(TINY)))
    JsonTokenizer(byte_level().to_str().encode()).save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with FREE bytes left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root mounts a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        gc.collect()  # what an error's traceback holds may be mapped from there
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int = FREE) -> None:
    facts = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"\0" * (facts.f_bavail * facts.f_bsize - free))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


COMMANDS = {
    "inspect": "inspect corpus --html DISK/page.html",
    "replay": "replay --config run/config.yaml --step 0 --output DISK/page.html",
    "report": "report --run run --output DISK/page.html",
    "export hf": "export --checkpoint model --format hf --output DISK/hf",
    "export timm": "export --checkpoint model --format timm --output DISK/timm",
    "export open_clip": "export --checkpoint model --format open_clip --output DISK/open_clip",
    "import": "import --format open_clip --input model.pt --output DISK/imported",
    "merge": "merge corpus --output DISK/merged",
    "retokenize": "retokenize corpus --tokenizer tokenizer.json --output DISK/retokenized",
    "export-corpus": "export-corpus corpus --output DISK/exported",
    "export-corpus hf": "export-corpus corpus --format hf --output DISK/exported",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands(
    name: str, documents: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("export "):
        pytest.importorskip({"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}[name.split()[1]])
    monkeypatch.chdir(documents)
    arguments = COMMANDS[name].replace("DISK", str(disk)).split()
    (disk / "page.html").write_text("as it was")
    fill(disk)
    before = snapshot(disk)
    assert main(arguments) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    free = rf"{re.escape(arguments[-1])}: No space left on device \([\d.]+ k?B of 2.1 MB are free in .*\)"
    assert re.fullmatch(f"megatron-lcl {arguments[0]}: {free}", said), said
    assert snapshot(disk) == before
    (disk / "ballast").unlink()
    assert main(arguments) == 0
    assert snapshot(disk) != before


def _heldout(folder: Path) -> None:
    pair = Pair(0, 0, 0, "context " * 400)
    write_heldout(folder, HeldOut("corpus", 1, 1, 1), [Example(pair, 1, (pair,) * 4)])


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # seen from Python 3.13 on
def test_a_run_goes_back_on_a_full_disk(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of later steps go, also between those of earlier ones; what has no room waits."""
    with Telemetry(disk, load(None, {"train.progress": "false"}), True, 0) as telemetry:
        for step in range(1, 90):
            telemetry.write({"step": step, "text": "x" * 100})
        telemetry.write({"step": 70, "checkpoint_bytes": 1})
        fill(disk, free=0)
        telemetry.rewind(80)
        for step in range(81, 500):
            telemetry.write({"step": step, "text": "x" * 100})
        assert capsys.readouterr().out.count("metrics cannot be written") == 1
        (disk / "ballast").unlink()
        telemetry.write({"step": 500})
    assert [line["step"] for line in read_metrics(disk)] == [*range(1, 81), 70, *range(81, 501)]


RESULTS = [Result("knn", "encoder", "data", 3, {f"top-{k}": Metric(0.5, 0.4, 0.6) for k in range(60)})]
WRITERS: dict[str, Callable[[Path], None]] = {
    "heldout_examples.json": _heldout,
    "results.json": lambda folder: write_json(RESULTS, folder / "results.json"),
    "results.png": lambda folder: write_picture(RESULTS, folder / "results.png"),
}


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        ("--version", (0, 0)),
        ("checkpoint verify nowhere", (2, 2)),
        ("inspect corpus", (2, 0)),
        ("train --print-config", (2, 0)),
    ],
)
def test_a_log_on_a_full_disk_changes_no_exit_code(words: str, codes: tuple[int, int], documents: Path) -> None:
    """codes: with standard output on a full disk, and standard error; what is no log, but a result, is lost with 2."""
    command = [sys.executable, "-m", "megatron_lcl", *words.split()]
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("PYTHONUNBUFFERED", None)  # with it every line is tried at once
    for out, err, code in ((True, False, codes[0]), (False, True, codes[1]), (True, True, codes[0])):
        with Path("/dev/full").open("wb") as full:
            streams: dict[str, Any] = {"stdout": full if out else -1, "stderr": full if err else -1}
            done = subprocess.run(command, cwd=documents, env=environment, text=True, timeout=60, **streams)
        assert done.returncode == code, (out, err, done)
        if not err:
            said = f"megatron-lcl {words.split()[0]}: No space left on device\n"
            assert done.stderr == (said if code else "") or "nowhere" in done.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_results(name: str, disk: Path) -> None:
    (disk / name).write_text("as it was")
    fill(disk)
    with pytest.raises(OSError, match=f"No space left on device: '{disk / name}'"):
        WRITERS[name](disk)
    assert (disk / name).read_text() == "as it was"
    assert not list(disk.glob(".*"))
    (disk / "ballast").unlink()
    WRITERS[name](disk)
    assert (disk / name).stat().st_size > FREE


def test_a_damaged_result_is_named(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((documents / "run" / "config.yaml").read_text())
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "heldout.json").write_text('{"corpus": "her')
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert f"{tmp_path / 'heldout.json'} is damaged" in capsys.readouterr().err


def test_pages_go_to_pipes_and_through_links(documents: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_lcl", "inspect", str(documents / "corpus"), "--html"]
    shown = subprocess.run([*command, "/dev/stdout"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.startswith("<!DOCTYPE html>")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    for _ in range(2):
        assert main([*command[3:], str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text() in shown


def test_hashes_of_documents_are_written_or_the_part_is_not_done(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a part's hashes do not fit, nothing says that the part is finished, and the next run makes it good."""
    arguments = ("jsonl", documents / "in", tmp_path / "corpus")
    original, work = pipeline.write_file, tmp_path / "corpus" / WORK

    def write_file(path: Path, content: bytes) -> Any:
        if path.name == pipeline.DIGESTS:
            path.with_name(path.name + ".tmp").symlink_to("/dev/full")
        return original(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_file", write_file)
        with pytest.raises(ValueError, match="no space left for"):
            preprocess(*arguments, vocab_size=400, job=(0, 2))
    assert not list(work.glob("part-*"))
    preprocess(*arguments, vocab_size=400)
    assert snapshot(tmp_path / "corpus") == snapshot(documents / "corpus")


def test_a_dry_run_of_curate(
    documents: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is written when the folder for temporary files is full: facts, removals, or what is mapped."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    arguments = ["curate", str(documents / "corpus"), "--dry-run", "--duplicates.documents.action", "keep-one"]
    for free in (0, 4 << 10, 12 << 10, 36 << 10):
        fill(disk, free)
        assert main(arguments) == 2, free
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"no space left for {disk}/\S+, .* are free in {disk}/.* set TMPDIR to", said), said
        (disk / "ballast").unlink()
        assert not any(disk.iterdir())


def test_unpacking_the_manual(disk: Path, tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine")
    package = tmp_path / "package"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "DEBIAN" / "control").write_text(
        f"Package: {manual.PACKAGE.name}\nVersion: 3\nArchitecture: all\nMaintainer: nobody\nDescription: pages\n"
    )
    (package / "index.html").write_bytes(b"<p>" + random.Random(0).randbytes(1 << 18).hex().encode())
    command = [
        "dpkg-deb",
        "--root-owner-group",
        "--build",
        str(package),
        str(disk / f"{manual.PACKAGE.name}_3_all.deb"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    fill(disk)
    with pytest.raises(OSError, match=f"No space left on device: '{disk}'"):
        manual.fetch_manual(disk)
    (disk / "ballast").unlink()
    assert manual.fetch_manual(disk).html == disk / "unpacked"
    shutil.rmtree(disk / "unpacked")
    (disk / f"{manual.PACKAGE.name}_3_all.deb").write_bytes(b"cut" * 99)
    with pytest.raises(ValueError, match=f"in {disk} failed: dpkg-deb: error: .* is not a Debian format archive"):
        manual.fetch_manual(disk)


def test_a_run_is_refused_that_has_no_room_for_a_checkpoint(
    documents: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(disk)
    command = ["train", "--config", str(documents / "run" / "config.yaml"), "--processes", "1", "--train.output"]
    assert main([*command, str(disk / "run"), "--data.cache", str(documents / "cache")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    numbers = r"takes at least [\d.]+ MB, and 4.1 kB of 2.1 MB are free in"
    assert re.search(f"train.output = {disk / 'run'}: a checkpoint of this model {numbers} {disk}; make room", said), (
        said
    )
    assert not (disk / "run").exists()


def test_a_cache_that_is_full_is_named(documents: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk)
    command = ["train", "--config", str(documents / "run" / "config.yaml"), "--processes", "1", "--train.output"]
    assert main([*command, str(documents / "new run"), "--data.cache", str(disk / "cache")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"the pack index cannot be written to {disk / 'cache'} (No space left on device, " in said
    assert "are free" in said
    assert "; make room there, or set data.cache to another folder" in said


def test_what_is_mapped_has_its_space_first(disk: Path) -> None:
    """Else the process would be killed by SIGBUS where it writes to a page that does not fit."""
    fill(disk, 4 * FREE)  # enough for its first and its last page
    with pytest.raises(OSError, match=f"No space left on device: '{disk / 'mapped.npy'}'"):
        new_array(disk / "mapped.npy", np.int64, (9999,))
    (disk / "ballast").unlink()
    new_array(disk / "mapped.npy", np.int64, (9999,))[:] = 3
    assert np.load(disk / "mapped.npy").sum() == 3 * 9999


def test_no_error_of_a_full_disk_is_without_a_name(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes to an open file do not say which: whoever writes does."""
    (disk / "run").mkdir()
    (disk / "run" / LOCK).touch()
    fill(disk, 0)
    writers: dict[str, Callable[[Path], Any]] = {
        LOCK: lambda path: lock_run_folder(path.parent).__enter__(),
        "array.npy": lambda path: save_array(path, np.zeros(9999)),
        "mapped.npy": lambda path: new_array(path, np.int64, (9999,)),
        "hashed": lambda path: write_file(path, b"0" * 9999),
    }
    for name, write in writers.items():
        with pytest.raises(OSError, match=str(disk / "run" / name)) as raised:
            write(disk / "run" / name)
        assert raised.value.errno == errno.ENOSPC
        line = describe_os_error(raised.value)
        assert line == f"{disk / 'run' / name}: No space left on device (0 B of 2.1 MB are free in {disk / 'run'})"
    assert describe_os_error(OSError(errno.EIO, "broken"), "the place") == "the place: broken"

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)  # as NFS does, which has taken what was written
    for place in (disk / "run" / LOCK, disk / "run"):
        with pytest.raises(OSError, match=f"Disk quota exceeded: '{place}'"):
            sync(place)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF])
def test_folders_that_cannot_be_synced(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on VirtualBox's shared folders, and some of CIFS and FUSE: only that a file cannot is an error."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path / 'file'}'"):
        sync(tmp_path / "file")


def test_a_file_that_may_not_grow_further(documents: Path, tmp_path: Path) -> None:
    """As under `ulimit -f`, or on FAT32, whose files end at 4 GB."""
    output = str(tmp_path / "exported")
    code = (
        "import resource, sys\nfrom megatron_lcl.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "export-corpus", str(documents / "corpus"), "--output", output],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"megatron-lcl export-corpus: {output}: File too large"
    assert not list(tmp_path.iterdir())


def test_what_is_of_files_is_a_line() -> None:
    for number in (errno.EIO, errno.ETIMEDOUT, errno.EMFILE):
        assert is_mendable(OSError(number, "broken", "a.png"))
    assert not is_mendable(OSError(errno.ETIMEDOUT, "timed out"))  # of a connection
    assert not is_mendable(OSError(errno.ECONNRESET, "reset", "a.png"))
