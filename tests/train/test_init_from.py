"""`train.init_from`: runs that begin with the weights of an import, of a run of any layout, of a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_corpus import make_corpus

from megatron_lcl import LCL, load_model
from megatron_lcl import config as configs
from megatron_lcl.config import Config, Corpus, Data
from megatron_lcl.convert.export import import_checkpoint, save_checkpoint
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.convert.resolution import at_image_size
from megatron_lcl.data.loading.ledger import open_ledger
from megatron_lcl.errors import UserError
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.reference_format import model_config, open_clip_config
from megatron_lcl.parallel.mesh import ALONE
from megatron_lcl.train.checkpoint.folder import Layout, choose
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights, load_initial_weights
from megatron_lcl.train.checkpoint.inventory import faults
from megatron_lcl.train.checks import check_beginning, check_output

TINY = configs.from_dict(
    {
        "model": {
            "vision": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
            "language": {
                "context_length": 24,
                "vocab_size": 99,
                "width": 16,
                "layers": 2,
                "heads": 2,
                "mlp_width": 32,
            },
            "pool_heads": 2,
        }
    }
)


# --- the reference's weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference's model as its file beside a model config, and imported; batches and losses to match."""
    folder = tmp_path_factory.mktemp("reference")
    tensors = load_file(shared / "reference" / "lcl_tiny.safetensors")
    with safe_open(shared / "reference" / "lcl_tiny.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    torch.save({f"module.{n[6:]}": v for n, v in tensors.items() if n.startswith("param/")}, folder / "tiny.pt")
    (folder / "tiny.json").write_text(json.dumps(config))
    import_checkpoint("open_clip", folder / "tiny.pt", folder / "imported")
    return {
        "file": str(folder / "tiny.pt"),
        "import": str(folder / "imported"),
        "model": configs.to_dict(Config(model=model_config(config)))["model"],
        "batch": (tensors["batch0/images"], tensors["batch0/text"]),
        "losses": tensors["traj"][0, :3].tolist(),
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "ZeRO-1": {"zero": {"stage": 1}},
    "ZeRO-2": {"zero": {"stage": 2}},
    "ZeRO-3": {
        "zero": {"stage": 3},
        "contrast": {"strategy": "recompute"},
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
}


def first_steps(rank: int, model: Any, batch: Any, cases: list[tuple[str, str]]) -> list[list[float]]:
    """The losses of the first step at each layout, beginning with the weights of each source."""
    import torch.distributed as dist

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    rows = []
    for layout, source in cases:
        config = configs.from_dict(
            {
                "model": model,
                "train": {"init_from": source, "global_batch": 2, "dtype": "float32", "seed": 5},
                **LAYOUTS[layout],
            }
        )
        mesh = init_processes(config)
        engine = build_engine(build_module(config, mesh, None, find_initial_weights(config)), config, mesh)
        images, text = batch
        of_sequences = images.split((text == config.model.language.vocab_size - 2).sum(1).tolist())
        batches = []
        for sequences in ((0, 1), (2,)) if mesh.data.size == 1 else (((0, 1),), ((2,),))[mesh.data.rank]:
            own = torch.cat([of_sequences[s] for s in sequences])
            rows_of = list(sequences)
            batches.append(pack_padded(text[rows_of], (text[rows_of] != 0).sum(1), own, config.model))
        result = build_stepper(engine, config, mesh).run(batches, 1e-3)
        rows.append([0.1 * result.metrics["contrastive"], result.metrics["generation"], result.loss])
        engine.destroy()
    dist.destroy_process_group()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_losses_are_the_references(processes: int, reference: dict[str, Any]) -> None:
    layouts = ["one process"] if processes == 1 else [name for name in LAYOUTS if name != "one process"]
    sources = {"one process": (reference["file"], reference["import"])}
    cases = [(layout, source) for layout in layouts for source in sources.get(layout, (reference["import"],))]
    for rows in run_processes(first_steps, processes, reference["model"], reference["batch"], cases):
        for case, row in zip(cases, rows, strict=True):
            assert row == pytest.approx(reference["losses"], rel=1e-5), case


# --- what is taken of a checkpoint ------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with weights and config, as `import` and runs leave it."""
    return saved(LCL(TINY.model, seed=1), tmp_path / "source")


def saved(model: LCL, folder: Path) -> Path:
    folder.mkdir()
    save_checkpoint(model, Config(model=model.config), folder)
    return folder


def begun(path: Path, **changes: Any) -> tuple[LCL, Any]:
    """A model drawn from seed 2 with the weights put into it, and what was found."""
    config = configs.replace(TINY, train__init_from=str(path), **changes)
    weights = find_initial_weights(config)
    assert weights is not None
    model = LCL(config.model, seed=2)
    load_initial_weights(weights, dict(enumerate(model.layers)), ALONE)
    return model, weights


def parameters(model: LCL) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.layers.named_parameters()}


def test_every_weight_is_taken_and_nothing_is_said_to_be_missing(source: Path) -> None:
    model, weights = begun(source)
    theirs = parameters(load_model(source))
    assert all(torch.equal(value, theirs[name]) for name, value in parameters(model).items())
    assert (weights.missing, weights.unused, weights.image_size) == ([], [], None)


def test_layers_are_matched_by_their_place(source: Path) -> None:
    """With another number of vision blocks every later index is another layer's."""
    theirs = parameters(load_model(source))
    model, weights = begun(source, model__vision__layers=3, model__language__layers=1)
    ours, drawn = parameters(model), parameters(LCL(model.config, seed=2))
    assert torch.equal(ours["2.mlp.up.weight"], theirs["2.mlp.up.weight"])
    assert torch.equal(ours["3.mlp.up.weight"], drawn["3.mlp.up.weight"]), "a vision block that there is not"
    assert torch.equal(ours["4.query"], theirs["3.query"])
    assert torch.equal(ours["5.mlp.up.weight"], theirs["4.mlp.up.weight"])
    assert torch.equal(ours["6.vocabulary"], theirs["6.vocabulary"])
    assert {name.split(".")[0] for name in weights.missing} == {"3"}
    assert {name.split(".")[0] for name in weights.unused} == {"5"}
    said = weights.describe(configs.Config(model=model.config))
    assert "it lacks 3.attention.k.bias, " in said
    assert "not used of it: 5.attention.k.bias" in said


def test_tensors_that_are_missing_keep_what_was_drawn(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    del state["3.query"], state["6.log_scale"]
    save_file({**state, "6.extra": torch.ones(2), "x": torch.ones(1)}, source / "model.safetensors")
    model, weights = begun(source)
    assert weights.missing == ["3.query", "6.log_scale"]
    said = (
        "it lacks 3.query, which begin as train.seed draws them; it lacks 6.log_scale, which begins as the config says"
    )
    assert f"{said}, at 2.65926; " in weights.describe(TINY)
    assert weights.unused == ["6.extra", "x"]
    assert torch.equal(parameters(model)["3.query"], parameters(LCL(TINY.model, seed=2))["3.query"])
    save_file({"x": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(UserError, match="has no tensor that the model has"):
        begun(source)


def test_what_the_runs_objective_does_not_train_is_named(source: Path) -> None:
    """Where the new one's trains it; else nothing comes of it."""
    config = configs.replace(TINY, objective__name="clip")
    (source / "config.yaml").write_text(configs.to_yaml(config))
    files = {path.name: fingerprint(path) for path in source.iterdir() if path.name != MANIFEST}
    (source / MANIFEST).write_text(manifest_text(files))
    _, weights = begun(source)
    head = ("6.vocabulary", "6.vocabulary_norm.bias", "6.vocabulary_norm.weight")
    assert (weights.untrained, weights.missing) == (head, [])
    said = f"its objective does not train {', '.join(head)}, which may be as its train.seed drew them"
    assert said in weights.describe(TINY)
    for changes in ({"objective__name": "siglip"}, {"train__freeze": ("head.vocabulary*",)}):
        model, weights = begun(source, **changes)
        said = weights.describe(configs.replace(TINY, **changes))
        assert "does not train" not in said
        bias = parameters(model).get("6.logit_bias")
        assert ("; it lacks 6.logit_bias, which begins as the config says, at -10" in said) == (bias is not None)
        assert bias is None or bias.tolist() == [-10]


def test_another_image_size_interpolates_the_positions(source: Path) -> None:
    model, weights = begun(source, model__vision__image_size=32)
    assert weights.image_size == 16
    assert "interpolated from 16 to 32 px" in weights.describe(configs.Config(model=model.config))
    expected = parameters(at_image_size(load_model(source), 32))
    assert all(torch.equal(value, expected[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__language__vocab_size": 64}, ["3.embedding.weight has the shape (99, 16), the model's (64, 16)",
                                               "model.language.vocab_size is 99 there and 64 here"]),
        ({"model__vision__width": 64}, ["0.class_embedding has the shape (32,), the model's (64,)", "tensors differ"]),
        ({"model__language__context_length": 48}, ["3.positions has the shape (24, 16), the model's (48, 16)"]),
        ({"model__vision__patch_size": 4}, ["0.projection.weight has the shape (32, 192), the model's (32, 48)"]),
        # of the same shapes
        ({"model__vision__heads": 4}, ["model.vision.heads is 2 there and 4 here"]),
        ({"model__pool_heads": 4}, ["model.pool_heads is 2 there and 4 here"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_both_shapes(source: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        begun(source, **changes)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_part_of_an_open_clip_file(tmp_path: Path) -> None:
    """A vision tower alone, with tensors that are none of ours: a CLIP model's, say."""
    theirs = LCL(TINY.model, seed=1)
    state = {n: v for n, v in theirs.state_dict_open_clip().items() if n.startswith("visual.")}
    torch.save({**state, "visual.proj": torch.ones(3)}, tmp_path / "clip.pt")
    (tmp_path / "clip.json").write_text(json.dumps(open_clip_config(TINY.model)))
    model, weights = begun(tmp_path / "clip.pt")
    drawn, ours = parameters(LCL(TINY.model, seed=2)), parameters(model)
    assert weights.unused == ["visual.proj"]
    for name, value in parameters(theirs).items():
        is_vision = name.split(".")[0] in "012" or name.startswith("3.norm.")
        assert torch.equal(ours[name], value if is_vision else drawn[name]), name
        assert (name in weights.missing) != is_vision
    torch.save({**state, "visual.conv1.weight": torch.ones(3)}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"has visual.conv1.weight of shape \(3,\), not \(32, 3, 8, 8\)"):
        begun(tmp_path / "clip.pt")


def test_what_cannot_be_begun_from(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; name an import"):
        begun(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint"):
        begun(tmp_path)
    both = {"train__init_from": str(source), "checkpoint__resume": str(source)}
    with pytest.raises(UserError, match="give one of the two"):
        check_beginning(configs.replace(TINY, **both))
    for name in both:
        secret = {**both, name: "s3://user:planted@bucket/run"}
        with pytest.raises(UserError, match="a URL with a user, a password or a query is not taken") as raised:
            check_beginning(configs.replace(TINY, **secret))
        assert "planted" not in str(raised.value)


def test_weights_of_another_tokenizer_are_refused(source: Path, tmp_path: Path) -> None:
    """Of the same size, which no shape tells: the ledger of the run's checkpoint does."""
    read, same, other = make_corpus(tmp_path / "a", seed=0), tmp_path / "same", make_corpus(tmp_path / "b", seed=1)
    shutil.copytree(read, same)
    corpora = {path: [{"path": str(path)}] for path in (read, same, other)}
    ledger = open_ledger(Data(corpora=(Corpus(str(read)),)), 4, 64)
    old = [{key: value for key, value in ledger.entries[0].items() if key != "tokenizer"}]
    for entries in (list(ledger.entries), old):
        layout = asdict(Layout())
        progress = {"step": 1, "packs": 4, "ledger": {**ledger.to_json(), "entries": entries}, "layout": layout}
        (source / "progress.json").write_text(json.dumps(progress))
        files = {path.name: fingerprint(path) for path in source.iterdir() if path.name != MANIFEST}
        (source / MANIFEST).write_text(manifest_text(files))
        begun(source, data__corpora=corpora[same])
        with pytest.raises(UserError, match=f"{source} was trained with another tokenizer than that of {other}"):
            begun(source, data__corpora=corpora[other])
    shutil.rmtree(read)
    begun(source, data__corpora=corpora[other])  # of an earlier version, nothing tells any more


# --- imports ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["now", "before"])
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An import as it is written now, and as it was when its record was called manifest.json."""
    torch.save(LCL(TINY.model, seed=1).state_dict_open_clip(), tmp_path / "tiny.pt")
    (tmp_path / "tiny.json").write_text(json.dumps(open_clip_config(TINY.model)))
    import_checkpoint("open_clip", tmp_path / "tiny.pt", tmp_path / "imported")
    if request.param == "before":
        (tmp_path / "imported" / "import.json").rename(tmp_path / "imported" / "manifest.json")
    return tmp_path / "imported"


def test_an_import_opens_and_is_replaced(imported: Path, make_damage: Callable[[Path], None]) -> None:
    theirs = parameters(LCL(TINY.model, seed=1))
    assert all(torch.equal(value, theirs[name]) for name, value in parameters(load_model(imported)).items())
    assert begun(imported)[1].missing == []
    import_checkpoint("open_clip", imported.parent / "tiny.pt", imported)
    assert sorted(path.name for path in imported.iterdir()) == ["config.yaml", "import.json", "model.safetensors"]
    make_damage(imported / "model.safetensors")
    for read in (load_model, begun):
        with pytest.raises(UserError, match="is not what `import` wrote"):
            read(imported)
    with pytest.raises(UserError, match="something else than an unchanged import; give another"):
        import_checkpoint("open_clip", imported.parent / "tiny.pt", imported)


@pytest.fixture
def make_damage() -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(bytes(data))

    return damage


def test_an_import_is_no_checkpoint_to_go_on_from(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        choose(tmp_path / "run", str(imported))
    assert "is an import: weights alone" in str(error.value)
    assert f"--train.init_from {imported}" in str(error.value)
    with pytest.raises(UserError, match="is an import; name another folder"):
        check_output(imported, TINY)
    step = tmp_path / "checkpoints" / "step-00000001"
    shutil.copytree(imported, step)
    assert "changed" not in "".join(faults(tmp_path)), "which is false"
