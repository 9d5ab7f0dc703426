"""Writing checkpoints while training goes on, and going on from them.

A save has two halves. In the first, on the main thread, DeepSpeed hands over what it would write (`Snapshot`). In the
second, in a thread where `checkpoint.background` is set, every process writes and hashes its files under a temporary
name, and the first one adds the weights, the manifest and the final name. The second halves communicate over a
group of their own: gloo, in host memory, apart from the training's collectives, with a timeout of a day.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import logging
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist

from megatron_lcl import objectives
from megatron_lcl.config import Checkpoint, Config, load, run_yaml
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.corpus.files import sync
from megatron_lcl.errors import RunError, UserError, describe_os_error
from megatron_lcl.filesystem import below, exists
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.run_folder import AVERAGES, CONFIG, METRICS, PROGRESS, WEIGHTS
from megatron_lcl.train.averages import average_names
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint import reshard
from megatron_lcl.train.checkpoint.code_versions import code_versions, versions_that_differ
from megatron_lcl.train.checkpoint.earlier_weight import earlier_weight, rescale_moments
from megatron_lcl.train.checkpoint.folder import RNG, STATE, Layout, Progress
from megatron_lcl.train.checkpoint.frozen import forget_group_copies, frozen_state, load_averages, load_universal
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.checkpoint.random_state import random_state, set_random_state
from megatron_lcl.train.checkpoint.state import PARTITION_DIMS, State, save_hashed
from megatron_lcl.train.checkpoint.unpickle import load_mapped, refused, restricted
from megatron_lcl.train.master_weights import clear_moments
from megatron_lcl.train.optimizer import muon_parts
from megatron_lcl.train.optimizers.pieces import partitions_of
from megatron_lcl.train.parts import frozen_patterns
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.train.resilience.faults import is_distributed

T = TypeVar("T")
TIMEOUT = timedelta(days=1)
"""how long processes wait for one that writes or converts; one that has died is noticed at once"""


class SaveError(RunError):
    """A checkpoint could not be written. Every process raises it, nothing is left of it, and training can go on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    folder: Path
    step: int
    num_bytes: int
    stall_seconds: float
    """for which training stood still, on this process"""
    write_seconds: float
    """from the first file to the final name"""
    not_deleted: list[str]
    """older files that should have gone and did not, and why"""
    not_copied: str = ""
    """why there is no copy of it in `checkpoint.mirror`"""


