"""The page of a run, as text: what it shows, what it leaves out, and that nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from data.corpora import random_documents, write_corpus

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.convert.card import TRAINING
from megatron_lcl.convert.find import run_of
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.corpus.corpus_manifest import read_manifest, write_manifest
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.errors import UserError
from megatron_lcl.plan.devices import DEVICES, assumed_rates
from megatron_lcl.plan.predict import predict
from megatron_lcl.report.events import MAX_EVENTS
from megatron_lcl.report.page import _clock, _duration, write_report
from megatron_lcl.report.runs import Run, find_runs
from megatron_lcl.report.series import MAX_BUCKETS
from megatron_lcl.report.slowest import MAX_NODES, MAX_RANKS, Slowest
from megatron_lcl.run_folder import EXAMPLES, HELDOUT, PROGRESS, WEIGHTS
from megatron_lcl.train.checkpoint.folder import Progress, progress_text, step_folder


def section(page: str, name: str) -> str:
    found = re.findall(rf'<section id="{name}"[^>]*>(.*?)</section>', page, re.DOTALL)
    assert len(found) == 1, name
    return found[0]


def test_the_page_says_what_the_run_folder_has(run: Path) -> None:
    page = write_report(run).read_text()
    assert "200</b>of 200 steps" in section(page, "status")
    assert "1234" not in section(page, "status")
    assert "1.23k</b>images a second" in section(page, "status")
    assert "3 GiB</b>peak memory" in section(page, "status")
    events = section(page, "events")
    kinds = re.findall(r'<span class="tag (\w+)">([^<]*)</span></td><td>([^<]*)', events)
    assert [kind for kind, *_ in kinds] == ["skipped", "rewind", "phase", "resumed", "stragglers", "stragglers"]
    assert kinds[0][1:] == ("step skipped", "the loss is nan")
    assert kinds[1][2] == "back to step 50, without the packs of the steps between"
    assert "80.0 %</b>k-NN accuracy" in section(page, "labeled")
    assert "chance 2.5 %" in section(page, "status")
    assert "chance 10 %: 8.0 times" in section(page, "labeled")
    settings = section(page, "settings")
    assert re.search(r'<code>train.steps</code></td><td class="short">200</td>.*default 1000', settings)
    assert "<code>train.log_every</code>" not in settings.partition("<details>")[0], "it is the default"
    assert 'href="profile/trace%20rank%200.json"' in section(page, "profile")
    assert "not here" in section(page, "documents")
    for empty in ("names", "heldout", "retrieval"):
        assert section(page, empty) == ""
        assert f'href="#{empty}"' not in page
    for title in ("labeled images: accuracy (%)", "held-out recall@10 (%)", "gradient norm by part", "effective rank"):
        assert title in section(page, "curves")
    assert 'class="mark phase"' in section(page, "curves")
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//|@import|url\(""", page), "self-contained"
    assert "fetch(" not in page, "only a page that is served follows the run"


def test_chance_among_thousands_of_pairs_is_not_nothing(run: Path) -> None:
    numbers = {"documents": 900, "corpus": "/nowhere", "step": 200, "pairs": 5120, "median_rank": 9.0}
    numbers |= {"image_to_context_recall_at_10": 0.5, "chance_at_10": 10 / 5120}
    numbers |= {"image_to_context_recall_at_1": 0.1, "chance_at_1": 1 / 5120}
    (run / "heldout.json").write_text(json.dumps(numbers))
    said = section(write_report(run).read_text(), "heldout")
    assert re.findall(r"chance ([^<]*)<", said) == ["0.2 %: 256.0 times", "0.02 %: 512.0 times"]
    assert "of 5120 pairs<" in said, "as in results by version 2 of the rules"
    numbers |= {"distinct_contexts": 4000, "contexts_with_rivals": 30, "image_in_document_recall_at_1": 0.5}
    (run / "heldout.json").write_text(json.dumps(numbers))
    said = section(write_report(run).read_text(), "heldout")
    assert "of 4000 contexts<" in said
    assert ">30 contexts<" in said


