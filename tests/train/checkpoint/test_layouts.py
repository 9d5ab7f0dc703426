"""A checkpoint goes on at the layout that wrote it to the last bit, and at any other with equal losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from small_runs import FIRST, LAST, LR, Job, build_config, run_jobs

from megatron_lcl import LCL, load_model
from megatron_lcl import config as configs
from megatron_lcl.convert.certificate import check_images, our_features
from megatron_lcl.convert.export import export
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.parallel.mesh import ALONE
from megatron_lcl.train.checkpoint.folder import step_folder
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights, load_initial_weights

SMALL_PIECES = {"sub_group_size": 2000}  # with which ZeRO-3 cuts its files differently
ON_CPU = {"device": "cpu"}
# small ones too: DeepSpeed leaves them whole
TWO_BY_TWO = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}


def joint(name: str, zero: int = 1, micro_batch: int = 3, **more: Any) -> Job:
    """A job with one micro-batch a process, or two where both processes make one replica."""
    return Job(name, zero, micro_batch=micro_batch, **more)


# written by two processes each; the first three with three micro-batches a process
SOURCES = {
    "zero1": Job("zero1", 1, again=True),
    "zero2": Job("zero2", 2, again=True),
    "zero3": Job("zero3", 3, again=True),
    "offload": joint("offload", 3, zero_options={"offload_optimizer": ON_CPU, "offload_param": ON_CPU}, again=True),
    "tensor": joint("tensor", 2, tensor=2, again=True),
    "pipeline": joint("pipeline", pipeline=2, again=True),
    "bfloat16": joint("bfloat16", 1, dtype="bfloat16", again=True),
    "siglip": joint("siglip", tensor=2, objective="siglip", again=True),
    "apex": joint("apex", 1, optimizer="apex_fused_adam", again=True),
    # as it was written before: nothing but apex's own state
    "apex, before": joint("apex, before", 1, optimizer="apex_fused_adam", before=True),
    # several pieces of each parameter group
    "apex, zero3": joint("apex, zero3", 3, optimizer="apex_fused_adam", zero_options=SMALL_PIECES, again=True),
}
BETAS = (0.8, 0.9)  # other ones than those of the sources
Result = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """What each source gave when it went on, and then went on from its own checkpoint in a fresh engine."""
    folder = tmp_path_factory.mktemp("runs") / "a [1] *?"  # not to be taken for a pattern
    fresh = [
        dataclasses.replace(s, name=f"{s.name}-fresh", source=s.name, again=False, before=False)
        for s in SOURCES.values()
    ]
    return folder, run_processes(run_jobs, 2, str(folder), [*SOURCES.values(), *fresh])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_at_the_same_layout_the_losses_are_the_same_to_the_last_bit(name: str, saved: tuple[Path, Result]) -> None:
    """Though what was saved in the background was written only after training had gone on."""
    undisturbed, fresh = saved[1][name], saved[1][f"{name}-fresh"]
    assert fresh["rows"] == undisturbed["rows"]
    if SOURCES[name].again:
        assert undisturbed["again"] == undisturbed["rows"], "into an engine that has gone on"
    assert fresh["said"] == []
    assert fresh["groups"] == groups_of(SOURCES[name])
    assert [(s.step, s.stall_seconds > 0, s.write_seconds > 0) for s in undisturbed["saved"]] == [
        (step, True, True) for step in (FIRST - 1, FIRST)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), [("tensor", "hf"), ("pipeline", "timm"), ("zero3", "open_clip")])
def test_exports_compute_what_one_layout_trained(
    name: str, format: str, saved: tuple[Path, Result], tmp_path: Path
) -> None:
    """Through the other library, against the model that ZeRO-1 trained, which is the same to rounding."""
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    run, reference = (step_folder(saved[0] / source, FIRST) for source in (name, "zero1"))
    facts = export(run, format, tmp_path / "out")
    assert facts["latents"]["relative_difference"] < 1e-5
    theirs = load_encoder(f"{format}:{'' if format == 'hf' else 'local-dir:'}{tmp_path / 'out'}")
    images = check_images(16)
    ours = our_features(load_model(reference), images)
    torch.testing.assert_close(theirs.encode(images).patches, ours.patches, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_run_of_any_layout_gives_its_weights_to_another(name: str, saved: tuple[Path, Result]) -> None:
    """`train.init_from`, the run's folder: the weights of its newest checkpoint into a model drawn otherwise."""
    config = configs.replace(build_config(saved[0], SOURCES[name]), train__init_from=str(saved[0] / name))
    weights = find_initial_weights(config)
    assert weights is not None
    assert (weights.path, weights.missing, weights.unused) == (step_folder(saved[0] / name, FIRST), [], [])
    model, theirs = LCL(config.model, seed=1), load_model(step_folder(saved[0] / name, FIRST))
    load_initial_weights(weights, dict(enumerate(model.layers)), ALONE)
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.slow
def test_at_two_processes(saved: tuple[Path, Result]) -> None:
    resume(
        2,
        saved,
        [
            ("tensor", joint("a", 3)),
            ("zero3", joint("b", 2, tensor=2)),
            ("pipeline", joint("c", 1, tensor=2)),
            ("tensor", joint("d", pipeline=2)),
            ("siglip", joint("o", pipeline=2, objective="siglip")),
            ("siglip", joint("p", 3, objective="siglip")),
            ("zero1", joint("e", 3, zero_options=SMALL_PIECES)),
            ("zero3", joint("f", 1)),
            ("zero3", joint("s", 3, zero_options=SMALL_PIECES)),
            ("zero1", joint("betas a", betas=BETAS)),
            ("zero1", joint("betas b", 3, betas=BETAS)),
            ("offload", joint("q", 1)),
            ("zero3", joint("r", 2, zero_options={"offload_optimizer": ON_CPU})),
            ("apex", joint("apex a", 3, optimizer="apex_fused_adam", zero_options=SMALL_PIECES)),
            ("apex, before", joint("apex b", 2, tensor=2, optimizer="apex_fused_adam")),
            # another optimizer, at the same layout
            ("apex", joint("apex c")),
            ("apex, before", joint("apex d")),
            ("zero1", joint("apex e", optimizer="apex_fused_adam")),
        ],
    )


