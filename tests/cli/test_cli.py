"""The command line as a user meets it: the promised commands; bad input is one clear line and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lcl import cli
from megatron_lcl.cli import main
from megatron_lcl.errors import UserError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what stands on standard error."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def test_commands_are_the_promised_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    listed = text.split("COMMAND\n")[1].split("\n\n")[0]
    assert re.findall(r"^    (\S+)", listed, re.M) == [
        "quickstart", "train", "claim", "checkpoint", "report", "selftest", "plan", "demo", "preprocess", "verify",
        "inspect", "merge", "retokenize", "export-corpus", "replay", "curate", "fetch", "evaluate", "import", "export",
    ]  # fmt: skip
    assert "130 for Ctrl-C" in text
    assert main([]) == 2
    assert capsys.readouterr().out == text


def test_help_documents_every_config_field(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lcl import config as configs

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name, _, _, help in configs.describe():
        assert f"--{name} " in text
        assert help in text
    assert " data.corpora[].weight  (float, 1)\n" in text
    sections = re.findall(r"^(\S+):\n  --(\S+) ", text.partition("the last counts:\n")[2], re.M)
    assert len(sections) == len(dict(sections)) > 15
    assert [name.rpartition(".")[0] for _, name in sections] == [section for section, _ in sections]


def test_print_config_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from megatron_lcl import config as configs

    assert main(["train", "--train.steps", "12", "--optimizer.lr=1e-3", "--print-config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert configs.load(file) == configs.load(None, {"train.steps": "12", "optimizer.lr": "1e-3"})


def test_bad_input_is_one_line_and_exit_2(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    output = str(tmp_path / "out")
    (tmp_path / "c.yaml").write_text("data: {corpora: nothing}")
    plan = ["plan", "--config", str(tmp_path / "c.yaml"), "--gpus", "8"]
    for arguments, message in (
        (["train", "--train.stepz", "3"], "nearest is `train.steps`"),
        (["train"], "data.corpora is empty"),
        (["train", "--data.corpora", str(empty)], "is not a corpus"),
        (["train", "--train.steps"], "--train.steps has no value"),
        (["preprocess", "--format", "html", "--input", str(empty), "--output", output], "HTML"),
        (["preprocess", "--format", "nonsense", "--input", str(empty), "--output", output], "nonsense"),
        (["evaluate", "--checkpoint", str(empty), "--corpus", str(empty)], str(empty)),
        (["export", "--checkpoint", str(empty), "--format", "hf", "--output", output], str(empty)),
        (["report", "--run", str(empty)], "neither a run folder"),
        (["quickstart", "--html", str(empty), "--output", output], "HTML"),
        (["quickstart", "--steps", "0", "--html", str(empty), "--output", output], "--steps 0: give at least 1"),
        ([*plan, "--gpu", "h10"], "--gpu h10 is not known; known are h100 (80 GB), "),
        (["selftest", "--timeout", "-1"], "--timeout -1: give seconds above 0"),
        (["selftest", "--all-reduce", "--timeout", "nan"], "--timeout nan: give seconds above 0"),
        (["evaluate", "--nonsense"], "--corpus --data"),
        (["verify", str(empty)], "is not a corpus"),
        (["inspect"], "arguments are required: CORPUS\n"),
        (["checkpoint"], "arguments are required: list|verify|prune, RUN\n"),
    ):
        code, error = run(capfd, *arguments)
        assert code == 2, arguments
        assert message in error, (arguments, error)
        if not error.startswith("usage:"):  # argparse prints its usage first
            assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
    assert not [p for p in Path(output).rglob("*") if p.is_file()]
    assert list(empty.iterdir()) == []
    assert [p.name for p in other.iterdir()] == ["letter.txt"]


def test_what_is_no_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.json").write_text("{}")
    for given, message in (
        ("corpus", "is a corpus, not a checkpoint; name a run folder (train.output)"),
        ("corpus/corpus.json", "is not a PyTorch checkpoint"),
        (".", "holds no complete checkpoint; it needs model.safetensors and config.yaml"),
        ("absent", "there is no checkpoint"),
    ):
        arguments = ["export", "--checkpoint", str(tmp_path / given), "--format", "open_clip"]
        code, error = run(capsys, *arguments, "--output", str(tmp_path / "out"))
        assert code == 2
        (line,) = error.splitlines()
        assert message in line
        assert len(line) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_switch_needs_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--data.allow-change"], ["--data.allow-change", "true"], ["--data.allow_change=true"]):
        assert main(["train", *words, "--train.steps", "3", "--resume", "runs/a", "--print-config"]) == 0
        tree = yaml.safe_load(capsys.readouterr().out)
        assert tree["data"]["allow_change"] is True
        assert (tree["train"]["steps"], tree["checkpoint"]["resume"]) == (3, "runs/a")
    assert main(["train", "--data.allow-change", "--print-config"]) == 0
    assert main(["train", "--train.steps", "--data.allow-change", "--print-config"]) == 2


def test_the_last_of_several_values_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts have arguments of their own, and behind them those that they are given."""
    words = [
        "--train.steps",
        "5",
        "--data.cache-gb",
        "1",
        "--data.cache_gb",
        "2",
        "--train.steps=7",
        "--data.cache-gb=3",
    ]
    assert main(["train", *words, "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["train"]["steps"], tree["data"]["cache_gb"]) == (7, 3)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "of several values of one field the last counts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flag", "value", "field", "other"),
    [
        ("--resume", "runs/a", "--checkpoint.resume", "runs/b"),
        ("--profile", "3:4", "--train.profile", "5:6"),
        ("--profile-ranks", "0,1", "--train.profile-ranks", "[0]"),
    ],
)
def test_a_short_flag_beside_its_field(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, field: str, other: str
) -> None:
    same = f"[{value}]" if flag == "--profile-ranks" else value
    assert main(["train", flag, value, field, same, "--print-config"]) == 0
    capsys.readouterr()
    code, error = run(capsys, "train", flag, value, field, other, "--print-config")
    assert code == 2
    assert f"{flag} is the same as {field.replace('-ranks', '_ranks')}, which is {other} beside it; give one" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--resume", "runs/a", "--checkpoint.resume", "s3://user:planted@bucket/run"],
        ["train", "s3://user:planted@bucket/run"],
        ["export", "runs/a", "s3://user:planted@bucket/run", "--format", "hf", "--output", "out"],
    ],
)
def test_a_password_that_is_given_in_vain_is_not_said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, error = run(capsys, *arguments)
    assert code == 2
    assert "a URL with a user, a password or a query is not taken" in error
    assert "planted" not in error


