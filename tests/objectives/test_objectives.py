"""Objectives by name: those there are, what each asks for, a wrong name, and objectives of another package in runs."""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.losses.group import HEADER
from megatron_lcl.losses.sigmoid import SUMS
from megatron_lcl.model.layers import MAX_LOG_SCALE
from megatron_lcl.objectives.base import GlobalCounts, Objective, StepInputs
from megatron_lcl.objectives.generation import Generation
from megatron_lcl.parallel.mesh import ALONE, Axis, Mesh
from megatron_lcl.train.checkpoint.folder import read_progress, step_folder
from megatron_lcl.train.checks import check
from megatron_lcl.train.result import PendingResult

OF_ANOTHER_PACKAGE = '''
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.objectives.base import Objective
from megatron_lcl.objectives.contrast import SIGMOID_METRICS, Contrast, SigmoidContrast
from megatron_lcl.objectives.generation import Generation
from small_latents import SmallLatents, Square


class Perplexity(Generation):
    def metrics(self):
        return {**super().metrics(), "perplexity": super().metrics()["generation"].exp()}


class OnPairs(Objective):
    """Generation on pairs only, and a metric of its own."""

    sequences = Sequences(interleaved=False, contrast=False)
    tasks = ("generation",)
    metrics = ("generation", "perplexity")
    parts = ((Perplexity, 1.0),)


class Weighted(SmallLatents):
    """The contrast counts for the more, the more pairs there are."""

    def terms(self, step):
        return [Contrast(step, 0.25 * step.counts.counts["num_pairs"]), Generation(step, 0.5), Square(step, 0.75)]


class Sigmoid(Objective):
    """SigLIP's contrast, and captions."""

    sequences = Sequences(interleaved=False, captions=True)
    tasks = ("retrieval",)
    metrics = ("generation", *SIGMOID_METRICS)
    parts = ((SigmoidContrast, "contrastive_weight"), (Generation, "generation_weight"))
    published = {"contrastive_weight": 1.0, "generation_weight": 2.0}
'''
WITH_FAULTS = """
import torch
from megatron_lcl.objectives.base import Objective, Term
from megatron_lcl.objectives.built_in import Clip, GenerationOnly
from megatron_lcl.objectives.generation import Generation


class Learned(Clip):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(()))


class Projected(Clip):
    def __init__(self, config):
        super().__init__(config)
        self.projection = torch.nn.Linear(2, 2)


class WithTeacher(Clip):
    def __init__(self, config):
        super().__init__(config)
        self.teacher = torch.nn.Linear(2, 2).requires_grad_(False)


class Scaled(Generation):
    scale = torch.nn.Parameter(torch.ones(()))


class OfScaled(GenerationOnly):
    parts = ((Scaled, 1.0),)


class Undeclared(Objective):
    tasks = ("generation",)


class Half(Term):
    def surrogate(self, m, out):
        return None

    def metrics(self):
        return {}


class OfHalf(GenerationOnly):
    parts = ((Half, 1.0),)


class Unknown(GenerationOnly):
    published = {"margin": 0.5}


def function(config):
    return Clip(config)


class OneTask(Clip):
    tasks = ("retrieval")
    metrics = ("generation")


class Named(Clip):
    metrics = (*Clip.metrics, "loss", "step", "num_pairs", "mfu", "heldout/nll")


class Misspelled(GenerationOnly):
    parts = ((Generation, "generation_weigth"), (Clip, 1.0))
    published = {"generation_weight": 1.0}


class Unweighted(GenerationOnly):
    parts = (Generation,)


class Described(GenerationOnly):
    sequences = "interleaved"


class Aligned(Generation):
    task = "alignment"


class OfAligned(GenerationOnly):
    tasks = ("generation", "captioning")
    parts = ((Aligned, 1.0),)


class Nothing(Objective):
    sequences, tasks, metrics = GenerationOnly.sequences, ("generation",), ("generation",)
"""
FAULTS = {
    "learned": (
        "Learned",
        r"Learned\.temperature requires gradients, and only .*latents, contexts, generation, log_sc",
    ),
    "projected": ("Projected", r"Projected\.projection requires gradients"),
    "of_scaled": ("OfScaled", r"Scaled\.scale requires gradients"),
    "undeclared": ("Undeclared", "'undeclared': the class Undeclared does not declare its sequences, metrics"),
    "half": ("OfHalf", "'half': the class Half does not declare its loss, task"),
    "unknown": ("Unknown", r"Unknown\.published names margin; the config's `objective` has contrastive_weight, gen"),
    "function": ("function", "names <function function at .*>, which is no class made of `Objective`"),
    "one_task": (
        "OneTask",
        r"OneTask\.tasks is 'retrieval'; it has to be a tuple .*; OneTask\.metrics is 'generation'; it has to be",
    ),
    "named": (
        "Named",
        r"Named\.metrics names loss, step, num_pairs, mfu, heldout/nll, as which a run writes numbers of its own; give",
    ),
    "misspelled": (
        "Misspelled",
        r"Misspelled\.parts has \(.*Generation'>, 'generation_weigth'\); it has to be a pair of a class made of `Term` "
        r"and its weight, a number or 'generation_weight'; Misspelled\.parts has \(.*Clip'>, 1\.0\); it has to be",
    ),
    "unweighted": (
        "Unweighted",
        r"Unweighted\.parts has <class .*Generation'>; it has to be a pair of a class .* number",
    ),
    "described": ("Described", r"Described\.sequences is 'interleaved'; it has to be made of `Sequences`"),
    "of_aligned": (
        "OfAligned",
        "OfAligned names the task 'captioning'; there are retrieval, generation; Aligned names the task 'alignment'",
    ),
    "nothing": ("Nothing", "the class Nothing declares neither `parts` nor `terms` of its own"),
    "missing": (
        "Missing",
        r"'missing' of megatron_lcl\.objectives \(with-faults 2\) cannot be loaded from with_faults:Missing: "
        "AttributeError: module 'with_faults' has no attribute 'Missing'; mend that package, or remove it",
    ),
    "clip": (
        "Learned",
        r"'clip' is the name of more than one entry of .*: of megatron_lcl and of with-faults 2; rename",
    ),
}
"""by name: the class in WITH_FAULTS, and what is said"""
CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 32, layers: 2, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 96, images_per_pack: 4, workers: 0}}
train: {{steps: 2, global_batch: 4, log_every: 1, progress: false, dtype: float32}}
checkpoint: {{every: 0}}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's config and two installed packages: with three objectives, and with the documented one."""
    folder = tmp_path_factory.mktemp("objectives")
    corpus = make_corpus(folder, seed=0)
    vocab_size = open_corpus(corpus).tokenizer.vocab_size
    text = CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=folder / "cache")
    (folder / "config.yaml").write_text(text)
    points = {"on_pairs": "OnPairs", "weighted": "Weighted", "sigmoid": "Sigmoid"}
    write_package(folder / "site", "more_objectives", 1, OF_ANOTHER_PACKAGE, points)
    page = (Path(__file__).parents[2] / "docs/architecture.md").read_text("utf-8")
    (example,) = re.findall(r"module `small_latents`:\n\n(.*?)\n\nand in the", page, re.S)
    ((name, module, cls),) = re.findall(r'^ {4}(small_latents) = "(.*):(.*)"\n', page, re.M)
    write_package(folder / "site", module, 1, textwrap.dedent(example), {name: cls})
    return folder


