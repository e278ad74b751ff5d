"""projects/NeuroDiff/sampling.py: a row for every way of sampling, none painted twice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from connectomics_neurodiff.checkpoints import save_checkpoint
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.synthesis import build_denoiser
from connectomics_neurodiff.volume import grow_phantom, open_volume, write_volume

SCRIPT = REPOSITORY / "projects" / "NeuroDiff" / "sampling.py"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    denoiser = {"preset": "small", "base_channels": 32, "multipliers": [1, 1], "rgm_reductions": []}
    segmenter = {"filters": [8, 12], "z_pool": [False]}
    extra = {
        "voxel_nm": [[29.0, 6.0, 6.0]], "patch": [4, 24, 24], "membrane_nm": 25.0, "condition_dropout": 0.1,
        "grey_scales": [{"mean": 0.5, "std": 0.2, "voxel_nm": [29.0, 6.0, 6.0]}],
        "process": {"steps": 10, "cosine_offset": 0.008, "prediction": "velocity"},
    }  # fmt: skip
    for kind, name, options, network in (
        ("denoiser", "neurodiff", denoiser, build_denoiser("neurodiff", **denoiser)),
        ("segmenter", "superhuman", segmenter, build_segmenter("superhuman", **segmenter)),
    ):
        state = network.state_dict()
        path = tmp_path / f"{kind}.pt"
        save_checkpoint(path, kind=kind, architecture=name, options=options, state_dict=state, extra=extra)
    volume = grow_phantom((4, 36, 40), (29.0, 6.0, 6.0), 0)
    write_volume(tmp_path / "v.h5", volume.arrays, volume.voxel_nm)
    files = [str(tmp_path / name) for name in ("denoiser.pt", "v.h5", "segmenter.pt")]
    small = [
        "--box",
        "0",
        "0",
        "0",
        "4",
        "30",
        "32",
        "--patch",
        "4",
        "16",
        "16",
        "--patches",
        "6",
        "--precision",
        "fp32",
    ]
    return [str(SCRIPT), *files, *small, "--json", str(tmp_path / "rows.json"), "--images", str(tmp_path / "images")]


def test_every_way_of_sampling_gets_a_row_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec = importlib.util.spec_from_file_location("sampling_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def rows_after(*further: str) -> dict:
        monkeypatch.setattr(sys, "argv", [*arguments, *further])
        script.main()
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert rows.pop("arguments")["seed"] == "0"
        return rows

    first = rows_after("--samplers", "ddim", "ddpm", "--steps", "2")
    assert sorted(first) == ["ddim 2 steps, guidance 1", "ddpm 2 steps, guidance 1", "real"]
    assert first["real"]["fid3d"] == pytest.approx(0, abs=1e-9)
    assert first["ddim 2 steps, guidance 1"]["fid3d"] > 0
    again = rows_after("--samplers", "ddim", "--steps", "2", "--guidance", "1", "3")
    assert {name: again[name] for name in first} == first
    assert set(again) - set(first) == {"ddim 2 steps, guidance 3"}
    image = np.asarray(open_volume(tmp_path / "images" / "ddim-2-3.h5").image)
    assert image.shape == (4, 30, 32)
    assert f"{again['ddim 2 steps, guidance 3']['arand']:.4f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"rows made with another seed\. Name another file"):
        rows_after("--samplers", "ddim", "--steps", "2", "--seed", "1")
