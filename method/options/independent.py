"""Independent learning has no flags of its own."""

from method.options import NoOptions, method_options

method_options.add("independent", NoOptions)
