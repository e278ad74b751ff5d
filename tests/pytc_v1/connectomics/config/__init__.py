import os

from yacs.config import CfgNode

from connectomics_neurodiff.config.load import nested
from connectomics_neurodiff.config.project import host_defaults


def get_cfg_defaults():
    cfg = CfgNode()
    for key, value in host_defaults().items():
        node, content = cfg, CfgNode(nested(key, value))
        for name in key.split(".")[:-1]:
            if name not in node:
                node[name] = CfgNode()
            node, content = node[name], content[name]
        node.update(content)
    return cfg


def load_cfg(args, freeze=True, add_cfg_func=None):
    cfg = get_cfg_defaults()
    if add_cfg_func is not None:
        add_cfg_func(cfg)
    for path in (args.config_base, args.config_file):
        if path is not None:
            cfg.merge_from_file(path)
    cfg.merge_from_list(args.opts)
    if args.inference:
        cfg.DATASET.OUTPUT_PATH = cfg.INFERENCE.OUTPUT_PATH
        cfg.DATASET.IMAGE_NAME = cfg.INFERENCE.IMAGE_NAME
    cfg.DATASET.IMAGE_SCALE = cfg.DATASET.LABEL_SCALE = cfg.DATASET.DATA_SCALE
    if freeze:
        cfg.freeze()
    return cfg


def save_all_cfg(cfg, output_dir):
    with open(os.path.join(output_dir, "config.yaml"), "w") as file:
        file.write(cfg.dump())
