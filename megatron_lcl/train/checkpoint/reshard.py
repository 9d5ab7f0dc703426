"""A checkpoint of any layout as DeepSpeed's Universal Checkpoint, from which any other layout loads.

    step-00001000/universal/        of another run's checkpoint: RUN/checkpoints/.step-00001000.….universal/universal/
        zero/{index}.name/{fp32,exp_avg,exp_avg_sq,step}.pt      whole and unpadded; also averages of the weights
        zero/optimizer_state.pt                                  loss scale and the like
        mp_rank_00_model_states.pt                               counts; what ZeRO-1 and 2 look for
        zero_pp_rank_0_mp_rank_00_model_states.pt                the same, what ZeRO-3 looks for
        manifest.json

DeepSpeed's own converter writes two formats, one that only ZeRO-1 and 2 load and one that only ZeRO-3 loads, by way of
a file for every piece of every parameter. This one writes what all of them load, one parameter at a time.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_lcl.config import Model
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text, verify
from megatron_lcl.data.corpus.scratch import clear_dead, scratch_folder, take_name, waiting_for_others
from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.checkpoint.folder import STATE, step_folder
from megatron_lcl.train.checkpoint.state import FROZEN, FROZEN_AVERAGES, State, save_hashed

UNIVERSAL = "universal"


def place_of(folder: Path, run: Path, step: int) -> tuple[Path, bool]:
    """The folder in which a run that goes on from a checkpoint has that one's universal form; whether it was verified.

    That is the checkpoint's own, if it is of this run, or has the form already. Into another run's folder, which may be
    somebody else's, nothing is written. In the run's own it is removed by the next save, as what an interrupted one
    leaves (`folder.clear_leftovers`).
    """
    if folder.resolve().parent == (run / CHECKPOINTS).resolve():
        return folder, False
    if not verify(folder / UNIVERSAL):
        return folder, True
    name = fingerprint(folder / MANIFEST)["xxh3"][:8]  # of whatever other checkpoint something may have been left
    return run / CHECKPOINTS / f".{step_folder(run, step).name}.{name}.{UNIVERSAL}", False


def convert(folder: Path, model: Model, place: Path | None = None) -> bool:
    """Make sure that a checkpoint has its universal form, in `place` (None: in its own folder); whether it had to be
    written. One process of a run calls it.

    Processes of other runs may do the same: each writes a folder of its own, which it renames, and only one that does
    not verify is moved out of the way. OSError where the place cannot be written.
    """
    place = place or folder
    final = place / UNIVERSAL
    if not verify(final):
        return False
    place.mkdir(parents=True, exist_ok=True)
    with waiting_for_others(place / f".{UNIVERSAL}.lock"):
        clear_dead(place)
        with scratch_folder(place) as scratch:
            if not verify(final):  # another run has written it meanwhile
                return False
            _write(State(folder / STATE, model), scratch / UNIVERSAL)
            if verify(final):  # as before, where there are no locks
                with contextlib.suppress(FileNotFoundError):
                    final.rename(scratch / "damaged")
                take_name(scratch / UNIVERSAL, final)  # no sync, for which all wait: the next one verifies it
    return True


def _write(state: State, folder: Path) -> None:
    files: dict[str, dict[str, object]] = {}

    def save(name: str, content: object) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = save_hashed(folder / name, content)

    for name, shape in state.shapes.items():
        dim = state.partition_dims.get(name, 0)
        for key in state.keys:
            content = {"param": state.whole(name, key), "cat_dim": dim}
            if dim == 0 and len(shape) > 1:
                content["vocab_tensor"] = True  # so DeepSpeed calls rows that may have to be padded again
            save(f"zero/{name}/{key}.pt", content)
        save(f"zero/{name}/step.pt", state.step)
    # as many as any run has: parameters may have been frozen. `Checkpointer.load` sets what is in them
    groups, shards = [state.base["param_groups"][0]] * 2, {"fp32_flat_groups", "param_slice_mappings"}
    shards |= {"single_partition_of_fp32_groups", "base_optimizer_state", "optimizer_state_dict"}
    common = {key: value for key, value in state.optimizer.items() if key not in shards}
    zero3 = {"state": {0: {"step": state.step}}, "param_groups": groups}
    common |= {"param_groups": groups, "optimizer_state_dict": zero3, "ds_version": state.version}
    save("zero/optimizer_state.pt", common)
    counts = {**state.common, "module": {}, "param_shapes": None, "mp_world_size": 1}
    for key in {FROZEN, FROZEN_AVERAGES} & counts.keys():  # they are with the others
        del counts[key]
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        save(name, counts)
    (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
