"""ImageNet (ILSVRC 2012), or any part of it: DIR/train/<class>/* and DIR/val/<class>/*."""

from dataset import DataSource, ImageSet, SourceRequest, sources
from dataset.class_folders import find_folders, list_images

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROP_SIZE = 224


@sources.register("imagenet")
def open_imagenet(request: SourceRequest) -> DataSource:
    """Images as files, classes in the sorted order of their folders' names.

    Raises:
        UserError: --data, a needed split or its class folders missing, an empty class folder, splits that differ.
    """
    folders, classes = find_folders(request, evaluation=("val",))
    splits = {split: list_images(folders[split], classes) for split in request.splits}
    return DataSource(
        name="imagenet",
        recipe="imagenet",
        classes=classes,
        mean=MEAN,
        std=STD,
        crop_size=CROP_SIZE,
        train=splits.get("train", ImageSet.empty()),
        test=splits.get("test", ImageSet.empty()),
    )