def test_held_out_numbers_by_other_rules_are_told_apart(run: Path) -> None:
    """The version is named, or is 3, whose lines had chances of their own before they named it."""
    marks = [{"heldout/context_to_image_chance_at_10": 0.1}, {"heldout/rules": 3}, {"heldout/rules": 3}]
    with (run / "metrics.jsonl").open("a") as lines:
        lines.writelines(json.dumps({"step": step, **mark}) + "\n" for step, mark in enumerate(marks, 201))
    (run / "heldout.json").write_text(
        json.dumps({"documents": 9, "corpus": "/nowhere", "step": 203, "rules": {"version": 3}})
    )
    page = write_report(run).read_text()
    said = "not to be compared (docs/evaluation.md, “Earlier versions”)"
    before = "by version 3 of the rules of held-out evaluation, those before by an unrecorded version"
    assert section(page, "events").count(f"held-out numbers from step 201 on are {before}: {said}") == 1
    assert f"This run has numbers by an unrecorded version, then version 3: {said}." in section(page, "heldout")
    assert "heldout rules" not in section(page, "curves"), "a version is no curve"
    incidents = Run.of(run).incidents
    assert incidents.endswith("1 × held-out rules, 1 × step skipped, 1 × rewind")
    assert "phase" not in incidents


def test_nodes_are_told_by_how_often_others_waited_for_them(run: Path) -> None:
    """Over all parts of a run: of 190 lines, with the mean of how far behind."""
    page = write_report(run).read_text()
    table = section(page, "slowest")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [
        ["node-b", '120 <span class="quiet">63 %</span>', "0.005", "2 (90), 3 (30)", "forward (90), data (30)"],
        ["node-a", '70 <span class="quiet">37 %</span>', "0.002", "1 (70)", "data (70)"],
    ]
    assert "Of 190 lines" in table
    assert 'href="#slowest"' in page
    for title, last in (
        ("seconds a step, by process", "0.12"),
        ("seconds of own work a step, by process", "0.12"),
    ):
        (figure,) = re.findall(rf'<figure class="plot"><figcaption><b>{title}</b>(.*?)</figure>', page, re.DOTALL)
        assert re.findall(r'class="line \w+" data-label="(\w+)"', figure) == ["slowest", "median", "fastest"]
        assert f'data-now="{last}"' in figure
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "stragglers" not in line]
    many = [{"node": f"n{n}", "rank": n, "last": 100 - n, "lag_seconds": 0.1, "phase": "data"} for n in range(40)]
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines, json.dumps({"step": 200, "stragglers": [*many, {"node": 3}]})]) + "\n"
    )
    table = section(write_report(run).read_text(), "slowest")
    assert table.count("<tr>") == 1 + MAX_NODES
    assert f"The first {MAX_NODES} of 40 nodes." in table
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert not section(write_report(run).read_text(), "slowest").strip()


def test_of_a_node_the_slowest_processes_are_named() -> None:
    row = {"node": "a", "lag_seconds": 0.1, "phase": "data"}
    slowest = Slowest()
    slowest.add([{**row, "rank": rank, "last": 9 - rank} for rank in range(MAX_RANKS + 2)])
    assert [node.ranks for node in slowest.rows()] == ["0 (9), 1 (8), 2 (7), 3 (6) and 2 more"]