class Checkpointer:
    """Saves and loads the checkpoints of a run; every process has one, made together and used together.

    `save` and `wait` raise SaveError on all processes or on none; where another process is lost, the error of the
    collective that has failed. Close it (or leave its `with` block) before the process group is destroyed.
    """

    def __init__(self, engine: Any, config: Config, mesh: Mesh, run: Path) -> None:
        from megatron_lcl.train.checkpoint.snapshot import Snapshot

        self.engine = engine
        self.config = config
        self.mesh = mesh
        self.run = run
        self.layout = layout_of(engine, config, mesh)
        self._snapshot = engine.checkpoint_engine = Snapshot(copies=config.checkpoint.background)
        engine._copy_recovery_script = lambda save_path: None  # it writes, and for a purpose that our weights serve
        all_names = type(engine)._get_all_ckpt_names  # of files by a pattern, into which it puts the folder's name
        engine._get_all_ckpt_names = lambda folder, tag: all_names(engine, glob.escape(folder), tag)
        self._peers = Axis()
        if mesh.world.size > 1:
            group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self._peers = Axis(group, mesh.world.rank, mesh.world.size, mesh.world.ranks)
        self._thread: threading.Thread | None = None
        self._awaited = False
        self._fault: BaseException | None = None
        self._finished: deque[Saved] = deque()
        # when the run starts: files that change later are not what it runs
        self._code = code_versions() | objectives.package_of(config) if mesh.is_first else {}
        self._parts = objectives.parts_of(config)
        self._reached = 0
        """the last step that was loaded or saved"""
        self.back_to: int | None = None
        """the step to which the run has gone back since the last save that is complete"""

    # --- saving --------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, since: float | None = None) -> Path:
        """Save a checkpoint; the folder where it is, or, in the background, soon will be.

        In the background a save begins by waiting for the one before, and raises SaveError if that one failed. It has
        then not begun itself; call it again to save all the same.

        since: when (`time.perf_counter()`) training stopped for it; by default now.
        """
        started = time.perf_counter() if since is None else since
        self.wait()
        self._reached = max(self._reached, progress.step)
        progress = replace(progress, layout=self.layout, code=self._code, parts=self._parts)
        final = checkpoint.step_folder(self.run, progress.step)
        temporary = final.with_name(f".{final.name}.tmp")
        client_state = {PARTITION_DIMS: partition_dims(self.engine.module), **frozen_state(self.engine.module)}
        self.engine.save_checkpoint(str(temporary), tag=STATE, client_state=client_state, save_latest=False)
        files = [(temporary / RNG / self._rng_file(), random_state())]
        self._on_all(lambda: files.extend(self._snapshot.take()))
        if self.config.checkpoint.background:
            stall = time.perf_counter() - started
            self._thread = threading.Thread(
                target=self._write_in_background, args=(files, temporary, final, progress, stall), name="checkpoint"
            )
            self._thread.start()
        else:
            saved = self._write(files, temporary, final, progress)
            self._finished.append(replace(saved, stall_seconds=time.perf_counter() - started))
        return final

    @property
    def writing(self) -> bool:
        """Whether this process is writing in the background."""
        return self._thread is not None and self._thread.is_alive()

    def background_group(self) -> dist.ProcessGroup | None:
        """The group of the saves' collectives, while one in the background makes them and the main thread does not wait
        for it."""
        return self._peers.group if self.writing and not self._awaited else None

    def wait(self) -> None:
        """Until the save in the background, if there is one, is complete. SaveError if it failed."""
        self.close()
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def wait_for_all(self) -> None:
        """Until every process has come here and has no save to finish, nor the first one a copy to the mirror."""
        self.close()
        self._peers.barrier()

    def finished(self) -> list[Saved]:
        """Saves completed since the last call, for the log. Does not wait; not the same on all processes at a time."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def close(self) -> None:
        """Wait until a save in the background has ended, well or not."""
        if self._thread is not None:
            self._awaited = True
            try:
                self._thread.join()
            finally:
                self._awaited = False
            self._thread = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_in_background(
        self, files: list[tuple[Path, Any]], temporary: Path, final: Path, progress: Progress, stall: float
    ) -> None:
        try:
            saved = self._write(files, temporary, final, progress)
            self._finished.append(replace(saved, stall_seconds=stall))
        except BaseException as error:  # noqa: BLE001 whatever it is, there is no checkpoint
            known = isinstance(error, SaveError) or is_distributed(error)
            self._fault = error if known else SaveError(f"the checkpoint was not written: {explain(error, final)}")

    def _write(self, files: list[tuple[Path, Any]], temporary: Path, final: Path, progress: Progress) -> Saved:
        started, first = time.perf_counter(), self.mesh.is_first
        try:
            self._on_all(lambda: make_room(temporary) if first else None)
            manifests = self._on_all(lambda: write_files(files, temporary))
            whole = {name: file for manifest in manifests for name, file in manifest.items()}
            not_deleted = self._on_all(lambda: self._finish(temporary, final, progress, whole) if first else [])
        except BaseException:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        num_bytes = sum(file["bytes"] for file in whole.values())
        saved = Saved(final, progress.step, num_bytes, 0.0, time.perf_counter() - started, not_deleted[0])
        return replace(saved, not_copied=self._copy(final, self._kept(progress))) if first else saved

    def _kept(self, progress: Progress) -> Checkpoint | None:
        """Which checkpoints are kept after a save; None: all. Between bad steps the run may have to go back to one."""
        return None if progress.guard.get("consecutive") else self.config.checkpoint

    def _copy(self, folder: Path, keep: Checkpoint | None) -> str:
        """Copy a complete checkpoint to `checkpoint.mirror`; why it could not be, if so: it is complete anyway."""
        try:
            if (mirror := self._mirror) is None:
                return ""
            mirror.check_owner(self.config.train.output)  # another run may have begun there at the same time
            mirror.upload(folder, keep, self._reached)
        except (UserError, OSError) as error:
            return explain(error) if isinstance(error, OSError) else str(error)
        return ""

    @cached_property
    def _mirror(self) -> Mirror | None:  # one for all copies: it remembers which older ones are whole
        return None if (url := self.config.checkpoint.mirror) is None else Mirror(url)

    def make_up_copy(self, folder: Path, progress: Progress) -> str:
        """Copy a checkpoint of this run of which there is no copy in `checkpoint.mirror`, while all processes wait for
        the first one; why it could not be, if so."""

        def copy() -> str:
            own = self.mesh.is_first and folder in checkpoint.list_checkpoints(self.run)
            return self._copy(folder, self._kept(progress)) if own else ""

        return "" if self.config.checkpoint.mirror is None else self._on_all(copy)[0]

    def _finish(self, temporary: Path, final: Path, progress: Progress, files: dict[str, dict[str, Any]]) -> list[str]:
        """What the first process does once the files of all processes are there; the result of `tidy`."""
        state, config = State(temporary / STATE, self.config.model), run_yaml(self.config)
        files[WEIGHTS] = state.write_weights(temporary / WEIGHTS)
        texts = {CONFIG: config, PROGRESS: checkpoint.progress_text(progress)}
        folders = [f"{AVERAGES}/{name}" for name in progress.averaged]
        for name, folder in zip(progress.averaged, folders, strict=True):
            (temporary / folder).mkdir(parents=True)
            files[f"{folder}/{WEIGHTS}"] = state.write_weights(temporary / folder / WEIGHTS, name)
            texts[f"{folder}/{CONFIG}"] = config
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
            files[name] = fingerprint(temporary / name)
        (temporary / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
        averages = [f"{folder}/{name}" for folder in folders for name in (WEIGHTS, CONFIG, ".")]
        for name in (*averages, *[AVERAGES] * bool(averages), WEIGHTS, CONFIG, PROGRESS, MANIFEST, STATE, RNG, "."):
            sync(temporary / name)
        with contextlib.suppress(OSError):  # nothing there, or metrics that cannot be written: no reason to fail
            sync(self.run / METRICS)  # else a run that goes on from here may lack lines of steps before
        checkpoint.give_name(temporary, final)  # the same step is saved again after a rewind, or a resume
        sync(final.parent)
        return self._tidy(progress)

    def _tidy(self, progress: Progress) -> list[str]:
        """As `tidy`, after the save of where the run stood; the first process's."""
        back_to, self.back_to = self.back_to, None
        if back_to is not None:
            # first: a start refuses a copy that is later than the folder's checkpoints
            with contextlib.suppress(UserError, OSError):  # the log says so of the copy that comes next
                if (mirror := self._mirror) is not None:
                    mirror.check_owner(self.config.train.output)
                    mirror.delete_later(back_to)
        return checkpoint.tidy(self.run, self._kept(progress), progress.step, back_to)

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """Every process's result; SaveError on all where one fails, so that none waits for it."""
        outcome: tuple[T | None, str | None]
        try:
            outcome = action(), None
        except Exception as error:  # noqa: BLE001 whatever it is, the other processes must know of it
            outcome = None, explain(error, self.run)
        outcomes = self._peers.gather_objects(outcome)
        for rank, (_, fault) in enumerate(outcomes):
            if fault is not None:
                raise SaveError(f"process {rank} could not write the checkpoint: {fault}")
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def _rng_file(self) -> str:
        return f"rank-{self.mesh.world.rank:05d}.pt"

    # --- going on ------------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> list[str]:
        """Parameters, optimizer and random-number generators of a checkpoint that verifies; what there is to say.

        At another layout the checkpoint is first converted (`reshard`), once, by the first process; the others wait.
        Learning rates, weight decays, betas, epsilon, the clipping norm and the rules of float16's loss scale stay as
        this run's config has them. RunError where the conversion cannot be written, or a file would build what is no
        part of a checkpoint (`unpickle`).
        """
        self.close()
        self._refuse_foreign(folder / STATE, folder / RNG)
        before = checkpoint.read_progress(folder)
        self._reached = max(self._reached, before.step)
        said = []
        if self.mesh.is_first and (differ := versions_that_differ(before.code, self._code)):
            said.append(f"{folder} was written by {', '.join(differ)}")
        same, place = before.layout == self.layout, folder
        if not same:
            place, written = self._convert(folder, before.step)
            if written:
                said.append(f"converted {folder} from {before.layout} to {self.layout}")
            self._refuse_foreign(place / reshard.UNIVERSAL)  # which is whole by now
        optimizer, engine = self.engine.optimizer, self.engine
        ours = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
        kept = ("clip_grad", "loss_scaler", "dynamic_loss_scale")
        values = {name: getattr(optimizer, name) for name in kept if hasattr(optimizer, name)}
        engine._config.load_universal_checkpoint = not same
        try:
            with quiet(), restricted():
                path, saved = engine.load_checkpoint(str(place), tag=STATE if same else reshard.UNIVERSAL)
        finally:
            engine._config.load_universal_checkpoint = False
        if path is None:
            raise RunError(f"DeepSpeed could not read {folder}")
        forget_group_copies(engine.module)
        if same:
            load_averages(engine.module, saved)
        else:
            self._load_what_deepspeed_leaves(place / reshard.UNIVERSAL / "zero", before)
        # ZeRO-3 has given every group the first one's settings, and all groups one and the same counter of steps
        for group, settings in zip(optimizer.param_groups, ours, strict=True):
            for key in group.keys() - settings.keys() - {"params"}:  # of another optimizer
                del group[key]
            group.update(settings)
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for parameter, state in optimizer.optimizer.state.items():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
        if "loss_scaler" in values:
            adopt_scale(values["loss_scaler"], optimizer.loss_scaler)
        for name, value in values.items():
            setattr(optimizer, name, value)
        first = self.mesh.is_first
        weight = self._peers.broadcast_object(earlier_weight(folder, self.config) if first else None)
        stepped_by = self._peers.broadcast_object(load(folder / CONFIG).optimizer.name if first else "")
        if weight is not None and weight.known:
            rescale_moments(optimizer.optimizer, weight.value)
        if stepped_by == "muon" and self.config.optimizer.name != "muon":
            # beside no second moment, or one that AdamW left long before, Muon's momentum gives steps without bound
            model = self.config.model
            clear_moments(engine, lambda name, shape: muon_parts(name, shape, model, per_head=False) > 0)
        if exists(folder / RNG / self._rng_file()):
            set_random_state(torch.load(folder / RNG / self._rng_file(), weights_only=True))
        return said

    def _load_what_deepspeed_leaves(self, states: Path, before: Progress) -> None:
        """From a universal checkpoint: parameters that are not trained, and, with ZeRO-3, averages of the weights."""
        averages = before.averaged.keys() & set(average_names(self.config))
        load_universal(self.engine.module, self.mesh, states, averages)
        optimizer = self.engine.optimizer
        for partition in partitions_of(optimizer, self.mesh) if self.config.zero.stage == 3 else ():
            for key in averages:
                average = optimizer.optimizer.state[partition.flat][key] = torch.zeros_like(partition.flat)
                for piece in partition.pieces:
                    whole = load_mapped(states / piece.name / f"{key}.pt")["param"]
                    piece.of(average).copy_(whole.flatten()[piece.offset : piece.offset + piece.length])

    def _refuse_foreign(self, *folders: Path) -> None:
        """The processes look through the files together, so that one that is refused ends all of them alike.

        folders: those that are read next. Beside them in a checkpoint may be half of its universal form, which another
        run is writing, or has left.
        """
        peers, files = self._peers, sorted(file for folder in folders for file in below(folder, "*.pt"))
        faults = peers.gather_objects(refused(files[peers.rank :: peers.size]))
        if fault := next((fault for fault in faults if fault), None):
            raise RunError(fault)

    def _convert(self, folder: Path, step: int) -> tuple[Path, bool]:
        """Where a checkpoint's universal form is, and whether it had to be written."""
        outcome: tuple[Path, bool] | str = folder, False
        if self.mesh.is_first:
            try:
                place, is_whole = reshard.place_of(folder, self.run, step)
                outcome = place, not is_whole and reshard.convert(folder, self.config.model, place)
            except Exception as error:  # noqa: BLE001 whatever it is, the other processes must know of it
                outcome = f"{folder} is of another layout and could not be converted: {explain(error)}"
        outcome = self._peers.broadcast_object(outcome)
        if isinstance(outcome, str):
            raise RunError(outcome)
        return outcome


