import time

import torch

from ..data.augmentation import TestAugmentor, build_train_augmentor
from ..data.dataset import build_dataloader, get_dataset
from ..model.build import build_model, update_state_dict
from ..model.loss.criterion import Criterion


def build_optimizer(cfg, model):
    return torch.optim.SGD(model.parameters(), lr=cfg.SOLVER.BASE_LR)


def build_lr_scheduler(cfg, optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


class _Monitor:
    def update(self, iter_total, loss, losses_vis, lr=0.1):
        return False

    def visualize(self, volume, label, output, weight, iter_total, suffix=None, additional_image_groups=None):
        pass


class Trainer:
    def __init__(self, cfg, device, mode="train", rank=None, checkpoint=None):
        self.cfg, self.device, self.mode, self.rank = cfg, device, mode, rank
        self.output_dir, self.is_main_process = cfg.DATASET.OUTPUT_PATH, rank is None or rank == 0
        self.model = build_model(self.cfg, self.device, rank)
        if mode == "train":
            self.optimizer = build_optimizer(self.cfg, self.model)
            self.lr_scheduler = build_lr_scheduler(self.cfg, self.optimizer)
            self.start_iter = cfg.MODEL.PRE_MODEL_ITER
            self.update_checkpoint(checkpoint)
            self.augmentor = build_train_augmentor(self.cfg)
            self.criterion = Criterion.build_from_cfg(self.cfg, self.device)
            self.monitor = _Monitor()
            self.total_iter_nums = cfg.SOLVER.ITERATION_TOTAL - self.start_iter
            self.total_time = 0
        else:
            self.update_checkpoint(checkpoint)
            self.augmentor = TestAugmentor.build_from_cfg(cfg, activation=True)
        self.dataloader = None
        if not cfg.DATASET.DO_CHUNK_TITLE:
            self.dataloader = iter(build_dataloader(self.cfg, self.augmentor, self.mode, rank=rank))

    def train(self):
        self.model.train()
        for i in range(self.total_iter_nums):
            self.start_time = time.perf_counter()
            self.optimizer.zero_grad()
            sample = next(self.dataloader)
            self.data_time = time.perf_counter() - self.start_time
            volume = sample.out_input.to(self.device)
            pred = self.model(volume)
            loss, losses_vis = self.criterion(pred, sample.out_target_l, sample.out_weight_l)
            self._train_misc(
                loss, pred, volume, sample.out_target_l, sample.out_weight_l, self.start_iter + i, losses_vis
            )

    def _train_misc(self, loss, pred, volume, target, weight, iter_total, losses_vis):
        self.backward_pass(loss)
        if self.monitor.update(iter_total, loss, losses_vis, self.optimizer.param_groups[0]["lr"]):
            self.monitor.visualize(volume, target, pred, weight, iter_total)
        if (iter_total + 1) % self.cfg.SOLVER.ITERATION_SAVE == 0:
            self.save_checkpoint(iter_total)
        self.lr_scheduler.step()

    def backward_pass(self, loss):
        loss.backward()
        self.optimizer.step()

    def save_checkpoint(self, iteration, is_best=False):
        raise NotImplementedError("The plugin's Trainer writes checkpoints itself.")

    def update_checkpoint(self, checkpoint=None):
        if checkpoint is None:
            return
        content = torch.load(checkpoint, map_location=self.device)
        self.model.module.load_state_dict(update_state_dict(self.cfg, content["state_dict"], mode=self.mode))
        if self.mode == "train":
            self.optimizer.load_state_dict(content["optimizer"])
            self.lr_scheduler.load_state_dict(content["lr_scheduler"])
            self.start_iter = content["iteration"]

    def run_chunk(self, mode):
        self.dataset = get_dataset(self.cfg, self.augmentor, mode)
        chunks = self.total_iter_nums // self.cfg.DATASET.DATA_CHUNK_ITER
        self.total_iter_nums = self.cfg.DATASET.DATA_CHUNK_ITER
        for _ in range(chunks):
            self.dataset.updatechunk()
            loader = build_dataloader(self.cfg, self.augmentor, mode, dataset=self.dataset.dataset)
            self.dataloader = iter(loader)
            self.train()
            self.start_iter += self.cfg.DATASET.DATA_CHUNK_ITER
