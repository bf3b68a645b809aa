"""The search space of tests that train a supernet: two stages, three operators, small enough for a hundred steps."""

SPACE = """
operators: [[3, 2], [5, 2], [3, 4]]
stages:
  - {channels: 8, stride: 2}
  - {channels: 8, stride: 1}
deepening: [[2, 2], [1, 2]]
resolution: 8
stem_channels: 8
stem_stride: 1
base_channels: 8
tail_channels: 16
head_channels: 16
"""
