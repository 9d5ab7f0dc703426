"""Any image encoder behind one interface: ours, timm's, Hugging Face's, OpenCLIP's.

Weights come from files that the libraries read as data; no code from a model's folder is ever run. A model whose
weights are not all there is refused: the libraries would fill in random ones.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError
from torch import nn

from megatron_lcl.convert.attention_pool import attention_pool, read_pool
from megatron_lcl.convert.libraries import quietly, require
from megatron_lcl.convert.load import find_checkpoint, load_model, read_config
from megatron_lcl.convert.pool import POOL
from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.store import MANIFEST, open_corpus
from megatron_lcl.data.loading.images import decode_eval, decode_rgb
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import normalize
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import some

_DECODING = "decode_rgb"
"""of other libraries' encoders; features that were cached when they decoded otherwise are not found again"""


class Features(NamedTuple):
    """What an encoder makes of N images, float32."""

    pooled: torch.Tensor
    """[N, D] one feature an image, not scaled"""
    patches: torch.Tensor
    """[N, P, V] its patch tokens, after the final norm where there is one; P = 0 for an encoder that has none"""


class Encoder(ABC):
    """A frozen image encoder, with a text encoder if it has one."""

    source: EncoderSource | None = None
    """what makes the same encoder in other processes"""

    def __init__(self, name: str, module: nn.Module, device: str | torch.device = "cpu") -> None:
        self.name = name
        self.module = module.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @abstractmethod
    def prepare(self, data: bytes) -> torch.Tensor:
        """Encoded bytes → [3, H, W] as `encode` takes it. BadImage if they do not decode."""

    @abstractmethod
    def _encode(self, images: torch.Tensor) -> Features: ...

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Features:
        """[N, 3, H, W] → Features, on the CPU."""
        pooled, patches = self._encode(images.to(self.device))
        return Features(pooled.float().cpu(), patches.float().cpu())

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → [N, D] unit norm, on the CPU, in the space of the pooled image features."""
        raise UserError(f"{self.name} has no text encoder; zero-shot classification and retrieval need one")

    @cached_property
    def fingerprint(self) -> str:
        """XXH3 of all that decides the features: settings, the modules with their constants, the weights' bytes."""
        digest = xxhash.xxh3_128(json.dumps([type(self).__name__, self.settings], default=str).encode())
        for name, module in self.module.named_modules():
            digest.update(f"{name} {type(module).__qualname__} {_constants(module)}\n".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights."""
        return self.module.state_dict()

    @property
    def settings(self) -> Any:
        """What the modules do not show: preprocessing, a config that they look into, the library's version. As JSON."""
        return ""


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
        if plain(value):
            found.append((name, repr(value)))
        elif callable(value) and not isinstance(value, nn.Module):
            found.append((name, getattr(value, "__qualname__", type(value).__qualname__)))
    return found


class OurEncoder(Encoder):
    """An LCL model: pooled is the image latent z, texts are read at `<soi>`."""

    module: LCL

    def __init__(
        self,
        name: str,
        model: LCL,
        tokenizer: tokenizers.Tokenizer | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(name, model, device)
        self.tokenizer = tokenizer
        size = model.config.language.vocab_size
        if tokenizer is not None and tokenizer.vocab_size != size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}; give its own --tokenizer")

    def need_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer; UserError where none was found."""
        if self.tokenizer is None:
            raise UserError(f"the tokenizer of {self.name} is not known; give --tokenizer clip or the corpus's file")
        return self.tokenizer

    def prepare(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(decode_eval(data, self.module.config.vision.image_size)))

    def _encode(self, images: torch.Tensor) -> Features:
        hidden = self.module.vision_tokens(normalize(images) if images.dtype == torch.uint8 else images)
        return Features(self.module.pool.pool(hidden)[0], self.module.pool.patch_features(hidden))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokenizer, room = self.need_tokenizer(), self.module.config.language.context_length - 2
        rows = [[tokenizer.sot, *ids[:room], tokenizer.eot] for ids in tokenizer.encode_batch(texts)]
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return self.module.encode_text(padded.to(self.device)).cpu()

    @property
    def settings(self) -> Any:
        return str(self.module.config)


class TimmEncoder(Encoder):
    """A timm model: pooled is what it puts before its classifier."""

    def __init__(self, spec: str, model: str, device: str | torch.device = "cpu") -> None:
        self._version = require("timm", spec)
        import timm

        with _loading(spec, "timm"):
            # with as many classes as the weights have: only then does timm insist on every tensor
            plain: Any = timm.create_model(model)
            num_classes = plain.pretrained_cfg["num_classes"]
            module: Any = timm.create_model(model, pretrained=True, num_classes=num_classes)
            self._config = timm.data.resolve_model_data_config(module)
            self._transform: Any = timm.data.create_transform(**self._config)
        super().__init__(spec, module, device)

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(decode_rgb(data))

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        features = module.forward_features(images)
        return Features(module.forward_head(features, pre_logits=True).flatten(1), self._patches(features))

    def _patches(self, features: torch.Tensor) -> torch.Tensor:
        if features.dim() == 2:
            return features[:, None][:, :0]
        if features.dim() == 3:
            return features[:, getattr(self.module, "num_prefix_tokens", 0) :]
        channels_last = features.shape[-1] == getattr(self.module, "num_features", None)
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)

    @property
    def settings(self) -> Any:
        return [self._version, _DECODING, self._config]


class HfEncoder(Encoder):
    """A Hugging Face vision or CLIP model; an LCL export's own attention pool is used where it lies beside."""

    def __init__(self, spec: str, folder: str, device: str | torch.device = "cpu") -> None:
        self._version = require("transformers", spec)
        from transformers import AutoImageProcessor, AutoModel

        self._spec, self._folder = spec, folder
        with _loading(spec, "Hugging Face"):
            module, report = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=False,
            )
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        missing = sorted(report["missing_keys"])
        # a classifier's checkpoint has no pooler, which some architectures put behind the class token
        self._has_pooler = not any("pooler." in name for name in missing)
        if missing := [name for name in missing if "pooler." not in name]:
            raise UserError(f"{spec} lacks {some(missing)}; transformers would make them up")
        if wrong := sorted(name for name, *_ in report["mismatched_keys"]):
            raise UserError(f"{spec} has {some(wrong)} of another shape than its config says")
        super().__init__(spec, module, device)
        pool = Path(folder) / POOL
        self._pool = read_pool(pool) if pool.is_file() else None

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._processor(decode_rgb(data), return_tensors="pt")["pixel_values"][0]

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        vision = getattr(module, "vision_model", module)
        out = vision(pixel_values=images)
        hidden = out.last_hidden_state
        if hidden.dim() == 4:  # a convolutional network's map
            hidden = hidden.flatten(2).transpose(1, 2)
            return Features(out.pooler_output.flatten(1), hidden)
        config = vision.config
        if config.model_type.startswith("clip"):  # the others' last hidden state comes after the final norm
            hidden = vision.post_layernorm(hidden)
        num_patches = (images.shape[2] // config.patch_size) * (images.shape[3] // config.patch_size)
        patches = hidden[:, hidden.shape[1] - num_patches :]  # class and register tokens stand first
        if self._pool is not None:
            weights, heads = self._pool
            weights = {key: value.to(images.device) for key, value in weights.items()}
            return Features(attention_pool(patches, weights, heads), patches)
        if hasattr(module, "get_image_features"):
            return Features(_tensor(module.get_image_features(pixel_values=images)), patches)
        pooled = getattr(out, "pooler_output", None) if self._has_pooler else None
        return Features(hidden[:, 0] if pooled is None else pooled, patches)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with _loading(self._spec, "Hugging Face"):
            return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        module: Any = self.module
        if not hasattr(module, "get_text_features"):
            return super().encode_texts(texts)
        config = module.config
        length = min(config.get_text_config().max_position_embeddings, self._tokenizer.model_max_length)
        padded = config.model_type.startswith("siglip")  # which is trained on texts of one length, padding read too
        tokens = self._tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)
        inputs = {"input_ids": tokens["input_ids"]} if padded else dict(tokens)
        return F.normalize(_tensor(module.get_text_features(**inputs)).float(), dim=-1).cpu()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        pool = {} if self._pool is None else self._pool[0]
        return {**super().tensors, **{f"attention_pool.{name}": tensor for name, tensor in pool.items()}}

    @property
    def settings(self) -> Any:
        module: Any = self.module
        config = {key: value for key, value in module.config.to_dict().items() if key != "_name_or_path"}
        return [
            self._version,
            _DECODING,
            config,
            self._processor.to_dict(),
            self._pool and self._pool[1],
            self._has_pooler,
        ]


