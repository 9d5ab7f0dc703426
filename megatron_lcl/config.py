"""The whole run in one typed, frozen tree: YAML in, dotted overrides on top, every field documented.

`load(file, overrides)` merges a YAML file and overrides such as `{"train.steps": "100"}` over the defaults; a key
that does not exist or has the wrong type is a `UserError` that names the nearest real one. `describe()` yields what
`--help` prints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megatron_lcl import fields
from megatron_lcl.errors import UserError
from megatron_lcl.fields import read_yaml

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


def _divides(small: str, divisor: int, large: str, value: int) -> None:
    if value % divisor:
        below = next(d for d in range(min(divisor, value), 0, -1) if value % d == 0)
        raise UserError(
            f"{small} = {divisor} does not divide {large} = {value}; the nearest smaller value that does is {below}"
        )


@dataclass(frozen=True, config=_STRICT)
class Vision:
    """CLIP-style vision transformer."""

    image_size: Positive = Field(default=224, description="side of the square input image, pixels")
    patch_size: Positive = Field(default=32, description="side of a patch, pixels; must divide image_size")
    width: Positive = Field(default=768, description="hidden width (ViT-B: 768)")
    layers: Positive = Field(default=12, description="number of blocks")
    heads: Positive = Field(default=12, description="attention heads; must divide width")
    mlp_width: Positive = Field(default=3072, description="hidden width of the feed-forward network")

    def __post_init__(self) -> None:
        _divides("model.vision.patch_size", self.patch_size, "model.vision.image_size", self.image_size)
        _divides("model.vision.heads", self.heads, "model.vision.width", self.width)

    @property
    def num_patches(self) -> int:
        """Patches per image, and so placeholders per image in the token sequence."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, config=_STRICT)
class Language:
    """CLIP-style causal language model."""

    context_length: Positive = Field(
        default=2048, description="longest sequence, tokens and placeholders together (learned positions)"
    )
    vocab_size: Positive = Field(
        default=49411, description="number of token ids, special tokens included (CLIP's byte pairs: 49,408 + 3)"
    )
    width: Positive = Field(default=512, description="hidden width; image latents and features have the same")
    layers: Positive = Field(default=12, description="number of blocks")
    heads: Positive = Field(default=8, description="attention heads; must divide width")
    mlp_width: Positive = Field(default=2048, description="hidden width of the feed-forward network")

    def __post_init__(self) -> None:
        _divides("model.language.heads", self.heads, "model.language.width", self.width)


@dataclass(frozen=True, config=_STRICT)
class Model:
    """Vision encoder, attention pool and language model."""

    vision: Vision = Vision()
    language: Language = Language()
    pool_heads: Positive = Field(default=8, description="heads of the attention pool; must divide model.language.width")

    def __post_init__(self) -> None:
        _divides("model.pool_heads", self.pool_heads, "model.language.width", self.language.width)


@dataclass(frozen=True, config=_STRICT)
class Corpus:
    """One corpus of a blend."""

    path: str = Field(description="folder that `preprocess` wrote")
    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="relative weight in the blend, counted in tokens"
    )


