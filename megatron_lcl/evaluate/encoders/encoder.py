"""The interface of every image encoder, and what its features depend on."""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pickle import UnpicklingError
from typing import Any

import PIL.Image
import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

from megatron_lcl.convert.libraries import SETTINGS, only_weights, quietly, usual_defaults
from megatron_lcl.data.corpus.tokenizer import several
from megatron_lcl.data.loading.images import Source, read_rgb
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.hub import Remote, by_cache_alone, causes, out_of_reach


@dataclass(frozen=True)
class Features:
    """What an encoder makes of N images. Each kind is copied to the CPU, in float32, when it is asked for."""

    pooled_on_device: torch.Tensor
    patches_on_device: torch.Tensor

    @property
    def pooled(self) -> torch.Tensor:
        """[N, D] one feature an image, not scaled."""
        return self.pooled_on_device.float().cpu()

    @property
    def patches(self) -> torch.Tensor:
        """[N, P, V] its patch tokens, after the final norm where there is one; P = 0 for an encoder that has none."""
        return self.patches_on_device.float().cpu()


class Encoder(ABC):
    """An image encoder, with a text encoder if it has one. Nothing that it computes has a gradient."""

    source: Callable[[int], Encoder] | None = None
    """makes the same encoder in process i of several (`load.EncoderSource`)"""
    untrained_pooled: str | None = None
    """why its pooled feature may be one that nothing has trained, in a line"""

    def __init__(self, name: str, module: nn.Module, device: str | torch.device = "cpu") -> None:
        """Moves the module to the device."""
        self.name = name
        self.module = module.to(device)
        self.device = torch.device(device)

    def prepare(self, image: Source) -> torch.Tensor:
        """An image → [3, H, W] as `encode` takes it.

        image: encoded bytes, the path of a file (str or os.PathLike), or a PIL image. Each is turned as its EXIF data
        say, levels of 16 bits are scaled to 8, and what is transparent becomes white. BadImage if it does not decode,
        TypeError for anything else, an array or a tensor say.
        """
        return self._prepare(read_rgb(image))

    def _prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        """`prepare`, of an RGB image of any size; an encoder has this one or `prepare`."""
        raise NotImplementedError

    @abstractmethod
    def _encode(self, images: torch.Tensor) -> Features: ...

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Features:
        """[N, 3, H, W] → Features."""
        return self._encode(images.to(self.device))

    @torch.no_grad()
    def encode_texts(self, texts: Iterable[str]) -> torch.Tensor:
        """Texts → [N, D] unit norm, on the CPU, in the space of the pooled image features.

        UserError where there is no text encoder, ValueError for one text in place of several.
        """
        found = several(texts)
        return self._encode_texts(found or [""])[: len(found)]  # not all encoders take none

    def token_ids(self, texts: Iterable[str]) -> torch.Tensor:
        """Texts → int64 [N, S], as `LCL.encode_text` takes them; of LCL models, see `OurEncoder`."""
        raise UserError(f"{self.name} is no LCL model, whose texts become token ids; call encode_texts")

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Of one text or more, as `encode_texts`."""
        raise UserError(
            f"{self.name} has no text encoder; zero-shot classification, retrieval and models.match of curate need one"
        )

    @property
    def fingerprint(self) -> str:
        """XXH3 of all that decides the features of a decoded image: settings, the modules with their constants, the
        weights' bytes. Kept where `load_encoder` has loaded it: weights of a caller's model may change."""
        return self._fingerprint() if self.source is None else self._kept_fingerprint

    @cached_property
    def _kept_fingerprint(self) -> str:
        return self._fingerprint()

    def _fingerprint(self) -> str:
        digest = xxhash.xxh3_128(json.dumps([type(self).__name__, self.settings], default=str).encode())
        for name, module in self.module.named_modules():
            digest.update(f"{name} {type(module).__qualname__} {_constants(module)}\n".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of what makes ids of texts, as far as neither the weights nor the library's version say it."""
        return ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights."""
        return self.module.state_dict()

    @property
    def settings(self) -> Any:
        """What the modules do not show: preprocessing, a config that they look into, the library's version. As JSON."""
        return ""


def check_device(device: str | torch.device) -> None:
    """UserError where it cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter by a torch that is built without CUDA
        said = str(error).splitlines()[0]
        raise UserError(
            f"the device {str(device)!r} cannot be used ({said}); give cpu, or cuda:0 … of this machine"
        ) from None


def hash_tokenizer(tokenizer: Any) -> str:
    """XXH3 of what decides the ids of transformers' tokenizer, however it was called before."""
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = json.loads(fast.to_str())
        for set_by_calls in ("padding", "truncation"):
            content.pop(set_by_calls, None)
    else:
        content = tokenizer.get_vocab()
    about = [type(tokenizer).__name__, tokenizer.model_max_length, content]
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def _constants(module: nn.Module) -> list[tuple[str, str]]:
    """What a module keeps beside tensors and other modules: numbers of heads, epsilons, ways of pooling, functions."""

    def plain(value: object) -> bool:
        return isinstance(value, str | int | float | None) or (
            isinstance(value, list | tuple) and all(plain(v) for v in value)
        )

    found = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "name_or_path":  # PyTorch's own; where the files lie
            continue
        if name == "training":  # no features depend on it (`OurEncoder`, `load`); False is what it was when it counted
            value = False
        if plain(value):
            found.append((name, repr(value)))
        elif callable(value) and not isinstance(value, nn.Module):
            found.append((name, getattr(value, "__qualname__", type(value).__qualname__)))
    return found


_A = {"timm": "a timm", "OpenCLIP": "an OpenCLIP", "Hugging Face": "a Hugging Face"}


@contextlib.contextmanager
def loading(spec: str, library: str, remote: Remote | None = None) -> Iterator[None]:
    """Whatever another library says of a folder or a name that it cannot load, in one line.

    A pickle among the files runs nothing, also where the library asks torch for an unrestricted read.

    remote: a file of those that it may have to fetch; if its host is out of reach, the cache has to do.
    """
    fault = remote and out_of_reach(remote)
    try:
        cache = by_cache_alone(spec, remote, fault) if remote and fault else contextlib.nullcontext()
        with usual_defaults(), quietly(), only_weights(), cache:
            yield
    except UserError:
        raise
    except (
        OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError, ImportError,
        SafetensorError, UnpicklingError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())
        if pickled := next((e for e in causes(error) if isinstance(e, UnpicklingError)), None):
            # torch, and timm after it, would advise to run what is in the file
            if wanted := sorted(set(re.findall(r"GLOBAL (\S+)", str(pickled)))):
                raise UserError(
                    f"{spec} is refused: weights are data, and this pickle wants to build {', '.join(wanted)}; give "
                    "safetensors"
                ) from None
            said = "its weights are no PyTorch checkpoint"
        if "trust_remote_code" in said:
            raise UserError(
                f"{spec} wants code of its own to be run, which is refused; only architectures that the library has "
                "itself can be evaluated"
            ) from None
        raise UserError(f"{spec} does not load as {_A[library]} model: {said}") from None


@contextlib.contextmanager
def sequences_of(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """The outputs [N, T, D] of a part of a model, while the model computes; none of None's."""
    found: list[torch.Tensor] = []
    if module is None:
        yield found
        return

    def keep(_module: nn.Module, _inputs: Any, out: torch.Tensor) -> None:
        if out.dim() == 3:
            found.append(out)

    hook = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Torch's initial values of an untrained model, drawn on the CPU; its generator is then as it was before.

    `torch.manual_seed` would seed the generators of all other devices too, and leave them so.
    """
    with SETTINGS, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
