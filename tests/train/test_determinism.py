"""`train.deterministic`: on during training, off behind it; what cannot keep it is refused."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lcl import config as configs
from megatron_lcl.errors import UserError
from megatron_lcl.parallel.layers import VocabularyEmbedding
from megatron_lcl.parallel.mesh import ALONE
from megatron_lcl.train.determinism import check_determinism, determinism

ON = configs.load(None, {"train.deterministic": "true"})
NO_DETERMINISTIC_FORM = "does not have a deterministic implementation"


def put() -> torch.Tensor:
    """An operation that torch refuses where the same bits are asked for."""
    return torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))


def test_only_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with determinism(False):
        put()
        assert "NCCL_ALGO" not in os.environ
    with determinism(True):
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")
        with pytest.raises(RuntimeError, match=NO_DETERMINISTIC_FORM):
            put()
    put()
    check_determinism(ON)


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "Tree")])
def test_an_environment_that_forbids_it_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    check_determinism(configs.load())
    with pytest.raises(UserError, match=f"train.deterministic is set, but {name} = {value}; unset it"):
        check_determinism(ON)


class Operations(TorchDispatchMode):
    """Names of what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_embedding_looks_up_the_same_rows() -> None:
    embedding, ids = VocabularyEmbedding(7, 3, ALONE), torch.tensor([1, 5, 1])
    torch.nn.init.normal_(embedding.weight)
    plain = torch.autograd.grad(embedding(ids).square().sum(), embedding.weight)[0]
    with determinism(True), Operations() as operations:
        ours = torch.autograd.grad(embedding(ids).square().sum(), embedding.weight)[0]
    assert "embedding_dense_backward" not in operations.names, "its sums on CUDA come in any order"
    assert "index_put_" in operations.names
    torch.testing.assert_close(ours, plain)


def two_steps(rank: int, config: str, output: str) -> str:
    """What a run prints; in its second step an operation that has no deterministic form is planted."""
    from megatron_lcl import config as configs
    from megatron_lcl.train import step
    from megatron_lcl.train.run import train

    run, done = step.Stepper.start, []

    def noted(self: step.Stepper, *arguments: Any) -> Any:
        print("deterministic", torch.are_deterministic_algorithms_enabled())
        if done:
            put()
        done.append(run(self, *arguments))
        return done[-1]

    step.Stepper.start = noted  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            train(
                configs.load(
                    config,
                    {"train.output": output, "train.deterministic": "true", "train.steps": "2", "data.workers": "0"},
                )
            )
        except RuntimeError as error:
            print(error)
        print("behind it", torch.are_deterministic_algorithms_enabled())
    return said.getvalue()


@pytest.mark.slow
def test_it_is_on_during_training(tmp_path: Path) -> None:
    from small_corpus import make_corpus
    from train.test_training_runs import CONFIG, losses

    from megatron_lcl.data.corpus.store import open_corpus

    corpus, file = make_corpus(tmp_path / "documents", seed=0), tmp_path / "config.yaml"
    vocab_size = open_corpus(corpus).tokenizer.vocab_size
    file.write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=tmp_path / "cache"))
    (said,) = run_processes(two_steps, 1, str(file), str(tmp_path / "run"))
    assert "kernels: attention per_sequence, losses torch" in said
    assert said.count("deterministic True") == 2
    assert NO_DETERMINISTIC_FORM in said
    assert said.splitlines()[-1] == "behind it False"
    assert [step for step, *_ in losses(tmp_path / "run")] == [1]
