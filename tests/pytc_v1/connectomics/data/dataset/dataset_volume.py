import random

import numpy as np
import torch
from torch.utils.data import Dataset

from connectomics_neurodiff.affinities import affinities_from_labels


class VolumeDataset(Dataset):
    def __init__(
        self,
        volume,
        label=None,
        valid_mask=None,
        valid_ratio=0.5,
        sample_volume_size=(8, 64, 64),
        sample_label_size=(8, 64, 64),
        sample_stride=(1, 1, 1),
        augmentor=None,
        target_opt=("1",),
        weight_opt=(("1",),),
        erosion_rates=None,
        dilation_rates=None,
        mode="train",
        do_2d=False,
        iter_num=-1,
        do_relabel=True,
        reject_size_thres=0,
        reject_num_trial=50,
        reject_diversity=0,
        reject_p=0.95,
        data_mean=0.5,
        data_std=0.5,
        data_match_act="none",
    ):
        fits = [(np.array(sample_label_size) <= v.shape).all() for v in volume]
        self.volume = [v for v, keep in zip(volume, fits, strict=True) if keep]
        self.label = None if label is None else [v for v, keep in zip(label, fits, strict=True) if keep]
        self.do_relabel = do_relabel
        self.mode, self.augmentor, self.sample_volume_size = mode, augmentor, np.array(sample_volume_size)
        self.volume_size = [np.array(v.shape) for v in self.volume]
        self.sample_num = np.array([np.prod(size - self.sample_volume_size + 1) for size in self.volume_size])
        self.iter_num = max(iter_num, int(self.sample_num.sum()))
        self.data_mean, self.data_std = data_mean, data_std

    def __len__(self):
        return self.iter_num

    def _get_pos_train(self, vol_size):
        chosen = random.randint(0, len(self.volume) - 1)
        return [chosen, *(random.randint(0, n) for n in self.volume_size[chosen] - np.array(vol_size))]

    def __getitem__(self, index):
        place = self._get_pos_train(self.sample_volume_size)
        box = tuple(slice(p, p + n) for p, n in zip(place[1:], self.sample_volume_size, strict=True))
        image, label = self.volume[place[0]][box] / np.float32(255), self.label[place[0]][box]
        if self.augmentor is not None:
            augmented = self.augmentor({"image": image, "label": label, "valid_mask": None})
            image, label = augmented["image"], augmented["label"]
        target = affinities_from_labels(np.asarray(label, np.uint32)).astype(np.float32)
        image = (np.asarray(image, np.float32)[None] - self.data_mean) / self.data_std
        return place, image, [target], [[np.ones_like(target)]]


class _Batch:
    """What PyTC's collate functions make of samples."""

    def __init__(self, samples):
        self.pos = [sample[0] for sample in samples]
        self.out_input = torch.stack([torch.from_numpy(sample[1]) for sample in samples])
        self.out_target_l = [torch.stack([torch.from_numpy(sample[2][0]) for sample in samples])]
        self.out_weight_l = [[torch.stack([torch.from_numpy(sample[3][0][0]) for sample in samples])]]
