"""The quickstart as a newcomer runs it, on a small folder of pages and a dozen emoji: twice, with everything it
promises at the end; and without the emoji, where they cannot be had."""

from __future__ import annotations

import io
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from demo.test_emoji import write_packages
from PIL import Image, ImageDraw
from train.resilience.fleet import Fleet

from megatron_lcl import load_model
from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.demo import packages
from megatron_lcl.demo import train as train_module
from megatron_lcl.demo.train import RUN, WITH_NEAR_DUPLICATES
from megatron_lcl.quickstart.run import _add_emoji, _Pages

ROOT = Path(__file__).parents[2]

WORDS = """
the pencil tool draws hard lines while a brush paints soft ones over any layer of your picture
""".split()  # noqa: SIM905


TOPIC = "animals & nature: mammals"
"""of the emoji; no word of it is in the pages"""


def write_pages(folder: Path, num_pages: int = 24) -> None:
    """Pages with headings, paragraphs and two drawings each, all different, and a navigation bar."""
    rng = random.Random(0)
    folder.mkdir()
    for page in range(num_pages):
        body = []
        for part in range(2):
            image = Image.new("RGB", (96, 80), tuple(rng.choices(range(256), k=3)))
            draw = ImageDraw.Draw(image)
            for _ in range(12):
                x, y = rng.randrange(90), rng.randrange(70)
                draw.rectangle(
                    (x, y, x + rng.randrange(4, 60), y + rng.randrange(4, 60)), tuple(rng.choices(range(256), k=3))
                )
            image.save(folder / f"{page}-{part}.png")
            text = " ".join(rng.choices(WORDS, k=40))
            body.append(
                f"<h2>Part {page}.{part}</h2><p>{text}</p><img src='{page}-{part}.png' alt=''><p>{text[:60]}</p>"
            )
        links = "".join(f"<a href='{p}.html'>{p}</a>" for p in range(num_pages))
        html = f"<html><body><nav>{links}</nav><h1>Page {page}</h1>{''.join(body)}</body></html>"
        (folder / f"{page}.html").write_text(html, encoding="utf-8")


def arguments(pages: Path, output: Path) -> list[str]:
    given = str(pages.parent / "packages")
    return ["quickstart", "--html", str(pages), "--from", given, "--output", str(output)]


