"""Blocks that two or more families share; a block of one family stays in its file."""
