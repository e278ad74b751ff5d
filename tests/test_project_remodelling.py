"""projects/NeuroDiff/remodelling.py: a row per volume and seed, none made twice, the same for any number of workers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY

from connectomics_neurodiff.volume import grow_phantom, write_volume

SCRIPT = REPOSITORY / "projects" / "NeuroDiff" / "remodelling.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that worker processes can import, too."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("remodelling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "remodelling", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    volume = grow_phantom((10, 72, 90), (29.0, 6.0, 6.0), 0)
    write_volume(tmp_path / "cells.h5", volume.arrays, volume.voxel_nm)
    return tmp_path / "cells.h5"


def test_rows_are_the_same_for_any_number_of_workers_and_not_made_twice(
    script: ModuleType, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(file: str, *options: str) -> dict[str, dict[str, float | str]]:
        command = [str(SCRIPT), str(cells), "--whole", "--json", str(tmp_path / file), *options]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        found: dict[str, dict[str, float | str]] = json.loads((tmp_path / file).read_text())
        return found

    one, two = rows("one.json", "--seeds", "2"), rows("two.json", "--seeds", "2", "--workers", "2")
    assert list(one) == ["cells 0", "cells 1"]
    assert one["cells 0"]["sha256"] != one["cells 1"]["sha256"]
    assert [row["sha256"] for row in two.values()] == [row["sha256"] for row in one.values()]
    (blocks,) = rows("one.json", "--seeds", "1", "--block-sections", "5").keys() - one.keys()
    assert blocks == "cells 0 in blocks of 5"
    assert all(row["labels_torn"] == row["mito_on_membrane_voxels"] == 0 for row in one.values())
    one["cells 1"]["cpu_seconds"] = 1234.5
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert rows("one.json", "--seeds", "2")["cells 1"]["cpu_seconds"] == 1234.5
    assert "1234.5 CPU s" in capsys.readouterr().out


def test_cost_and_picture(
    script: ModuleType, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(cells), "--cost", "4", "80", "70"])
    script.main()
    printed = capsys.readouterr().out
    assert f"label_mb {4 * 80 * 70 * 8 / 2**20:.2f}" in printed
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(cells), "--picture", str(tmp_path / "p.png")])
    script.main()
    # Two bands of five sections, the source above the mask in each, with gaps of 6 pixels.
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture is not None
    assert picture.shape == (4 * (72 + 6), 5 * 90 + 4 * 6, 3)
    assert (picture[:72] != picture[78:150]).any()


def test_a_volume_is_mirrored_or_cropped_to_a_shape(script: ModuleType) -> None:
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    fitted = script.fitted(volume, (3, 2, 6))
    assert np.array_equal(fitted[:2, :, :4], volume[:, :2])
    assert np.array_equal(fitted[2], fitted[1])
    assert np.array_equal(fitted[..., 4:], fitted[..., 3:1:-1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--block-sections", "5", "--cost", "4", "9", "9"], "give it alone"),
        (["--block-sections", "-5"], "must be >= 0. Got -5"),
    ],
)
def test_blocks_go_with_nothing_that_they_would_ignore(
    script: ModuleType,
    options: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "phantom", *options])
    with pytest.raises(SystemExit):
        script.main()
    assert told in capsys.readouterr().err


def test_a_missing_volume_is_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "none.h5"), "--seeds", "1"])
    with pytest.raises(SystemExit, match=r"error: .*none\.h5"):
        script.main()