def write_package(site: Path, module: str, version: int, text: str, points: Mapping[str, str]) -> None:
    """A package of one module, as installed in `site`, with objectives: the class of each name."""
    about = site / f"{module}-{version}.dist-info"
    about.mkdir(parents=True)
    (site / f"{module}.py").write_text(text)
    (about / "METADATA").write_text(f"Name: {module.replace('_', '-')}\nVersion: {version}\n")
    lines = [f"{name} = {module}:{cls}\n" for name, cls in points.items()]
    (about / "entry_points.txt").write_text("".join([f"[{objectives.ENTRY_POINTS}]\n", *lines]))


def test_what_the_built_in_objectives_ask_for() -> None:
    def asked(name: str, strategy: str) -> tuple[str, int, bool, bool, bool]:
        config = configs.from_dict({"objective": {"name": name}, "contrast": {"strategy": strategy}})
        objective = objectives.create(config)
        reads = objective.sequences
        return objective.strategy, objective.num_forwards, reads.interleaved, reads.contrast, reads.targets

    assert objectives.names() == ["clip", "coca", "emu", "generation", "genlip", "lcl", "siglip"]
    assert asked("lcl", "retain") == ("retain", 1, True, True, True)
    assert asked("lcl", "recompute") == ("recompute", 2, True, True, True)
    assert asked("clip", "recompute") == ("recompute", 2, False, True, False)
    assert asked("siglip", "recompute") == ("recompute", 2, False, True, False)
    assert asked("genlip", "recompute") == ("1F1B", 1, False, False, True)
    assert asked("coca", "retain") == ("retain", 1, False, True, True)
    assert asked("coca", "recompute") == ("recompute", 2, False, True, True)
    assert asked("emu", "recompute") == ("1F1B", 1, True, True, True)
    assert asked("generation", "recompute") == ("1F1B", 1, True, False, True)


