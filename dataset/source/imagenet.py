"""ImageNet (ILSVRC 2012), or any part of it: DIR/train/<class>/* and DIR/val/<class>/*; DIR/test/<class>/* if there."""

from dataset import DataSource, SourceRequest, names_hash, sources
from dataset.class_folders import find_folders


@sources.register("imagenet")
def open_imagenet(request: SourceRequest) -> DataSource:
    """Images as files, classes in the sorted order of their folders' names.

    Raises:
        UserError: --data, a needed split or its class folders missing, an empty class folder, splits that differ.
    """
    folders = find_folders(request)
    files = folders.files()
    names = names_hash(files["train"].paths) if "train" in files else ""
    return DataSource.of_row("imagenet", folders.classes, folders.roles(files), reported=folders.reported, names=names)