@pytest.mark.slow
def test_at_one_process(saved: tuple[Path, Result]) -> None:
    resume(1, saved, [("zero1", joint("g", 3)), ("pipeline", joint("h", 2)), ("tensor", joint("i", 1))])


@pytest.mark.slow
def test_at_three_processes(saved: tuple[Path, Result]) -> None:
    resume(
        3,
        saved,
        [
            ("zero3", joint("j", 3, micro_batch=2)),
            ("zero2", joint("k", 2, micro_batch=2)),
            ("pipeline", joint("l", 3, micro_batch=2)),
        ],
    )


@pytest.mark.slow
def test_at_four_processes_and_back(saved: tuple[Path, Result]) -> None:
    """Two by two, and from there to one process; two replicas, of two tensor ranks and of two stages, each from its own
    checkpoint and from the other's."""
    folder, expected = saved
    split = joint("split", tensor=2, pipeline=2)
    tensor, stages = Job("tensor ranks", 2, tensor=2, packs=4), Job("stages", pipeline=2, packs=4)
    again = [dataclasses.replace(job, name=f"{job.name}-fresh", source=job.name) for job in (tensor, stages)]
    into = [
        dataclasses.replace(tensor, name="from stages", source="stages"),
        dataclasses.replace(stages, name="from tensor ranks", source="tensor ranks"),
    ]
    four = [split, tensor, stages, *again, *into]
    for results in resume(4, saved, [("zero3", joint("m", tensor=2, pipeline=2))], four):
        assert_close(results["split"]["rows"], expected["zero1"]["rows"], split)
        for job in again:
            assert results[job.name]["rows"] == results[job.source or ""]["rows"]
            assert results[job.name]["said"] == []
        for job in (stages, *into):
            assert_close(results[job.name]["rows"], results["tensor ranks"]["rows"], job)
        for job in four:
            assert results[job.name]["groups"] == groups_of(job), job
    rows = run_processes(run_jobs, 1, str(folder), [joint("n", 3, source="split")])[0]["n"]["rows"]
    assert_close(rows, expected["zero1"]["rows"], split)


@pytest.mark.slow
def test_from_and_to_hierarchical_zero3(tmp_path: Path) -> None:
    """In two groups, which takes four processes; and from there to one process."""
    jobs = [
        Job("plain", 2, packs=4),
        Job("hierarchical", 3, packs=4, zero_options=TWO_BY_TWO, again=True),
        Job("fresh", 3, packs=4, zero_options=TWO_BY_TWO, source="hierarchical"),
        Job("to", 3, packs=4, zero_options=TWO_BY_TWO, source="plain"),
        Job("from", 1, packs=4, source="hierarchical"),
    ]
    # in processes of its own: once there is a hierarchy, DeepSpeed uses it in all that follows with ZeRO-3
    back = Job("back", 3, packs=4, micro_batch=2, source="hierarchical")
    results = run_processes(run_jobs, 4, str(tmp_path), jobs)[0]
    results |= run_processes(run_jobs, 1, str(tmp_path), [back])[0]
    for job in (*jobs, back):
        assert_close(results[job.name]["rows"], results["plain"]["rows"], job)
        assert results[job.name]["groups"] == groups_of(job), job
    written = results["hierarchical"]
    assert written["again"] == results["fresh"]["rows"] == written["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apex", "apex, before", "apex, zero3"])
def test_apex_takes_the_steps_of_adamw(name: str, saved: tuple[Path, Result]) -> None:
    assert_close(saved[1][name]["rows"], saved[1]["zero1"]["rows"], SOURCES[name])


def resume(
    processes: int, saved: tuple[Path, Result], cases: list[tuple[str, Job]], more: Sequence[Job] = ()
) -> list[Result]:
    """Sources go on at other layouts, as they went on themselves. What these jobs, then `more`, gave, by process."""
    folder, expected = saved
    jobs = [dataclasses.replace(job, source=source) for source, job in cases]
    everyone = run_processes(run_jobs, processes, str(folder), [*jobs, *more])
    for results in everyone:
        for job, (source, _) in zip(jobs, cases, strict=True):
            same = 1 if job.betas == BETAS else None  # steps until the weights differ
            assert_close(results[job.name]["rows"][:same], expected[source]["rows"][:same], job)
            assert results[job.name]["groups"] == groups_of(job), job
    for source, _ in cases:  # converted in the folder of the run that goes on
        assert not (step_folder(folder / source, FIRST) / "universal").exists()
    return everyone


def groups_of(job: Job) -> list[tuple[Any, ...]]:
    """Weight decay, learning rate, betas and epsilon of every parameter group in the last step."""
    return [(decay, LR[LAST - 1], job.betas, 1e-6) for decay in (0.3, 0.0)]


def assert_close(ours: Any, theirs: Any, job: Job) -> None:
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours[:, :2], theirs[:, :2], rtol=1e-5, atol=0, msg=lambda text: f"{job}\n{text}")
    torch.testing.assert_close(ours[:, 2], theirs[:, 2], rtol=1e-4, atol=0, msg=lambda text: f"{job}\n{text}")