def test_the_built_in_objectives_have_their_papers_weights() -> None:
    def weights(name: str) -> dict[str, float]:
        return objectives.create(configs.from_dict({"objective": {"name": name}})).weights

    contrast, generation = "contrastive_weight", "generation_weight"
    assert weights("lcl") == {contrast: 0.1, generation: 1}  # arXiv 2406.07543
    assert weights("coca") == {contrast: 1, generation: 2}  # arXiv 2205.01917, eq. 4
    assert weights("emu") == {"regression_weight": 1, generation: 1}  # arXiv 2307.05222, section 2
    assert math.log(100) == MAX_LOG_SCALE  # CLIP, arXiv 2103.00020, section 2.5


def test_what_follows_from_terms_and_their_weights() -> None:
    """What an objective trains, and what it sends: of 3 and 5 pairs on two replicas of two tensor ranks."""
    axes = [Axis(None, 0, size, tuple(range(size))) for size in (2, 4, 2)]
    mesh = Mesh(ALONE, axes[0], data_tensor=axes[1], tensor=axes[2])

    def follows(name: str, **weights: float) -> tuple[tuple[str, ...], list[tuple[Axis, int]]]:
        config = configs.from_dict({"objective": {"name": name, **weights}, "model": {"language": {"width": 64}}})
        objective = objectives.create(config)
        return objective.trains, objective.gathers([3, 5], mesh)

    rows, tensor = (mesh.data_tensor, 4 * 3 * 2 * 64 * 4), (mesh.tensor, 2 * 2 * 64 * 4 * 2)
    headers = (mesh.data_tensor, 4 * HEADER * 8)
    contrast = [headers, rows, (mesh.data_tensor, 4 * (5 + 2 * 3) * 4), tensor]
    both = ("retrieval", "generation")
    assert follows("lcl") == follows("coca") == (both, contrast)
    assert follows("lcl", generation_weight=0) == follows("clip") == (both[:1], contrast)
    assert follows("coca", contrastive_weight=0) == (both[1:], contrast), "it is measured"
    assert follows("siglip") == (both[:1], [headers, rows, (mesh.data_tensor, 4 * SUMS * 8), tensor])
    assert follows("generation") == follows("genlip") == (both[1:], [])
    sums = [(mesh.data, (1 + 2 * 64) * 8)] * 2
    assert follows("emu") == (both, sums)
    assert follows("emu", regression_weight=0) == (both[1:], sums)


def test_what_another_package_gets_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="interleaved=False"):
        Sequences(captions=True)

    class Counted(objectives.create(configs.from_dict({})).__class__):  # type: ignore[misc]
        metrics = ("generation",)

    given = {"generation": torch.ones(()), "perplexity": torch.ones(())}
    objective, counts = Counted(configs.from_dict({})), GlobalCounts.of([], Mesh(ALONE, ALONE), torch.device("cpu"))
    two_stages = Axis(None, 0, 2, (0, 1))
    for pipeline, kind in ((ALONE, RunError), (two_stages, UserError)):  # which the first stage would not say
        with pytest.raises(
            UserError, match=r"Counted\.metrics does not name perplexity, which its terms give"
        ) as error:
            PendingResult(given, objective, counts, pipeline, torch.device("cpu"))
        assert type(error.value) is kind