@dataclass(frozen=True, config=_STRICT)
class Data:
    """Documents to packed batches."""

    corpora: tuple[Corpus, ...] = Field(
        default=(), description="corpora to blend: a list of {path, weight}, or one path"
    )
    tokens_per_pack: Positive = Field(default=2048, description="token slots of a pack (T)")
    images_per_pack: Positive | None = Field(
        default=None,
        description="image slots of a pack (I); null: chosen from the corpora so that token and image slots fill up "
        "alike",
    )
    min_similarity: float = Field(
        default=0.24,
        description="matched sources: skip an image whose similarity to its text segment is lower (reference: 0.24)",
    )
    max_images_per_segment: Positive = Field(
        default=1, description="matched sources: images kept per text segment, drawn at random (reference: 1)"
    )
    max_images: Positive = Field(
        default=6, description="matched sources: images kept per document, the first ones (reference: 6)"
    )
    min_images: Count = Field(
        default=1, description="matched sources: skip documents with fewer images after selection (reference: 1)"
    )
    image_first: Fraction = Field(
        default=0.5,
        description="probability that a matched image, or a pair's image, stands before its text (reference: 0.5)",
    )
    pair_layout: Literal["document", "reference"] = Field(
        default="document",
        description="image-text pairs: `<sot> … <eot>` around everything, or the reference's one-ended forms",
    )
    contrast_leading_images: bool = Field(
        default=False,
        description="contrast also an image that no text of its sequence precedes (reference: true, except where <soi> "
        "comes first)",
    )
    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.9, 1.0),
        description="random resized crop: smallest and largest fraction of the image's area (reference: 0.9, 1.0)",
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3),
        description="random resized crop: smallest and largest width over height (reference: 3/4, 4/3)",
    )
    seed: int = Field(default=0, description="seed of shuffling, image selection, image placement and augmentation")
    workers: Count = Field(default=2, description="data loader processes per rank; 0: load in the training process")
    cache: str | None = Field(
        default=None, description="folder for pack indices; null: megatron_lcl in the user's cache folder"
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=100,
        description="size limit of the folder for pack indices, GB (10^9 bytes); over it, the least recently used are "
        "deleted",
    )
    max_bad_images: Positive = Field(
        default=100, description="stop the run after so many consecutive images that do not decode"
    )
    max_bad_fraction: Fraction = Field(
        default=0.05,
        description="stop the run when a larger fraction of a process's last 1,000 images does not decode (at least 20 "
        "images)",
    )
    allow_change: bool = Field(
        default=False, description="let a resumed run continue with other corpora than it began with"
    )

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"data.{name} is [{low}, {high}]; give two positive numbers, the smaller first")


@dataclass(frozen=True, config=_STRICT)
class Objective:
    """What is minimized."""

    name: str = Field(
        default="lcl",
        description="lcl: contrast and generation; clip: contrast only, on pairs; coca: contrast and captioning, on "
        "pairs; generation: no contrast; emu: generation and regression of image latents; or one that another package "
        "adds",
    )
    contrastive_weight: Weight | None = Field(
        default=None,
        description="weight of the contrastive loss; null: as published, in `lcl` 0.1, in `coca` 1; in `clip` it is "
        "always 1",
    )
    generation_weight: Weight | None = Field(
        default=None,
        description="weight of the generation loss, in `coca` of the captioning loss; null: as published, in `lcl` and "
        "`emu` 1, in `coca` 2; in `generation` it is always 1",
    )
    regression_weight: Weight = Field(
        default=1.0, description="weight of the regression of image latents in `emu` (published: 1)"
    )


@dataclass(frozen=True, config=_STRICT)
class Contrast:
    """How the contrast over the global batch is computed."""

    initial_log_scale: Annotated[float, Field(ge=0, le=math.log(100))] = Field(
        default=math.log(1 / 0.07),
        description="initial log scale of the contrast (CLIP: ln(1/0.07)); it is learned and clamped to [0, ln 100]",
    )
    strategy: Literal["retain", "recompute"] = Field(
        default="retain",
        description="retain: keep the graphs of all micro-batches until the loss; recompute: run the forwards twice, "
        "which needs less memory (required with ZeRO-3)",
    )


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW with warmup and cosine decay."""

    name: Literal["adamw", "apex_fused_adam"] = Field(
        default="adamw",
        description="adamw: torch's AdamW (paper); apex_fused_adam: FusedAdam of NVIDIA's apex (not PyPI's package of "
        "that name)",
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        default=5e-4, description="peak learning rate (paper: 5e-4 on pairs, 3e-4 on interleaved documents)"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="learning rate that the cosine decay reaches one step after the last step (reference: 0)",
    )
    warmup: Count = Field(default=2000, description="steps of linear warmup (paper: 2000)")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.98), description="Adam's beta1, beta2 (paper: 0.9, 0.98)")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="Adam's epsilon (paper: 1e-6)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2,
        description="weight decay of parameters with two or more dimensions (paper: 0.2); biases, norms and the log "
        "scale have none",
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="largest global gradient norm, larger ones are clipped; 0: no clipping (the paper's value is not "
        "published)",
    )


@dataclass(frozen=True, config=_STRICT)
class Zero:
    """DeepSpeed's ZeRO."""

    stage: Annotated[int, Field(ge=1, le=3)] = Field(
        default=1,
        description="ZeRO stage, sharded over data-parallel ranks: 1 optimizer states; 2 also gradients; 3 also "
        "parameters",
    )


