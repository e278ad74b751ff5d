"""projects/NeuroDiff/choices.py: what its choices change, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from connectomics_neurodiff.checkpoints import save_checkpoint
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.synthesis import noise_loss
from connectomics_neurodiff.volume import Volume, grow_phantom, write_volume

FOLDER = REPOSITORY / "projects" / "NeuroDiff"
RECIPE = """
DATASET: {IMAGE_NAME: v.h5}
AUGMENTOR: {SYNTHETIC: True}
NEURODIFF:
  SPLIT:
    TRAIN: {BOX: [0, 0, 0, 8, 40, 48]}
    TUNE: {BOX: [0, 40, 0, 4, 72, 48]}
    TEST: {BOX: [4, 40, 0, 8, 72, 48]}
  DIFFUSION:
    PRESET: small
    FLAT_LEVELS: 2
    PATCH: [4, 32, 32]
    BATCH: 1
    ACCUMULATE: 1
    SAMPLER: dpmpp
    SAMPLER_STEPS: 2
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("choices", FOLDER / "choices.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "choices", module)
    spec.loader.exec_module(module)
    return module


class Echo(nn.Module):
    """Gives x_t back, and keeps it."""

    seen: torch.Tensor

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def a_batch() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    shape = (4, 1, 3, 40, 24)
    membrane = (torch.rand(shape, generator=rng) < 0.3).float()
    return {
        "noisy": torch.randn(shape, generator=rng) + 5,
        "target": torch.randn(shape, generator=rng),
        "t": torch.tensor([0, 1, 2, 1]),
        "condition": torch.cat([membrane, torch.zeros(shape)], dim=1),
        "voxel_nm": torch.ones(4, 3),
    }


def test_own_loss_is_the_recipes_where_nothing_is_weighed(script: ModuleType) -> None:
    batch, weight = a_batch(), torch.tensor([0.5, 1.0, 2.0])
    own = partial(script.weighed_loss, weight=weight)
    expected = noise_loss(Echo(), batch, norm="l2", weight=weight)[0]
    torch.testing.assert_close(own(Echo(), batch, size=torch.square, on_membrane=1.0)[0], expected)
    # By hand: a membrane's error counts three times, and three times in the mean.
    batch = {name: value[:1] for name, value in batch.items()}
    errors = 0.5 * (batch["noisy"] - batch["target"]).square().numpy().ravel()
    on = batch["condition"][:, :1].numpy().ravel() == 1
    expected = (3 * errors[on].sum() + errors[~on].sum()) / (3 * on.sum() + (~on).sum())
    found = own(Echo(), batch, size=torch.square, on_membrane=3.0)[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_huber_is_the_square_near_zero_and_grows_evenly_beyond(script: ModuleType) -> None:
    found = script.huber(torch.tensor([0.0, 0.5, -1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found.numpy(), [0, 0.25, 1, 3, 5], rtol=1e-6)


def test_hidden_squares_go_through_all_sections_and_leave_the_rest(script: ModuleType) -> None:
    torch.manual_seed(1)
    network, batch = Echo(), a_batch()
    shares = []
    for _ in range(40):
        script.blindfolded(partial(noise_loss, norm="l2"), network, batch)
        hidden = network.seen == 0
        assert torch.equal(network.seen[~hidden], batch["noisy"][~hidden])
        assert torch.equal(hidden, hidden[:, :, :1].expand_as(hidden))
        squares = hidden[:, :, :, :32, :16].unflatten(3, (2, 16)).float().mean((4, 5))
        assert set(squares.unique().tolist()) <= {0.0, 1.0}
        shares.append(hidden.float().mean())
    assert np.mean(shares) == pytest.approx(script.HIDDEN_SAMPLES * script.HIDDEN_SQUARES, abs=0.06)
    assert bool((batch["noisy"] != 0).all()), "the batch itself is left alone"


def test_half_resolution_by_hand(script: ModuleType) -> None:
    image = np.arange(2 * 5 * 6, dtype=np.float32).reshape(2, 5, 6)
    label = np.arange(60, dtype=np.uint64).reshape(2, 5, 6)
    half = script.at_half_resolution(Volume(image, label, None, (30.0, 6.0, 8.0)))
    assert half.shape == (2, 2, 3)
    assert half.voxel_nm == (30.0, 12.0, 16.0)
    assert half.array("image")[0, 0, 0] == (0 + 1 + 6 + 7) / 4
    assert half.array("image")[1, 1, 2] == np.mean([46, 47, 52, 53])
    np.testing.assert_array_equal(half.array("label")[0], [[0, 2, 4], [12, 14, 16]])


def test_rows_are_made_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"filters": [8, 12], "z_pool": [False]}
    network = build_segmenter("superhuman", **options)
    extra = {"voxel_nm": [[29.0, 6.0, 6.0]], "patch": [4, 24, 24]}
    checkpoint = tmp_path / "segmenter.pt"
    save_checkpoint(
        checkpoint,
        kind="segmenter",
        architecture="superhuman",
        options=options,
        state_dict=network.state_dict(),
        extra=extra,
    )
    volume = grow_phantom((8, 72, 48), (29.0, 6.0, 6.0), 0)
    write_volume(tmp_path / "v.h5", volume.arrays, volume.voxel_nm)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = [
        "choices.py", str(recipe), str(tmp_path), str(checkpoint), "--iterations", "4", "--patches", "4",
        "--box", "0", "40", "0", "4", "72", "48", "--patch", "4", "16", "16", "--json", str(tmp_path / "rows.json"),
        "--choices", "recipe", "hidden image", "half resolution first", "distilled", "no voxel size",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows.pop("arguments")["iterations"] == "4"
    assert set(rows) == {"real", "recipe", "hidden image", "half resolution first", "distilled", "no voxel size"}
    assert rows["real"]["fid3d"] == pytest.approx(0, abs=1e-6)
    assert rows["recipe"]["iterations"] == rows["hidden image"]["iterations"] == 4
    assert rows["distilled"]["iterations"] == 3 + 1
    assert all(row["iterations"] >= 1 and row["fid3d"] > 0 for name, row in rows.items() if name != "real")
    monkeypatch.setattr(script, "row_of", lambda *_: pytest.fail("made again"))
    script.main()
    assert capsys.readouterr().out == first
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match="made with another seed"):
        script.main()