def quickstart(pages: Path, output: Path) -> str:
    """What the command says, as a newcomer gives it."""
    command = [sys.executable, "-m", "megatron_lcl", *arguments(pages, output), "--steps", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "{" not in result.stdout  # no Python object as it prints itself
    return result.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write_pages(folder / "pages")
    write_packages(folder / "packages")
    said = quickstart(folder / "pages", folder / "out")
    for step in range(1, 7):
        assert f"[{step}/6]" in said
    return folder / "out"


@pytest.mark.slow
def test_the_encoder_is_a_hugging_face_model_with_the_same_outputs(output: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(output / "hf")
    ours = load_model(output / "run")
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = getattr(theirs, "vision_model", theirs)(images).last_hidden_state
        expected = ours.vision_tokens(images)
    assert (last - expected).norm() <= 1e-5 * expected.norm()
    certificate = json.loads((output / "hf" / "certificate.json").read_text())
    assert certificate


@pytest.mark.slow
def test_held_out_documents_are_measured(output: Path) -> None:
    result = json.loads((output / "run" / "heldout.json").read_text())
    assert result["pairs"] >= 2
    assert result["chance_at_1"] == pytest.approx(1 / result["distinct_contexts"])
    assert result["context_to_image_chance_at_1"] == pytest.approx(1 / result["distinct_images"])
    assert 0 < result["bits_per_token"] < 20


@pytest.mark.slow
def test_the_held_out_artist_is_named(output: Path) -> None:
    for folder in (output / "run", output / "run" / WITH_NEAR_DUPLICATES):
        (result,) = json.loads((folder / "results.json").read_text())
        assert result["num_items"] == result["settings"]["classes"] >= 8
        accuracy = result["metrics"]["accuracy"]
        assert accuracy["chance"] == 1 / result["num_items"]
        gallery = json.loads((folder / "gallery.json").read_text())
        assert gallery["num_right"] == round(accuracy["value"] * result["num_items"])
        assert len(gallery["right"]) + len(gallery["wrong"]) == len(gallery["marks"]) == result["num_items"]
    corpora = [output / "corpus", *(output / "emoji" / "corpora" / name for name in ("labels", "pairs", "heldout"))]
    assert len({open_corpus(corpus).tokenizer.fingerprint for corpus in corpora}) == 1
    tokenizer = open_corpus(output / "corpus").tokenizer
    assert len(tokenizer.encode("the pencil tool draws")) == 4
    assert len(tokenizer.encode(TOPIC)) < 15  # it has learned the emoji's words too
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert {Path(corpus["path"]).name for corpus in config["data"]["corpora"]} >= {"corpus", "labels", "pairs"}
    assert config["schedule"]["cooldown"] == 1, "of 4 steps the share that it is of all"


def page_of_first_run() -> str:
    return (ROOT / "docs/first-run.md").read_text("utf-8")


def markdown_commands(folder: Path) -> list[list[str]]:
    """The commands of docs/first-run.md, in order, with the documents in `folder` that they are for."""
    write_pages(folder / "papers", 8)
    for page in (folder / "papers").glob("*.html"):
        text = re.sub(r"<nav>.*?</nav>|</?(html|body)>", "", page.read_text(encoding="utf-8"))
        page.with_suffix(".md").write_text(text, encoding="utf-8")
        page.unlink()
    commands = re.findall(r"^ {4}megatron-lcl (.*)$", page_of_first_run(), re.M)
    assert [command.split()[0] for command in commands] == ["preprocess", "train", "evaluate", "report", "export"]
    return [shlex.split(command) for command in commands]


@pytest.mark.slow
def test_own_documents_need_no_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/first-run.md as a newcomer types them in a checkout; N is also what `preprocess` prints."""
    commands = markdown_commands(tmp_path)
    ((inspect, program),) = re.findall(
        r'^ {4}N=\$\(megatron-lcl (.*) \| python -c "(.*)"\)$', page_of_first_run(), re.M
    )
    (tmp_path / "megatron_lcl").symlink_to(ROOT / "megatron_lcl")
    monkeypatch.chdir(tmp_path)
    preprocess, train, *rest = commands
    assert main(preprocess) == 0, capsys.readouterr().err
    size, _ = re.findall(r"(\d+) token ids", capsys.readouterr().out)  # of the corpus, and the same of what is held out
    assert main(shlex.split(inspect)) == 0, capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(capsys.readouterr().out))
    exec(program, {})
    assert capsys.readouterr().out == f"{size}\n"
    train[train.index("$N")] = size
    short = "--train.steps 1 --train.global_batch 2 --train.micro_batch 1".split()  # noqa: SIM905
    with Fleet(Path("runs/papers"), *train[1:], *short, size=1) as fleet:
        assert fleet.wait() == [0], fleet.said()
    for words in rest:
        assert main(words) == 0, capsys.readouterr().err
    assert "heldout" in Path("runs/papers/report.html").read_text(encoding="utf-8")
    assert Path("exports/papers/model.safetensors").is_file()


@pytest.mark.slow
def test_own_documents_may_take_its_config_and_its_tokenizer(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/first-run.md says, without a size of the vocabulary."""
    preprocess, train, *_ = markdown_commands(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(output)
    monkeypatch.chdir(tmp_path)
    page = page_of_first_run()
    (tokenizer,) = re.findall(r"`(--tokenizer \S+)` for `preprocess`", page)
    (config,) = re.findall(r"for `train` `--config (\S+)`", page)
    at = train.index("--model.language.vocab_size")
    del train[at : at + 2]
    train[train.index("--config") + 1] = config
    assert main([*preprocess, *tokenizer.split()]) == 0, capsys.readouterr().err
    assert main([*train, "--dry-run", "--processes", "1"]) == 0, capsys.readouterr().err


def test_without_npm_the_pages_alone_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pages(tmp_path / "pages")
    monkeypatch.setattr(packages, "npm", lambda: None)
    pages = _Pages(tmp_path / "out", tmp_path / "pages", None)
    assert not _add_emoji(pages, None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("without the emoji, on the pages alone: npm is not on this machine")
    assert line.endswith("; and then give a new --output")
    assert not (tmp_path / "out" / "corpus").exists()
    tokenizer = pages.write()
    assert len(tokenizer.encode(TOPIC)) > 18
    capsys.readouterr()
    # with npm it goes on as it began: another tokenizer would be another corpus
    write_packages(tmp_path / "packages")
    assert not _add_emoji(pages, tmp_path / "packages")
    assert "was begun with the pages alone, and goes on with them; with the emoji: a new" in capsys.readouterr().out
    assert pages.write().fingerprint == tokenizer.fingerprint


def test_pages_that_lack_images_are_to_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart has no flag for how much may be bad."""
    write_pages(tmp_path / "pages", 4)
    for name in ("0-0.png", "1-0.png"):
        (tmp_path / "pages" / name).write_bytes(b"")
    monkeypatch.setattr(packages, "npm", lambda: None)
    assert main(["quickstart", "--html", str(tmp_path / "pages"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 8 images are bad, 25%" in said
    assert said.endswith(f"; mend the input (all reasons, with names: {tmp_path / 'out/corpus/drops.jsonl'})")


@pytest.mark.slow
def test_the_pages_alone_come_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pages(tmp_path / "pages")
    monkeypatch.setattr(packages, "npm", lambda: None)
    monkeypatch.setattr(train_module, "start_local", start_forked)
    out = tmp_path / "out"
    assert main(["quickstart", "--html", str(tmp_path / "pages"), "--output", str(out), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "without the emoji, on the pages alone: npm is not on this machine" in said
    assert "[6/6]" in said
    assert "zero-shot" not in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert [Path(corpus["path"]).name for corpus in config["data"]["corpora"]] == ["corpus"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Retrieval examples" in page
    assert "Names for pictures" not in page
    assert (out / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_report_is_one_self_contained_page(output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"<(?:img|script|link|iframe)[^>]*(?:src|href)=[\"']([^\"']+)", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    for part in (
        "Names for pictures",
        "Twemoji drew these",
        "never saw",
        "Retrieval examples",
        "first packed batch",
        "what was dropped",
        "Going on",
        "<svg",
    ):
        assert part in page, part
    assert page.count('<details class="pack"') == 8


@pytest.mark.slow
def test_the_report_in_a_browser(output: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [chromium, *flags, f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom"]
    result = subprocess.run(
        [*command, (output / "report.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in result.stderr
    assert result.stdout.count('class="example"') >= 2


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_training(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (130, 75):
        monkeypatch.setattr(train_module, "start_local", lambda arguments, processes, told, code=code: code)
        assert main(arguments(output.parent / "pages", output)) == code


def start_forked(command: Sequence[str], processes: int, told: list[int]) -> int:
    """The same processes, forked: they have imported everything."""
    with Fleet(Path(command[-1]).parent / RUN, *command[1:], size=processes) as fleet:
        return max(code if code is not None else 1 for code in fleet.wait())


@pytest.mark.slow
def test_it_can_be_run_again(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = next((output / "run" / "checkpoints").glob("*/model.safetensors"))
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(train_module, "start_local", start_forked)
    assert main([*arguments(output.parent / "pages", output), "--steps", "4"]) == 0
    assert "[6/6]" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before  # nothing was trained again