@dataclass(frozen=True, config=_STRICT)
class Parallel:
    """How one replica of the model is split; the processes divided by tensor * pipeline are data-parallel."""

    tensor: Positive = Field(
        default=1,
        description="tensor-parallel size: processes that share every layer (Megatron's, with sequence parallelism)",
    )
    pipeline: Positive = Field(default=1, description="pipeline stages into which the list of layers is split")


@dataclass(frozen=True, config=_STRICT)
class Checkpoint:
    """What is saved, how often, and what is kept."""

    every: Count = Field(
        default=1000, description="steps between checkpoints, one more is saved at the end; 0: at the end only"
    )
    keep_last: Positive = Field(default=3, description="number of newest checkpoints kept")
    keep_every: Count = Field(
        default=0, description="checkpoints at multiples of so many steps are never deleted; 0: none"
    )
    background: bool = Field(
        default=True,
        description="write checkpoints while training continues, from a copy in host memory; false: training waits, "
        "without a copy",
    )
    resume: str = Field(
        default="auto",
        description="auto: resume from the newest checkpoint in train.output that verifies; or a run folder (its "
        "newest that verifies) or a checkpoint of another run (pickles with more than tensors, plain values and "
        "DeepSpeed's own few classes are refused)",
    )
    max_failures: Positive = Field(
        default=3, description="stop the run after so many consecutive checkpoints that could not be written"
    )


@dataclass(frozen=True, config=_STRICT)
class Guard:
    """Faults that a run survives, or ends at with a message."""

    timeout: Annotated[float, Field(ge=10)] = Field(
        default=600.0,
        description="hang timeout of a step, seconds: when a process makes no progress for so long, all end; a step "
        "must be shorter",
    )
    long_timeout: Annotated[float, Field(ge=10)] = Field(
        default=3600.0,
        description="hang timeout during start-up, first step, saving and evaluation, seconds (at least guard.timeout "
        "is used)",
    )
    every: Count = Field(
        default=100,
        description="steps between bitwise comparisons of the parameters of all data-parallel replicas; 0: never",
    )
    max_bad_steps: Positive = Field(
        default=10,
        description="consecutive skipped steps (loss or gradient not finite, or a loss spike) before the run rewinds "
        "to a checkpoint",
    )
    max_rewinds: Count = Field(default=3, description="rewinds to one and the same checkpoint before the run stops")
    spike_sigmas: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="skip a step whose loss is so many standard deviations above the recent mean (OLMo: 6); null: "
        "never",
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        default=128,
        description="number of recent steps whose losses give the mean and deviation for guard.spike_sigmas",
    )


EvaluationTask = Literal["retrieval", "generation"]


@dataclass(frozen=True, config=_STRICT)
class Evaluate:
    """What is measured during training, by all processes together."""

    corpus: str | None = Field(
        default=None, description="folder of the held-out corpus, e.g. one that `preprocess --held-out` wrote"
    )
    tasks: tuple[EvaluationTask, ...] = Field(
        default=(),
        description="retrieval: recall@1 and @10, image to context and back; generation: bits per token; empty: what "
        "the objective trains",
    )


