"""One data set per file; every file registers itself in `dataset.sources`."""
