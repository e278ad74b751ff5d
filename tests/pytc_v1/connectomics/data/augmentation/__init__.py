import numpy as np


class _SplitActivation:
    def __init__(self, channels):
        self.split_channels = channels

    def __call__(self, tensor):
        return tensor.sigmoid()


class TestAugmentor:
    __test__ = False

    def __init__(self, mode="mean", do_2d=False, num_aug=None, scale_factors=(1.0, 1.0, 1.0), inference_act=None):
        self.mode, self.do_2d, self.num_aug = mode, do_2d, num_aug
        self.scale_factors, self.inference_act = scale_factors, inference_act

    @classmethod
    def build_from_cfg(cls, cfg, activation=True):
        channels = [3 if name == "2" else 1 for name in cfg.MODEL.TARGET_OPT]
        return cls(
            cfg.INFERENCE.AUG_MODE, cfg.DATASET.DO_2D, cfg.INFERENCE.AUG_NUM, inference_act=_SplitActivation(channels)
        )

    def __call__(self, model, data):
        return self._tta_3d(model, data)

    def _tta_3d(self, model, data):
        return np.asarray(self.inference_act(model(data)).detach())


def build_train_augmentor(cfg):
    return None
