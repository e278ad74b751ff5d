"""Synthetic pairs in the trainings of pytorch_connectomics v2: settings, samples, the loader. No host is needed."""

from __future__ import annotations

import importlib
import pickle
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from host_v2 import VOXEL, settings_file, stand_in_host, write_pair_file

from connectomics_neurodiff.errors import (
    ConfigError,
    MissingInput,
    UnknownName,
    UserError,
    ValueRangeError,
    VoxelSizeMissing,
)
from connectomics_neurodiff.host import v2
from connectomics_neurodiff.host.v2 import pairs
from connectomics_neurodiff.torchvision_repair import repair_torchvision

stand_in = pytest.fixture(stand_in_host)


@pytest.fixture
def pair_files(tmp_path) -> list[Path]:
    (tmp_path / "pairs").mkdir()
    return [write_pair_file(tmp_path / "pairs" / f"copy_{i}.h5") for i in range(2)]


def train_config(**train):
    base = {"dataset_type": "neurodiff_pairs", "resolution": list(VOXEL), "image": "real.h5", "label": "label.h5"}
    return {"data": {"train": {**base, **train}}, "system": {"seed": 5}}


@pytest.mark.parametrize("named", ["pairs/*.h5", ["pairs/copy_0.h5", "pairs/copy_1.h5"]])
def test_settings_name_pairs_beside_their_file(tmp_path, pair_files, named):
    file = settings_file(tmp_path, {"pairs": named, "ratio": 3})
    settings = pairs.settings_for(train_config(json=str(file)), None)
    assert settings == pairs.PairSettings(tuple(pair_files), 3.0)


def test_ratio_is_one_unless_it_is_said(tmp_path, pair_files):
    assert pairs.settings_from_file(settings_file(tmp_path, {"pairs": "pairs/*.h5"})).ratio == 1.0


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", ConfigError, "must be JSON"),
        (["a.h5"], ConfigError, "Got list"),
        ({"pair": "pairs/*.h5"}, UnknownName, "no key 'pair'. Did you mean 'pairs'"),
        ({"pairs": 3}, ConfigError, "path or a list of paths. Got 3"),
        ({"pairs": "pairs/*.h5", "ratio": "1"}, ConfigError, "must be a number. Got '1'"),
        ({"pairs": "pairs/*.h5", "ratio": -0.5}, ValueRangeError, "Got -0.5"),
        ({"pairs": "pears/*.h5"}, MissingInput, "No synthetic pair matches"),
        ({"pairs": "pairs/copy_7.h5"}, MissingInput, "Did you mean 'copy_1.h5'|Did you mean 'copy_0.h5'"),
        ({"ratio": 1.0}, MissingInput, "needs synthetic pairs. Got none"),
    ],
)
def test_bad_settings_are_told(tmp_path, pair_files, content, error, message):
    with pytest.raises(error, match=message):
        pairs.settings_from_file(settings_file(tmp_path, content))


def test_pairs_are_switched_on_and_given_once(tmp_path, pair_files):
    given = pairs.PairSettings(tuple(pair_files))
    file = settings_file(tmp_path, {"pairs": "pairs/*.h5"})
    assert pairs.settings_for(train_config(), given) is given
    assert pairs.settings_for({"data": {"train": {}}}, None) is None
    assert pairs.settings_for(train_config(dataset_type="tile", json="tiles.json"), None) is None
    with pytest.raises(ConfigError, match="given twice"):
        pairs.settings_for(train_config(json=str(file)), given)
    with pytest.raises(ConfigError, match=r"needs pairs: data\.train\.json"):
        pairs.settings_for(train_config(), None)
    with pytest.raises(ConfigError, match="switch them on"):
        pairs.settings_for(train_config(dataset_type=None), given)
    with pytest.raises(UnknownName, match="Did you mean 'neurodiff_pairs'"):
        pairs.settings_for(train_config(dataset_type="neurodiff_pair"), None)
    with pytest.raises(UnknownName, match="Did you mean 'neurodiff_pairs'"):
        pairs.settings_for(train_config(dataset_type="Neurodif_pairs", json="pairs.json"), None)
    with pytest.raises(MissingInput, match=r"named by data\.train\.json"):
        pairs.settings_for(train_config(json=str(tmp_path / "none.json")), None)


def test_pairs_of_another_voxel_size_are_refused_before_training(tmp_path, pair_files):
    file = settings_file(tmp_path, {"pairs": "pairs/*.h5"})
    pairs.check_training(train_config(json=str(file)), None)
    with pytest.raises(ValueRangeError, match=r"real volume's voxel size \(40.0, 4.0, 4.0\)"):
        pairs.check_training(train_config(json=str(file), resolution=[40, 4, 4]), None)


def test_the_real_voxel_size_is_the_configuration_s_or_the_file_s(tmp_path, pair_files):
    assert pairs.real_voxel_size(train_config()) == VOXEL
    assert pairs.real_voxel_size(train_config(resolution=None, image=[str(pair_files[0])])) == VOXEL
    with h5py.File(tmp_path / "main.h5", "w") as bare:
        bare["main"] = np.zeros((2, 3, 4), np.uint8)
    (tmp_path / "scan.nii").touch()
    for name in ("main.h5", "scan.nii"):
        with pytest.raises(VoxelSizeMissing, match=r"set data\.train\.resolution"):
            pairs.real_voxel_size(train_config(resolution=None, image=str(tmp_path / name)))


