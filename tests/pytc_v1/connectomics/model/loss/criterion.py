from typing import ClassVar

import torch


class Criterion:
    loss_dict: ClassVar = {
        "WeightedBCE": torch.nn.BCELoss,
        "WeightedBCEWithLogitsLoss": torch.nn.BCEWithLogitsLoss,
        "DiceLoss": torch.nn.MSELoss,
    }

    @classmethod
    def build_from_cfg(cls, cfg, device):
        criterion = cls()
        criterion.losses = [cls.loss_dict[name]() for name in cfg.MODEL.LOSS_OPTION[0]]
        return criterion

    def __call__(self, pred, target, weight):
        return sum(loss(pred, target[0]) for loss in self.losses), {}