def test_what_was_planned_stands_beside_what_was_measured(run: Path) -> None:
    def with_hardware(device: str, processes: int, **more: int) -> str:
        facts = {"step": 200, "hardware": {"device": device, "processes": processes, "nodes": 2}, **more}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
        return section(write_report(run).read_text(), "plan")

    assert not section(write_report(run).read_text(), "plan").strip()
    for device, processes in (("cpu", 8), ("NVIDIA H100 PCIe", 8), ("NVIDIA H100 80GB HBM3", 7)):
        assert not with_hardware(device, processes).strip(), "not known, or 7 processes do not divide the batch"
    config, own = configs.load(run / "config.yaml"), with_hardware("NVIDIA H100 80GB HBM3", 16, images_per_pack=3)
    assert "on 16 processes (h100, by its data sheet)" in own
    config = configs.replace(config, train__dtype="bfloat16")
    step = predict(config, 16, 8, assumed_rates(DEVICES["h100"], "bfloat16"), 3).seconds
    assert f"<td>a step</td><td>{step:,.4g} s</td><td>0.1 s</td><td>{0.1 / step:.2f}</td>" in own
    assert re.search(r"<td>tokens a second</td><td>[\d,]+</td><td>98,765</td>", own)
    assert re.search(r"<td>peak memory of a process</td><td>at least [\d.]+ GiB</td><td>3 GiB</td>", own)
    planned = {"layout": "tensor 2", "processes": 4, "device": "h100", "is_measured": False, "memory_is_bound": True}
    planned |= {"step_seconds": 0.2, "mfu": 0.5, "memory_peak_bytes": 2**31, "flops_per_second": 1e12}
    (run / "plan.json").write_text(json.dumps(planned))
    found = section(write_report(run).read_text(), "plan")
    for row in ("a step|0.2 s|0.1 s|0.50", "MFU|50 %|40 %|0.80", "peak memory of a process|at least 2 GiB|3 GiB|1.50"):
        assert "</td><td>".join(row.split("|")) in found, row
    assert "tensor 2 on 4 processes (h100, by its data sheet)" in found
    assert "TFLOP a second" not in found, "the run has no such metric"
    found = with_hardware("cpu", 8, flops_per_second=5 * 10**11)
    assert "<td>TFLOP a second</td><td>1</td><td>0.5</td><td>0.50</td>" in found


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(29, "29 s"), (31, "1 min"), (3599, "1 h 00 min"), (7265, "2 h 01 min"), (47 * 3600, "47 h 00 min"),
     (60 * 3600, "2.5 days")],
)  # fmt: skip
def test_how_long_a_run_has_trained(seconds: float, said: str) -> None:
    assert _duration(seconds) == said


def test_times_are_those_of_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert _clock(1.7e9) == "2023-11-14 22:13 UTC"
    time.tzset()


def test_the_first_batch_is_left_out_where_its_corpora_are_not_as_they_were(run: Path, tmp_path: Path) -> None:
    """A run may go on with other documents under the same path; its first packs were of those that are gone."""
    corpus = write_corpus(tmp_path / "corpus", random_documents(30, 1))
    config = configs.load(run / "config.yaml", {"data.corpora": str(corpus.path), "data.cache": str(tmp_path / "c")})
    (run / "config.yaml").write_text(configs.to_yaml(config))
    assert "no checkpoint so far" not in section(write_report(run).read_text(), "documents"), "where none is there"
    folder = step_folder(run, 200)
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(progress_text(Progress(200, 200, open_run_ledger(config).to_json())))
    (folder / MANIFEST).write_text(manifest_text({PROGRESS: fingerprint(folder / PROGRESS)}))
    (folder / WEIGHTS).touch()
    assert "Pack 0" in section(write_report(run).read_text(), "batch")
    shutil.rmtree(corpus.path)
    write_corpus(corpus.path, random_documents(20, 2))
    page = write_report(run).read_text()
    assert "(The corpora, or the package of the objective, are not here.)" in section(page, "batch")
    assert "20 documents" in section(page, "documents"), "those of today"
    assert "format jsonl (no checkpoint so far has read it)" in section(page, "documents")
    assert f'<code>{corpus.path}</code> <span class="quiet">(read earlier, no longer)' in section(page, "documents")


