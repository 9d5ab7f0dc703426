"""Sections `parallel`, `checkpoint`, `guard`, `train` and `evaluate`: the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Positive
from megatron_lcl.errors import UserError, check_on_disk, without_secrets


@dataclass(frozen=True, config=STRICT)
class Parallel:
    """How one replica of the model is split; the processes divided by tensor * pipeline are data-parallel."""

    tensor: Positive = Field(
        default=1,
        description="tensor-parallel size: processes that share every layer (Megatron's, with sequence parallelism)",
    )
    pipeline: Positive = Field(default=1, description="pipeline stages into which the list of layers is split")


@dataclass(frozen=True, config=STRICT)
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
        "newest that verifies) or a checkpoint of another run, also s3://bucket/folder (pickles with more "
        "than tensors, plain values and DeepSpeed's own few classes are refused)",
    )
    max_failures: Positive = Field(
        default=3, description="stop the run after so many consecutive checkpoints that could not be written"
    )

    mirror: str | None = Field(
        default=None,
        description="s3://bucket/folder to which each checkpoint is copied once it is complete, and from which a run "
        "without checkpoints of its own goes on (docs/object-storage.md); null: none",
    )

    def __post_init__(self) -> None:
        if self.mirror is not None and "://" not in self.mirror:
            raise UserError(f"checkpoint.mirror is {without_secrets(self.mirror)}; give a URL, as s3://bucket/folder")


@dataclass(frozen=True, config=STRICT)
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


AttentionName = Literal["flash_attn_3", "flash_attn", "torch_varlen", "flex", "dense", "per_sequence"]
"""back-ends of attention (megatron_lcl/attention.py)"""
EvaluationTask = Literal["retrieval", "generation"]
"""what is measured on a held-out corpus, by the part of the model that it needs"""
LabeledTask = Literal["knn", "zero-shot"]
"""what is measured on labeled images"""


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """What is measured during training, by all processes together."""

    corpus: str | None = Field(
        default=None, description="folder of the held-out corpus, e.g. one that `preprocess --held-out` wrote"
    )
    tasks: tuple[Literal["retrieval", "generation", "knn", "zero-shot"], ...] = Field(
        default=(),
        description="on evaluate.corpus: retrieval: recall@1 and @10, image to context and back; generation: bits per "
        "token; on evaluate.labeled: knn: k nearest neighbors; zero-shot: the nearest class text; empty: what the "
        "objective trains and the data allow",
    )
    average: str | None = Field(
        default=None,
        description="name of the average of the weights that is measured in their place (ema_0.999 of average.ema, "
        "tail_0.1 of average.tail), from where it begins; null: the weights",
    )
    labeled: str | None = Field(
        default=None,
        description="labeled images, DIR/test/CLASS/*.jpg (for knn also DIR/train/…), or a WebDataset in "
        "CLIP_benchmark's layout; every image is encoded in each evaluation",
    )
    neighbors: Positive = Field(
        default=20, description="of knn: neighbors that vote, by exp(cosine / 0.07) (DINO, arXiv 2104.14294: 20)"
    )
    prompts: tuple[str, ...] = Field(
        default=(),
        description="of zero-shot: texts of a class, {c} for its name, whose features are averaged; empty: the data's "
        "own, else `a photo of a {c}.`",
    )


@dataclass(frozen=True, config=STRICT)
class Average:
    """Averages of the weights, kept in float32 beside them and in every checkpoint; none changes what is trained."""

    ema: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(),
        description="decays of exponential moving averages, each an average of its own, called ema_0.999 …; unbiased "
        "as Adam's moments are (arXiv 1412.6980, section 3), so that the initial weights have no part in them; decay d "
        "gives sum_i d^(n - i) w_i / sum_i d^(n - i) after n steps",
    )
    tail: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(),
        description="plain means over the last steps, as fractions of train.steps, each an average of its own, called "
        "tail_0.1 … (Polyak and Juditsky 1992; arXiv 1803.05407 averages the last quarter)",
    )

    def __post_init__(self) -> None:
        for name, values in (("ema", self.ema), ("tail", self.tail)):
            if len(set(values)) < len(values):
                raise UserError(f"average.{name} = {list(values)}: give each once")


@dataclass(frozen=True, config=STRICT)
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
    attention: Literal["auto", AttentionName] = Field(
        default="auto",
        description="kernel of the language model's attention; auto: flash_attn_3 or flash_attn where they load, else "
        "torch_varlen, else dense; on CPU per_sequence. Naming a kernel that cannot be used is an error",
    )
    compile: bool = Field(
        default=False,
        description="compile what blocks compute beside attention with torch.compile: norms, GELU and sums with the "
        "matrix products; the first step takes longer. Without tensor parallelism and ZeRO-3",
    )
    float8: bool = Field(
        default=False,
        description="multiply in float8 in the linear layers of blocks, with a scale for each row (torchao); with "
        "train.compile and bfloat16, on GPUs of compute capability 8.9 or higher, emulated on a CPU",
    )
    measure_kernels: bool = Field(
        default=False,
        description="when a run begins, measure which attention (where train.attention is auto) and whether compiled "
        "blocks (as train.compile) are fastest here, and take them; kept in data.cache and in checkpoints",
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
        "else, a new run begins with; or a model of another library, timm:NAME, hf:NAME or open_clip:NAME@TAG, or one "
        "for each encoder, vision=timm:NAME,language=open_clip:NAME@TAG (docs/conversion.md); a run that has "
        "checkpoints of its own resumes from these instead",
    )
    evaluate_every: Count = Field(
        default=0,
        description="steps between evaluations on evaluate.corpus and evaluate.labeled, one more at the end; 0: never",
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
    freeze: tuple[str, ...] = Field(
        default=(),
        description="patterns of parameters that are not trained, and have neither gradients nor optimizer states: "
        "vision.*, language.blocks.[0-3].*, head.log_scale …; `*` matches any characters (docs/recipe.md)",
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        default=(),
        description="where metrics go beside metrics.jsonl and TensorBoard: Weights & Biases, MLflow; each takes its "
        "server and project from its own environment variables (docs/metrics.md)",
    )
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="dense peak of a device in operations per second; mfu is the share of it that is used; null: by "
        "the device's name (docs/metrics.md), and no mfu for a CPU or an unknown device",
    )
    profile: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]*:[1-9][0-9]*$",
        description="A:B: trace steps A to B (counted from 1) into the folder `profile` of the run; null: none",
    )
    profile_ranks: tuple[Count, ...] = Field(default=(0,), description="the processes that trace train.profile's steps")

    def __post_init__(self) -> None:
        check_on_disk(
            "train.output",
            self.output,
            "checkpoint.mirror=s3://bucket/folder for copies of its checkpoints in a bucket",
        )
