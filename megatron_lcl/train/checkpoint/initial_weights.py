"""`train.init_from`: a run whose first step has the weights of a checkpoint, and nothing else of it.

The checkpoint is an import, a run of any layout or one of its checkpoints, or a file in the format of the published
ones. Only safetensors and pickles of plain tensors are read (`convert.load`). Or it is a model of another library, or
two, one for each encoder (`library_weights`).

Parameters are called `{index}.name`, and an index says something only beside its model's numbers of layers. So what is
matched is the layer: the same one of the same encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from megatron_lcl.config import Config, Model, to_dict
from megatron_lcl.convert.find import export_kind, find_checkpoint, read_config, without_average
from megatron_lcl.convert.load import (
    check_whole,
    load_model,
    open_clip_sizes,
    read_safetensors,
    read_state_dict,
)
from megatron_lcl.convert.remote import pinned
from megatron_lcl.convert.resolution import interpolate_positions
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import Ledger, tokenizer_of
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.spec import library_specs
from megatron_lcl.fields import flat
from megatron_lcl.filesystem import is_dir, is_file
from megatron_lcl.model.layers import layer_kinds, parameter_shapes
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import model_config, name_faults, some, state_dict_open_clip, under_our_names
from megatron_lcl.parallel.layers import full_shape, shard
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.run_folder import PROGRESS, WEIGHTS
from megatron_lcl.train.checkpoint.folder import read_progress
from megatron_lcl.train.checkpoint.library_weights import read_libraries
from megatron_lcl.train.parts import frozen_parameters, untrained_parameters

_MEANING = ("heads", "norm_eps", "embedding_norm", "registers", "layer_scale", "qk_norm")
"""ends of fields that decide what the same tensors compute"""
_POSITIONS = "0.positions"
"""of the vision encoder, which are interpolated to another image size"""


@dataclass(frozen=True)
class InitialWeights:
    """What of a checkpoint becomes what of a model. The first process finds it; all load it."""

    path: Path | str
    """the checkpoint's folder, or the file; a text: its URL, of which each machine has a copy, or the other library's
    model, as `train.init_from` names it"""
    names: dict[str, str]
    """parameter of the model → that of the checkpoint's model (`{index}.name` both)"""
    missing: list[str]
    """parameters of the model that the checkpoint lacks: they begin as those of a new run"""
    unused: list[str]
    """tensors of the checkpoint that the model does not have, by their names there"""
    image_size: int | None
    """of the checkpoint's model, if the model's is another: position embeddings are interpolated"""
    model: Model | None = None
    """the run's"""
    partly: tuple[str, ...] = ()
    """parameters of which some rows begin as `train.seed` draws them"""
    untrained: tuple[str, ...] = ()
    """parameters of the model that its objective trains, and that of the checkpoint's run does not"""
    compared: tuple[str, ...] = ()
    """what was found when other libraries' encoders were run beside what was made of them, a line each"""

    def describe(self, config: Config) -> str:
        """One line for the person who watches."""
        parts = [f"beginning with the weights of {self.path}"]
        numbers = {"log_scale": config.initial_log_scale, "logit_bias": config.model.logit_bias}
        known = {name: numbers[leaf] for name in self.missing if (leaf := name.partition(".")[2]) in numbers}
        if drawn := [name for name in self.missing if name not in known]:
            parts.append(f"it lacks {some(drawn)}, which begin as train.seed draws them")
        parts += [f"it lacks {name}, which begins as the config says, at {value:g}" for name, value in known.items()]
        if self.partly:
            parts.append(f"some rows of {some([*self.partly])} begin so, too")
        if self.untrained:
            untrained = some([*self.untrained])
            parts.append(f"its objective does not train {untrained}, which may be as its train.seed drew them")
        if self.unused:
            parts.append(f"not used of it: {some(self.unused)}")
        if self.image_size is not None:
            sizes = f"{self.image_size} to {config.model.vision.image_size} px"
            parts.append(f"position embeddings interpolated from {sizes}")
        return "; ".join([*parts, *self.compared])


