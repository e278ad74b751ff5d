"""Every command as a user types it: what it writes, what it prints, and one line with exit code 2 when they err."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import neurodiff, settings

from connectomics_neurodiff.affinities import affinities_from_labels
from connectomics_neurodiff.checkpoints import load_checkpoint, save_checkpoint
from connectomics_neurodiff.conditions import dark_bodies
from connectomics_neurodiff.segmenters import build_segmenter
from connectomics_neurodiff.synthesis import build_denoiser
from connectomics_neurodiff.volume import grow_phantom, write_volume


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5"
    result = neurodiff("phantom", str(path), "--shape", "8", "48", "60", "--voxel-nm", "29", "6", "6", "--seed", "3")
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "checkpoint.pt"
    extra = {"process": {"steps": 250, "cosine_offset": 0.008}, "patch": [4, 32, 32], "voxel_nm": [[29, 6, 6]]}
    extra["grey_scales"] = [{"mean": 0.5, "std": 0.2, "voxel_nm": [29, 6, 6]}]
    network = build_denoiser("neurodiff", preset="small")
    save_checkpoint(
        path,
        kind="denoiser",
        architecture="neurodiff",
        options={"preset": "small"},
        state_dict=network.state_dict(),
        extra=extra,
    )
    return path


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("segmenter") / "checkpoint.pt"
    options = {"filters": [8, 12], "z_pool": [False]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_segmenter("superhuman", **options)
    save_checkpoint(
        path,
        kind="segmenter",
        architecture="superhuman",
        options=options,
        state_dict=network.state_dict(),
        extra={"patch": [6, 32, 32]},
    )
    return path


def done(*arguments: str) -> str:
    result = neurodiff(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(message: str, *arguments: str) -> None:
    result = neurodiff(*arguments)
    assert result.returncode == 2, (result.returncode, result.stderr)
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("neurodiff: error: ")]
    assert len(lines) == 1
    assert result.stderr.strip().splitlines()[-1] == lines[0]
    assert message in lines[0], lines[0]


def test_phantom_is_seeded_and_labelled(cells: Path, tmp_path: Path) -> None:
    done("phantom", str(tmp_path / "same.h5"), "--shape", "8", "48", "60", "--voxel-nm", "29", "6", "6", "--seed", "3")
    done("phantom", str(tmp_path / "other.h5"), "--shape", "8", "48", "60", "--voxel-nm", "29", "6", "6", "--seed", "4")
    assert (tmp_path / "same.h5").read_bytes() == cells.read_bytes()
    assert (tmp_path / "other.h5").read_bytes() != cells.read_bytes()
    with h5py.File(cells) as file:
        assert file["image"].dtype == np.uint8
        assert file["label"].shape == (8, 48, 60)
        assert file.attrs["resolution_nm"].tolist() == [29, 6, 6]


def test_info_is_json(cells: Path) -> None:
    found = json.loads(done("info", str(cells)))
    assert found["shape"] == [8, 48, 60]
    assert found["voxel_nm"] == [29, 6, 6]
    assert found["labels"] > 1


def test_one_section_is_remodelled(cells: Path, tmp_path: Path) -> None:
    with h5py.File(cells) as source, h5py.File(tmp_path / "flat.h5", "w") as file:
        file["label"], file["mito"] = source["label"][3:4], source["mito"][3:4]
        file.attrs["resolution_nm"] = source.attrs["resolution_nm"]
        before = file["label"][:]
    done("remodel", str(tmp_path / "flat.h5"), str(tmp_path / "masks.h5"))
    with h5py.File(tmp_path / "masks.h5") as file:
        assert file["label"].shape == before.shape
        assert set(np.unique(file["label"])) == set(np.unique(before))
        assert (file["label"][:] != before).any()
        assert not file["mito"][:][file["membrane"][:] > 0].any()


def test_remodel_then_sample_gives_a_pair(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    masks, pair = tmp_path / "masks.h5", tmp_path / "pair.h5"
    done("remodel", str(cells), str(masks), "--copies", "2", "--seed", "1")
    with h5py.File(masks) as first, h5py.File(tmp_path / "masks_001.h5") as second:
        assert set(first) == {"label", "membrane", "mito"}
        assert (first["label"][:] != second["label"][:]).any()
    arguments = ["--checkpoint", str(denoiser), "--steps", "2", "--seed", "5", "--gpus", "0"]
    for sampler in ("ddpm", "ddim", "dpmpp"):
        done("sample", str(masks), str(tmp_path / f"{sampler}.h5"), "--sampler", sampler, *arguments)
        with h5py.File(tmp_path / f"{sampler}.h5") as file:
            assert set(file) == {"image", "label", "membrane", "mito"}
            assert file["image"].dtype == np.uint8
    done("sample", str(masks), str(pair), "--sampler", "ddpm", *arguments)
    assert pair.read_bytes() == (tmp_path / "ddpm.h5").read_bytes()


def test_sample_paints_what_masks_say_is_dark(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    """The same masks with and without it give other images; the pair holds the three masks in any case."""
    untrained = load_checkpoint(denoiser, kind="denoiser")
    out = untrained.state_dict["out_conv.weight"]  # zeros: what it is told would make no difference
    random = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)) / 10
    heeding = tmp_path / "heeding.pt"
    save_checkpoint(
        heeding,
        kind="denoiser",
        architecture="neurodiff",
        options=untrained.options,
        state_dict={**untrained.state_dict, "out_conv.weight": random},
        extra=untrained.extra,
    )
    told, plain = tmp_path / "told.h5", tmp_path / "plain.h5"
    done("remodel", str(cells), str(told), "--dark-bodies", "--seed", "1")
    with h5py.File(told) as source, h5py.File(plain, "w") as file:
        assert source["dark"][:].any()
        for name in ("label", "membrane", "mito"):
            file[name] = source[name][:]
        file.attrs["resolution_nm"] = source.attrs["resolution_nm"]
    images = []
    for masks in (told, plain):
        pair = tmp_path / f"pair_{masks.name}"
        done("sample", str(masks), str(pair), "--checkpoint", str(heeding), "--steps", "2", "--gpus", "0")
        with h5py.File(pair) as file:
            assert set(file) == {"image", "label", "membrane", "mito"}
            images.append(file["image"][:])
    assert (images[0] != images[1]).any()


def test_a_dataset_called_dark_that_is_no_mask_is_refused(cells: Path, tmp_path: Path) -> None:
    with h5py.File(cells) as source:
        arrays = {name: source[name][:] for name in ("image", "label", "mito")}
    dark = arrays["mito"].astype(np.int16)
    for wrong, message in ((dark - 1, "Got values from -1"), (199 * dark, "to 199"), (dark[:4], "same shape")):
        with h5py.File(tmp_path / "wrong.h5", "w") as file:
            for name, array in {**arrays, "dark": wrong}.items():
                file[name] = array
            file.attrs["resolution_nm"] = (29, 6, 6)
        refused(message, "remodel", str(tmp_path / "wrong.h5"), str(tmp_path / "masks.h5"))
    with h5py.File(tmp_path / "wrong.h5", "a") as file:
        del file["dark"]
        file["dark"] = dark
    refused("in memory only", "remodel", str(tmp_path / "wrong.h5"), str(tmp_path / "o.h5"), "--block-sections", "4")


def test_a_killed_sample_goes_on_and_leaves_nothing_behind(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    masks, whole, killed = tmp_path / "masks.h5", tmp_path / "whole.h5", tmp_path / "killed.h5"
    done("remodel", str(cells), str(masks))
    options = ["--checkpoint", str(denoiser), "--steps", "40", "--gpus", "0", "--precision", "fp32"]
    done("sample", str(masks), str(whole), *options)
    scratch = tmp_path / ".killed.h5.unfinished"
    program = [sys.executable, "-m", "connectomics_neurodiff", "sample", str(masks), str(killed), *options]
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (scratch / "progress.json").exists() or '"step": 0' in (scratch / "progress.json").read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not killed.exists()
    done("sample", str(masks), str(killed), *options)
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.h5", "masks.h5", "whole.h5"]


def test_a_denoiser_trained_without_dropout_is_not_guided(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.h5")
    done("remodel", str(cells), str(tmp_path / "masks.h5"))
    arguments = ["sample", str(tmp_path / "masks.h5"), out, "--checkpoint", str(denoiser), "--gpus", "0"]
    refused("CONDITION_DROPOUT", *arguments, "--guidance", "2")
    refused("invalid float", *arguments, "--guidance", "strong")


def test_the_gate_lets_real_tissue_pass_and_no_inverted_one(tmp_path: Path) -> None:
    volume = grow_phantom((24, 96, 104), (29.0, 6.0, 6.0), seed=1)
    cells, pair, inverted = (tmp_path / f"{name}.h5" for name in ("cells", "pair", "inverted"))
    write_volume(cells, volume.arrays, volume.voxel_nm, {})
    for path, image in ((pair, volume.array("image")), (inverted, 1 - volume.array("image"))):
        arrays = {"image": image[12:], "label": volume.array("label")[12:], "mito": volume.array("mito")[12:]}
        write_volume(path, arrays, volume.voxel_nm, {})
    by = ["--real", str(cells), "--box", "0", "0", "0", "12", "96", "104", "--judge-iterations", "200"]
    table = done("gate", str(pair), *by)
    assert "following" in table
    assert "refused" not in table
    verdict = neurodiff("gate", str(inverted), *by, "--json")
    assert verdict.returncode == 2
    found = json.loads(verdict.stdout)
    assert not found["passed"]
    assert "does not follow its mask" in found["reason"]
    assert f"neurodiff: error: {found['reason']}" in verdict.stderr
    refused("a quarter of the train part is held out", "gate", str(pair), "--real", str(cells), "--box", *"000199")


def test_guidance_interval_and_fit_are_recorded_and_checked(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    masks, coarse, raw, fitted = (str(tmp_path / f"{name}.h5") for name in ("masks", "coarse", "raw", "fitted"))
    done("remodel", str(cells), masks)
    by = ["--checkpoint", str(denoiser), "--steps", "2", "--gpus", "0"]
    done("sample", masks, raw, *by, "--guidance-above", "0.25")
    done("sample", masks, fitted, *by, "--fit-to", str(cells))
    with h5py.File(raw) as first, h5py.File(fitted) as second, h5py.File(cells) as real:
        assert (first.attrs["guidance"], first.attrs["guidance_above"]) == (1.0, 0.25)
        assert (bool(first.attrs["fitted"]), bool(second.attrs["fitted"])) == (False, True)
        before, after, wanted = (file["image"][:].astype(float) for file in (first, second, real))
    assert [after.mean(), after.std()] == pytest.approx([wanted.mean(), wanted.std()], rel=0.05)
    assert [before.mean(), before.std()] != pytest.approx([wanted.mean(), wanted.std()], rel=0.05)
    done("phantom", coarse, "--shape", "4", "20", "20", "--voxel-nm", "29", "8", "8")
    other = str(tmp_path / "other.h5")
    told = "--fit-to needs voxels of the masks' size (29.0, 6.0, 6.0) nm. Got (29.0, 8.0, 8.0)"
    refused(told, "sample", masks, other, *by, "--fit-to", coarse)
    refused("--guidance-above must be >= 0. Got -1", "sample", masks, other, *by, "--guidance-above", "-1")


def test_predict_writes_affinities(cells: Path, segmenter: Path, tmp_path: Path) -> None:
    done("predict", str(cells), str(tmp_path / "a.h5"), "--checkpoint", str(segmenter), "--gpus", "0")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["affinity"].shape == (3, 8, 48, 60)
        assert file["affinity"].dtype == np.float16
        assert 0 <= file["affinity"][:].min() <= file["affinity"][:].max() <= 1


def test_fid_of_an_image_that_is_darker_elsewhere_and_of_itself(cells: Path, segmenter: Path, tmp_path: Path) -> None:
    with h5py.File(cells) as file, h5py.File(tmp_path / "dark.h5", "w") as dark:
        dark["image"] = file["image"][:6, :40] // 2
        dark.attrs["resolution_nm"] = (29, 6, 6)
    arguments = ["--checkpoint", str(segmenter), "--patch", "4", "24", "32", "--patches", "16", "--gpus", "0", "--json"]
    same = json.loads(done("fid", str(cells), str(cells), *arguments))
    assert same["fid3d"] == pytest.approx(0, abs=1e-9)
    far = neurodiff("fid", str(cells), str(tmp_path / "dark.h5"), *arguments)
    by_default = ["--checkpoint", str(segmenter), "--gpus", "0", "--patches", "4", "--json"]
    assert json.loads(done("fid", str(cells), str(cells), *by_default))["fid3d_patches"] == 4
    found = json.loads(far.stdout)
    assert set(found) == {"fid3d", "fid3d_interval", "fid3d_floor", "fid3d_patches", "fid3d_features"}
    assert found["fid3d_floor"] == same["fid3d_floor"] < found["fid3d"]
    assert found["fid3d_interval"][0] <= found["fid3d"] <= found["fid3d_interval"][1]
    assert (found["fid3d_patches"], found["fid3d_features"]) == (16, 12)
    assert "warning" not in far.stderr


def test_fid_warns_of_what_spoils_it(cells: Path, segmenter: Path, tmp_path: Path) -> None:
    with h5py.File(cells) as file, h5py.File(tmp_path / "coarse.h5", "w") as coarse:
        coarse["image"] = file["image"][:]
        coarse.attrs["resolution_nm"] = (29, 8, 8)
    real_only = load_checkpoint(segmenter, kind="segmenter")
    mixed = vars(real_only) | {"extra": real_only.extra | {"arm": "mixed"}}
    save_checkpoint(tmp_path / "mixed.pt", **mixed)
    arguments = ["--checkpoint", str(tmp_path / "mixed.pt"), "--patch", "4", "24", "32", "--patches", "5"]
    result = neurodiff("fid", str(cells), str(tmp_path / "coarse.h5"), *arguments, "--gpus", "0")
    assert result.returncode == 0, result.stderr
    voxels, trained, few = [line for line in result.stderr.splitlines() if line.startswith("neurodiff: warning: ")]
    assert "(29.0, 6.0, 6.0) nm" in voxels
    assert "(29.0, 8.0, 8.0) nm" in voxels
    assert "mixed.pt was trained on synthetic data too" in trained
    assert "5 patches of 12 features" in few
    assert "floor" in result.stdout


def test_fid_refuses_what_it_cannot_compare(cells: Path, segmenter: Path, denoiser: Path, tmp_path: Path) -> None:
    image = np.full((8, 48, 60), 0.5, np.float32)
    image[3, 3, 3] = np.nan
    for name, role, array in (("nan", "image", image), ("masks", "label", np.ones(image.shape, np.uint32))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file[role] = array
            file.attrs["resolution_nm"] = (29, 6, 6)
    by = ["--checkpoint", str(segmenter)]
    refused("holds a denoiser", "fid", str(cells), str(cells), "--checkpoint", str(denoiser))
    refused("no dataset 'image'", "fid", str(cells), str(tmp_path / "masks.h5"), *by)
    refused("must be finite", "fid", str(cells), str(tmp_path / "nan.h5"), *by)
    refused("at least 2 patches. Got 1", "fid", str(cells), str(cells), *by, "--patches", "1")
    refused("take a smaller patch", "fid", str(cells), str(cells), *by, "--patch", "99", "99", "99")


@pytest.mark.parametrize("method", ["waterz", "multicut"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint8])
def test_perfect_affinities_are_segmented_perfectly(cells: Path, tmp_path: Path, method: str, kind: type) -> None:
    with h5py.File(cells) as file:
        affinity = affinities_from_labels(file["label"][:]) * (255 if kind is np.uint8 else 1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["affinity"] = affinity.astype(kind)
        file.attrs["resolution_nm"] = (29, 6, 6)
    done("segment", str(tmp_path / "a.h5"), str(tmp_path / "s.h5"), "--method", method)
    scores = json.loads(done("evaluate", str(tmp_path / "s.h5"), "--truth", str(cells), "--json"))
    assert set(scores) == {"voi_split", "voi_merge", "voi", "arand"}
    assert scores["arand"] < 0.02


def test_datasets_are_named_with_two_colons(cells: Path) -> None:
    scores = json.loads(done("evaluate", f"{cells}::label", "--truth", f"{cells}::label", "--json"))
    assert scores == {"voi_split": 0.0, "voi_merge": 0.0, "voi": 0.0, "arand": pytest.approx(0, abs=1e-12)}


def test_published_scores_of_third_party_segmentations(real_data: Path) -> None:
    volume = real_data / "checks" / "gala_test_voi.h5"
    for name in ("seg1", "seg4", "watershed"):
        with h5py.File(volume) as file:
            published = {k: float(file[name].attrs[f"third_party_{k}_bits"]) for k in ("voi_split", "voi_merge")}
        scores = json.loads(done("evaluate", f"{volume}::{name}", "--truth", str(volume), "--json"))
        assert scores["voi_split"] == pytest.approx(published["voi_split"], abs=1e-5)
        assert scores["voi_merge"] == pytest.approx(published["voi_merge"], abs=1e-5)


def test_a_dry_run_says_what_would_be_done(tmp_path: Path) -> None:
    text = done("run", "--dry-run", *settings(tmp_path / "run"))
    for expected in ("SEED: 0", "embedded phantom", "masks: 1 file", "parameters", "GiB", "min"):
        assert expected in text
    assert not (tmp_path / "run").exists()
    missing = done("run", "--dry-run", *settings(tmp_path / "run", DATASET__IMAGE_NAME="nowhere.h5"))
    assert "missing: nowhere.h5" in missing.replace("./", "")


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Did you mean 'SOLVER'", ["run", "SOLVR.BASE_LR", "1"]),
        ("No config file at nowhere.yaml", ["run", "--config-file", "nowhere.yaml"]),
        ("Missing input", ["run", "DATASET.IMAGE_NAME", "nowhere.h5"]),
        ("Did you mean 'masks'", ["run", "--stages", "maks"]),
        ("Did you mean 'evaluate'", ["evalute", "a.h5"]),
        ("does not exist", ["evaluate", "nowhere.h5", "--truth", "nowhere.h5"]),
        ("Did you mean 'waterz'", ["segment", "a.h5", "b.h5", "--method", "watrez"]),
        ("Did you mean '--seed'", ["remodel", "a.h5", "b.h5", "--sed", "1"]),
        ("a seed is a whole number >= 0", ["phantom", "a.h5", "--seed", "-1"]),
        ("at most 9223372036854775807", ["remodel", "a.h5", "b.h5", "--seed", str(2**63)]),
        ("required: OUT.h5", ["phantom"]),
        ("Got '.txt'", ["phantom", "a.txt"]),
        ("not enough memory", ["phantom", "a.h5", "--shape", "100000", "100000", "100000"]),
    ],
)
def test_slips_are_told_in_one_line(message: str, arguments: list[str]) -> None:
    refused(message, *arguments)


def test_nothing_a_user_made_is_overwritten(cells: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.h5"
    kept.write_bytes(b"precious")
    for arguments in (
        ["phantom", str(kept)],
        ["remodel", str(cells), str(kept)],
        ["predict", str(cells), str(kept), "--checkpoint", "c.pt"],
        ["segment", str(cells), str(kept), "--method", "waterz"],
        ["sample", str(cells), str(kept), "--checkpoint", "c.pt"],
    ):
        refused("nothing was overwritten", *arguments)
    assert kept.read_bytes() == b"precious"


def test_outputs_that_cannot_be_written_are_refused_before_the_work(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.h5").mkdir()
    refused("is a file, not a folder", "phantom", str(tmp_path / "file" / "a.h5"))
    refused("not a file", "remodel", str(cells), str(tmp_path / "folder.h5"), "--force")
    refused("cannot be", "phantom", "/proc/a.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.h5"]


def test_a_full_disk_behind_stdout_is_told_in_one_line(cells: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "connectomics_neurodiff", "info", str(cells)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["neurodiff: error: No space left on device"]


def test_checkpoints_of_another_kind_are_refused(cells: Path, segmenter: Path, denoiser: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.h5")
    refused("holds a denoiser", "predict", str(cells), out, "--checkpoint", str(denoiser))
    refused("holds a segmenter", "sample", str(cells), out, "--checkpoint", str(segmenter))
    refused("No checkpoint at", "predict", str(cells), out, "--checkpoint", "nowhere.pt")


class Pickled:
    """Executed by whoever unpickles it without care."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


