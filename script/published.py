"""Sizes as the papers print them. Typed here once; `script/summarise_zoo.py` sets them beside the computed ones."""

from typing import NamedTuple


class Size(NamedTuple):
    """A published row; figures as strings, because their digits say how far they are rounded.

    Attributes:
        arch, dataset, split_factor, crop: which networks, and the side of the image in pixels.
        params: of all S networks in millions, "" where none is printed.
        macs: of all S networks in G, "FLOPs" in the papers' tables.
        note: why a figure is not ours rounded, where more than the counter explains it.
    """

    arch: str
    dataset: str
    split_factor: int
    crop: int
    params: str
    macs: str
    note: str = ""


_BUFFERS = "the published count includes the running statistics of batch norm"
_SHAKE = "the published count leaves out the shortcuts that never run; checkpoints hold them"

# Zhao et al., arXiv:2011.14660; the last six: Peng et al., "Cream of the Crop", by the names of its networks
PUBLISHED = (
    Size("resnet50", "imagenet", 1, 224, "25.7", "5.5"),
    Size("resnet101", "imagenet", 1, 224, "44.8", "9.2", _BUFFERS),
    Size("wide_resnet50_2", "imagenet", 1, 224, "68.9", "12.8", "the published count is that of a 7x7 stem"),
    Size("wide_resnet50_2", "imagenet", 2, 224, "51.4", "10.9"),
    Size("wide_resnet50_3", "imagenet", 1, 224, "135.0", "23.8"),
    Size("wide_resnet50_3", "imagenet", 2, 224, "138.0", "25.6"),
    Size("resnext101_64x4d", "imagenet", 1, 224, "83.6", "16.9"),
    Size("resnext101_64x4d", "imagenet", 2, 224, "88.6", "18.8"),
    Size("se_resnet50", "imagenet", 1, 224, "28.2", "4.9"),
    Size("se_resnext101_64x4d", "imagenet", 2, 416, "98.0", "61.1"),
    Size("se_resnext101_64x4d_B", "imagenet", 2, 320, "98.0", "38.2", "the published count is that of the other stem"),
    Size("resnexst50_4x16d", "imagenet", 1, 224, "17.8", "4.3", _BUFFERS),
    Size("resnexst50_8x16d", "imagenet", 1, 224, "30.5", "6.8", _BUFFERS),
    Size("wide_resnet28_10", "cifar10", 1, 32, "36.5", "5.25"),
    Size("wide_resnet28_10", "cifar10", 2, 32, "35.8", "5.16"),
    Size("wide_resnet28_10", "cifar10", 4, 32, "36.5", "5.28"),
    Size("wide_resnet28_10", "cifar100", 1, 32, "36.5", "5.25"),
    Size("wide_resnet28_10", "cifar100", 2, 32, "35.8", "5.16"),
    Size("wide_resnet28_10", "cifar100", 4, 32, "36.7", "5.28"),
    Size("shake_resnet26_2x96d", "cifar10", 1, 32, "26.2", "3.78", _SHAKE),
    Size("shake_resnet26_2x96d", "cifar10", 2, 32, "23.3", "3.38", _SHAKE),
    Size("shake_resnet26_2x96d", "cifar10", 4, 32, "26.3", "3.81", _SHAKE),
    Size("densenet190", "cifar100", 1, 32, "25.8", "9.39"),
    Size("densenet190", "cifar100", 2, 32, "25.5", "9.24"),
    Size("pyramidnet272", "cifar10", 1, 32, "26.2", "4.55"),
    Size("pyramidnet272", "cifar10", 4, 32, "32.6", "6.33"),
    Size("pyramidnet272", "cifar100", 1, 32, "26.8", "4.55", "26.8 looks like a slip for 26.3"),
    Size("pyramidnet272", "cifar100", 2, 32, "28.9", "5.24"),
    Size("pyramidnet272", "cifar100", 4, 32, "32.8", "6.33"),
    Size("cream_14", "imagenet", 1, 64, "", "0.014"),
    Size("cream_43", "imagenet", 1, 96, "", "0.043"),
    Size("cream_114", "imagenet", 1, 160, "", "0.114"),
    Size("cream_287", "imagenet", 1, 224, "", "0.287"),
    Size("cream_481", "imagenet", 1, 224, "", "0.481"),
    Size("cream_604", "imagenet", 1, 224, "", "0.604"),
)
