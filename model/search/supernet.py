"""The weight-sharing network of a Cream search: every searchable block holds one module per operator.

Source: Peng et al., "Cream of the Crop", NeurIPS 2020. State-dict keys are the published `blocks.S.B.CHOICE.*` and
`meta_layer`, plus `path` (ours): the path that is evaluated. No dead block is built where the published code has one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.search.blocks import ConvBnSwish, CreamFrame, DepthwiseSeparable, InvertedResidual, init_cream
from model.search.space import SKIP, Arch, SearchSpace
from utils.errors import UserError


class Supernet(CreamFrame):
    """All paths of a search space with shared weights: (images [B, 3, H, W], path) -> logits [B, K].

    Args:
        space: operators, channels and strides.
        depths: how many blocks each searchable stage has.
        num_classes: K.
        slice_size: images per entry of the board; `meta_layer` scores K * slice_size numbers.
        dropout: rate before the classifier.
        global_pool: avg, max or avgmax.
        interval: the operations, in millions, that the search's result should have; kept for the search.
    """

    path: Tensor  # of self.blocks, [stage][block][operator]

    def __init__(
        self,
        space: SearchSpace,
        depths: Sequence[int],
        num_classes: int,
        *,
        slice_size: int = 4,
        dropout: float = 0.0,
        global_pool: str = "avg",
        interval: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        frame = space.frame
        stages: list[list[list[nn.Module]]] = [[[DepthwiseSeparable(frame.stem_channels, frame.base_channels)]]]
        for number, depth in enumerate(depths):
            stages.append(
                [
                    [InvertedResidual(space.block(number, position, operator)) for operator in space.operators]
                    for position in range(depth)
                ]
            )
        stages.append([[ConvBnSwish(frame.in_channels, frame.tail_channels)]])
        blocks = nn.ModuleList(nn.ModuleList(nn.ModuleList(choices) for choices in blocks) for blocks in stages)
        super().__init__(frame, num_classes, blocks=blocks, dropout=dropout, global_pool=global_pool)
        self.space = space
        self.depths = tuple(depths)
        self.slice_size = slice_size
        self.interval = interval
        self.meta_layer = nn.Linear(num_classes * slice_size, 1)
        self.register_buffer("path", torch.zeros(sum(depths) + 2, dtype=torch.int64))
        # beside the buffer, so that a forward pass neither waits for the device nor needs real tensors
        self._default_path = [[0] * len(blocks) for blocks in stages]
        self.register_load_state_dict_post_hook(_read_path)
        init_cream(self)

    @property
    def default_path(self) -> list[list[int]]:
        """The path taken where none is given; it travels with the state dict."""
        return self._default_path

    @default_path.setter
    def default_path(self, path: Arch) -> None:
        self.check_path(path)
        self._default_path = [list(stage) for stage in path]
        self.path.copy_(torch.tensor([index for stage in path for index in stage]), non_blocking=True)

    def check_path(self, path: Arch) -> None:
        """Refuse a path that this supernet does not hold.

        Raises:
            UserError: as `SearchSpace.check_arch`, or other depths.
        """
        self.space.check_arch(path, skips=True)
        depths = tuple(len(stage) for stage in path[1:-1])
        if depths != self.depths:
            raise UserError(f"a path of depths {depths} does not fit a supernet of depths {self.depths}.")

    def modules_of(self, path: Arch) -> list[list[nn.Module]]:
        """The blocks that a path uses, per stage."""
        self.check_path(path)
        return [
            [choices[index] for choices, index in zip(blocks, stage, strict=True) if index != SKIP]
            for blocks, stage in zip(self.blocks, path, strict=True)
        ]

    def unused_parameter_names(self) -> set[str]:
        """Parameters that the default path's logits do not depend on."""
        used = {id(parameter) for parameter in self.active_parameters(self.default_path)}
        return {name for name, parameter in self.named_parameters() if id(parameter) not in used}

    def active_parameters(self, path: Arch) -> list[nn.Parameter]:
        """Every parameter that the path's logits depend on, in a fixed order."""
        used = [self.conv_stem, self.bn1, self.conv_head, self.classifier]
        used += [block for stage in self.modules_of(path) for block in stage]
        return [parameter for module in used for parameter in module.parameters()]

    @property
    def stages(self) -> list[nn.Module]:
        """The stages of the default path."""
        return [nn.Sequential(*blocks) for blocks in self.modules_of(self.default_path)]

    def forward(self, images_BCHW: Tensor, path: Arch | None = None) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K] of `path`, by default of `default_path`.

        Raises:
            UserError: as `check_path`.
        """
        features = self.stem(images_BCHW)
        for blocks in self.modules_of(self.default_path if path is None else path):
            for block in blocks:
                features = block(features)
        return self.classify(self.tail(features))


def _read_path(supernet: Supernet, incompatible: object) -> None:
    """After a state dict was loaded: the path that it brought."""
    indices = iter(supernet.path.tolist())
    supernet._default_path = [[next(indices) for _ in stage] for stage in supernet._default_path]