def adopt_scale(scaler: Any, saved: Any) -> None:
    """Let DeepSpeed's loss scaler go on with the scale that a checkpoint's had found, if neither has a fixed one.

    The run's own minimum and hysteresis bound what it takes over.
    """
    if scaler.dynamic and saved.dynamic:
        counts = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        vars(scaler).update({name: getattr(saved, name) for name in counts})
        scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
        scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)


class OfOtherThreads(io.TextIOBase):
    """A stream that passes on what other threads write than the one that makes it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what DeepSpeed prints and warns of while it loads, on which a user cannot act."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(OfOtherThreads(sys.stdout)):
            yield
    finally:
        logger.setLevel(level)


def layout_of(engine: Any, config: Config, mesh: Mesh) -> Layout:
    """The layout of a run; every process calls it."""
    first_layer = min(int(name.split(".")[0]) for name, _ in engine.module.named_parameters())
    layout = Layout(
        tensor=mesh.tensor.size,
        pipeline=mesh.pipeline.size,
        data=mesh.data.size,
        zero_stage=config.zero.stage,
        dtype=resolve_dtype(config),
        partition=tuple(mesh.pipeline.gather_objects(first_layer)),
        deepspeed=config.deepspeed,
        frozen=frozen_patterns(config),
    )
    return Layout.from_json(json.loads(json.dumps(asdict(layout))))


def partition_dims(module: torch.nn.Module) -> dict[str, int]:
    """The dimension along which tensor parallelism splits, of those parameters of this process that it splits."""
    named = module.named_parameters()
    return {name: p.partition_dim for name, p in named if getattr(p, "tensor_model_parallel", False)}  # type: ignore


def make_room(temporary: Path) -> None:
    """Remove what interrupted saves have left; what cannot be removed is at least not where this save writes."""
    if exists(temporary):
        checkpoint.set_aside(temporary)
    checkpoint.clear_leftovers(temporary.parent)


def write_files(files: list[tuple[Path, Any]], root: Path) -> dict[str, dict[str, Any]]:
    """Write (path, content), durably, letting go of each when it is written; their entries in the manifest."""
    entries = {}
    while files:
        path, content = files.pop()
        path.parent.mkdir(parents=True, exist_ok=True)
        entries[path.relative_to(root).as_posix()] = save_hashed(path, content)
        sync(path)
    return entries


def explain(error: BaseException, place: Path | None = None) -> str:
    """An error in one line. place: what was written to, where the error may not know it."""
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error, place)
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"
