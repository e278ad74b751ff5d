import json

import h5py

from . import VolumeDataset


def _read(path):
    """The volume that stands beside the JSON file of its tiles here."""
    with open(path) as file:
        assert json.load(file)["depth"]
    with h5py.File(path.replace(".json", ".h5")) as file:
        return file["main"][()]


class TileDataset:
    """Chunks of one volume along y, made one after the other."""

    def __init__(self, chunk_num, chunk_iter, volume_json, label_json, mode, **kwargs):
        self.chunk_num, self.mode, self.chunk_iter, self.kwargs = chunk_num, mode, chunk_iter, kwargs
        self.arrays, self.next_chunk = (_read(volume_json[0]), _read(label_json[0])), 0

    def updatechunk(self, do_load=True):
        self.chunk = self.next_chunk % self.chunk_num[1]
        self.next_chunk += 1
        if do_load:
            self.loadchunk()

    def loadchunk(self):
        size = self.arrays[0].shape[1] // self.chunk_num[1]
        rows = slice(self.chunk * size, (self.chunk + 1) * size)
        volume, label = ([array[:, rows]] for array in self.arrays)
        self.dataset = VolumeDataset(
            volume,
            label if self.mode == "train" else None,
            None,
            mode=self.mode,
            do_relabel=True,
            iter_num=self.chunk_iter if self.mode == "train" else -1,
            **self.kwargs,
        )
