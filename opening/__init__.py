"""From a configuration to what a training works with: its place, its data, its networks; and what is said of it."""
