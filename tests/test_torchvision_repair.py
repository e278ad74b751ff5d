"""The repair of torchvision beside a torch that cannot load its operators."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest
from host_v2 import run_python

BROKEN_TORCHVISION = """
    import torch
    from torchvision import left_behind
    @torch.library.register_fake("torchvision::nms")
    def nms(dets, scores, iou_threshold):
        return dets
    """


def repair(folder: Path, init: str) -> subprocess.CompletedProcess[str]:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(textwrap.dedent(init))
    (folder / "torchvision" / "left_behind.py").touch()
    code = """
        from connectomics_neurodiff.torchvision_repair import repair_torchvision
        from connectomics_neurodiff.errors import UserError
        try:
            print(repair_torchvision(), repair_torchvision())
        except UserError as error:
            print(type(error).__name__, error)
        """
    return run_python("-c", textwrap.dedent(code), path=folder)


def test_torchvision_is_repaired_only_where_its_import_fails(tmp_path):
    assert repair(tmp_path, BROKEN_TORCHVISION).stdout.split() == ["True", "False"]


def test_a_sound_torchvision_is_left_alone(tmp_path):
    assert repair(tmp_path, "").stdout.split() == ["False", "False"]


@pytest.mark.parametrize("init", ["raise RuntimeError('built for another\\ntorch')", "raise OSError('libc10')"])
def test_a_torchvision_beyond_repair_is_told_in_one_line(tmp_path, init):
    said = repair(tmp_path, init).stdout
    assert said.startswith("MissingDependency")
    assert said.count("\n") == 1
    assert "pip install --no-deps torchvision==0.28.0" in said
