"""Other libraries' models are run as they were trained, and all of them give the same kinds of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lcl.evaluate.encoders.load import load_encoder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def open_clip_config(**others: Any) -> dict[str, Any]:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **others}


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize("of_name", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_open_clip_models_have_the_activation_that_their_weights_were_trained_with(
    of_name: bool, of_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config that has QuickGELU OpenCLIP does not say of all weights that they want it (roberta-ViT-B-32)."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip_config(**({"quick_gelu": True} if of_name else {}))
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**{**config, "quick_gelu": of_name or of_weights}).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    weights: dict[str, Any] = {"file": str(tmp_path / "weights.safetensors")}
    weights |= {"quick_gelu": True} if of_weights else {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B-8", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-B-8", {"openai": weights})
    for name in ("Tiny-B-8", "Tiny-B/8"):
        encoder = load_encoder(f"open_clip:{name}@openai")
        with torch.no_grad():
            assert torch.equal(encoder.encode(IMAGES).pooled, theirs.encode_image(IMAGES))
            texts = torch.nn.functional.normalize(theirs.encode_text(open_clip.get_tokenizer(name)(["a cat"])), dim=-1)
        assert torch.allclose(encoder.encode_texts(["a cat"]), texts, atol=1e-6)
