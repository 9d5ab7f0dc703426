"""The config's `deepspeed:` section: what goes into DeepSpeed's config beside what the rest of ours decides.

It is checked by DeepSpeed's own classes, before anything starts. Where DeepSpeed would look away (a misspelt section,
an option that its ZeRO stage does not know) it is an error here.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError


def merge(ours: dict[str, Any], theirs: dict[str, Any], path: str = "deepspeed") -> dict[str, Any]:
    """Both together. UserError where `theirs` sets something that stands in `ours`."""
    merged = dict(ours)
    for key, value in theirs.items():
        if key not in ours:
            merged[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = merge(ours[key], value, f"{path}.{key}")
        else:
            raise UserError(f"{path}.{key} = {value!r} is decided by the rest of the config ({ours[key]!r}); remove it")
    return merged


def check(config: Config, settings: dict[str, Any], data_parallel: int) -> None:
    """UserError for what DeepSpeed does not take or would not heed. settings: the whole of DeepSpeed's config."""
    theirs = config.deepspeed
    if not theirs:
        return
    for name in ("optimizer", "scheduler"):  # DeepSpeed would build none: it is given ours
        if name in theirs:
            raise UserError(f"deepspeed.{name} is decided by the `optimizer` section; remove it")
    _check_names(theirs, settings)
    zero = theirs.get("zero_optimization", {})
    _check_checkpoints(theirs.get("checkpoint", {}), zero)
    parts = zero.get("zero_hpz_partition_size", 1)
    for name, used in (("offload_param", zero.get("offload_param")), ("zero_hpz_partition_size", parts > 1)):
        if used and config.zero.stage < 3:
            raise UserError(f"deepspeed.zero_optimization.{name} needs zero.stage = 3, not {config.zero.stage}")
    if parts > 1 and data_parallel % parts:
        nearest = min((d for d in range(1, data_parallel + 1) if data_parallel % d == 0), key=lambda d: abs(d - parts))
        raise UserError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size = {parts} does not divide {data_parallel} "
            f"data-parallel processes; the nearest that does is {nearest}"
        )


def _check_checkpoints(checkpoint: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """UserError where checkpoints would be written other than those that are read here."""
    for name in sorted({"load_universal", "use_node_local_storage", "writer"} & checkpoint.keys()):
        raise UserError(f"deepspeed.checkpoint.{name} is decided by the `checkpoint` section; remove it")
    if zero.get("elastic_checkpoint"):
        raise UserError("deepspeed.zero_optimization.elastic_checkpoint is not needed, any layout loads; remove it")
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer.device = nvme keeps the optimizer outside DeepSpeed's "
            "checkpoint files; set it to cpu"
        )


class _Asked(dict[str, Any]):
    """A dict that knows which of its keys were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Asked(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.asked: set[Any] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # one of its own, so that `**settings` asks for every key

    def keys(self) -> Any:
        return self  # so that `key in settings.keys()` is seen

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def __copy__(self) -> _Asked:
        return self


def _check_names(theirs: dict[str, Any], settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    # the global batch follows from these two, whatever DeepSpeed takes for the number of processes here
    asked = _Asked({key: value for key, value in settings.items() if key != "train_batch_size"})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(asked)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        section = next((name for name, value in theirs.items() if isinstance(value, dict) and where[0] in value), None)
        path = ".".join(["deepspeed", *([section] if section else []), *where])
        if first["type"] == "extra_forbidden":
            raise UserError(_unknown(path, _fields(DeepSpeedConfigModel))) from None
        raise UserError(f"{path} = {first['input']!r}: {first['msg']}") from None
    except Exception as error:  # noqa: BLE001 - whatever DeepSpeed has against its config
        raise UserError(f"deepspeed: {' '.join(str(error).split())}") from None
    for path, known in _not_asked(theirs, asked, "deepspeed"):
        raise UserError(_unknown(path, known))


def _not_asked(theirs: Mapping[str, Any], asked: _Asked, path: str) -> Iterator[tuple[str, set[str]]]:
    """Paths of the keys that DeepSpeed did not look at, and what it looked for in their places."""
    for key, value in theirs.items():
        if key not in asked.asked:
            yield f"{path}.{key}", asked.asked
        elif isinstance(value, dict) and asked[key].asked:  # else DeepSpeed looks into it when it comes to it
            yield from _not_asked(value, asked[key], f"{path}.{key}")


def _fields(model: Any) -> set[str]:
    """Names of all fields of a class's subclasses."""
    names = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
    return names.union(*(_fields(sub) for sub in model.__subclasses__()))


def _unknown(path: str, known: set[str]) -> str:
    near = difflib.get_close_matches(path.rsplit(".", 1)[1], known, 1)
    return f"{path} is no setting of DeepSpeed" + (f"; did you mean {near[0]}?" if near else "; remove it")
