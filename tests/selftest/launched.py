"""Run by torchrun: a selftest in which one process has a fault in one case."""

from __future__ import annotations

from megatron_lcl.selftest import worker
from megatron_lcl.selftest.cases import Case
from megatron_lcl.selftest.run import selftest


def break_down(rank: int) -> None:
    """In the second process of a layout with tensor ranks, before it meets the others."""
    meet = worker.meet

    def faulty(store: object, rank: int, processes: int, timeout: float) -> None:
        if rank == 1 and processes == 2:
            raise RuntimeError("a fault of this process alone")
        meet(store, rank, processes, timeout)  # type: ignore[arg-type]

    worker.meet = faulty


if __name__ == "__main__":
    selftest([Case(tensor=2)], prepare=break_down, timeout=400)