@pytest.mark.parametrize(
    ("what", "flags", "goes"),
    [
        ("prune", ["--quick"], "list and verify"),
        *(("list", flags, "prune") for flags in (["--keep-last", "1"], ["--keep-every", "2"], ["--dry-run"])),
        ("verify", ["--dry-run"], "prune"),
    ],
)
def test_a_flag_of_another_action_is_not_ignored(
    capsys: pytest.CaptureFixture[str], what: str, flags: list[str], goes: str
) -> None:
    code, error = run(capsys, "checkpoint", what, "runs/a", *flags)
    assert code == 2
    assert error == f"megatron-lcl checkpoint: {flags[0]} goes with {goes}, not with {what}; leave it out\n"


@pytest.mark.parametrize(
    ("words", "does", "takes"),
    [
        ("preprocess --format html --input a --output b", "data.prepare.preprocess.preprocess", "ABC"),
        ("curate a --dry-run", "curate.run.curate", "A"),
        ("train", "config.load", "DE"),
        ("claim --output a", "claim.run.claim", "D"),
        ("verify a", "data.prepare.verify.verify", ""),
        ("evaluate a --corpus b", "evaluate.heldout.evaluate_checkpoint", ""),
        ("quickstart", "quickstart.run.quickstart", ""),
        ("demo manual --output a", "demo.run.demo", ""),
    ],
)
def test_a_remedy_is_said_by_the_commands_that_have_its_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, does: str, takes: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        flags = ("--workers", "--max-bad-fraction", "--held-out", "--data.workers", "--data.cache")
        raise UserError("said", dict(zip(flags, "ABCDE", strict=True)))

    monkeypatch.setattr(f"megatron_lcl.{does}", fails)
    assert run(capsys, *words.split()) == (2, f"megatron-lcl {words.split()[0]}: said{takes}\n")


