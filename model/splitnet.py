"""SplitNet: S networks side by side, one view each, logits out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SplitNet(nn.Module):
    """S networks that share a task but no weights (Zhao et al., arXiv:2011.14660, section 3).

    State-dict keys are `models.<i>.<name>`, as in the published checkpoints without their `module.` prefix.

    Args:
        networks: S modules, each mapping [B, C, H, W] to logits [B, K]; usually of one structure.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("SplitNet needs at least one network.")
        self.models = nn.ModuleList(networks)

    @property
    def split_factor(self) -> int:
        """S, the number of networks held."""
        return len(self.models)

    def forward(self, views_SBCHW: Tensor) -> Tensor:
        """Views [S, B, C, H, W], or one view for all [1, B, C, H, W] or [B, C, H, W] -> logits [S, B, K].

        Raises:
            ValueError: the number of views is neither 1 nor S.
        """
        views = self.expand_views(views_SBCHW)
        return torch.stack([network(view) for network, view in zip(self.models, views, strict=True)])

    def expand_views(self, views_SBCHW: Tensor) -> Tensor:
        """Give every network its view: [B, C, H, W] or [1, B, C, H, W] is repeated without a copy."""
        views = views_SBCHW.unsqueeze(0) if views_SBCHW.dim() == 4 else views_SBCHW
        num_networks = len(self.models)
        if len(views) == 1 and num_networks > 1:
            views = views.expand(num_networks, *views.shape[1:])
        if len(views) != num_networks:
            raise ValueError(
                f"SplitNet has S = {num_networks} networks but got {len(views)} views. "
                f"Make {num_networks} views, or pass --split_factor {len(views)}."
            )
        return views
