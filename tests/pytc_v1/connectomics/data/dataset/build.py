import os

import h5py
import numpy as np
from torch.utils.data import DataLoader

from .dataset_tile import TileDataset
from .dataset_volume import VolumeDataset, _Batch


def _rescale(data, scales, order):
    assert list(scales) == [1.0, 1.0, 1.0]
    return data


def _pad(data, pad_size, pad_mode):
    assert not any(pad_size)
    return data


def _read(cfg, name):
    with h5py.File(os.path.join(cfg.DATASET.INPUT_PATH, name)) as file:
        return np.array(file["main"])


def get_dataset(
    cfg,
    augmentor,
    mode="train",
    rank=None,
    dataset_class=VolumeDataset,
    dataset_options={},  # noqa: B006  # PyTC's
    dir_name_init=None,
    img_name_init=None,
    preload_data=None,
):
    size = augmentor.sample_size if augmentor is not None else cfg.MODEL.INPUT_SIZE
    shared = {
        "sample_volume_size": size,
        "sample_label_size": size,
        "augmentor": augmentor,
        "data_mean": cfg.DATASET.MEAN,
        "data_std": cfg.DATASET.STD,
    }
    if cfg.DATASET.DO_CHUNK_TITLE == 1:
        files = [[os.path.join(cfg.DATASET.INPUT_PATH, cfg.DATASET[key])] for key in ("IMAGE_NAME", "LABEL_NAME")]
        return TileDataset(
            chunk_num=cfg.DATASET.DATA_CHUNK_NUM,
            chunk_iter=cfg.DATASET.DATA_CHUNK_ITER,
            volume_json=files[0],
            label_json=files[1],
            mode=mode,
            **shared,
        )
    image, label = _read(cfg, cfg.DATASET.IMAGE_NAME), _read(cfg, cfg.DATASET.LABEL_NAME)
    count = cfg.SOLVER.ITERATION_TOTAL * cfg.SOLVER.SAMPLES_PER_BATCH
    return dataset_class(
        volume=[image], label=[label], valid_mask=None, iter_num=count, mode=mode, **shared, **dataset_options
    )


def build_dataloader(
    cfg,
    augmentor=None,
    mode="train",
    dataset=None,
    rank=None,
    dataset_class=VolumeDataset,
    dataset_options={},  # noqa: B006  # PyTC's
    cf=_Batch,
):
    if dataset is None:
        dataset = get_dataset(cfg, augmentor, mode, rank, dataset_class, dataset_options)
    return DataLoader(
        dataset,
        batch_size=cfg.SOLVER.SAMPLES_PER_BATCH,
        shuffle=False,
        collate_fn=cf,
        num_workers=cfg.SYSTEM.NUM_CPUS,
    )
