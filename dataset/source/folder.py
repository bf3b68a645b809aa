"""A data set of the user's in one folder per class, split into folders or not. Ours."""

from dataset import DataSource, SourceRequest, sources
from dataset.class_folders import find_folders
from dataset.own_images import open_listed


@sources.register("folder")
def open_folder(request: SourceRequest) -> DataSource:
    """DIR/train/<class>/* with DIR/val/<class>/*, DIR/test/<class>/* or both; or DIR/<class>/*, or train/ alone.

    Raises:
        UserError: as `find_folders` and `open_listed`.
        RunError: an unreadable image, under --on_bad_image fail.
    """
    return open_listed(find_folders(request), request)