# --- Samples ---


class Jitter:
    """Draws as MONAI's transforms do, from a generator of its own that seeds itself anew when its length is asked."""

    def __init__(self) -> None:
        self.set_random_state()

    def set_random_state(self, seed: int | None = None) -> None:
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        self.set_random_state()
        return 1

    def __call__(self, sample: dict) -> dict:
        return {**sample, "jitter": self.rng.random()}


class RealPatches:
    """Draws as the host's patch dataset does, from the global generators."""

    patch_size = (4, 8, 8)
    foreground_threshold = 0.0
    max_attempts = 10

    def __init__(self, length: int = 40, **changes) -> None:
        self.length = length
        self.transforms = Jitter()
        vars(self).update(changes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        drawn = [random.random(), float(np.random.random()), float(torch.rand(1))]
        sample = {"image": np.array(drawn), "synthetic": False}
        return self.transforms(sample) if self.transforms else sample

    def _crop_volumes(self, volume, position) -> dict:
        return {"image": np.zeros((1, 4, 8, 8), np.uint8), "label": np.ones((1, 4, 8, 8), np.uint16), "mask": None}


def mixed_patches(**options) -> pairs.MixedPatches:
    return pairs.MixedPatches(RealPatches(transforms=None), SyntheticPatches(transforms=None), Jitter(), **options)


class SyntheticPatches(RealPatches):
    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "synthetic": True}


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0])
def test_the_share_of_synthetic_samples_is_exact(ratio):
    mixed = mixed_patches(ratio=ratio, seed=0)
    share = np.mean([mixed[i]["synthetic"] for i in range(2000)])
    assert share == pytest.approx(ratio / (1 + ratio), rel=0.03)


def drawn_in(sample: dict) -> tuple[float, ...]:
    return (*sample["image"].tolist(), sample["jitter"])


def test_a_sample_depends_on_seed_and_number_alone_and_touches_no_global_generator():
    first, again, other = (
        mixed_patches(ratio=1.0, seed=3),
        mixed_patches(ratio=1.0, seed=3),
        mixed_patches(ratio=1.0, seed=4),
    )
    forwards = [drawn_in(first[i]) for i in range(20)]
    random.seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert [drawn_in(again[i]) for i in reversed(range(20))][::-1] == forwards
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    for drawn in zip(*forwards, strict=True):
        assert len(set(drawn)) == 20
    assert not set(drawn_in(other[0])) & set(forwards[0])


def test_generators_are_put_back_even_if_a_sample_fails():
    state = random.getstate()
    with pytest.raises(KeyError), pairs.drawn_for(0, 0):
        raise KeyError
    assert random.getstate() == state


def pair_patches(paths, real=None, seed=0):
    stored = pairs.open_stored(pairs.PairSettings(tuple(paths)), train_config())
    real = real or RealPatches()
    return pairs.PairPatches(stored, real, real._crop_volumes(0, (0, 0, 0)), seed)


def test_patches_of_pairs_look_like_the_host_s(pair_files):
    patches = pair_patches(pair_files)
    for index in range(10):
        sample = patches[index]
        assert set(sample) == {"image", "label"}
        assert sample["image"].shape == sample["label"].shape == (1, 4, 8, 8)
        assert sample["image"].dtype == np.uint8
        assert sample["label"].dtype == np.uint16
        # The image tells the label: they were cut at the same place. Ids are small, background stays.
        grey, ids = sample["image"].ravel(), sample["label"].ravel()
        assert len(set(zip(grey.tolist(), ids.tolist(), strict=True))) == len(set(ids.tolist()))
        assert np.array_equal(patches[index]["image"], sample["image"])


def test_patches_of_pairs_travel_to_spawned_workers(pair_files):
    patches = pair_patches(pair_files)
    copy = pickle.loads(pickle.dumps(patches))
    assert np.array_equal(copy[3]["image"], patches[3]["image"])


def test_a_pair_smaller_than_the_patch_is_mirrored(tmp_path):
    small = write_pair_file(tmp_path / "small.h5", shape=(3, 20, 5))
    sample = pair_patches([small])[0]
    assert sample["image"].shape == (1, 4, 8, 8)
    assert (sample["image"][0, 3] == sample["image"][0, 1]).all()
    assert (sample["label"][0, 3] == sample["label"][0, 1]).all()


def test_a_mask_stands_beside_the_host_s_masks(pair_files):
    real = RealPatches(_crop_volumes=lambda *_: {"label": np.ones(1, np.uint8), "mask": np.ones(1, np.uint8)})
    assert (pair_patches(pair_files, real)[0]["mask"] == 1).all()


