"""Any image encoder behind one interface: ours, timm's, Hugging Face's, OpenCLIP's.

Weights come from files that the libraries read as data; no code from a model's folder is ever run.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from megatron_lcl.convert.load import find_checkpoint, load_model, read_config
from megatron_lcl.convert.pool import POOL, attention_pool, read_pool
from megatron_lcl.data import tokenizer as tokenizers
from megatron_lcl.data.images import decode_eval
from megatron_lcl.data.store import open_corpus
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.stages import normalise


class Features(NamedTuple):
    """What an encoder makes of N images, float32."""

    pooled: torch.Tensor
    """[N, D] one feature an image, not scaled"""
    patches: torch.Tensor
    """[N, P, V] its patch tokens, after the final norm where there is one"""


class Encoder(ABC):
    """A frozen image encoder, with a text encoder if it has one."""

    def __init__(self, name: str, module: nn.Module, device: str | torch.device = "cpu") -> None:
        self.name = name
        self.module = module.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @abstractmethod
    def prepare(self, data: bytes) -> torch.Tensor:
        """Encoded bytes → [3, H, W] as `encode` takes it. ValueError if they do not decode."""

    @abstractmethod
    def _encode(self, images: torch.Tensor) -> Features: ...

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> Features:
        """[N, 3, H, W] → Features, on the CPU."""
        pooled, patches = self._encode(images.to(self.device))
        return Features(pooled.float().cpu(), patches.float().cpu())

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → [N, D] unit norm, on the CPU, in the space of the pooled image features."""
        raise ValueError(f"{self.name} has no text encoder; zero-shot classification and retrieval need one")

    @property
    def fingerprint(self) -> str:
        """XXH3 of the weights and of what was set when loading."""
        digest = xxhash.xxh3_128(f"{type(self).__name__} {self.settings}".encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def settings(self) -> str:
        """What else decides the features: preprocessing, architecture."""
        return ""


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
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}; give its own --tokenizer"
            )

    def need_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer; ValueError where none was found."""
        if self.tokenizer is None:
            raise ValueError(f"the tokenizer of {self.name} is not known; give --tokenizer clip or the corpus's file")
        return self.tokenizer

    def prepare(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(decode_eval(data, self.module.config.vision.image_size)))

    def _encode(self, images: torch.Tensor) -> Features:
        hidden = self.module.vision_tokens(normalise(images) if images.dtype == torch.uint8 else images)
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
    def settings(self) -> str:
        return str(self.module.config)


class TimmEncoder(Encoder):
    """A timm model: pooled is what it puts before its classifier."""

    def __init__(self, name: str, module: Any, device: str | torch.device = "cpu") -> None:
        import timm

        super().__init__(name, module, device)
        self._config = timm.data.resolve_model_data_config(module)
        self._transform = timm.data.create_transform(**self._config)

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(_open(data))

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        features = module.forward_features(images)
        return Features(module.forward_head(features, pre_logits=True).flatten(1), self._patches(features))

    def _patches(self, features: torch.Tensor) -> torch.Tensor:
        if features.dim() == 3:
            return features[:, getattr(self.module, "num_prefix_tokens", 0) :]
        channels_last = features.shape[-1] == getattr(self.module, "num_features", None)
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)

    @property
    def settings(self) -> str:
        return f"{self.module.default_cfg.get('architecture')} {self._config}"  # type: ignore[union-attr,operator]


class HfEncoder(Encoder):
    """A Hugging Face vision or CLIP model; an LCL export's own attention pool is used where it lies beside."""

    def __init__(self, name: str, folder: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        try:
            module = AutoModel.from_pretrained(folder, dtype=torch.float32)
            self._processor: Any = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} does not load as a Hugging Face model: {' '.join(str(error).split())}"
            ) from None
        super().__init__(name, module, device)
        self._folder = folder
        self._pool = read_pool(Path(folder)) if (Path(folder) / POOL).is_file() else None

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._processor(_open(data), return_tensors="pt")["pixel_values"][0]

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
        pooled = getattr(out, "pooler_output", None)
        return Features(hidden[:, 0] if pooled is None else pooled, patches)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        module: Any = self.module
        if not hasattr(module, "get_text_features"):
            return super().encode_texts(texts)
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(self._folder)(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return F.normalize(_tensor(module.get_text_features(**tokens.to(self.device))).float(), dim=-1).cpu()

    @property
    def settings(self) -> str:
        pool = self._pool and sorted((k, float(v.double().sum())) for k, v in self._pool[0].items())
        return f"{self.module.config} {self._processor} {pool}"


class OpenClipEncoder(Encoder):
    """An OpenCLIP model: pooled is what `encode_image` gives."""

    def __init__(self, name: str, model: str, device: str | torch.device = "cpu") -> None:
        import open_clip

        architecture, _, pretrained = model.partition("@")
        try:
            module, _, self._transform = open_clip.create_model_and_transforms(architecture, pretrained or None)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{model} does not load as an OpenCLIP model: {' '.join(str(error).split())}") from None
        super().__init__(name, module, device)
        self._architecture = architecture
        self._tokenizer: Any = None

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(_open(data))  # type: ignore[operator]

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
        return Features(pooled, tokens[-1][:, 1:] if tokens else pooled[:, None])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        import open_clip

        if self._tokenizer is None:
            self._tokenizer = open_clip.get_tokenizer(self._architecture)
        module: Any = self.module
        return F.normalize(module.encode_text(self._tokenizer(list(texts)).to(self.device)).float(), dim=-1).cpu()

    @property
    def settings(self) -> str:
        return f"{self._architecture} {self._transform}"


def load_encoder(spec: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that `spec` names.

    `timm:NAME` (also `timm:local-dir:DIR`), `hf:DIR`, `open_clip:NAME[@PRETRAINED]` (also `open_clip:local-dir:DIR`),
    or the path of an LCL checkpoint, whose tokenizer is that of its run's corpus, or CLIP's if its vocabulary has
    CLIP's size, unless `tokenizer` names another. Raises ValueError where it does not load.
    """
    kind, _, name = str(spec).partition(":")
    if kind in ("timm", "hf", "open_clip") and name:
        library = {"timm": "timm", "hf": "transformers", "open_clip": "open_clip"}[kind]
        try:
            if kind == "hf":
                return HfEncoder(str(spec), name, device)
            return OpenClipEncoder(str(spec), name, device) if kind == "open_clip" else _timm(str(spec), name, device)
        except ImportError:
            raise ValueError(f"{spec} needs {library}: pip install 'megatron-lcl[hf]' open-clip-torch") from None
    return OurEncoder(str(spec), load_model(spec), _tokenizer(Path(spec), tokenizer), device)


@dataclass(frozen=True)
class EncoderSource:
    """Makes the encoder of process i: what several processes share."""

    spec: str
    tokenizer: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    """process i takes the i-th, round and round"""

    def __call__(self, number: int) -> Encoder:
        return load_encoder(self.spec, self.tokenizer, self.devices[number % len(self.devices)])


def _timm(spec: str, name: str, device: str | torch.device) -> TimmEncoder:
    import timm

    try:
        return TimmEncoder(spec, timm.create_model(name, pretrained=True, num_classes=0), device)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{spec} does not load as a timm model: {' '.join(str(error).split())}") from None


_CLIP_VOCABULARY = 49411


def _tokenizer(path: Path, given: str | Path | None) -> tokenizers.Tokenizer | None:
    if given is not None:
        return tokenizers.load(given)
    if not path.is_dir():
        return None
    config = read_config(find_checkpoint(path))
    for corpus in config.data.corpora:
        if (Path(corpus.path) / "corpus.json").is_file():
            return open_corpus(corpus.path).tokenizer
    return tokenizers.load("clip") if config.model.language.vocab_size == _CLIP_VOCABULARY else None


def _open(data: bytes) -> PIL.Image.Image:
    try:
        return PIL.Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"an image that does not decode: {error}") from None


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.pooler_output