def test_what_a_run_read_before_its_settings_changed(run: Path, tmp_path: Path) -> None:
    """Of the first batch the packs of then, and a corpus that was removed since; one that has only moved was not."""
    corpora = [write_corpus(tmp_path / name, random_documents(30, n)) for n, name in enumerate("abc")]
    manifest = {key: value for key, value in read_manifest(corpora[1].path).items() if key != "fingerprint"}
    source = {"merged": [{"format": "html", "licence": "GFDL"}, {"format": "jsonl"}, {"format": "jsonl"}]}
    write_manifest(corpora[1].path, {**manifest, "source": source})
    config = configs.load(run / "config.yaml", {"data.cache": str(tmp_path / "cache"), "train.global_batch": "2"})

    def reading(*numbers: int) -> Config:
        return configs.replace(config, data__corpora=[{"path": str(corpora[n].path)} for n in numbers])

    now = configs.replace(reading(1, 2), train__global_batch=5)
    ledger = open_run_ledger(now, previous=open_run_ledger(reading(0, 1)), step=4, consumed=8)
    (run / "config.yaml").write_text(configs.to_yaml(now))
    folder = step_folder(run, 200)
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(progress_text(Progress(200, 988, ledger.to_json())))
    (folder / MANIFEST).write_text(manifest_text({PROGRESS: fingerprint(folder / PROGRESS)}))
    (folder / WEIGHTS).touch()
    page = write_report(run).read_text()
    assert ">2 packs, which all processes together read in step 0" in section(page, "batch")
    assert re.findall(r"Pack (\d+)", section(page, "batch")) == ["0", "1"]
    shown = re.findall(r"<p><code>(.*?)</code>:? ?(?:<span class=.quiet.>)?([^,\n]*)", section(page, "documents"))
    assert [path for path, _ in shown] == [str(corpora[n].path) for n in (1, 2, 0)]
    assert [said.startswith("(read earlier") for _, said in shown] == [False, False, True]
    assert "merged from format html, license GFDL; format jsonl</span>" in section(page, "documents")
    assert "no checkpoint so far" not in page
    shutil.rmtree(corpora[2].path)
    documents = section(write_report(run).read_text(), "documents")
    assert re.findall("<p><code>(.*?)</code>", documents) == [str(corpora[n].path) for n in (1, 2, 0)], "each once"


def test_the_first_batch_is_left_out_where_the_objective_is_not_installed(run: Path) -> None:
    config = configs.load(run / "config.yaml", {"objective.name": "of_another_package"})
    (run / "config.yaml").write_text(configs.to_yaml(config))
    page = write_report(run).read_text()
    assert "are not here" in section(page, "batch")
    assert "<h1>A vision encoder pre-trained by the objective of_another_package</h1>" in page


def test_the_heading_is_of_the_objective(run: Path) -> None:
    assert "pre-trained by Latent Compression Learning on interleaved" in write_report(run).read_text()
    config = configs.load(run / "config.yaml", {"objective.name": "clip"})
    (run / "config.yaml").write_text(configs.to_yaml(config))
    page = write_report(run).read_text()
    assert "<h1>A vision encoder pre-trained by contrast of image-text pairs</h1>" in page
    assert "Latent Compression Learning" not in page
    assert set(TRAINING) == set(objectives.names()), "each has words"


def test_results_of_another_version_lack_numbers(run: Path) -> None:
    """Or have null: what there is is shown, without what it would be compared with."""
    heldout = {"documents": 9, "corpus": "/nowhere", "pairs": 50, "targets": 70, "bits_per_token": None}
    heldout |= {"image_to_context_recall_at_1": 0.25, "image_to_context_recall_at_10": None, "chance_at_10": 0.2}
    (run / "heldout.json").write_text(json.dumps(heldout))
    labeled = {"data": "pictures", "classes": None, "neighbors": 20, "values": {"knn_accuracy": 0.8, "chance": None}}
    (run / "labeled.json").write_text(json.dumps(labeled))
    last = {"step": 201, "loss": 1.0, "images_per_second": 7.0, "tokens_per_second": None, "time": 1.7e9}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**last, "clock": None}) + "\n")
    page = write_report(run).read_text()
    tile = re.compile(r'<div class="tile"><b>([^<]*)</b>([^<]*)(?:<br><span class="quiet">([^<]*))?')
    assert tile.findall(section(page, "heldout")) == [("25.0 %", "recall@1", "")]
    assert tile.findall(section(page, "labeled")) == [("80.0 %", "k-NN accuracy", "")]
    assert "1</b>loss of the last step" in section(page, "status")
    assert "tokens a second," not in section(page, "curves")
    (run / "gallery.json").write_text(json.dumps({"result": {"metrics": {}}}))
    with pytest.raises(UserError, match=r"gallery\.json lacks what the report shows of it .*`megatron-lcl evaluate`"):
        write_report(run)


