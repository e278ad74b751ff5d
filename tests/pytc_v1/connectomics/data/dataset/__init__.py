from .dataset_volume import VolumeDataset  # noqa: I001  # the others import it from here
from .build import build_dataloader, get_dataset
from .dataset_tile import TileDataset

__all__ = ["TileDataset", "VolumeDataset", "build_dataloader", "get_dataset"]
