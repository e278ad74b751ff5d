"""Shared by the tests of the plugin for pytorch_connectomics v2: a stand-in for the host, and small configurations."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY

from connectomics_neurodiff.host import v2
from connectomics_neurodiff.volume import write_volume

VOXEL = (30.0, 6.0, 6.0)
OURS = {"neurodiff_superhuman"}
DECODERS = {"neurodiff_waterz", "neurodiff_mean", "neurodiff_multicut"}

STAND_IN = {
    "__init__.py": "",
    "models/__init__.py": "",
    "models/architectures/__init__.py": """
        REGISTRY = {}
        def register_architecture(name):
            def add(builder):
                REGISTRY[name] = builder
                return builder
            return add
        def unregister_architecture(name):
            del REGISTRY[name]
        def list_architectures():
            return sorted(REGISTRY)
        """,
    "decoding/__init__.py": "",
    "decoding/registry.py": """
        class Decoders:
            def __init__(self):
                self._decoders = {}
        DEFAULT_DECODER_REGISTRY = Decoders()
        def register_decoder(name, fn, *, overwrite=False):
            if name in DEFAULT_DECODER_REGISTRY._decoders:
                raise ValueError(name)
            DEFAULT_DECODER_REGISTRY._decoders[name] = fn
        def list_decoders():
            return sorted(DEFAULT_DECODER_REGISTRY._decoders)
        """,
    "training/__init__.py": "",
    "training/lightning/__init__.py": "",
    "training/lightning/data.py": """
        class SimpleDataModule:
            def __init__(self, train, val):
                self.train, self.val = train, val
            def train_dataloader(self):
                return self.train
            def val_dataloader(self):
                return self.val
        """,
    "runtime/__init__.py": "",
    "runtime/cli.py": """
        import json
        import sys
        from types import SimpleNamespace
        def parse_args():
            return SimpleNamespace(mode="train", config=sys.argv[1])
        def setup_config(args):
            return json.load(open(args.config))
        """,
    "runtime/dispatch.py": """
        import sys
        import traceback
        from connectomics.models.architectures import REGISTRY
        from connectomics.decoding.registry import DEFAULT_DECODER_REGISTRY
        def create_datamodule(cfg, mode="train", fast_dev_run=False):
            return "the host's own"
        def suppress_nonzero_rank_stdout():
            pass
        def prepare_cli_args(args, root):
            print("root", root)
        def dispatch_runtime(args, cfg):
            REGISTRY[cfg["model"]["arch"]["type"]](cfg)
            try:
                print("datamodule:", create_datamodule(cfg, mode=args.mode, fast_dev_run=False))
                if "decode" in cfg:
                    DEFAULT_DECODER_REGISTRY._decoders[cfg["decode"]](cfg)
            except Exception:
                traceback.print_exc()
                sys.exit(1)
        """,
}


def write_stand_in(folder: Path, files: dict[str, str]) -> Path:
    """A package `connectomics` with these files, in a folder of its own."""
    for name, source in files.items():
        path = folder / "connectomics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return folder


def stand_in_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Body of a fixture: the package `connectomics` stands in for v2, with the few functions the plugin touches."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "connectomics"}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(write_stand_in(tmp_path / "site", STAND_IN))
    monkeypatch.setattr(v2, "repair_torchvision", lambda: False)
    monkeypatch.setattr(v2, "has_torchvision", lambda: True)
    yield SimpleNamespace(
        architectures=importlib.import_module("connectomics.models.architectures"),
        decoders=importlib.import_module("connectomics.decoding.registry"),
        dispatch=importlib.import_module("connectomics.runtime.dispatch"),
        folder=tmp_path / "site",
    )
    v2.unregister()
    for name in [name for name in sys.modules if name.partition(".")[0] == "connectomics"]:
        del sys.modules[name]
    sys.modules.update(before)


def run_python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    environment["PYTHONPATH"] = f"{path}:{REPOSITORY}" if path else str(REPOSITORY)
    return subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,  # the host asks questions where there is a terminal
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
        timeout=600,
    )


def v2_config(**changes):
    """The keys of the host's configuration that a builder reads."""
    model = {"arch": {"type": "neurodiff_superhuman", "params": {"filters": [4, 6]}}, "in_channels": 1}
    return {"model": {**model, "out_channels": 3, "input_size": [8, 32, 32], "heads": {}, "loss": {}, **changes}}


def brute_force(label: np.ndarray, order: str, edge_offset: int) -> np.ndarray:
    """The host's targets, edge by edge: (3, z, y, x), 1 = same neuron; where there is no edge, 0."""
    affinity = np.zeros((3, *label.shape), np.uint8)
    for channel, axis in enumerate(order):
        step = np.array([axis == "z", axis == "y", axis == "x"], dtype=int)
        for source in np.ndindex(label.shape):
            target = tuple(np.array(source) + step)
            if all(t < n for t, n in zip(target, label.shape, strict=True)):
                stored_at = target if edge_offset == 1 else source
                affinity[(channel, *stored_at)] = label[source] == label[target] > 0
    return affinity


def write_pair_file(path: Path, shape=(6, 20, 24), voxel=VOXEL, image_type=np.uint8) -> Path:
    """A pair whose image tells its label: image = 7 label mod 251."""
    label = np.random.default_rng(len(path.name)).integers(0, 5, shape).astype(np.uint32) + 70_000_000
    label[:, :3] = 0
    image = (label % 70_000_000 * 7 % 251).astype(np.uint8)
    write_volume(path, {"image": image, "label": label}, voxel)
    if image_type != np.uint8:
        with h5py.File(path, "a") as file:
            del file["image"]
            file["image"] = image.astype(image_type)
    return path


def settings_file(folder: Path, content: object) -> Path:
    path = folder / "pairs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