def test_a_term_of_another_package_may_call_the_constructor_of_its_base() -> None:
    class Own(Generation):
        def __init__(self, step: StepInputs, weight: float) -> None:
            super(Generation, self).__init__()
            self.weight = weight

    class WithOwn(Objective):
        sequences, tasks, metrics, parts = Sequences(contrast=False), ("generation",), ("generation",), ((Own, 0.5),)

    counts = GlobalCounts.of([], Mesh(ALONE, ALONE), torch.device("cpu"))
    step = StepInputs([], [], torch.zeros(1), counts, Mesh(ALONE, ALONE))
    (term,) = WithOwn(configs.from_dict({})).terms(step)
    assert isinstance(term, Own)
    assert term.weight == 0.5


def test_a_wrong_name_is_one_line(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--config", str(files / "config.yaml"), "--train.output", str(files / "none")]
    assert main([*command, "--objective.name", "lcp"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert (
        "`objective.name` = 'lcp': there is no such objective; there are clip, coca, emu, generation, genlip, lcl, "
        "siglip, the nearest" in said
    )
    assert "the nearest is lcl; name one of these, or install the package that adds it" in said


def test_what_is_wrong_in_another_package_is_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {name: cls for name, (cls, _) in FAULTS.items()} | {"with_teacher": "WithTeacher"}
    write_package(files / "faulty", "with_faults", 2, WITH_FAULTS, points)
    monkeypatch.syspath_prepend(files / "faulty")
    for name, (_, said) in FAULTS.items():
        with pytest.raises(UserError, match=said):
            objectives.create(configs.from_dict({"objective": {"name": name}}))
    objectives.create(configs.from_dict({"objective": {"name": "with_teacher"}}))


def test_a_module_that_cannot_be_imported_is_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_package(files / "broken", "broken_objectives", 3, "import no_such_module", {"broken": "Broken"})
    write_package(files / "broken", "script", 4, "import sys; sys.exit('usage: script FILE')", {"script": "Script"})
    monkeypatch.syspath_prepend(files / "broken")
    command = ["train", "--config", str(files / "config.yaml"), "--train.output", str(files / "none")]
    assert main([*command, "--objective.name", "broken", "--processes", "1", "--dry-run"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "(broken-objectives 3) cannot be loaded from broken_objectives:Broken: ModuleNotFoundError: No mod" in said
    assert "`python -c 'import broken_objectives'` shows where" in said
    with pytest.raises(
        UserError, match=r"\(script 4\) cannot be loaded from script:Script: SystemExit: usage: script F"
    ):
        objectives.objective_class("script")


def test_a_sigmoid_contrast_without_a_bias_is_refused_by_the_checks(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(files / "site")
    output = files / "sigmoid"
    given = {"objective.name": "sigmoid", "train.output": str(output)}
    with pytest.raises(UserError, match=r"needs a bias; set .*: --model\.logit_bias -10 --contrast\.initial_log_sc"):
        check(configs.load(files / "config.yaml", given), 1)
    remedy = {"model.logit_bias": "-10", "contrast.initial_log_scale": "2.302585"}
    check(configs.load(files / "config.yaml", given | remedy), 1)
    assert not output.exists()


def test_a_weight_that_is_not_set_is_the_published_one() -> None:
    """Of every objective and weight, and also where the config says so itself with null."""
    for name in objectives.names():
        for own in ({}, dict.fromkeys(configs.to_dict(configs.Config())["objective"].keys() - {"name"})):
            found = objectives.create(configs.from_dict({"objective": {"name": name, **own}}))
            assert found.weights == found.published


def test_weights_that_are_both_0() -> None:
    weights = {"contrastive_weight": 0, "generation_weight": 0}
    for name in ("lcl", "coca"):
        with pytest.raises(ValueError, match=r"both 0, .*; give one of them a weight above 0"):
            objectives.create(configs.from_dict({"objective": {"name": name, **weights}}))
    objectives.create(configs.from_dict({"objective": {"name": "emu", **weights}}))
    with pytest.raises(ValueError, match=r"objective\.generation_weight and objective\.regression_weight are both 0"):
        objectives.create(configs.from_dict({"objective": {"name": "emu", **weights, "regression_weight": 0}}))
    for name in ("clip", "generation"):  # whose one loss has weight 1
        objectives.create(configs.from_dict({"objective": {"name": name, **weights}}))


def test_the_documented_objective_is_what_it_says(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its entry point; its term, in a run: `test_an_objective_of_another_package_trains`."""
    monkeypatch.syspath_prepend(str(files / "site"))
    objective = objectives.create(configs.from_dict({"objective": {"name": "small_latents"}}))
    *of_lcl, (square, weight) = objective._weighted()
    assert of_lcl == objectives.create(configs.from_dict({}))._weighted()
    assert (objective.trains, weight) == (("retrieval", "generation"), 0.01)
    assert objectives.parts_of(objective.config) == {"Contrast": 0.1, "Generation": 1.0, "Square": 0.01}
    assert objectives.parts_of(configs.from_dict({})) == {}, "one of ours"
    monkeypatch.setattr(type(objective), "parts", ((square, 0.01), (type("Square", (square,), {}), 0.5)))
    assert objectives.parts_of(objective.config) == {"Square": 0.01, "Square 2": 0.5}
    # names that a config decides are known where there is one
    monkeypatch.setattr(type(objective), "metrics", property(lambda self: ("contrastive",)))
    assert objectives.create(objective.config).metrics == ("contrastive",)
    counts = GlobalCounts({"num_pairs": 4}, [4])
    batches: Any = [SimpleNamespace(image_soi=torch.tensor([3, -1, 5]), num_pairs=2)] * 2
    term: Any = square(StepInputs(batches, [], torch.zeros(1), counts, Mesh(ALONE, ALONE)), weight)  # type: ignore[call-arg]
    latents = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    surrogates = [term.surrogate(m, SimpleNamespace(latents=latents[m])) for m in range(2)]
    expected = weight * latents[:, [0, 2]].square().mean()
    torch.testing.assert_close(term.loss(), expected.detach())
    torch.testing.assert_close(torch.autograd.grad(sum(surrogates), latents), torch.autograd.grad(expected, latents))


def install(rank: int, site: str) -> None:
    """The other package, as if it were installed."""
    sys.path.insert(0, site)


def run(files: Path, name: str, *arguments: str, size: int = 1) -> list[dict[str, Any]]:
    """The lines of metrics of two steps with an objective of the other package."""
    output = files / f"run-{name}-{size}"
    words = ["--config", str(files / "config.yaml"), "--objective.name", name, *arguments]
    fleet.train(output, *words, size=size, plant=install, planted=(str(files / "site"),))
    of_package = read_progress(step_folder(output, 2))
    assert of_package.parts.keys() == ({"Perplexity"} if name == "on_pairs" else {"Contrast", "Generation", "Square"})
    assert of_package.code["more-objectives"] == "1"
    return [line for line in fleet.lines(output) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--parallel.pipeline", "2")], ids=["replicas", "pipeline"])
def test_an_objective_of_another_package_trains(files: Path, layout: tuple[str, ...]) -> None:
    name = "on_pairs" if layout else "weighted"
    one, two = run(files, name), run(files, name, *layout, size=2)
    for a, b in zip(one, two, strict=True):
        assert [b[key] for key in ("loss", "generation", "grad_norm")] == pytest.approx(
            [a[key] for key in ("loss", "generation", "grad_norm")], rel=1e-5
        )
        if name == "weighted":
            expected = 0.25 * a["num_pairs"] * a["contrastive"] + 0.5 * a["generation"] + 0.75 * a["latent_square"]
            assert a["num_pairs"] > 1
            assert 0 < b["latent_square"] == pytest.approx(a["latent_square"], rel=1e-5)
        else:
            expected = a["generation"]
            assert (a["num_pairs"], "contrastive" in a) == (0, False)
            assert 1 < b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-5)
        assert a["loss"] == pytest.approx(expected, rel=1e-5)
