"""The commands of the README, of the report and of the page for one GPU, as they are typed, on a few documents."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from data.writers import picture, write_jsonl
from launch.conftest import TINY, WORDS
from small_corpus import make_corpus

from megatron_lcl import LCL, open_corpus
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Corpus, Data, Language, Model, Vision, load, replace
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.model.activations import unit_norm
from megatron_lcl.train import checks, dryrun
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import Memory, estimate

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^ *(megatron-lcl (?:preprocess|verify|inspect|train|evaluate|export) .*)$", re.M)
README, REPORT, ONE_GPU = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "megatron_lcl/report/report.html", "docs/one-gpu.md")
)


def without_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are meant for other machines, with memory for them; with what is here their steps would be simulated."""
    for module in (checks, dryrun):
        monkeypatch.setattr(module, "available", lambda local: Memory(1e15, "this machine has much"))


def test_the_reports_commands_are_the_readmes() -> None:
    ours, theirs = ([c.split("<")[0] for c in COMMAND.findall(text)] for text in (REPORT, README))
    assert len(ours) == 4
    assert [command for command in theirs if command in ours] == ours


def test_memory_of_one_gpu_is_the_estimates() -> None:
    """Every number of the table, and every config that is meant for one model."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\S+) \| (\S+) \|$", ONE_GPU, re.M)
    names = {file.stem for file in (ROOT / "configs").glob("*.yaml") if not file.stem.endswith("blend")}
    assert {name for name, *_ in rows} == names
    for name, images, *told in rows:
        file = ROOT / "configs" / f"{name}.yaml"
        assert f"at about {images} images a pack" in file.read_text()
        for recomputed, gigabytes in zip(("none", "full"), told, strict=True):
            chosen = {"contrast__strategy": "recompute", "train__global_batch": 64, "train__dtype": "bfloat16"}
            split = {"parallel__tensor": 1, "parallel__pipeline": 1, "zero__stage": 1}
            config = replace(load(file), **chosen, **split, train__activation_checkpointing=recomputed)
            assert config.data.tokens_per_pack == 8192
            found = estimate(config, 1, int(images)).total / 1e9
            assert float(gigabytes) == (round(found) if found >= 10 else round(found, 1)), (name, recomputed, found)


def test_commands_for_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data's are run, the training is tried with --dry-run; of the others all options are taken, up to the first
    thing that the training would have written."""
    pytest.importorskip("open_clip")  # CLIP's vocabulary
    write_jsonl([Document((Text(" ".join(WORDS[k:])), Image(picture(k)), Text(WORDS[k]))) for k in range(9)], tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    without_simulation(monkeypatch)
    commands = [shlex.split(line.strip()) for line in re.findall(r"^ {4}(megatron-lcl .*)$", ONE_GPU, re.M)]
    assert [command[1] for command in commands] == [
        *("preprocess", "verify", "plan", "train", "train", "evaluate", "report"), *["evaluate"] * 4, "export"
    ]  # fmt: skip
    dry, real = (command for command in commands if command[1] == "train")
    assert dry == [*real, "--dry-run"]
    (planned,) = (command for command in commands if command[1] == "plan")
    assert planned[:10] == ["megatron-lcl", "plan", *dry[2:10]], "what is planned is what is trained"
    missing = {"report": "runs/one is neither a run folder", "export": "there is no checkpoint runs/one"}
    for command in commands:
        words = command[1:]
        if words[0] in ("preprocess", "verify"):
            assert main(words) == 0, words
        elif command == dry:
            assert main([*words, "--data.cache", str(tmp_path / "cache")]) == 0
            assert "memory      a process holds at least" in capsys.readouterr().out
        elif command not in (real, planned):
            capsys.readouterr()
            assert main(words) == 2, words
            (line,) = capsys.readouterr().err.splitlines()
            wanted = missing.get(words[0]) or (
                "runs/one" if "corpora/heldout" in words else words[words.index("--data") + 1]
            )
            assert wanted in line, line


def test_commands_for_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model and the layout of its plan are valid, and its options are; what is told of the model is so."""
    page = (ROOT / "docs/one-node.md").read_text(encoding="utf-8")
    plan, dry, real, *others = (shlex.split(line)[1:] for line in re.findall(r"^ {4}(megatron-lcl .*)$", page, re.M))
    assert dry == [*real, "--dry-run"]
    assert plan[:3] == ["plan", "--config", "configs/lcl_vitl14_interleaved.yaml"]
    assert plan[5:] == ["--gpus", "8", "--gpu", "h100", "--write", "l16.yaml"]
    given = {"model__vision__patch_size": 16, "zero__stage": 2, "train__micro_batch": 8, "contrast__strategy": "retain"}
    config = replace(load(ROOT / plan[2]), **given)
    with torch.device("meta"):
        model = LCL(config.model)
    assert f"model       {sum(p.numel() for p in model.parameters()):,} parameters" in page
    check_layout(config, 8)
    assert "a replica runs 8 micro-batches of 8" in page
    step, days, hours = (
        float(re.findall(rf"{before}([\d.,]+){after}", page)[0].replace(",", ""))
        for before, after in (("step        ", " s:"), ("images: ", " days"), ("days, ", " GPU-hours"))
    )
    assert f"run         {config.train.steps * 512 * 27:,} images" in page
    assert days == pytest.approx(config.train.steps * step / 86400, rel=0.002)
    assert hours == pytest.approx(days * 24 * 8, rel=0.001)
    (huge,) = re.findall(r"`(--model\.vision\.width.*?)`", page, re.S)
    for options in (plan[3:5], shlex.split(huge)):
        assert main(["train", *plan[1:3], *options, "--data.corpora", "corpora/mine", "--print-config"]) == 0
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for words in others:
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "runs/l16" in line or "pets" in line, line


def test_files_and_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in (README, REPORT, *(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))):
        named = {e for wanted in re.findall(r"pip install -e \"\.\[(.*?)\]", text) for e in wanted.split(",")}
        assert named or text not in (README, REPORT)
        assert named <= extras.keys()
        if re.search(r"^ {4}megatron-lcl .* --tokenizer clip ", text, re.M):
            assert "clip" in named, f"CLIP's tokenizer is in an extra, which this page does not name: {text[:40]}"
    assert "](docs/index.md)" in README, "the site's first page names all others"
    assert dead_links(README) == []


def dead_links(text: str) -> list[str]:
    """The links of the README that lead to no file, or to no heading of it."""
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        page = ROOT / (path or "README.md")
        if "://" not in link and not (page.exists() and (not anchor or anchor in anchors(page.read_text("utf-8")))):
            dead.append(link)
    return dead


def anchors(page: str) -> set[str]:
    """Those that GitHub gives the headings of a page: lower case, without punctuation, a hyphen for each space; the
    second of one name has -1 behind it."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.M):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(next(name for n in range(99) if (name := f"{slug}-{n}" if n else slug) not in found))
    return found


def test_a_link_to_no_heading_is_found() -> None:
    page = "# A page\n## Several runs: `--sweep`\n### [A link](x.md), twice\n### A link twice #\n"
    page += "```\n# code\n```\n    # code\n"
    assert anchors(page) == {"a-page", "several-runs---sweep", "a-link-twice", "a-link-twice-1"}
    dead = (
        "docs/launching.md#sweep",
        "docs/launch.md#several-runs---sweep",
        "#nowhere",
        "docs/none.md",
        "docs/none.md#x",
    )
    there = "docs/launching.md#several-runs---sweep", "docs/launching.md", "#step-by-step", "https://host/x#y"
    assert dead_links("".join(f"[x]({link}) " for link in (*dead, *there))) == list(dead)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path / "corpora" / "made", 3)
    corpus.rename(tmp_path / "corpora" / "mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "windmill.jpg").write_bytes(picture(1))
    vocab_size = open_corpus("corpora/mine").tokenizer.vocab_size
    Path("runs/b32").mkdir(parents=True)
    model = LCL(Model(Vision(16, 8, 32, 1, 2, 64), Language(64, vocab_size, 48, 1, 4, 96), 4))
    save_checkpoint(model, Config(model=model.config, data=Data(corpora=(Corpus("corpora/mine"),))), Path("runs/b32"))
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert (names["latents"].shape, names["contexts"].shape) == ((1, 48), (2, 48))
    encoder, ids = names["encoder"], names["token_ids"]
    torch.testing.assert_close(names["latents"], unit_norm(encoder.encode(names["images"]).pooled))
    torch.testing.assert_close(names["contexts"], encoder.encode_texts(["a windmill", "a cat on a chair"]))
    own = open_corpus("corpora/mine").tokenizer
    assert ids[0][ids[0] != 0].tolist() == [own.sot, *own.encode("a windmill"), own.eot]
    assert encoder.token_ids(["a cat on a chair " * 99]).shape == (1, 64)


@pytest.mark.slow
def test_every_command_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("open_clip", "transformers"):
        pytest.importorskip(package)
    write_jsonl([Document((Text(" ".join(WORDS[k:])), Image(picture(k)), Text(WORDS[k]))) for k in range(9)], tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    without_simulation(monkeypatch)
    commands = [shlex.split(command)[1:] for command in COMMAND.findall(README) if "--help" not in command]
    assert [command[0] for command in commands] == ["preprocess", "verify", "inspect", "train", "evaluate", "export"]
    for command in commands:
        assert main([*command, "--dry-run"] if command[0] == "train" else command) == 0
        if command[0] == "train":  # the real one is for GPUs and weeks
            small = ["--train.steps", "1", "--train.dtype", "float32", "--data.cache", str(tmp_path / "cache")]
            assert main([*command, *TINY, "--train.global_batch", "2", *small, "--processes", "1"]) == 0
    for written in ("corpora/heldout/corpus.json", "sample.html", "exports/b32/config.json"):
        assert (tmp_path / written).is_file()
