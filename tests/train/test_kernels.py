"""Which kernels are used: a flash-attn that does not load, a card that is too old, one that is asked for by name."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import inspect
import itertools
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch.conftest import tiny  # noqa: F401 - a fixture
from torch import nn
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from train.resilience.fleet import line_of

from megatron_lcl import attention, objectives
from megatron_lcl import config as configs
from megatron_lcl.attention import Adaptive, choose_attention, find_fault, flex_mask, group_by_length
from megatron_lcl.cli import main
from megatron_lcl.errors import UserError
from megatron_lcl.losses import contrastive, contrastive_tiles, generation, kernels, softmax_torch
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.layers import LanguageBlock
from megatron_lcl.parallel.mesh import ALONE, Axis, Mesh
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train import dryrun
from megatron_lcl.train import kernels as choice
from megatron_lcl.train.kernels import Kernels, describe

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
TURING, AMPERE, HOPPER, BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0)
WRONG_ABI = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E\\n(in this torch)")\n'
WORKING = "def flash_attn_varlen_func(*arguments, **keywords):\n    return keywords\n"


def install(folder: Path, text: str, patch: pytest.MonkeyPatch) -> None:
    """A package flash_attn of this text."""
    (folder / "flash_attn").mkdir(parents=True)
    (folder / "flash_attn" / "__init__.py").write_text(text)
    patch.delitem(sys.modules, "flash_attn", raising=False)
    patch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


@pytest.fixture
def wrong_abi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn built for another torch."""
    install(tmp_path / "packages", WRONG_ABI, monkeypatch)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """flash-attn that returns its keywords; forgotten again."""
    install(tmp_path / "packages", WORKING, monkeypatch)
    yield
    sys.modules.pop("flash_attn", None)


@pytest.mark.usefixtures("wrong_abi")
def test_a_flash_attn_that_does_not_load_is_said_and_the_next_is_used() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        chosen = choose_attention(CUDA, dtype, capability=AMPERE)
        assert chosen.name == "torch_varlen"
        (line,) = chosen.passed_over
        assert line == (
            "flash_attn is installed but does not load (ImportError: flash_attn_2_cuda.so: undefined symbol: "
            "_ZN3c105ErrorC2E (in this torch))"
        )
    with pytest.raises(UserError, match=r"train.attention = flash_attn, but flash_attn is installed but does not load"):
        choose_attention(CUDA, torch.bfloat16, "flash_attn", capability=AMPERE)


@pytest.mark.usefixtures("working")
def test_an_older_card_gets_dense_attention() -> None:
    chosen = choose_attention(CUDA, torch.bfloat16, capability=TURING)
    assert chosen.name == "dense"
    needs = "needs compute capability 8.0 (Ampere) or newer, and the GPU has 7.5"
    assert chosen.passed_over == (f"flash_attn {needs}", f"torch_varlen {needs}")
    with pytest.raises(UserError, match=r"the GPU has 7.5; set train.attention to auto"):
        choose_attention(CUDA, torch.bfloat16, "torch_varlen", capability=TURING)


def test_what_is_not_installed_is_not_worth_a_line() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    assert choose_attention(CUDA, torch.bfloat16, capability=AMPERE).passed_over == ()
    assert len(choose_attention(CUDA, torch.bfloat16, capability=TURING).passed_over) == 1
    with pytest.raises(UserError, match="flash_attn is not installed"):
        choose_attention(CUDA, torch.bfloat16, "flash_attn", capability=AMPERE)


@pytest.mark.usefixtures("working")
def test_what_each_device_and_dtype_uses() -> None:
    assert choose_attention(CUDA, torch.bfloat16, capability=AMPERE).name == "flash_attn"
    assert choose_attention(CUDA, torch.float32, capability=AMPERE).name == "dense"
    assert choose_attention(CPU, torch.bfloat16).name == "per_sequence"
    assert choose_attention(CUDA, torch.bfloat16, "torch_varlen", capability=AMPERE).name == "torch_varlen"
    assert choose_attention(CPU, torch.float32, "dense").name == "dense"
    assert choose_attention(CUDA, torch.float16, capability=AMPERE, head_width=320).name == "dense"
    assert find_fault("torch_varlen", CUDA, torch.float16, AMPERE, 20) is not None
    assert find_fault("flash_attn", CUDA, torch.float16, AMPERE, 20) is None
    for name, device, dtype in (("flash_attn", CPU, torch.bfloat16), ("torch_varlen", CUDA, torch.float32)):
        with pytest.raises(UserError, match=f"train.attention = {name}, but {name} needs"):
            choose_attention(device, dtype, name, capability=AMPERE)