def find_initial_weights(config: Config, verify: bool = True) -> InitialWeights | None:
    """What `train.init_from` names, None where it names nothing.

    UserError for what is no checkpoint, has nothing that the model has, or has it in another shape, and for a run's
    that was trained with another tokenizer. verify: also read every byte, and refuse what is damaged.
    """
    if config.train.init_from is None:
        return None
    path: Path | str = config.train.init_from
    compared: tuple[str, ...] = ()
    never: frozenset[str] = frozenset()
    if libraries := library_specs(config.train.init_from):
        found = read_libraries(config.train.init_from, libraries, config.model)
        theirs, tensors, unused = found.model, found.tensors, found.unused
        compared = found.compare() if verify else ()
    else:
        url = url_of(path)
        path = pinned(url) if url else Path(path)
        folder = find_checkpoint(Path(path)) if url or is_dir(Path(path)) else Path(path)
        if verify and is_dir(folder) and not export_kind(folder):
            check_whole(folder)
        theirs, tensors, unused = _read(folder, config.model)
        path = path if url else folder
        _check_tokenizer(path, folder, config)
        if is_dir(folder) and not export_kind(folder):
            never = untrained_parameters(read_config(folder))
    shapes = parameter_shapes(config.model)
    names = {name: source for name in shapes if (source := _counterpart(name, config.model, theirs)) in tensors}
    if not names:
        raise UserError(f"train.init_from = {path} has no tensor that the model has; name an LCL checkpoint")
    given = {name: tensors[source] for name, source in names.items()}
    fitting = {_POSITIONS, *((_text_positions(config.model),) if libraries else ())}
    _check_fit(path, config.model, theirs, given, shapes, fitting)
    used = set(names.values())
    partly = [
        name
        for name, tensor in given.items()
        if libraries and name != _POSITIONS and (len(tensor) < shapes[name][0] or bool(tensor.isnan().any()))
    ]
    return InitialWeights(
        path,
        names,
        sorted(shapes.keys() - names.keys(), key=_order),
        [*sorted(tensors.keys() - used, key=_order), *unused],
        theirs.vision.image_size if theirs.vision.image_size != config.model.vision.image_size else None,
        config.model,
        tuple(sorted(partly, key=_order)),
        tuple(sorted((n for n in names.keys() - frozen_parameters(config) if names[n] in never), key=_order)),
        compared,
    )


def load_initial_weights(weights: InitialWeights, layers: Mapping[int, nn.Module], axis: Axis) -> None:
    """Copy the weights into this process's layers, by their index in the list of all.

    axis: the tensor ranks that share them.
    """
    if isinstance(weights.path, str) and not url_of(weights.path):
        assert weights.model is not None
        tensors = read_libraries(weights.path, library_specs(weights.path), weights.model).tensors
    else:
        folder = find_checkpoint(Path(weights.path)) if isinstance(weights.path, str) else weights.path
        _, tensors, _ = _read(folder, None)
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            ours = f"{index}.{name}"
            source = weights.names.get(ours)
            if source is None:
                continue
            value, shape = tensors[source].float(), full_shape(parameter)
            if ours == _POSITIONS and value.shape != shape:
                value = interpolate_positions(value, shape[0] - 1)
            elif value.shape != shape:  # a text tower's positions
                missing = value.new_full((max(0, shape[0] - len(value)), *shape[1:]), torch.nan)
                value = torch.cat([value[: shape[0]], missing])
            value = shard(value, parameter, axis)
            if ours in weights.partly:
                value = torch.where(value.isnan(), parameter.data.float(), value)
            parameter.data.copy_(value)


def _check_tokenizer(path: Path | str, folder: Path, config: Config) -> None:
    """UserError where a run's checkpoint, or an average in one, was trained with another tokenizer than that of
    `data.corpora`, as far as the checkpoint's ledger tells."""
    of_run = without_average(folder)
    if not is_file(of_run / PROGRESS) or not config.data.corpora:
        return
    trained = tokenizer_of(Ledger.from_json(read_progress(of_run).ledger), config.data)
    corpus = config.data.corpora[0].path
    if trained not in (None, open_corpus(corpus, config.data.cache).manifest["tokenizer"]["fingerprint"]):
        raise UserError(
            f"train.init_from = {path} was trained with another tokenizer than that of {corpus}; write the corpus with "
            "that one (`preprocess --tokenizer`, `megatron-lcl retokenize`), or name other weights"
        )


