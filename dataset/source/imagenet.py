"""ImageNet (ILSVRC 2012), or any part of it: DIR/train/<class>/* and DIR/val/<class>/*."""

from dataset import DataSource, SourceRequest, names_hash, sources
from dataset.class_folders import find_folders, list_images


@sources.register("imagenet")
def open_imagenet(request: SourceRequest) -> DataSource:
    """Images as files, classes in the sorted order of their folders' names.

    Raises:
        UserError: --data, a needed split or its class folders missing, an empty class folder, splits that differ.
    """
    folders, classes = find_folders(request, evaluation=("val",))
    splits = {split: list_images(folders[split], classes) for split in request.splits}
    names = names_hash(splits["train"].paths) if "train" in splits else ""
    return DataSource.of_row("imagenet", classes, splits, names=names)
