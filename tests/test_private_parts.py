"""Every private part of other libraries that the package uses is listed here, and exists with the signature we rely on.

After an upgrade of torch or DeepSpeed this test says at once what broke. A part is private where a name begins with an
underscore, or where it belongs to a module that its library does not document (`deepspeed.runtime…`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_lcl"
INTERNAL = ("deepspeed.runtime", "deepspeed.ops", "deepspeed.utils.groups", "deepspeed.utils.tensor_fragment")
NOT_PRIVATE = {"_replace", "_fields", "_asdict", "_exit", "_current_frames"}
"""documented in spite of the underscore: of NamedTuple, os and sys"""


class Part(NamedTuple):
    """One private part; `name` is dotted, below `module`."""

    module: str
    name: str
    use: str
    parameters: tuple[str, ...] | None = None
    """names of its first parameters; None: not called by us with any, or no function"""
    in_source: str = ""
    """for what instances have: text of the class's or module's source that makes it"""

    @property
    def key(self) -> str:
        """What `private_uses` finds: a name with underscore, or else the name with its module."""
        last = self.name.rpartition(".")[2] or self.module
        return last if last.startswith("_") else f"{self.module}.{self.name}".rstrip(".")


PIPE = "deepspeed.runtime.pipe"
ENGINE = f"{PIPE}.engine"
PARTS = [
    Part(
        "deepspeed.autotuning.autotuner",
        "",
        "goes without MLflow: train/uncompiled.py",
        in_source="    import mlflow\n    has_mlflow = True\nexcept Exception as e:",
    ),
    # DeepSpeed's pipeline: train/pipeline
    Part(ENGINE, "PipelineEngine", "base of our engine"),
    Part(
        f"{PIPE}.module",
        "PipelineModule.ckpt_layer_path_list",
        "gets the folder's name as a pattern",
        ("self", "ckpt_dir", "local_layer_idx"),
    ),
    Part(ENGINE, "PipelineEngine._INSTRUCTION_MAP", "which method runs which instruction; ours are put in"),
    Part(ENGINE, "PipelineEngine._exec_schedule", "runs our schedules", ("self", "pipe_schedule")),
    Part(ENGINE, "PipelineEngine._exec_recv_activations", "replaced", ("self", "buffer_id")),
    Part(ENGINE, "PipelineEngine._exec_forward_pass", "replaced", ("self", "buffer_id")),
    Part(ENGINE, "PipelineEngine._exec_reduce_grads", "timed", ("self",)),
    Part(ENGINE, "PipelineEngine._exec_optimizer_step", "timed", ("self", "lr_kwargs")),
    Part(ENGINE, "PipelineEngine._exec_send_activations", "replaced", ("self", "buffer_id")),
    Part(ENGINE, "PipelineEngine._exec_recv_grads", "replaced", ("self", "buffer_id")),
    Part(ENGINE, "PipelineEngine._exec_backward_pass", "replaced", ("self", "buffer_id")),
    Part(ENGINE, "PipelineEngine._exec_send_grads", "replaced", ("self", "buffer_id")),
    *(
        Part(ENGINE, f"PipelineEngine.{name}", "what our instructions read", in_source=f"self.{name} = ")
        for name in ("pipe_buffers", "micro_batches", "num_stages", "stage_id", "prev_stage", "next_stage")
    ),
    Part(ENGINE, "PipelineEngine.set_train_batch_size", "sets it for a phase", ("self", "train_batch_size")),
    Part(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine.micro_steps",
        "a step ends at a multiple; set to 0 where the global batch changes",
        in_source="self.micro_steps = ",
    ),
    Part(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer.gradient_accumulation_steps",
        "set with it",
        in_source="self.gradient_accumulation_steps = ",
    ),
    Part(f"{PIPE}.module", "PipelineModule", "base of our stage"),
    Part(f"{PIPE}.module", "PipelineModule._partition_layers", "replaced: our partition", ("self", "method")),
    Part(f"{PIPE}.module", "PipelineModule._set_bounds", "sets our partition", ("self", "start", "stop")),
    Part(f"{PIPE}.module", "PipelineModule.forward_funcs", "the last is the head", in_source="self.forward_funcs = "),
    Part(f"{PIPE}.p2p", "send", "sends hidden rows", ("tensor", "dest_stage")),
    Part(f"{PIPE}.p2p", "recv", "receives hidden rows", ("tensor", "src_stage")),
    Part(f"{PIPE}.p2p", "", "module of the two"),
    Part(f"{PIPE}.schedule", "", "module of the instructions"),
    Part(f"{PIPE}.schedule", "PipeInstruction", "type of the instructions"),
    Part(f"{PIPE}.schedule", "PipeSchedule", "base", ("self", "micro_batches", "stages", "stage_id")),
    Part(f"{PIPE}.schedule", "TrainSchedule", "1F1B", ("self", "micro_batches", "stages", "stage_id")),
    *(
        Part(f"{PIPE}.schedule", name, "an instruction of our schedules")
        for name in ("LoadMicroBatch", "ForwardPass", "BackwardPass", "SendActivation", "RecvActivation", "SendGrad")
    ),
    *(
        Part(f"{PIPE}.schedule", name, "an instruction of our schedules")
        for name in ("RecvGrad", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
    ),
    Part(f"{PIPE}.topology", "PipelineParallelGrid", "tells DeepSpeed the tensor ranks", ("self", "topology")),
    Part(f"{PIPE}.topology", "PipeModelDataParallelTopology", "order of ranks", ("self", "num_pp", "num_mp", "num_dp")),
    # DeepSpeed's engine, config and checkpoints: train, train/checkpoint
    Part("deepspeed.runtime.engine", "DeepSpeedEngine", "its forward and backward, without the pipeline's"),
    Part(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine.backward",
        "of one micro-batch",
        in_source="def backward(self, loss, retain_graph=False, scale_wrt_gas=True)",
    ),
    Part("deepspeed.runtime.engine", "DeepSpeedEngine._copy_recovery_script", "replaced", ("self", "save_path")),
    Part(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine._get_all_ckpt_names",
        "gets the folder's name as a pattern",
        ("self", "checkpoints_path", "tag"),
    ),
    Part("deepspeed.runtime.engine", "DeepSpeedEngine._config", "its checkpoint setting", in_source="self._config = "),
    Part("deepspeed.runtime.config", "DeepSpeedConfig", "checks our settings", ("self", "config", "mpu")),
    Part("deepspeed.runtime.config_utils", "DeepSpeedConfigModel", "which keys a section has"),
    Part("deepspeed.runtime.checkpoint_engine", "TorchCheckpointEngine", "base of Snapshot"),
    Part(
        "deepspeed.runtime.checkpoint_engine", "TorchCheckpointEngine.save", "replaced", ("self", "state_dict", "path")
    ),
    Part("deepspeed.runtime.checkpoint_engine", "TorchCheckpointEngine.makedirs", "replaced", ("self", "path")),
    Part("deepspeed.runtime.checkpoint_engine", "TorchCheckpointEngine.preserves_storage_sharing", "replaced"),
    Part("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", "may be in a checkpoint's pickles"),
    *(
        Part("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", "goes on from a checkpoint's", in_source=source)
        for source in (
            *("self.cur_iter = 0", "self.last_overflow_iter = -1", "self.min_scale = min_scale"),
            *("self.delayed_shift = delayed_shift", "self.cur_hysteresis = delayed_shift", "self.dynamic = True"),
        )
    ),
    Part("deepspeed.runtime.fp16.loss_scaler", "LossScaler", "may be in a checkpoint's pickles"),
    Part("deepspeed.runtime.zero.config", "ZeroStageEnum", "may be in a checkpoint's pickles"),
    Part("deepspeed.utils.tensor_fragment", "fragment_address", "may be in a checkpoint's pickles"),
    Part("deepspeed.utils.groups", "", "its `mpu`, kept from one engine to the next"),
    Part("deepspeed.utils.groups", "mpu", "set to None or to the tensor ranks before an engine is built"),
    Part("deepspeed.ops", "__compatible_ops__", "switches the compiled all-reduce on CPU off"),
    Part("deepspeed.runtime.bf16_optimizer", "", "tells no memory"),
    Part("deepspeed.runtime.bf16_optimizer", "see_memory_usage", "replaced by what takes anything"),
    *(
        Part(f"deepspeed.runtime.{module}", f"{name}._lazy_init_hp_params_optimizer_state", "links states again")
        for module, name in (("zero.stage_1_and_2", "DeepSpeedZeroOptimizer"), ("bf16_optimizer", "BF16_Optimizer"))
    ),
    Part(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer._hp_optimizer_states_linked",
        "links states again",
        in_source="self._hp_optimizer_states_linked = ",
    ),
    *(
        Part("deepspeed.runtime.zero.stage3", f"DeepSpeedZeroOptimizer_Stage3.{name}", "puts masters into the model")
        for name in ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters")
    ),
    # DeepSpeed's question whether a gradient is finite, put off: train/skipping.py
    *(
        Part(f"deepspeed.runtime.{module}", name, "replaced during a step", parameters)
        for module, name, parameters in (
            ("zero.stage_1_and_2", "is_invalid_grad_norm", ("norm",)),
            ("zero.stage3", "is_invalid_grad_norm", ("norm",)),
            ("bf16_optimizer", "is_invalid_grad_norm", ("norm",)),
            ("zero.stage_1_and_2", "mask_nan_or_inf_with_val_inplace", ("input", "device", "val")),
            ("utils", "mask_nan_or_inf_with_val_inplace", ("input", "device", "val")),
            ("bf16_optimizer", "clip_tensors_by_global_norm", ("input_tensors", "max_norm", "global_norm", "mpu")),
        )
    ),
    Part(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer.check_overflow",
        "left out",
        ("self", "partition_gradients"),
    ),
    # the machinery of torch.compile, not imported: train/uncompiled.py
    Part("deepspeed.runtime.compiler", "", "replaced while Muon is imported", in_source="def compile("),
    Part("deepspeed.runtime.zero.muon.original_muon", "", "imported", in_source="@compiler.compile()"),
    # torch
    Part("torch._C._autograd", "_get_current_graph_task_keep_graph", "whether backward may free its buffers"),
    Part("torch._C", "_autograd", "module of it"),
    Part("torch", "_C", "module of it"),
    Part("torch.distributed.distributed_c10d", "_get_default_store", "the watchdog's store", ()),
    Part("torch.distributed.distributed_c10d", "_abort_process_group", "a process that has failed", ("group",)),
    Part("torch.distributed.distributed_c10d", "_world", "all process groups, and their names"),
    Part("torch.distributed", "ProcessGroup._get_sequence_number_for_group", "collectives so far, for the report"),
    Part(
        "torch.utils.data.dataloader",
        "_MultiProcessingDataLoaderIter._workers",
        "the loader's processes: has one of them been killed?",
        in_source="self._workers = []",
    ),
    Part("tarfile", "TarInfo._proc_member", "each header passes it before more of it is read", ("self", "tarfile")),
    Part(
        "torch.utils.data.dataloader",
        "_MultiProcessingDataLoaderIter._shutdown",
        "set, it keeps a fork of the main process from ending them",
        in_source="if not self._shutdown:",
    ),
    Part("torch.utils.data.dataloader", "_MultiProcessingDataLoaderIter._shutdown_workers", "ends them", ("self",)),
    Part("torch.nn", "Module._parameters", "stand-ins of shared parameters", in_source='"_parameters"'),
    Part("torch.nn", "Module._apply", "extended: the log scale stays float32", ("self", "fn", "recurse")),
    Part("torch._ops", "OpOverload._opname", "name of a collective, to count its traffic"),
    Part("torch.utils._python_dispatch", "TorchDispatchMode", "sees the operations of a step"),
    Part("torch._inductor.async_compile", "maybe_warm_pool", "()"),
    Part("torch._inductor.compile_fx", "", "imported ahead by the selftest"),
    # a simulated step: train/simulate.py
    Part("torch._subclasses.fake_tensor", "FakeTensor", "tensors without data"),
    Part("torch._subclasses.fake_tensor", "FakeTensorMode", "makes them"),
    Part("torch.testing._internal.distributed.fake_pg", "FakeStore", "a process group that sends nothing"),
    Part("torch.utils._pytree", "tree_leaves", "the tensors that an operation gives", ("tree",)),
    Part("torch.autograd", "Variable._execution_engine", "calls back where a backward has ended"),
    Part("torch", "_foreach_norm", "norms of many tensors at once"),
    Part("torch.cuda.memory", "_record_memory_history", "allocations of profiled steps", ("enabled",)),
    Part("torch.cuda.memory", "_dump_snapshot", "writes them", ("filename",)),
    Part("torch", "ops.aten._local_scalar_dense", "a number that is asked of a tensor"),
    Part("torch", "ops.c10d._allgather_base_", "of which gloo copies what it gives"),
    Part("torch", "ops.c10d._reduce_scatter_base_", "of which gloo copies what it takes"),
    Part("threading", "_register_atexit", "what is not read when a process ends, before its threads do", ("func",)),
    Part("multiprocessing.forkserver", "_forkserver", "the server of its processes, ended"),
    Part(
        "multiprocessing.spawn",
        "_main._inheriting",
        "whether a process imports who started it",
        in_source="process.current_process()._inheriting = True",
    ),
    Part("multiprocessing.util", "Finalize", "removes the folder of its sockets", ("self", "obj", "callback", "args")),
    Part("multiprocessing.util", "get_temp_dir", "takes our folder", in_source="current_process()._config.get("),
    *(
        Part(module, "", "its comparison with other processes is left out", in_source="assert_ints_same_as_other_ranks")
        for module in (
            "deepspeed.runtime.zero.partition_parameters",
            "deepspeed.runtime.zero.partitioned_param_coordinator",
            "deepspeed.runtime.zero.stage3",
        )
    ),
    # numba's cache: compiled.py
    Part("numba.core.dispatcher", "Dispatcher._cache", "replaced", in_source="self._cache = NullCache()"),
    *(
        Part("numba.core.caching", f"FunctionCache{name}", "base of our cache", parameters)
        for name, parameters in (
            ("", ("self", "py_func")),
            (".load_overload", ("self", "sig", "target_context")),
            (".save_overload", ("self", "sig", "data")),
            (".flush", ("self",)),
        )
    ),
    Part("numba.core.caching", "Cache._cache_file", "its index", in_source="self._cache_file = IndexDataCacheFile("),
    Part("numba.core.caching", "IndexDataCacheFile._index_path", "removed", in_source="self._index_path ="),
    # others
    Part("submitit", "AutoExecutor._typed_parameters", "names and types of Slurm's parameters"),
    Part("submitit.slurm.slurm", "_make_sbatch_string", "names and types of Slurm's parameters", ("command", "folder")),
    Part("huggingface_hub", "_CACHED_NO_EXIST", "told: the hub has said that a repository has no such file"),
    Part("open_clip.factory", "_get_hf_config", "config of a model on disk", ("model_id",)),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.module}.{part.name}")
def test_the_part_exists_as_we_use_it(part: Part) -> None:
    if part.module.split(".")[0] not in ("torch", "deepspeed"):
        pytest.importorskip(part.module.split(".")[0])
    found: Any = importlib.import_module(part.module) if part.module != "torch._C._autograd" else None
    if found is None:
        import torch

        found = torch._C._autograd
    *owners, last = part.name.split(".")
    for owner in owners:
        found = getattr(found, owner)
    if part.in_source:
        classes = found.__mro__[:-1] if inspect.isclass(found) else (found,)
        assert any(part.in_source in inspect.getsource(each) for each in classes), part.use
        return
    if last:
        assert hasattr(found, last), part.use
        found = getattr(found, last)
    if part.parameters is not None:
        function = found.__init__ if inspect.isclass(found) else found
        assert tuple(inspect.signature(function).parameters)[: len(part.parameters)] == part.parameters, part.use


# --- what the package uses ---------------------------------------------------------------------------------------


def private_uses(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Private parts of the libraries, and the files that use them: dotted imports, attributes, strings of getattr.

    An attribute counts where the package defines none of that name, or defines it in a class that inherits from a
    class of the libraries that has it too.
    """
    uses: dict[str, set[str]] = defaultdict(set)
    own = {name for tree in trees.values() for name in _defined(tree)}
    for file, tree in trees.items():
        imported: dict[str, str] = {}
        for node in ast.walk(tree):
            for local, full in _imports(node):
                imported[local] = full
                private = any(part.startswith("_") and not _is_ours(part) for part in full.split("."))
                if not _of_package(full) and (private or full.startswith(INTERNAL)):
                    last = full.rpartition(".")[2]
                    uses[last if last.startswith("_") else full].add(file)
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Attribute(attr=name)
                    | ast.Call(
                        func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
                    )
                ):
                    if name.startswith("_") and name not in own | NOT_PRIVATE and not _is_ours(name):
                        uses[name].add(file)
                case ast.ClassDef():
                    bases = [_resolve(ast.unparse(base), imported) for base in node.bases]
                    for name in _defined(node):
                        if name.startswith("_") and not name.endswith("__") and any(hasattr(b, name) for b in bases):
                            uses[name].add(file)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = imported.get(node.value.id, "")
                if module.startswith(INTERNAL) and module in sys.modules:
                    full = f"{module}.{node.attr}"
                    uses[full].add(file)
    return uses


