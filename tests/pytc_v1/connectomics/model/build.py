import torch

MODEL_MAP = {"unet_3d": lambda **kwargs: torch.nn.Conv3d(kwargs["in_channel"], kwargs["out_channel"], 1)}


def update_state_dict(cfg, model_dict, mode="train"):
    return model_dict


def build_model(cfg, device, rank=None):
    assert cfg.MODEL.ARCHITECTURE in MODEL_MAP
    network = MODEL_MAP[cfg.MODEL.ARCHITECTURE](
        block_type=cfg.MODEL.BLOCK_TYPE,
        in_channel=cfg.MODEL.IN_PLANES,
        out_channel=cfg.MODEL.OUT_PLANES,
        filters=cfg.MODEL.FILTERS,
        ks=cfg.MODEL.KERNEL_SIZES,
        blocks=cfg.MODEL.BLOCKS,
        attn=cfg.MODEL.ATTENTION,
        is_isotropic=cfg.DATASET.IS_ISOTROPIC,
        isotropy=cfg.MODEL.ISOTROPY,
        pad_mode=cfg.MODEL.PAD_MODE,
        act_mode=cfg.MODEL.ACT_MODE,
        norm_mode=cfg.MODEL.NORM_MODE,
        pooling=cfg.MODEL.POOLING_LAYER,
        return_feats=cfg.MODEL.RETURN_FEATS,
    )
    return torch.nn.DataParallel(network).to(device) if cfg.SYSTEM.PARALLEL == "DP" else network.to(device)
