"""The ground that every room stands on: errors, registry, options, seed, processes, precision. It imports no room."""
