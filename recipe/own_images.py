"""The small default: what trains images of a user's own where no --arch says more. Ours.

A run that ends in minutes to an hour on one small GPU, from scratch, on some thousand images; from there, --arch,
--pretrained, --epochs and --method go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

KINDS = ("folder", "csv", "parquet", "webdataset")  # data sets of images of a user's own, by their names
TABLES = ("csv", "parquet")  # those of them that have columns


@dataclass(frozen=True, kw_only=True)
class SmallDefault:
    """One row.

    Attributes:
        name: of the row, shown as the origin of its values.
        training: flags by name, `arch`, `epochs`, `batch_size` and `lr` among them; the rate is for that batch.
    """

    name: str
    training: Mapping[str, Any]


# Small batches for many updates: on 750 images of 32 pixels (10 of ImageNet's classes, resnet20, seed 1, 500 others to
# test on) 54.6 %, and 41.2 % in 30 epochs of batches of 64. Crops and flips only: mixup, policies and erasing want
# longer runs.
_SHORT: Mapping[str, Any] = {
    "epochs": 60,
    "batch_size": 32,
    "is_autoaugment": False,
    "is_cutout": False,
    "is_mixup": False,
    "weight_decay": 5e-4,
}

# by the row of `recipe.datasets.OPEN_ROWS` that the images borrow
SMALL_DEFAULTS: Mapping[str, SmallDefault] = MappingProxyType(
    {
        "cifar10": SmallDefault(name="own images up to 64 pixels", training={**_SHORT, "arch": "resnet20", "lr": 0.05}),
        "imagenet": SmallDefault(
            name="own images above 64 pixels", training={**_SHORT, "arch": "torchvision/resnet18", "lr": 0.02}
        ),
    }
)