class OpenClipEncoder(Encoder):
    """An OpenCLIP model: pooled is what `encode_image` gives."""

    def __init__(self, spec: str, model: str, device: str | torch.device = "cpu") -> None:
        self._version = require("open_clip", spec)
        import open_clip

        if model.startswith(("local-dir:", "hf-hub:")):
            self._architecture, pretrained = model, ""
        else:
            self._architecture, _, pretrained = model.partition("@")
            if not pretrained and self._architecture in open_clip.list_models():
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(self._architecture)) or "a file's path"
                raise UserError(f"{spec} names no weights; give {spec}@PRETRAINED, where PRETRAINED is one of {tags}")
        with _loading(spec, "OpenCLIP"):
            module, self._transform = open_clip.create_model_from_pretrained(self._architecture, pretrained or None)
        super().__init__(spec, module, device)
        self._spec = spec

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(decode_rgb(data))  # type: ignore[operator]

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        patches: list[torch.Tensor] = []
        norm = getattr(module.visual, "ln_post", None)
        hook = norm.register_forward_hook(lambda _, __, out: patches.append(out)) if norm is not None else None
        try:
            pooled = module.encode_image(images)
        finally:
            if hook is not None:
                hook.remove()
        tokens = [p for p in patches if p.dim() == 3]
        return Features(pooled, tokens[-1][:, 1:] if tokens else pooled[:, None][:, :0])

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        # of a Hugging Face tokenizer; the folder's config could ask for its code to be run
        code = {"trust_remote_code": False} if _hf_tokenizer(self._architecture) else {}
        with _loading(self._spec, "OpenCLIP"):
            return open_clip.get_tokenizer(self._architecture, **code)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        module: Any = self.module
        return F.normalize(module.encode_text(self._tokenizer(list(texts)).to(self.device)).float(), dim=-1).cpu()

    @property
    def settings(self) -> Any:
        module: Any = self.module
        return [self._version, _DECODING, module.visual.preprocess_cfg]