@pytest.mark.usefixtures("working")
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_asked_for_its_deterministic_backward(deterministic: bool) -> None:
    chosen = choose_attention(CUDA, torch.bfloat16, capability=AMPERE, deterministic=deterministic)
    rows: Any = torch.zeros(3, 1, 8)
    assert chosen.attend(rows, rows, rows, rows, 3) == {"causal": True, "deterministic": deterministic}


def test_torch_s_kernel_is_asked_for_causal_attention_in_each_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def varlen_attn(*arguments: Any, **keywords: Any) -> torch.Tensor:
        asked.append(inspect.signature(real).bind(*arguments, **keywords).arguments)
        return asked[-1]["query"]

    real = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    chosen = choose_attention(CUDA, torch.bfloat16, "torch_varlen", capability=AMPERE)
    q, k, v = torch.zeros(3, 3, 1, 8).unbind()
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert chosen.attend(q, k, v, cu_seqlens, 2) is q
    (told,) = asked
    assert [told[name] for name in ("query", "key", "value")] == [q, k, v]
    assert told["cu_seq_q"] is told["cu_seq_k"] is cu_seqlens
    assert (told["max_q"], told["max_k"]) == (2, 2)
    assert tuple(told["window_size"]) == (-1, 0), "all rows before, none behind"