@dataclass(frozen=True, config=_STRICT)
class Train:
    """The run."""

    output: str = Field(default="runs/lcl", description="run folder: checkpoints, metrics, log, config")
    steps: Positive = Field(default=1000, description="optimizer steps")
    global_batch: Positive = Field(default=16, description="packs per optimizer step, over all processes")
    micro_batch: Positive = Field(default=1, description="packs per forward pass of one data-parallel replica")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="auto",
        description="type of weights and activations; auto: bfloat16 on CUDA, float32 elsewhere; master weights are "
        "always float32",
    )
    attention: Literal["auto", "flash_attn", "torch_varlen", "dense", "per_sequence"] = Field(
        default="auto",
        description="kernel of the language model's attention; auto: flash_attn where it loads, else torch_varlen, "
        "else dense; on CPU per_sequence. Naming a kernel that cannot be used is an error",
    )
    deterministic: bool = Field(
        default=False,
        description="on CUDA: only kernels and sums that give the same bits in every run; slower (docs/parallelism.md)",
    )
    activation_checkpointing: Literal["none", "full", "attention"] = Field(
        default="none",
        description="recomputed in backward to save memory: none: nothing; full: whole blocks; attention: their "
        "attention half",
    )
    activation_checkpointing_every: Positive = Field(
        default=1,
        description="apply activation_checkpointing to one in so many blocks, of the vision and of the language model",
    )
    seed: int = Field(default=0, description="seed of the initial parameters")
    init_from: str | None = Field(
        default=None,
        description="path of an import, a run, a checkpoint or a file in open_clip's format whose weights, and nothing "
        "else, a new run begins with; a run that has checkpoints of its own resumes from these instead",
    )
    evaluate_every: Count = Field(
        default=0, description="steps between evaluations on evaluate.corpus, one more at the end; 0: never"
    )
    log_every: Positive = Field(
        default=10,
        description="steps between entries in metrics.jsonl and TensorBoard, and between lines in a log",
    )
    progress: bool = Field(
        default=True,
        description="show a progress bar where the output is a terminal; without one there is a line every log_every",
    )
    apex_layer_norm: bool = Field(
        default=False, description="use the fused LayerNorm of NVIDIA's apex instead of torch's"
    )


@dataclass(frozen=True, config=_STRICT)
class Config:
    """A pre-training run."""

    model: Model = Model()
    data: Data = Data()
    objective: Objective = Objective()
    contrast: Contrast = Contrast()
    optimizer: Optimizer = Optimizer()
    zero: Zero = Zero()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="mapping merged into DeepSpeed's config as it is; keys that other fields here decide are refused",
    )


# --- reading -----------------------------------------------------------------------------------------------------


def load(file: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """The config from a YAML file (or the defaults) with dotted overrides, e.g. {"train.steps": "100"}, on top.

    The type of its field decides what an override's text means (`fields.parse`): a name is taken as it is written, a
    list or a mapping is YAML. Raises UserError naming the key, its value, and the nearest real key.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = read_yaml(Path(file).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"no config file {file}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise UserError(
                f"{file} holds a {type(tree).__name__}; a config is a mapping of sections such as `train:` and `data:`"
            )
    for key, value in (overrides or {}).items():
        fields.put(Config, tree, key.replace("-", "_"), value)
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The config from nested dicts; the inverse of `to_dict`. An absent or empty (null) section has its defaults."""
    tree = _without_empty(Config, tree)
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("corpora"), str):
        tree["data"] = {**data, "corpora": [{"path": data["corpora"]}]}
    return fields.build(Config, tree)


def _without_empty(cls: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: section for name, info in fields.fields_of(cls).items() if (section := fields.section_of(info))}
    return {
        key: _without_empty(sections[key], value) if key in sections and isinstance(value, Mapping) else value
        for key, value in tree.items()
        if not (key in sections and value is None)
    }


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of plain YAML values; `from_dict` gives the config back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return plain(config)


def to_yaml(config: Config) -> str:
    """The whole tree as YAML, what `--print-config` prints."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def replace(config: Config, **dotted: Any) -> Config:
    """A copy with dotted fields replaced, dots written as two underscores: `replace(c, train__steps=10)`."""
    tree = to_dict(config)
    for key, value in dotted.items():
        *sections, name = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return from_dict(tree)


# --- describing --------------------------------------------------------------------------------------------------


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, help), in order."""
    return fields.describe(Config)
