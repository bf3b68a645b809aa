"""One family of networks per file; every file registers its architectures in `model.registry.backbones`."""