def test_right_contexts_are_marked(run: Path) -> None:
    """Also where a context is named by the pair of another image; files of earlier versions tell it by the pair."""
    pairs = [{"document": n, "shard": 0, "image": n, "context": f"mill {n}"} for n in range(4)]
    example = {"pair": pairs[3], "rank": 1, "nearest": pairs[:3], "right": [False, True, True], "num_contexts": 2}
    earlier = {"pair": pairs[3], "rank": 2, "nearest": pairs[2:]}
    (run / HELDOUT).write_text(json.dumps({"corpus": "/nowhere", "documents": 4, "pairs": 4, "targets": 0}))
    (run / EXAMPLES).write_text(json.dumps([example, earlier]))
    found = section(write_report(run).read_text(), "retrieval")
    assert re.findall(r'class="context true">…([^<]*)<', found) == ["mill 3", "mill 1", "mill 2", "mill 3", "mill 3"]
    assert re.findall(r'class="context">…([^<]*)<', found) == ["mill 0", "mill 2"]
    assert re.findall(r'class="quiet">([^<]* ranks [^<]*)<', found) == [
        "the best of its contexts ranks 1 of 4",
        "true context ranks 2 of 4",
    ]
    assert re.findall(r"<b>([^<]*)</b><div", found) == ["The first of its 2 contexts", "True context"]


def test_settings_that_changed_have_both_values(run: Path) -> None:
    settings = {"train.global_batch": [4, 8], "optimizer.betas": [[0.9, 0.98], [0.9, 0.95]], "data.cache": [None, "c"]}
    events = [{"settings": settings, "warnings": ["the rate is 2", "so is b"]}, {"settings": {}, "warnings": ["old"]}]
    with (run / "audit.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": 1.8e9, "event": "changed", "step": 9, **one}) + "\n" for one in events)
    said = re.findall(r">settings changed</span></td><td>([^<]*)", section(write_report(run).read_text(), "events"))
    assert said == [
        "train.global_batch 4 → 8, optimizer.betas [0.9, 0.98] → [0.9, 0.95], data.cache null → c; "
        "warning: the rate is 2; warning: so is b",
        "warning: old",
    ]


def test_names_are_given_after_a_step(run: Path) -> None:
    """Files of earlier versions name none."""
    zero_shot = {"task": "zero-shot classification", "num_items": 9, "settings": {"classes": 2}}
    shares = {key: {"value": 0.6, "low": 0.4, "high": 0.8, "chance": 0.5} for key in ("accuracy", "accuracy, top 5")}
    (run / "sketches").mkdir()
    for more, said in (({}, 0), ({"step": None}, 0), ({"step": 1200}, 1)):
        result = {**zero_shot, "metrics": shares, **more}
        (run / "sketches" / "results.json").write_text(json.dumps([result, {"task": "k-NN"}]))
        (run / "gallery.json").write_text(json.dumps({"result": result, "num_right": 5}))
        names = section(write_report(run).read_text(), "names")
        assert names.count("Measured after 1,200 steps.") == said
        assert names.count("sketches: 60.0 % of 9 pictures, after 1,200 steps<") == said
        assert names.count("steps") == 2 * said


