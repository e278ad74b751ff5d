"""projects/NeuroDiff/resolution.py: texture in numbers, and one mask painted under three voxel sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from connectomics_neurodiff.checkpoints import save_checkpoint
from connectomics_neurodiff.synthesis import build_denoiser
from connectomics_neurodiff.volume import grow_phantom, open_volume, write_volume

SCRIPT = REPOSITORY / "projects" / "NeuroDiff" / "resolution.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resolution_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("period", "band"), [(24, "1/32"), (12, "1/16"), (6, "1/8"), (3, "1/4")])
def test_a_wave_falls_into_the_band_of_its_frequency(script: ModuleType, period: int, band: str) -> None:
    x = np.arange(96)
    image = np.broadcast_to(0.5 + 0.2 * np.sin(2 * np.pi * x / period), (3, 64, 96))
    found = script.texture_statistics(image)
    assert found[f"band_{band}"] > 0.9
    assert found["std"] == pytest.approx(0.2 / 2**0.5, rel=0.02)
    assert found["gradient_z"] == 0
    # Neighbours differ by 2 * .2 sin(pi / period) cos(..) along x, and not along y.
    by_hand = (2 * 0.2 * np.sin(np.pi / period)) ** 2 / 2
    assert found["gradient_yx"] == pytest.approx(by_hand / 2, rel=0.03)


def test_white_noise_has_no_slope_and_a_random_walk_one_of_minus_two(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 128, 160))
    assert script.texture_statistics(noise)["slope"] == pytest.approx(0, abs=0.1)
    radius = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(160))
    brown = np.fft.ifft2(np.fft.fft2(noise) / np.maximum(radius, 1 / 160)).real
    assert script.texture_statistics(brown)["slope"] == pytest.approx(-2, abs=0.2)


def test_the_size_least_alike_is_the_wrong_one(script: ModuleType) -> None:
    trained = [[29.0, 6.0, 6.0], [8.0, 8.0, 8.0], [50.0, 4.6, 4.6]]
    assert script.farthest((29.0, 6.0, 6.0), trained) == [8.0, 8.0, 8.0]
    assert script.farthest((8.0, 8.0, 8.0), trained) == [50.0, 4.6, 4.6]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A denoiser whose every branch is awake, so that it heeds the voxel size."""
    torch.manual_seed(0)
    options = {"preset": "small", "multipliers": [1, 1], "rgm_reductions": [], "resolution_embedding": True}
    network = build_denoiser("neurodiff", **options)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    extra = {
        "grey_scales": [{"mean": 0.5, "std": 0.2, "voxel_nm": [29, 6, 6]}],
        "voxel_nm": [[29.0, 6.0, 6.0], [8.0, 8.0, 8.0]], "patch": [8, 48, 48], "membrane_nm": 25.0,
        "process": {"steps": 10, "cosine_offset": 0.008, "prediction": "velocity"},
    }  # fmt: skip
    path, state = tmp_path / "checkpoint.pt", network.state_dict()
    save_checkpoint(path, kind="denoiser", architecture="neurodiff", options=options, state_dict=state, extra=extra)
    return path


def test_three_voxel_sizes_give_three_images(
    script: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    volume = grow_phantom((3, 32, 36), (29.0, 6.0, 6.0), 0)
    write_volume(tmp_path / "v.h5", volume.arrays, volume.voxel_nm)
    arguments = [str(SCRIPT), str(checkpoint), str(tmp_path / "v.h5"), "--steps", "2", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--images", str(tmp_path / "out"), "--precision", "fp32"])
    script.main()
    rows = json.loads(capsys.readouterr().out)
    told = {name: row["voxel_nm"] for name, row in rows.items()}
    assert told == {"real": [29, 6, 6], "true": [29, 6, 6], "wrong": [8, 8, 8], "none": [0, 0, 0]}
    assert rows["true"]["change"] == 0
    images = {name: open_volume(tmp_path / "out" / f"{name}.h5").array("image") for name in ("true", "wrong", "none")}
    for name in ("wrong", "none"):
        by_hand = np.sqrt(np.square(images[name] - images["true"]).mean())
        assert rows[name]["change"] == pytest.approx(by_hand, abs=0.005)
        assert rows[name]["change"] > 0.003
    monkeypatch.setattr(sys, "argv", [*arguments, "--wrong-nm", "29", "6", "6"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "name another one with --wrong-nm" in capsys.readouterr().err