def test_files_that_are_no_checkpoints_are_refused_and_never_executed(
    cells: Path, segmenter: Path, tmp_path: Path
) -> None:
    whole = segmenter.read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello\nworld",
        "half": whole[: len(whole) // 2],
        "code": pickle.dumps(Pickled()),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    torch.save({"format": "connectomics_neurodiff checkpoint 1"}, tmp_path / "bare.pt")
    torch.save({"format": Pickled()}, tmp_path / "trap.pt")
    for path in sorted(tmp_path.glob("*.pt")):
        refused(path.name, "predict", str(cells), str(tmp_path / "out.h5"), "--checkpoint", str(path))
    assert not (REPOSITORY / "pwned").exists()
    assert not (tmp_path / "out.h5").exists()


def test_checkpoints_must_say_what_is_needed_of_them(cells: Path, tmp_path: Path) -> None:
    options = {"filters": [8, 12], "z_pool": [False], "in_channels": 2}
    for name, more in (("patchless", {"in_channels": 1}), ("coloured", {})):
        network = build_segmenter("superhuman", **options | more)
        made = {
            "architecture": "superhuman",
            "options": options | more,
            "state_dict": network.state_dict(),
            "extra": {},
        }
        save_checkpoint(tmp_path / f"{name}.pt", kind="segmenter", **made)  # type: ignore[arg-type]
    out = str(tmp_path / "out.h5")
    refused("--tile", "predict", str(cells), out, "--checkpoint", str(tmp_path / "patchless.pt"))
    refused(
        "1 image channel",
        *("predict", str(cells), out, "--checkpoint", str(tmp_path / "coloured.pt"), "--tile", "4", "8", "8"),
    )


def test_an_input_is_safe_under_any_of_its_names(cells: Path, tmp_path: Path) -> None:
    source, link = tmp_path / "mine.h5", tmp_path / "link.h5"
    source.write_bytes(cells.read_bytes())
    link.symlink_to(source)
    for name in (source, link, tmp_path / "missing" / ".." / "mine.h5"):
        refused("would be lost", "remodel", str(source), str(name))
        refused("would be lost", "remodel", str(source), str(name), "--force")
    assert source.read_bytes() == cells.read_bytes()
    assert not (tmp_path / "missing").exists()


def test_bad_volumes_are_refused(cells: Path, denoiser: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.h5")
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["main"] = np.ones((4, 20, 28), np.uint32)
    refused("--voxel-nm", "remodel", str(tmp_path / "bare.h5"), out)
    done("remodel", str(tmp_path / "bare.h5"), out, "--voxel-nm", "29", "6", "6", "--no-mito")
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["label"] = np.ones((4, 20, 28), np.float32)
        file.attrs["resolution_nm"] = (29, 6, 6)
    refused("integer", "remodel", str(tmp_path / "float.h5"), str(tmp_path / "o2.h5"))
    refused("shape", "evaluate", str(tmp_path / "bare.h5"), "--truth", str(cells))
    blocks = ["remodel", str(cells), str(tmp_path / "o4.h5"), "--block-sections", "4"]
    refused("--dark-bodies needs the whole volume", *blocks, "--dark-bodies")
    sample = ["sample", out, str(tmp_path / "o3.h5"), "--checkpoint", str(denoiser)]
    for steps in ("0", "251"):
        refused("1 to 250 steps", *sample, "--steps", steps)
    refused("overlap < tile", *sample, "--tile", "0", "8", "8")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["label"] = np.zeros((4, 20, 28), np.uint32)
        file.attrs["resolution_nm"] = (29, 6, 6)
    refused("background only", "remodel", str(tmp_path / "empty.h5"), str(tmp_path / "o4.h5"))
    for width in ("nan", "0", "25000"):
        refused("--membrane-nm must be a number in (0, 200]", "remodel", str(cells), out, "--membrane-nm", width)
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["label"] = np.ones((20, 28), np.uint32)
    assert json.loads(done("info", str(tmp_path / "flat.h5")))["labels"] is None
    truncated = tmp_path / "short.h5"
    truncated.write_bytes(cells.read_bytes()[:3000])
    refused("short.h5", "info", str(truncated))


def test_shapes_of_one_volume_serve_another_without_mitochondria(cells: Path, tmp_path: Path) -> None:
    shapes, bare = str(tmp_path / "shapes.npz"), tmp_path / "bare.h5"
    done("remodel", str(cells), str(tmp_path / "masks.h5"), "--save-library", shapes)
    with h5py.File(cells) as source, h5py.File(bare, "w") as file:
        file["label"] = source["label"][:]
        file.attrs["resolution_nm"] = source.attrs["resolution_nm"]
    done("remodel", str(bare), str(tmp_path / "with.h5"), "--library", shapes)
    done("remodel", str(bare), str(tmp_path / "without.h5"))
    asked = ("--library", shapes, "--mito-fraction", "0.03", "--mito-count", "1")
    done("remodel", str(bare), str(tmp_path / "asked.h5"), *asked)
    with h5py.File(tmp_path / "with.h5") as placed, h5py.File(tmp_path / "without.h5") as none:
        assert placed["mito"][:].any()
        assert not none["mito"][:].any()
    with h5py.File(tmp_path / "asked.h5") as placed:
        assert 0 < placed["mito"][:].mean() < 0.033
    out = str(tmp_path / "o.h5")
    refused("the signature library has none", "remodel", str(bare), out, "--mito-fraction", "0.03")
    refused("the signature library has none", "remodel", str(bare), out, "--mito-count", "3", "--block-sections", "8")
    refused("must lie in [1, ", "remodel", str(cells), out, "--mito-count", "100000")
    refused("a number in [0, 1]", "remodel", str(cells), out, "--mito-fraction", "nan")
    refused("--mito-count is of mitochondria to place", "remodel", str(cells), out, "--no-mito", "--mito-count", "3")
    refused("exists", "remodel", str(cells), out, "--save-library", shapes)
    refused("ends in .npz", "remodel", str(cells), out, "--save-library", str(tmp_path / "shapes.h5"))
    before = Path(shapes).read_bytes()
    refused("must lie in", "remodel", str(cells), out, "--save-library", shapes, "--force", "--mito-count", "99999")
    assert Path(shapes).read_bytes() == before
    refused("volume with mitochondria", "remodel", str(bare), out, "--save-library", str(tmp_path / "new.npz"))
    refused("not a signature library", "remodel", str(bare), out, "--library", str(cells))
    assert not (tmp_path / "new.npz").exists()
    assert not (tmp_path / "o.h5").exists()


def test_dark_bodies_stand_for_mitochondria_where_they_are_asked_for(tmp_path: Path) -> None:
    """With --no-mito what was found only moves along; several processes find the same."""
    volume = grow_phantom((6, 100, 110), (29, 6, 6), 2)
    found = dark_bodies(volume.array("image"), volume.array("label"), volume.voxel_nm)
    assert found.any()
    bare = tmp_path / "bare.h5"
    write_volume(bare, {"image": volume.array("image"), "label": volume.array("label")}, volume.voxel_nm, {})
    still = ("--no-elastic", "--no-mito")
    done("remodel", str(bare), str(tmp_path / "without.h5"), *still)
    done("remodel", str(bare), str(tmp_path / "with.h5"), *still, "--dark-bodies", "--copies", "2", "--workers", "2")
    with h5py.File(tmp_path / "without.h5") as file:
        assert "mito" not in file or not file["mito"][:].any()
    for name in ("with.h5", "with_001.h5"):
        with h5py.File(tmp_path / name) as file:
            np.testing.assert_array_equal(file["mito"][:], found & (file["membrane"][:] == 0))
            assert file["dark"][:].any()
            assert not (file["dark"][:] & (file["mito"][:] | file["membrane"][:])).any()
    refused(
        "--dark-bodies needs", "remodel", str(bare), str(tmp_path / "x.h5"), "--dark-bodies", "--block-sections", "4"
    )


@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_do_not_spin_while_they_wait_unless_asked_to(chosen: dict[str, str], policy: str) -> None:
    """As the thread library itself tells, when torch loads it."""
    program = "from connectomics_neurodiff.cli import main; main(['phantom', '--help'])"
    program = f"try: {program}\nexcept SystemExit: import torch"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | chosen | {"OMP_DISPLAY_ENV": "TRUE"},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this torch has another thread library")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