def test_links_start_where_the_page_lies(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    page = write_report(run, tmp_path / "elsewhere" / "x.html").read_text()
    assert 'href="../run/profile/trace%20rank%200.json"' in page


def test_a_run_that_has_just_begun_has_a_page(run: Path) -> None:
    for name in ("metrics.jsonl", "audit.jsonl", "labeled.json", "profile/trace rank 0.json"):
        (run / name).unlink()
    page = write_report(run).read_text()
    assert "nothing is written yet" in page
    assert "<svg" not in page
    for empty in ("curves", "events", "labeled", "profile"):
        assert section(page, empty) == ""
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(run)


def test_a_config_beside_a_run_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `quickstart` and `demo --train` leave it, with the finished page."""
    shutil.copy(run / "config.yaml", tmp_path)
    (tmp_path / "report.html").write_text("finished")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text() == "finished"
    with pytest.raises(UserError, match=r"is not a run folder, which has a config\.yaml beside metrics\.jsonl or"):
        run_of(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / ".lock").touch()  # all that a run has beside its config while it makes its model
    assert find_runs([tmp_path]) == find_runs([run]) == [run]


def test_what_others_wrote_is_text(run: Path) -> None:
    bad = "</section><script>alert(1)</script>"
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 200 + i, bad: 1.0 * i, "skipped": None}) + "\n" for i in (1, 2))
        file.write(json.dumps({"step": 203, "skipped": bad}) + "\n")
    (run / "profile" / "<script>").write_text("")
    page = write_report(run).read_text()
    assert "<script>alert" not in page
    assert page.count("<script>") == 1, "the page's own"


def test_a_long_run_has_a_page_of_the_same_size(run: Path) -> None:
    """100,000 lines of a million steps: as many points as a chart shows, and every kind of event bounded."""
    small = len(write_report(run).read_bytes())
    lines = (
        f'{{"step": {s}, "loss": {1e6 if s == 777_770 else s % 97}, "lr": {1 / s}}}\n' for s in range(210, 10**6, 10)
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)
    with (run / "audit.jsonl").open("a") as file:
        file.writelines(
            f'{{"time": {1.7e9 + s}, "event": "step skipped", "step": {s}, "reason": "r"}}\n'
            for s in range(300, 30_000)
        )
        file.write(f'{{"time": {1.7e9 + 10**6}, "event": "rewind", "step": 999990, "to": 999000}}\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {s}, "skipped": "r", "time": {1.7e9 + s}}}\n' for s in range(300, 30_000))
    page = write_report(run).read_text()
    assert len(page) < small + 150_000
    paths = re.findall(r'<path class="line[^>]* d="([^"]*)"', page)
    assert max(len(re.findall("[ML]", path)) for path in paths) in range(MAX_BUCKETS // 2, 2 * MAX_BUCKETS + 1)
    (loss,) = (p for p in re.findall(r"<figure.*?</figure>", page, re.DOTALL) if "<b>loss that is minimized" in p)
    heights = [
        float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.findall(r'class="line[^>]* d="([^"]*)"', loss)[0])
    ]
    assert min(heights) < 20 < 60 < sorted(heights)[1], "the spike, alone at the top"
    happened = section(page, "events")
    assert happened.count("<tr>") == 1 + MAX_EVENTS
    assert "back to step 999,000, without" in happened.rpartition("<tr>")[2], "the last one is the newest"
    assert '<td class="number">29,941</td>' in happened
    assert '<td class="number">29,940</td>' not in happened
    assert "29,707 events: " in happened
    assert "29,701 × step skipped, 2 × rewind" in happened, "each once, though two files have them"
    assert f"the {29_707 - MAX_EVENTS:,} earlier ones are in audit.jsonl and metrics.jsonl" in happened
    marks = re.findall(r'class="mark incident skipped".*?<title>step ([\d,]+), .*?, and ([\d,]+) more<', loss)
    steps, more = ([int(number.replace(",", "")) for number in column] for column in zip(*marks, strict=True))
    assert (steps[0], steps[-1] > 25_000) == (60, True), "over all steps"
    assert sum(more) + len(more) == 29_701
    assert "29,701 × step skipped, 2 × rewind" in Run.of(run).incidents
