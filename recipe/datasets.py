"""One row for each data set that has a recipe of its own: all that is known of it before its files are opened.

A data set of the user's own, of any size and number of classes, borrows the row that `open_row` names.
"Published" means the training runs of arXiv:2011.14660; "ours" are choices of this project for what those leave open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Statistic = tuple[float, float, float]

SMALL_SIDE = 64  # pixels: images up to here are small ones, as CIFAR's; larger ones are treated as ImageNet's


@dataclass(frozen=True, kw_only=True)
class ViewRow:
    """The published augmentation.

    Attributes:
        flip: mirror half of the views.
        policy: AutoAugment's policy for the data, or "none".
        erase_area: smallest and largest erased part of a view; all 0: nothing is erased.
        erase_ratio: smallest and largest height / width of what is erased.
        random_resized_crop: views are random resized crops, not crops of padded images.
    """

    flip: bool = True
    policy: str = "none"
    erase_area: tuple[float, float] = (0.0, 0.0)
    erase_ratio: tuple[float, float] = (1.0, 1.0)
    random_resized_crop: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """What is known of a data set.

    Attributes:
        num_classes: K.
        side: of the networks' input in pixels.
        is_large: networks take their ImageNet form, and images are read from files.
        statistics: mean and standard deviation per channel, on the scale [0, 1]; None: measured as the data is opened.
        views: the augmentation.
        training: the other flags of the published runs, by name.
        warm_up: usual lengths of the runs -> epochs of the learning rate's warm-up; see `in_proportion`.
        cot_warm_up: the same for the weight of the co-training loss.
        milestones: length of the usual run, and the epochs at which --lr_mode step multiplies in it. Other lengths
            take them in proportion. (Published for 1800 epochs: 100 and 150, a default that nobody scaled.)
        departures: the published departures of single architectures that it takes part in: "cifar", "imagenet" or "".
    """

    num_classes: int
    side: int = 32
    is_large: bool = False
    statistics: tuple[Statistic, Statistic] | None = None
    views: ViewRow
    training: Mapping[str, Any]
    warm_up: Mapping[int, int]
    cot_warm_up: Mapping[int, int]
    milestones: tuple[int, tuple[int, ...]] = (300, (100, 225))
    departures: str = ""

    @property
    def published_statistics(self) -> tuple[Statistic, Statistic]:
        """`statistics` of a row that has them.

        Raises:
            ValueError: they are measured.
        """
        if self.statistics is None:
            raise ValueError("this row has no published mean and deviation: they are measured")
        return self.statistics


# Published, but for the padding that is the data's own.
_SMALL: Mapping[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "padding": 4,
    "optimizer": "SGD",
    "lr": 0.1,
    "momentum": 0.9,
    "lr_mode": "cos",
    "slow_start_lr": 5e-3,
    "end_lr": 1e-4,
    "weight_decay": 1e-4,
    "is_autoaugment": True,
    "randaa": None,
    "is_cutout": True,
    "erase_p": 0.5,
    "is_mixup": True,
    "is_label_smoothing": False,
}
_SMALL_WARM_UP, _SMALL_COT_WARM_UP = {300: 20, 1800: 60}, {300: 40, 1800: 80}

ROWS: Mapping[str, DatasetRow] = MappingProxyType(
    {
        "cifar10": DatasetRow(
            num_classes=10,
            statistics=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            views=ViewRow(policy="cifar10", erase_area=(0.125, 0.2), erase_ratio=(0.99, 1.0)),
            training=_SMALL,
            warm_up=_SMALL_WARM_UP,
            cot_warm_up=_SMALL_COT_WARM_UP,
            departures="cifar",
        ),
        "cifar100": DatasetRow(
            num_classes=100,
            statistics=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            views=ViewRow(policy="cifar10", erase_area=(0.0625, 0.1), erase_ratio=(0.99, 1.0)),
            training=_SMALL,
            warm_up=_SMALL_WARM_UP,
            cot_warm_up=_SMALL_COT_WARM_UP,
            departures="cifar",
        ),
        "svhn": DatasetRow(
            num_classes=10,
            statistics=((0.4309, 0.4302, 0.4463), (0.1965, 0.1983, 0.1994)),
            views=ViewRow(policy="svhn", erase_area=(0.125, 0.25), erase_ratio=(0.9, 1.1)),
            training={**_SMALL, "epochs": 200, "lr": 5e-3, "end_lr": 1e-5, "weight_decay": 1e-3},
            warm_up={200: 0},
            cot_warm_up={300: 40, 200: 40, 1800: 80},
            milestones=(200, (80, 120)),
        ),
        "imagenet": DatasetRow(
            num_classes=1000,
            side=224,
            is_large=True,
            statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            views=ViewRow(policy="imagenet", erase_area=(0.05, 0.12), erase_ratio=(0.5, 1.5), random_resized_crop=True),
            training={**_SMALL, "epochs": 120, "batch_size": 256, "end_lr": 1e-5, "is_label_smoothing": True},
            warm_up={120: 5},
            cot_warm_up={120: 60},
            milestones=(120, (30, 60, 90)),
            departures="imagenet",
        ),
        # Ours: real images that every machine has; no augmentation beyond the crop.
        "digits": DatasetRow(
            num_classes=10,
            side=16,
            views=ViewRow(flip=False),
            training={
                **_SMALL,
                "epochs": 30,
                "batch_size": 64,
                "padding": 2,
                "weight_decay": 5e-4,
                "is_autoaugment": False,
                "is_cutout": False,
                "is_mixup": False,
            },
            warm_up={300: 20},
            cot_warm_up={300: 40},
        ),
    }
)


OPEN_ROWS = ("cifar10", "imagenet")  # that images of a user's own borrow: small, large


def open_row(side: int) -> str:
    """Name of the row that images of a user's own borrow, by their side in pixels."""
    return OPEN_ROWS[side > SMALL_SIDE]


def row_for(dataset: str, side: int) -> str:
    """Name of the row that a data set takes: its own, or the borrowed one of an open data set."""
    return dataset if dataset in ROWS else open_row(side)


def in_proportion(usual: Mapping[int, int], epochs: int) -> int:
    """A number of epochs in a run of `epochs`: as published for that length, else in proportion to the first length."""
    if epochs in usual:
        return usual[epochs]
    length, number = next(iter(usual.items()))
    return round(number * epochs / length)
