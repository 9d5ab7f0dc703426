"""States of random generators, which a run that goes on takes up again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of all generators of this process; readable with weights_only."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state |= {"numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}  # type: ignore
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back into the states that `random_state` read."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