def _is_ours(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__compatible_ops__"


def _of_package(full: str) -> bool:
    return full.split(".")[0] == PACKAGE.name


def _imports(node: ast.AST) -> list[tuple[str, str]]:
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
    return []


def _defined(tree: ast.AST) -> set[str]:
    """Names of functions, classes, variables and of attributes set on `self` or `ctx`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Name(id=name, ctx=ast.Store())
            ):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "ctx"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def _resolve(text: str, imported: dict[str, str]) -> Any:
    first, _, rest = text.partition(".")
    full = imported.get(first, "") + (f".{rest}" if rest else "")
    module, _, name = full.rpartition(".")
    if not module or _of_package(full):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def test_every_private_use_is_listed() -> None:
    trees = {
        str(file.relative_to(PACKAGE)): ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")
    }
    uses = private_uses(trees)
    listed = {part.key for part in PARTS}
    assert {name: files for name, files in uses.items() if name not in listed} == {}
    text = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    last = {part: (part.name or part.module).rpartition(".")[2] for part in PARTS}
    assert [part for part, name in last.items() if name not in text] == [], "listed and no longer used"


def test_the_scan_sees_what_it_should() -> None:
    source = """
from deepspeed.runtime.zero import stage3
from torch.utils.data import _utils
from any_library import _hidden_there
from megatron_lcl.evaluate import _of_us
engine._private = 1
getattr(engine, "_hidden")
self._own = 2
self._own
"""
    found = private_uses({"a.py": ast.parse(source)}).keys()
    assert found >= {"deepspeed.runtime.zero.stage3", "_utils", "_hidden_there", "_private"}
    assert {"_hidden", "_own", "_of_us"} & found == {"_hidden"}