@pytest.mark.parametrize("gives", ["keywords", "keywords, None"], ids=["now", "with the log-sum-exps"])
def test_flash_attention_3_is_first_on_hopper(gives: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"def flash_attn_varlen_func(*arguments, **keywords):\n    return {gives}\n"
    (tmp_path / "flash_attn_interface.py").write_text(module)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    chosen = choose_attention(CUDA, torch.bfloat16, capability=HOPPER, deterministic=True)
    assert (chosen.name, chosen.passed_over) == ("flash_attn_3", ())
    rows: Any = torch.zeros(3, 1, 8)
    assert chosen.attend(rows, rows, rows, rows, 3) == {"causal": True, "deterministic": True}
    for capability, has in ((AMPERE, "8.0"), (BLACKWELL, "10.0")):
        other = choose_attention(CUDA, torch.bfloat16, capability=capability)
        assert other.name != "flash_attn_3"
        assert f"flash_attn_3 needs compute capability 9.x (Hopper), and the GPU has {has}" in other.passed_over
    assert "a multiple of 8" in str(find_fault("flash_attn_3", CUDA, torch.bfloat16, HOPPER, 20))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_torchs_attention_is_its_flash_attention(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not cuDNN's, which torch 2.15 takes where it is not switched off; blocks may be compiled, and recompute."""
    seen: list[tuple[bool, bool]] = []

    def stand_in(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return q.clone()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    attend = choose_attention(CUDA, torch.bfloat16, "torch_varlen", capability=HOPPER).attend
    block = LanguageBlock(Case().config().model.language, nn.LayerNorm, ALONE, "attention", None, attend)
    if compiled:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        block.compile_parts()
    batch = make_batches(Case().config(), 0)[0]
    rows = torch.zeros(len(batch.tokens), block.norm1.weight.numel(), requires_grad=True)
    block(Activations.of(batch)._replace(hidden=rows)).hidden.sum().backward()
    assert seen == [(True, False)] * 2, "forward, and again in backward"
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_kernels_get_the_sequences_of_a_batch_and_nothing_is_compiled_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers and lengths of sequences in each batch, compiled blocks that are made for the first."""
    given: list[tuple[torch.Tensor, int]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> Any:
        given.append((cu_seqlens, longest))
        return q + k + v

    model = Case().config().model
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    blocks = [LanguageBlock(model.language, nn.LayerNorm, ALONE, "none", None, attend) for _ in range(2)]
    for block in blocks:
        block.compile_parts()
    batch, graphs = make_batches(Case().config(), 0)[0], []
    num_rows = len(batch.tokens)
    rows = torch.zeros(num_rows, model.language.width, requires_grad=True)
    for number in range(1, 13):
        starts = torch.arange(number + 1, dtype=torch.int32) * num_rows // number
        longest = int(starts.diff().max())
        x: Any = Activations.of(replace(batch, cu_seqlens=starts, max_seqlen=longest))._replace(hidden=rows)
        for block in blocks:
            x = block(x)
        x.hidden.sum().backward()
        assert [(own is starts, bound) for own, bound in given[-2:]] == [(True, longest)] * 2
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 12
    assert graphs[0] > 0


def test_flex_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where Triton can compile: on a GPU without a C compiler its first call would fail."""
    monkeypatch.setattr(attention, "triton_fault", lambda: "triton needs a C compiler")
    with pytest.raises(UserError, match=r"flex, but flex is compiled by Triton, and triton needs a C compiler; set "):
        choose_attention(CUDA, torch.float32, "flex", capability=TURING)
    monkeypatch.setattr(attention, "triton_fault", lambda: None)
    assert choose_attention(CUDA, torch.float32, "flex", capability=TURING).name == "flex"
    assert choose_attention(CUDA, torch.float32, capability=TURING).name == "dense"
    for device, capability, width, said in (
        (CPU, None, 64, "needs a CUDA device"),
        (CUDA, (6, 1), 64, "7.0 (Volta) or newer, and the GPU has 6.1"),
        (CUDA, HOPPER, 8, "at least 16 features"),
    ):
        assert said in str(find_fault("flex", device, torch.float32, capability, width))


@pytest.mark.parametrize("lengths", [(1, 37, 0, 130, 5, 0, 300), (128, 128, 256), (513,), (1,) * 300, (100, 28, 129)])
def test_the_blocks_of_flex_are_those_that_torch_finds_by_looking_at_all_pairs(lengths: tuple[int, ...]) -> None:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    ours = flex_mask(torch.tensor([0, *ends, ends[-1]], dtype=torch.int32), ends[-1])
    theirs = create_block_mask(ours.mask_mod, None, None, ends[-1], ends[-1], device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(numbers, getattr(theirs, f"{kind}_num_blocks")), kind
        for row, number in enumerate(numbers[0, 0].tolist()):
            listed = [getattr(mask, f"{kind}_indices")[0, 0, row, :number] for mask in (ours, theirs)]
            assert torch.equal(*listed), (kind, row)


def test_what_follows_from_a_batch_s_lengths_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex's mask and the CPU's groups. Forward: torch has no backward of flex on a CPU; on a GPU the selftest has."""
    made: list[Any] = []

    def counted(prepare: Any) -> Any:
        def call(bounds: torch.Tensor, rows: int) -> Any:
            result = prepare(bounds, rows)
            made.append(weakref.ref(result))
            return result

        return call

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)  # as written: all scores
    monkeypatch.setattr(attention, "flex_mask", counted(flex_mask))
    monkeypatch.setattr(attention._Calls, "of", counted(attention._Calls.of))
    flex, per_sequence = (attention._function(name, False) for name in ("flex", "per_sequence"))
    dense = choose_attention(CPU, torch.float32, "dense").attend
    ends = [np.cumsum([0, *lengths]).tolist() for lengths in ((1, 5, 0, 9, 141), (141, 6, 0, 9, 0))]
    batches = [torch.tensor(bounds, dtype=torch.int32) for bounds in ends]
    for layer, bounds in itertools.product(range(2), batches):  # both batches are there at the same time
        qkv = [torch.randn(156, 2, 16) for _ in range(3)]
        expected = dense(*qkv, bounds, 150)
        torch.testing.assert_close(flex(*qkv, bounds, 150), expected)
        torch.testing.assert_close(per_sequence(*qkv, bounds, 150), expected)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "MASKED", 172 * 50)  # as of more rows than one call may have
            torch.testing.assert_close(dense(*qkv, bounds, 150), expected)
        assert len(made) == (4 if layer else 2 * (1 + (bounds is batches[1])))
    copied = copy.deepcopy(per_sequence)
    assert torch.equal(copied(*qkv, bounds, 150), per_sequence(*qkv, bounds, 150))
    assert len(made) == 5
    nothing = flex(*[torch.randn(0, 2, 16, requires_grad=True) for _ in range(3)], torch.zeros(2, dtype=torch.int32), 0)
    assert nothing.grad_fn is not None, "the graph of a process without rows"
    del bounds, batches
    gc.collect()
    assert [prepared() for prepared in made] == [None] * 5, "it goes with the batch"


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(0, 100))
@settings(max_examples=30)
def test_short_sequences_of_like_length_are_one_call(lengths: list[int], seed: int) -> None:
    """Each row once, and results and gradients those of the sequences one by one."""
    ends = [0, *np.cumsum(lengths).tolist()]
    groups = group_by_length([(start, length) for start, length in zip(ends, lengths, strict=False) if length])
    found = sorted(sequence for group in groups for sequence in group.sequences)
    assert found == [(start, length) for start, length in zip(ends, lengths, strict=False) if length]
    together = {-(-length // 16) for length in lengths if 0 < length <= 128}
    assert len(groups) == len(together) + sum(length > 128 for length in lengths)
    assert all(0 <= group.length - length < 16 for group in groups for _, length in group.sequences)
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(ends[-1], 2, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    given_gradient = torch.randn(ends[-1], 2, 8, generator=generator, dtype=torch.float64)
    both = [
        choose_attention(CPU, torch.float64, name).attend(*qkv, torch.tensor(ends, dtype=torch.int32), 200)
        for name in ("dense", "per_sequence")
    ]
    torch.testing.assert_close(*both)
    dense, ours = (torch.autograd.grad(out, qkv, given_gradient) for out in both)
    torch.testing.assert_close(ours, dense)


def test_dense_and_per_sequence_are_the_same() -> None:
    qkv = [torch.randn(9, 2, 4) for _ in range(3)]
    bounds = torch.tensor([0, 1, 6, 6, 9, 9], dtype=torch.int32)
    ours = [choose_attention(CPU, torch.float32, name).attend(*qkv, bounds, 9) for name in ("dense", "per_sequence")]
    torch.testing.assert_close(*ours)
    torch.testing.assert_close(Adaptive()(*qkv, bounds, 9), ours[1])


def test_by_config(capfd: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("has a device")
    run = ["--processes", "2", *tiny, "--train.output", str(tmp_path / "run")]
    for how in (["--dry-run"], []):
        assert main(["train", *how, *run, "--train.attention", "flash_attn"]) == 2
        line = line_of(capfd.readouterr().err)
        # of a torch for CUDA, whose devices may be elsewhere, a dry run asks for less
        found = "is not installed" if torch.version.cuda and how else "needs a CUDA device, not cpu"
        assert line.endswith(f"flash_attn {found}; set train.attention to auto")
    assert main(["train", "--dry-run", *run, "--train.attention", "dense"]) == 0
    losses = "chosen on the run's devices" if torch.version.cuda else "torch"
    assert f"\nkernels     attention dense, losses {losses}, blocks eager\n" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("wrong_abi")
def test_the_dry_run_imports_what_is_installed(
    capsys: pytest.CaptureFixture[str],
    tiny: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a login node: a torch for CUDA, and no GPU."""
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    run = ["train", "--dry-run", "--nodes", "2", "--processes", "4", *tiny]
    assert main(run) == 0
    lines = capsys.readouterr().out.splitlines()
    chosen = "chosen on the run's devices"
    at = lines.index(f"kernels     attention {chosen}, losses {chosen}, blocks eager")
    assert "flash_attn is installed but does not load (ImportError: flash_attn_2_cuda.so: undefined" in lines[at + 1]
    assert main([*run, "--train.compile", "true", "--train.measure_kernels", "true"]) == 0
    assert "devices, blocks compiled, or what is measured to be faster\n" in capsys.readouterr().out
    assert main([*run, "--train.attention", "flash_attn"]) == 2
    assert "does not load" in capsys.readouterr().err
    assert main([*run, "--train.attention", "dense", "--objective.name", "siglip"]) == 0
    assert "\nkernels     attention dense, losses torch, blocks eager\n" in capsys.readouterr().out


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_the_dry_run_says_where_float8_is_emulated(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    """By a torch for CPUs, also where it is for other machines."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    float8 = configs.from_dict({"train": {"compile": True, "float8": True}})
    (line,) = dryrun._kernels(float8, elsewhere=True)
    assert line.endswith("blocks compiled in float8" + " (emulated)" * (cuda is None))


def test_losses_without_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_cuda: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)

    def fault() -> str | None:
        kernels.triton_fault.cache_clear()
        return kernels.triton_fault()

    try:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton", None)
            assert fault() == "triton is not installed"
            assert contrastive._backend(on_cuda) is contrastive_tiles
            assert generation._softmax(on_cuda) is softmax_torch
        pytest.importorskip("triton")
        with monkeypatch.context() as patch:
            patch.setenv("CC", "cc")
            assert fault() is None
            patch.delenv("CC")
            patch.setenv("PATH", "/nowhere")
            assert "no gcc or clang" in (fault() or "")
            patch.setenv("CC", "cc")
            patch.setattr(kernels, "_headers", lambda: Path("/nowhere"))
            assert fault() == "triton needs Python's headers, and there is no Python.h in /nowhere; install python3-dev"
            assert contrastive._backend(on_cuda) is contrastive_tiles
        (tmp_path / "file").touch()
        for folder, said in ((tmp_path / "file" / "cache", "Not a directory"), (Path("/proc"), "No such file")):
            with monkeypatch.context() as patch:
                patch.setenv("CC", "cc")
                patch.setenv("TRITON_CACHE_DIR", str(folder))
                assert re.fullmatch(
                    rf"triton cannot write .*: {folder}: {said}.*; name a .* TRITON_CACHE_DIR", fault() or ""
                )
                assert contrastive._backend(on_cuda) is contrastive_tiles
                assert generation._softmax(on_cuda) is softmax_torch
    finally:
        kernels.triton_fault.cache_clear()


def test_our_kernels_have_no_atomics() -> None:
    """What `train.deterministic` relies on."""
    sources = list((Path(kernels.__file__).parent).glob("*_triton.py"))
    assert len(sources) == 2
    for source in sources:
        assert not re.search(r"\.atomic_", source.read_text(encoding="utf-8"))


def test_a_loss_without_triton_kernels_is_said_to_be_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU; and that Triton fails is then no news. `test_fake_cuda.py` has what is launched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "choose_run_attention", lambda _: choose_attention(CPU, torch.float32))
    for fault, losses in ((None, "triton"), ("triton is not installed", "torch")):
        monkeypatch.setattr(choice, "triton_fault", lambda fault=fault: fault)
        configs_by_name = {name: Case(objective=name).config() for name in objectives.names()}
        # the head computes what has no weight, too
        configs_by_name["emu, 0"] = configs.replace(configs_by_name["emu"], objective__generation_weight=0.0)
        for name, config in configs_by_name.items():
            found = choice.choose_kernels(config)
            plain = name == "siglip"
            assert found.losses == ("torch" if plain else losses), name
            assert found.passed_over == (() if plain or not fault else (fault,)), name


class FourProcesses(Axis):
    """An axis on which one process has other kernels."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, value, Kernels("dense", "triton", "eager", ("flash_attn is too new",)), value]


def test_processes_with_other_kernels_are_named() -> None:
    ours = Kernels("flash_attn", "triton", "compiled", ())
    line = "kernels: attention flash_attn, losses triton, blocks compiled"
    assert list(describe(ours, Mesh(ALONE, ALONE))) == [line]
    assert list(describe(ours, Mesh(FourProcesses(), ALONE))) == [
        "kernels on processes 0, 1, 3: attention flash_attn, losses triton, blocks compiled",
        "kernels on process 2: attention dense, losses triton, blocks eager",
        "flash_attn is too new",
    ]


def test_what_is_made_of_a_batch_is_on_its_device() -> None:
    """The rows of short sequences that share a call: on CUDA `index_select` takes no index in host memory."""
    order = attention._Order.of(group_by_length([(0, 5), (5, 9), (14, 200)]), 214, torch.device("meta"))
    assert {index.device.type for index in (order.row_P, order.place_R, order.is_row_P)} == {"meta"}


def test_layers_share_one_dense_mask() -> None:
    """torch makes a float mask of one of bools in every layer, and keeps it for backward: R² numbers a layer."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows, attend = 256, choose_attention(CPU, torch.float32, "dense").attend
    cu_seqlens = torch.tensor([0, 100, rows, rows], dtype=torch.int32)
    x = torch.randn(rows, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = x
        for _ in range(3):
            out = attend(out, out, out, cu_seqlens, rows)
    assert [size for size in kept.values() if size >= rows**2] == [4 * rows**2]
