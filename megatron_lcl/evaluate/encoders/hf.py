"""Hugging Face's vision and CLIP models as encoders."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F

from megatron_lcl.convert.attention_pool import attention_pool, read_pool
from megatron_lcl.convert.libraries import require
from megatron_lcl.convert.pool import POOL
from megatron_lcl.data.loading.images import bounded
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder, Features, hash_tokenizer, loading, sequences_of
from megatron_lcl.evaluate.encoders.hub import hub_file, optional_file
from megatron_lcl.evaluate.encoders.spec import Spec
from megatron_lcl.filesystem import is_dir, is_file
from megatron_lcl.model.reference_format import some

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""a repository of the hub, rather than a path"""
_EXPORTED = ("clip_vision_model", "dinov2", "dinov2_with_registers")
"""types of models that `export` writes (`convert.hf`)"""
_POOLED = "the model's pooler, else its class token, else the mean of its patches"
"""what the pooled feature is where the model has no projection and no pool of ours; said in the settings"""


class HfEncoder(Encoder):
    """A Hugging Face vision or CLIP model; an LCL export's own attention pool is used where it lies beside."""

    def __init__(self, spec: Spec, device: str | torch.device = "cpu") -> None:
        self._version = require("transformers", spec.text)
        from transformers import AutoImageProcessor, AutoModel

        folder = self._folder = spec.name
        self._remote, pool = None, Path(folder) / POOL
        if not is_dir(Path(folder)):
            if not _HUB_NAME.fullmatch(folder):
                raise UserError(f"{spec.text}: there is no folder {folder}")
            self._remote = hub_file(folder, "config.json", "give the folder of a model: hf:DIR")
        with loading(spec.text, "Hugging Face", self._remote):
            module, report = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=False,
            )
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            may_be_export, found = _may_be_export(module, self._processor), pool if is_file(pool) else None
            if self._remote is not None and may_be_export:
                found = optional_file(folder, POOL)
            self._pool = None if found is None else read_pool(found)
        if self._pool is None and may_be_export:  # `save_pretrained` of an export writes the tower alone
            self.untrained_pooled = (
                f"{spec.text} has no {POOL}: the class token's output is measured, which LCL does not train; if the "
                "model began as an export, copy that one's folder lcl into its own"
            )
        missing = sorted(report["missing_keys"])
        # a classifier's checkpoint has no pooler, which some architectures put behind the class token
        self._has_pooler = not any("pooler." in name for name in missing)
        if missing := [name for name in missing if "pooler." not in name]:
            raise UserError(f"{spec.text} lacks {some(missing)}; transformers would initialize them at random")
        # names, in transformers 5 with their shapes
        if wrong := sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]):
            raise UserError(f"{spec.text} has {some(wrong)} of another shape than its config says")
        if _is_masked(module):  # it drops patches while it is trained, and here too if nobody says otherwise
            module.config.mask_ratio = 0.0
        super().__init__(spec.text, module, device)

    def _prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        # transformers 4 has processors that take the rows of an image one pixel high for its channels
        layout = {} if getattr(self._processor, "is_fast", True) else {"input_data_format": "channels_last"}
        return self._processor(bounded(image), return_tensors="pt", **layout)["pixel_values"][0]

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        vision = getattr(module, "vision_model", module)
        options = {}
        if _is_masked(module):  # the patches that it keeps stand in the order of these numbers
            numbers = torch.arange(vision.embeddings.patch_embeddings.num_patches, device=images.device)
            options["noise"] = numbers.expand(len(images), -1)
        norm = getattr(vision, "post_layernorm", None)
        with sequences_of(norm) as normed:
            out = vision(pixel_values=images, **options)
        hidden = out.last_hidden_state
        pooled = getattr(out, "pooler_output", None) if self._has_pooler else None
        if hidden.dim() == 4:  # a convolutional network's map
            patches = hidden.flatten(2).transpose(1, 2)
            tokens = patches[:, :0]
        else:
            if norm is not None and not normed:  # CLIP and its like apply it to the class token alone
                hidden = norm(hidden)
            # class and register tokens stand first; networks that merge patches have fewer states, and no such tokens
            first = max(0, hidden.shape[1] - self._num_patches(vision.config, images))
            tokens, patches = hidden[:, :first], hidden[:, first:]
        if self._pool is not None:
            return Features(attention_pool(patches, *self._pool), patches)
        if hasattr(module, "get_image_features"):
            return Features(_tensor(module.get_image_features(pixel_values=images)), patches)
        if pooled is None:
            pooled = tokens[:, 0] if tokens.shape[1] else patches.mean(1)
        return Features(pooled.flatten(1), patches)

    def _num_patches(self, config: Any, images: torch.Tensor) -> int:
        """Of an image. UserError where the config does not say."""
        size = getattr(config, "patch_size", None)
        if size is None:
            raise UserError(f"{self.name}: the config of {config.model_type} has no patch_size to count its patches by")
        height, width = (size, size) if isinstance(size, int) else size
        return (images.shape[2] // height) * (images.shape[3] // width)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with loading(self.name, "Hugging Face", self._remote):
            return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        module: Any = self.module
        if not hasattr(module, "get_text_features"):
            return super()._encode_texts(texts)
        config = module.config
        length = min(config.get_text_config().max_position_embeddings, self._tokenizer.model_max_length)
        padded = config.model_type.startswith("siglip")  # which is trained on texts of one length, padding read too
        tokens = self._tokenizer(
            texts,
            padding="max_length" if padded else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
            return_token_type_ids=False,  # zeros, of which CLIP in transformers 4.56 knows nothing
        ).to(self.device)
        inputs = {"input_ids": tokens["input_ids"]} if padded else dict(tokens)
        return F.normalize(_tensor(module.get_text_features(**inputs)).float(), dim=-1).cpu()

    @property
    def tokenizer_fingerprint(self) -> str:
        return hash_tokenizer(self._tokenizer)

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
            config,
            self._processor.to_dict(),
            self._pool and self._pool[1],
            self._has_pooler,
            _POOLED,
        ]


def _is_masked(module: Any) -> bool:
    """Whether it is a masked autoencoder's encoder, which sees a random part of the patches."""
    return module.config.model_type == "vit_mae"


def _may_be_export(module: Any, processor: Any) -> bool:
    """Whether `export --format hf` writes such a model. Others, DINOv2's own among them, are not asked for a pool: from
    a cache that another program filled they load without the hub."""
    config, clips = module.config, type(processor).__name__.startswith("CLIPImageProcessor")
    return clips and config.model_type in _EXPORTED and config.hidden_act == "gelu"


def _tensor(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.pooler_output
