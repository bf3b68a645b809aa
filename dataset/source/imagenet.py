"""ImageNet (ILSVRC 2012), or any part of it: DIR/train/<class>/* and DIR/val/<class>/*; DIR/test/<class>/* if there."""

import dataclasses

from dataset import DataSource, SourceRequest, sources
from dataset.class_folders import find_folders


@sources.register("imagenet")
def open_imagenet(request: SourceRequest) -> DataSource:
    """Images as files, classes in the sorted order of their folders' names.

    Raises:
        UserError: --data, a needed split or its class folders missing, an empty class folder, splits that differ.
    """
    listed = find_folders(dataclasses.replace(request, test_fraction=None))  # its split is the published one
    roles = listed.roles(listed.splits)
    return DataSource.of_row(
        "imagenet",
        listed.classes,
        roles,
        reported=listed.reported,
        names=listed.names,
        held_out_sha256=listed.held_out_sha256,
        reported_sha256=listed.digest(listed.reported),
    )