def _hf_tokenizer(architecture: str) -> bool:
    """Whether OpenCLIP takes a Hugging Face tokenizer for this model."""
    import open_clip

    kind, _, place = architecture.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(place) / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    elif kind == "hf-hub":
        from open_clip.factory import _get_hf_config

        config = _get_hf_config(place)["model_cfg"]
    else:
        config = open_clip.get_model_config(architecture)
    return bool(config["text_cfg"].get("hf_tokenizer_name"))


def load_encoder(spec: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that `spec` names.

    `timm:NAME` (also `timm:local-dir:DIR`), `hf:DIR`, `open_clip:NAME[@PRETRAINED]` (also `open_clip:local-dir:DIR`),
    or the path of an LCL checkpoint, whose tokenizer is that of its run's corpus, or CLIP's if its vocabulary has
    CLIP's size, unless `tokenizer` names another. Raises UserError where it does not load.
    """
    kind, _, name = str(spec).partition(":")
    if kind in _LIBRARIES and name:
        encoder: Encoder = _LIBRARIES[kind](str(spec), name, device)
    else:
        encoder = OurEncoder(str(spec), load_model(spec), _tokenizer(Path(spec), tokenizer), device)
    encoder.source = EncoderSource(str(spec), None if tokenizer is None else str(tokenizer), (str(device),))
    return encoder


_LIBRARIES: dict[str, Callable[[str, str, str | torch.device], Encoder]] = {
    "timm": TimmEncoder,
    "hf": HfEncoder,
    "open_clip": OpenClipEncoder,
}


def is_ours(spec: str) -> bool:
    """Whether `spec` is a path rather than another library's model."""
    return spec.partition(":")[0] not in _LIBRARIES


@dataclass(frozen=True)
class EncoderSource:
    """Makes the encoder of process i: what several processes share."""

    spec: str
    tokenizer: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    """process i takes the i-th, round and round"""

    def __call__(self, number: int) -> Encoder:
        encoder = load_encoder(self.spec, self.tokenizer, self.devices[number % len(self.devices)])
        encoder.source = self
        return encoder


@contextlib.contextmanager
def _loading(spec: str, library: str) -> Iterator[None]:
    """Whatever another library says of a folder or a name that it cannot load, in one line."""
    try:
        with quietly():
            yield
    except (
        OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError, ImportError,
        SafetensorError, UnpicklingError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            raise UserError(
                f"{spec} wants code of its own to be run, which is refused; only architectures that the library has "
                "itself can be evaluated"
            ) from None
        raise UserError(f"{spec} does not load as a {library} model: {said}") from None


_CLIP_VOCABULARY = 49411


def _tokenizer(path: Path, given: str | Path | None) -> tokenizers.Tokenizer | None:
    if given is not None:
        return tokenizers.load(given)
    if not path.is_dir():
        return None
    config = read_config(find_checkpoint(path))
    for corpus in config.data.corpora:
        if (Path(corpus.path) / MANIFEST).is_file():
            return open_corpus(corpus.path).tokenizer
    return tokenizers.load("clip") if config.model.language.vocab_size == _CLIP_VOCABULARY else None


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.pooler_output
