"""Protects the table of devices: what is assumed of them, how they are found, and that users are told all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from plan.test_predict import IMAGES, config_of

from megatron_lcl.cli import main
from megatron_lcl.errors import UserError
from megatron_lcl.plan.devices import DEVICES, assumed_rates, check_name, name_of
from megatron_lcl.plan.network import bandwidth
from megatron_lcl.plan.predict import predict

ROOT = Path(__file__).parents[2]


def test_devices_get_their_assumed_shares() -> None:
    rates = assumed_rates(DEVICES["h100"], "bfloat16")
    assert rates.peak == 989.5e12
    assert rates.matmul["vision"] == pytest.approx(0.65 * 989.5e12)
    assert assumed_rates(DEVICES["h100"], "float32").peak == 67e12
    assert all("%" in line or "µs" in line for line in rates.assumed)


def test_cards_without_nvlink_send_over_pcie() -> None:
    """Tensor parallelism takes as much longer there as the link is slower."""
    pcie = {"l40s", "a6000", "rtx4090", "rtx3090"}
    assert {name for name, device in DEVICES.items() if device.intra == 32e9} == pcie
    config = config_of(parallel__tensor=2)
    card, slow = assumed_rates(DEVICES["rtx4090"], "bfloat16"), assumed_rates(DEVICES["a100"], "bfloat16")
    over_pcie, over_nvlink = (predict(config, 4, 4, replace(card, intra=r.intra), IMAGES).network for r in (card, slow))
    assert bandwidth((0, 1), 4, card) == 24e9
    assert over_pcie > over_nvlink
    assert any("(32 GB/s in a node, 1.25 between nodes)" in line for line in card.assumed)


def test_every_device_is_named_to_users(capsys: pytest.CaptureFixture[str]) -> None:
    """By the help, by the page, and where a name is not known; with its memory, which a name alone may not tell."""
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    offered = " ".join(capsys.readouterr().out.split())
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `--gpu NAME` |")]
    with pytest.raises(UserError) as caught:
        check_name("a100-48gb")
    for name, device in DEVICES.items():
        assert re.search(rf"\b{name}\b(?!-)", offered), name
        assert f"`{name}`" in row, name
        assert f" {name} ({device.memory / 1e9:.0f} GB)" in str(caught.value), name
        assert f"{device.memory / 1e9:.0f} GB" in device.label
    assert "did you mean" not in str(caught.value), "twice its memory"
    assert check_name("RTX4090") == "rtx4090"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-PCIE-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
    ],
)
def test_what_a_driver_names_is_planned_only_as_itself(device: str, name: str | None) -> None:
    """Not as one with more memory or faster links, nor as one whose name is a part of its own."""
    assert name_of(device) == name
