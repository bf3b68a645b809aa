"""Flags of the data, its augmentation and its batches."""

from dataclasses import dataclass

from recipe.preprocessing import INTERPOLATIONS
from utils.options import BY_RECIPE, OF_CALL, SAME, TAKES, Options, option

SAMPLERS = ("shuffled", "balanced")
PADDING_MODES = ("zero", "reflect")
ERASE_MODES = ("const", "pixel")
RANDOM = "random"
CROP_INTERPOLATIONS = (*INTERPOLATIONS, RANDOM)
TEST_FRACTION = 0.2  # of images without a split
OF_DATA = "the data set's, or the method's recipe"


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Data and augmentation"""

    dataset: str = option(
        "cifar10", "data set", choices=None, default_text="what --data holds, else cifar10", resume=SAME
    )
    num_classes: int | None = option(
        None,
        "number of classes",
        default_text="known by the data set",
        least=2,
        resume="held against the classes of the checkpoint",
    )
    workers: int = option(
        8, "decoding processes per training process; 0 decodes in the process itself", least=0, resume=OF_CALL
    )
    batch_size: int = option(
        128,
        "images per node over all its processes, per step before accumulation",
        unit="images",
        least=1,
        resume="the share of training that is done stays",
    )
    drop_last: bool = option(
        True,
        "leave out the images of an epoch that fill no batch; 0: train on them too",
        resume="the share of training that is done stays",
    )
    eval_batch_size: int = option(
        100,
        "images per process in evaluation",
        unit="images",
        default_text="100; 1000 on a GPU where images lie in memory",
        least=1,
        resume=TAKES,
    )
    crop_size: int = option(
        32, "side of the network's input", unit="pixels", default_text=BY_RECIPE, least=1, resume=TAKES
    )
    padding: int = option(4, "padding before the random crop of small images", unit="pixels", least=0, resume=TAKES)
    padding_mode: str = option(
        "zero",
        "what that padding holds: black, or the mirrored image",
        choices=PADDING_MODES,
        default_text=BY_RECIPE,
        resume=TAKES,
    )
    crop_area: tuple[float, ...] = option(
        (0.1, 1.0),
        "random crops of image files: smallest and largest part of them",
        above=0,
        most=1,
        count=2,
        ascending=True,
        resume=TAKES,
    )
    crop_interpolation: str = option(
        "bicubic",
        "how random crops of image files are resized; random draws one of the two for every view",
        choices=CROP_INTERPOLATIONS,
        default_text=BY_RECIPE,
        resume=TAKES,
    )
    eval_interpolation: str = option(
        "bicubic", "how evaluation resizes image files", choices=INTERPOLATIONS, default_text=BY_RECIPE, resume=TAKES
    )
    crop_pct: float | None = option(
        None,
        "evaluation of image files: side of the centre crop over the short side",
        default_text="1/1.15; 0.875 for Cream's networks on imagenet",
        above=0,
        most=1,
        resume=TAKES,
    )
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation change by up to this part", least=0, most=1, resume=TAKES
    )
    mean: tuple[float, ...] = option(
        (), "mean of the red, green and blue pixels, from 0 to 1", default_text=OF_DATA, count=3, resume=TAKES
    )
    std: tuple[float, ...] = option(
        (), "their standard deviation", default_text=OF_DATA, above=0, count=3, resume=TAKES
    )
    is_cutout: bool = option(True, "random erasing (under the published name)", resume=TAKES)
    erase_p: float = option(0.5, "probability of random erasing", least=0, most=1, resume=TAKES)
    erase_mode: str = option(
        "const", "erase to the mean colour, or to noise per pixel", choices=ERASE_MODES, resume=TAKES
    )
    erase_area: tuple[float, ...] = option(
        (),
        "smallest and largest erased part of a view",
        default_text=BY_RECIPE,
        above=0,
        most=1,
        count=2,
        ascending=True,
        resume=TAKES,
    )
    erase_ratio: tuple[float, ...] = option(
        (),
        "smallest and largest height / width of it",
        default_text=BY_RECIPE,
        above=0,
        count=2,
        ascending=True,
        resume=TAKES,
    )
    is_autoaugment: bool = option(False, "the data set's AutoAugment policy", default_text=BY_RECIPE, resume=TAKES)
    randaa: str | None = option(
        None,
        "RandAugment instead, as 'rand-m9-mstd0.5', or 'trivial': TrivialAugment in its wide space",
        metavar="STRING",
        resume=TAKES,
    )
    is_mixup: bool = option(True, "mix pairs of images and their labels (mixup)", resume=TAKES)
    mix_alpha: float = option(0.2, "mixup draws its weight from Beta(alpha, alpha)", above=0, resume=TAKES)
    cutmix_alpha: float = option(0.0, "CutMix draws its weight from Beta(alpha, alpha); 0: off", least=0, resume=TAKES)
    mix_switch_prob: float = option(
        0.5,
        "where mixup and CutMix are both on, a step is CutMix with this probability",
        least=0,
        most=1,
        resume=TAKES,
    )
    repeats: int = option(
        1,
        "repeated augmentation: every image comes so many times in a row, and an epoch takes as many fewer of them",
        least=1,
        resume=TAKES,
    )
    is_label_smoothing: bool = option(False, "label smoothing of 0.1", default_text=BY_RECIPE, resume=TAKES)
    is_diff_data_train: bool = option(
        True, "every network sees its own view; 0: all see the same one (ablation)", resume=TAKES
    )
    val_fraction: float = option(
        0.0,
        "class-balanced part of the training set held out to choose the best epoch",
        least=0,
        below=1,
        resume="refused where other images would be held out",
    )
    class_map: str | None = option(
        None,
        "names for classes that are numbers or codes: a FILE of a code and its name a line",
        metavar="FILE",
        resume="held against the classes of the checkpoint",
    )
    sampler: str = option(
        "shuffled",
        "which images an epoch takes: each once, or draws with replacement in which every class is equally likely",
        choices=SAMPLERS,
        resume=TAKES,
    )
    image_column: str | None = option(
        None, "of a table, the column of the images", default_text="guessed by its name", resume=OF_CALL
    )
    label_column: str | None = option(
        None, "of a table, the column of the labels", default_text="guessed by its name", resume=OF_CALL
    )
    split_column: str | None = option(
        None, "of a table, the column of the splits, if it has one", default_text="guessed by its name", resume=OF_CALL
    )
    test_fraction: float = option(
        TEST_FRACTION,
        "images of a user's own without a split: part of every class that is tested on, by a hash of the names",
        above=0,
        below=1,
        resume="refused where other images would be held out",
    )
    on_bad_image: str = option(
        "fail", "what to do with an image that cannot be read", choices=("fail", "skip"), resume=TAKES
    )