def test_foreground_is_looked_for_as_the_host_does(tmp_path):
    path = write_pair_file(tmp_path / "thin.h5", shape=(4, 200, 8))
    with h5py.File(path, "a") as file:
        file["label"][:, :180] = 0
    wanted = RealPatches(foreground_threshold=0.5, max_attempts=200)
    assert (pair_patches([path], wanted)[0]["label"] > 0).mean() >= 0.5
    anywhere = [(pair_patches([path], seed=s)[0]["label"] > 0).mean() for s in range(8)]
    assert min(anywhere) == 0


def test_pairs_are_drawn_in_proportion_to_their_voxels(tmp_path):
    large = write_pair_file(tmp_path / "large.h5", shape=(12, 20, 24))
    small = write_pair_file(tmp_path / "smaller.h5", shape=(4, 20, 24))
    patches = pair_patches([large, small])
    assert patches._chances.tolist() == [0.75, 0.25]


# --- The training loader ---


def test_numbers_go_on_from_epoch_to_epoch(monkeypatch):
    numbers = pairs.SampleNumbers(6)
    assert [list(numbers), len(numbers)] == [[0, 1, 2, 3, 4, 5], 6]
    numbers.set_epoch(2)
    assert list(numbers) == [12, 13, 14, 15, 16, 17]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(pairs, "_place", lambda rank=rank: (rank, 2))
        assert len(numbers) == 3
        shares.append(list(numbers))
    assert shares == [[12, 14, 16], [13, 15, 17]]


def test_lightning_numbers_the_samples_through_epochs_and_resumes(tmp_path):
    repair_torchvision()  # lightning imports torchvision where there is one
    import lightning
    from torch.utils.data import DataLoader

    class Numbers(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([float(index)])

    class Recorder(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch, _):
            self.seen += [int(n) for n in batch.ravel()]
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(epochs: int, checkpoint: Path | None) -> tuple[Recorder, lightning.Trainer]:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        module = Recorder()
        dataset = Numbers()
        loader = DataLoader(dataset, batch_size=2, sampler=pairs.SampleNumbers(len(dataset)))
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    whole, trainer = fit(2, None)
    assert whole.seen == list(range(8))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(3, tmp_path / "two.ckpt")
    assert resumed.seen == [8, 9, 10, 11]


def collate(samples):
    return samples


def create_with(real):
    from torch.utils.data import DataLoader

    def create(cfg, mode="train", fast_dev_run=False):
        module = importlib.import_module("connectomics.training.lightning.data")
        return module.SimpleDataModule(DataLoader(real, batch_size=3, collate_fn=collate), "validation")

    return create


def test_the_training_loader_is_the_host_s_with_pairs_in_it(stand_in, pair_files):
    settings = pairs.PairSettings(tuple(pair_files), 2.0)
    module = pairs.mixed_datamodule(create_with(RealPatches()), train_config(), settings, mode="train")
    loader = module.train_dataloader()
    assert module.val_dataloader() == "validation"
    assert (loader.batch_size, loader.collate_fn, len(loader)) == (3, collate, 14)
    samples = [sample for batch in loader for sample in batch]
    assert sum("synthetic" not in sample for sample in samples) in (26, 27)
    again = pairs.mixed_datamodule(create_with(RealPatches()), train_config(), settings).train_dataloader().dataset
    assert [again[i]["jitter"] for i in range(40)] == [sample["jitter"] for sample in samples]
    assert again.seed == 5


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        (
            {"_crop_volumes": lambda *_: {"image": np.zeros((1, 4, 8, 8), np.uint16), "label": np.ones(1)}},
            {},
            "type of",
        ),
        ({"_crop_volumes": lambda *_: {"image": np.zeros((2, 4, 8, 8)), "label": np.ones(1)}}, {}, "have 2"),
        ({"_crop_volumes": lambda *_: {"image": np.zeros((1, 4)), "label": None}}, {}, "set data.train.label"),
        ({"_crop_volumes": lambda *_: {"label": np.ones(1), "label_aux": 1}}, {}, "label_aux_type: none"),
        ({"patch_size": (8, 8)}, {}, "works in 3D"),
        ({}, {"nnunet_preprocessing": {"enabled": True}}, "does not resample"),
    ],
)
def test_trainings_that_pairs_cannot_join_are_refused(stand_in, pair_files, changes, data, message):
    config = train_config()
    config["data"].update(data)
    with pytest.raises(UserError, match=message):
        pairs.mixed_datamodule(create_with(RealPatches(**changes)), config, pairs.PairSettings(tuple(pair_files)))


def test_a_dataset_that_draws_no_patches_is_refused(stand_in, pair_files):
    with pytest.raises(ConfigError, match="use_preloaded_cache_train: true"):
        pairs.mixed_datamodule(create_with([1, 2]), train_config(), pairs.PairSettings(tuple(pair_files)))


def test_the_hook_leaves_other_data_to_the_host(stand_in, pair_files, capsys):
    v2.register()
    create = stand_in.dispatch.create_datamodule
    assert create({"data": {"train": {}}}, mode="train", fast_dev_run=False) == "the host's own"
    assert create(train_config(), mode="test") == "the host's own"
    with pytest.raises(SystemExit) as stop:
        create(train_config(), mode="train")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: data.train.dataset_type: neurodiff_pairs needs pairs")