def _read(path: Path, ours: Model | None) -> tuple[Model, dict[str, torch.Tensor], list[str]]:
    """The checkpoint's model, its tensors under our names (mapped), and names of those that are none of the model's.

    ours: the run's model, whose language model stands for the one that an export of the vision encoder does not hold.
    """
    if is_dir(path) and export_kind(path):
        encoder = load_model(path)
        unread = {f"{len(encoder.layers) - 1}.{name}" for name in ("embedding.weight", "positions")}
        held = {name: p.detach() for name, p in encoder.layers.named_parameters() if name not in unread}
        if ours is None:
            return encoder.config, held, []
        if (there := encoder.config.language.width) != (here := ours.language.width):  # the pool's, which is held
            raise UserError(
                f"train.init_from = {path} does not fit the model: model.language.width is {there} there and {here} "
                "here"
            )
        return replace(encoder.config, language=ours.language), held, []
    if is_dir(path):
        model, state = read_config(path).model, read_safetensors(path / WEIGHTS)
        expected = parameter_shapes(model)
        known = {name: tensor for name, tensor in state.items() if name in expected}
        _check_tensors(path / WEIGHTS, expected, known)
        return model, known, sorted(state.keys() - known.keys())
    if not is_file(path):
        raise UserError(f"train.init_from = {path} does not exist; name an import, a run's folder, or a checkpoint")
    state = read_state_dict(path)
    model = model_config(open_clip_sizes(path, state))
    with torch.device("meta"):
        empty = LCL(model, seed=None)
    expected = {name: tensor.shape for name, tensor in state_dict_open_clip(empty.layers, model).items()}
    known = {name: tensor for name, tensor in state.items() if name in expected}
    _check_tensors(path, expected, known)
    return model, dict(under_our_names(empty.layers, model, known)), sorted(state.keys() - known.keys())


def _check_tensors(path: Path, expected: Mapping[str, torch.Size], known: Mapping[str, torch.Tensor]) -> None:
    if faults := name_faults({name: expected[name] for name in known}, known):
        raise UserError(f"{path} {faults}; does its model config belong to it?")


def _counterpart(name: str, model: Model, theirs: Model) -> str | None:
    """A parameter's name in another model; None where that one has no such layer."""
    index, _, leaf = name.partition(".")
    layer, layers = layer_kinds(model)[int(index)], layer_kinds(theirs)
    return f"{layers.index(layer)}.{leaf}" if layer in layers else None


def _order(name: str) -> tuple[int, str]:
    index, _, leaf = name.partition(".")
    return int(index), leaf


def _text_positions(model: Model) -> str:
    """The name of the language model's positions."""
    return f"{layer_kinds(model).index(('pool', 0))}.positions"


def _check_fit(
    path: Path | str,
    model: Model,
    theirs: Model,
    given: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    fitting: Set[str],
) -> None:
    """UserError where a tensor has another shape than the model's, or another meaning: heads do not show in shapes.

    fitting: names of positions, which are made to fit where only their number differs.
    """
    wrong = [name for name, tensor in given.items() if tensor.shape != shapes[name]]
    if model.vision.patch_size == theirs.vision.patch_size:
        wrong = [name for name in wrong if name not in fitting or given[name].shape[1:] != shapes[name][1:]]
    faults = [
        f"{name} has the shape {tuple(given[name].shape)}, the model's {tuple(shapes[name])}" for name in wrong[:3]
    ]
    faults += [f"{len(wrong) - 3} more tensors differ"] * (len(wrong) > 3)
    other = [
        f"{key} is {before} there and {now} here"
        for key, before, now in _differences(theirs, model)
        if wrong or key.endswith(_MEANING)
    ]
    if wrong or other:
        raise UserError(f"train.init_from = {path} does not fit the model: {'; '.join([*faults, *other])}")


def _differences(theirs: Model, model: Model) -> list[tuple[str, object, object]]:
    """Sizes that are not the same in two models, but for those that need not be."""
    free = (
        "image_size",
        "layers",
        "drop_path",
        "patch_dropout",
        "patch_dropout_places",
        "unmasked_steps",
        "logit_bias",
    )
    before, now = (flat({"model": to_dict(Config(model=one))["model"]}) for one in (theirs, model))

    def differs(key: str) -> bool:
        if key.endswith("layer_scale"):  # whose factors are learned, whatever they began as
            return (before[key] is None) != (now[key] is None)
        return before[key] != now[key] and not key.endswith(free)

    return [(key, before[key], now[key]) for key in now if differs(key)]