def test_processes_are_not_for_what_a_launcher_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, said in (("0", "--processes 2: a launcher has started 4 of them; leave it out"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        code, error = run(capsys, "train", "--data.corpora", "a", "--processes", "2")
        assert (code, error) == (2, f"megatron-lcl train: {said}\n" if said else "")


@pytest.mark.parametrize("command", [("train", "--data.corpora", "a"), ("selftest", "--all-reduce"), ("selftest",)])
def test_what_a_launcher_has_not_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """As in a shell in which something else has set them; every process says so."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    code, error = run(capsys, *command)
    assert code == 2
    assert error == (
        f"megatron-lcl {command[0]}: RANK=1 and WORLD_SIZE=2 are set, but LOCAL_RANK, MASTER_PORT are not; set what is "
        "missing, or, if no launcher has started this process, `unset RANK WORLD_SIZE`\n"
    )


def test_importing_the_package_is_cheap() -> None:
    """And so is what finds a run's checkpoints; `curate` imports what is dear only for rules that need it."""
    code = """
import sys, megatron_lcl.convert.find
print(sorted({"torch", "numpy", "deepspeed"} & sys.modules.keys()))
import megatron_lcl.curate.run, megatron_lcl.curate.write
print(sorted({"torch", "numba", "scipy"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["[]", "[]"]


def test_the_checkouts_scripts_are_the_commands() -> None:
    tools = Path(__file__).parents[2] / "tools"
    for script in sorted(tools.glob("*.py")):
        result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("usage: megatron-lcl"), script


FAULTY = """
import sys
import numpy as np
import megatron_lcl.data.prepare.verify
megatron_lcl.data.prepare.verify.verify = lambda *_: {fault}
from megatron_lcl.cli import main
sys.exit(main(["verify", "corpus"]))
"""


@pytest.mark.parametrize(
    ("fault", "named"),
    [("np.zeros(3) + np.zeros(4)", "ValueError: operands"), ("(_ for _ in ()).throw(OSError('odd'))", "OSError: odd")],
)
def test_a_fault_of_the_program_is_not_taken_for_bad_input(fault: str, named: str) -> None:
    """Only UserError, and what the system says of files, becomes one line with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTY.format(fault=fault)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert named in done.stderr


@pytest.mark.parametrize("packs", ["7", "7:3", "-1:3"])
def test_packs_that_are_no_range(capsys: pytest.CaptureFixture[str], packs: str) -> None:
    code, error = run(capsys, "replay", "runs/a", "--step", "0", f"--packs={packs}")
    assert code == 2
    assert error == f"megatron-lcl replay: --packs {packs}: give the first and the last pack, as 512:527\n"


ESCAPE = "\x1b]0;title\x07\x1b]52;c;Y3VybA==\x07\x1b[2J\x7f\x9b8m\r"
"""what a terminal would obey: it sets the title, fills the clipboard, clears the screen, hides what follows"""


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """Documents with such names and texts, and where their corpus goes."""
    items = [{"text": f"a text {ESCAPE}"}, {"image": f"{ESCAPE}.png"}]
    lines = [{"id": f"http://x/{ESCAPE}", "items": items}, {"id": ESCAPE, "items": [{"text": "more"}]}, {"items": 3}]
    (tmp_path / "in").mkdir()
    (tmp_path / f"in/{ESCAPE}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "in", tmp_path / "corpus"


def test_control_characters_of_others_reach_no_terminal(
    capsys: pytest.CaptureFixture[str], hostile: tuple[Path, Path]
) -> None:
    source, corpus = map(str, hostile)
    made = ["preprocess", "--format", "jsonl", "--input", source, "--output", corpus, "--tokenizer", "clip"]
    shown = ["inspect", corpus]
    for code, command in (
        (0, [*made, "--max-bad-fraction", "1"]),
        (0, shown),
        (0, [*shown, "show", "0"]),
        (0, [*shown, "--source", ESCAPE]),
        (2, [*shown, "--source", f"no such {ESCAPE}"]),
        (2, ["verify", f"{source}/{ESCAPE}"]),
    ):
        assert main(command) == code
        out, err = capsys.readouterr()
        said = out.replace("\r\n", "\n") + err.replace("\r", "")  # a line's end, and of a progress bar
        assert re.findall(r"[^\n\t -~\u00a0-\uffff]", said) == []
        assert "\\x1b]52;c;" in said


def test_commands_print_by_one_function() -> None:
    """Which has no control characters."""
    for file in Path(cli.__file__).parent.glob("*.py"):
        assert file.name == "output.py" or not re.search(r"\bprint\(", file.read_text()), file
