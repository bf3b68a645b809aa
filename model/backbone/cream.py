"""Cream's networks (Peng et al., "Cream of the Crop", NeurIPS 2020): the released six, any arch list, the supernet.

Released: state-dict names, blocks and numbers are those of the published weights. Ours: division (widths on
multiples of 8 from the budget solver, dropout over sqrt(S)) and the form for small images (`PUBLISHED_SMALL`).
"""

from functools import partial
from typing import Any

from torch import nn

from model.options import CreamOptions
from model.registry import LARGE, SMALL, Backbone, BackboneRequest, backbones, family_options
from model.search.blocks import ConvBnSwish, CreamFrame, DepthwiseSeparable, InvertedResidual, init_cream
from model.search.costs import NetworkPlan
from model.search.estimates import size_supernet
from model.search.reading import parse_arch_list, read_space
from model.search.space import PUBLISHED, PUBLISHED_SMALL, SearchSpace, divided
from model.search.supernet import Supernet
from utils.errors import UserError


class CreamNet(CreamFrame):
    """A stand-alone network of a plan: [B, 3, H, W] -> logits [B, K].

    Args:
        plan: its widths and blocks.
        dropout: rate before the classifier.
        global_pool: avg, max or avgmax.
    """

    def __init__(self, plan: NetworkPlan, *, dropout: float = 0.0, global_pool: str = "avg") -> None:
        frame = plan.frame
        blocks = nn.ModuleList(
            [
                nn.Sequential(DepthwiseSeparable(frame.stem_channels, frame.base_channels)),
                *(nn.Sequential(*map(InvertedResidual, stage)) for stage in plan.stages),
                nn.Sequential(ConvBnSwish(frame.in_channels, frame.tail_channels)),
            ]
        )
        super().__init__(frame, plan.num_classes, blocks=blocks, dropout=dropout, global_pool=global_pool)
        self.plan = plan
        init_cream(self)

    @property
    def stages(self) -> list[nn.Module]:
        """Stage 0, the searchable stages, the last stage."""
        return list(self.blocks)


def _options(request: BackboneRequest) -> CreamOptions:
    return family_options(CreamOptions, request)


def _dropout(request: BackboneRequest) -> float:
    """Rate before the classifier of one of S networks."""
    return float(_options(request).dropout_rate / request.split_factor**0.5)


def _space(request: BackboneRequest) -> SearchSpace:
    text = _options(request).search_space
    if text:
        return read_space(text)
    return PUBLISHED if request.shape == LARGE else PUBLISHED_SMALL


def _network(request: BackboneRequest, space: SearchSpace, arch_list: Any, *, honour_single_block: bool) -> CreamNet:
    arch = parse_arch_list(arch_list, space)
    key = tuple(map(tuple, arch))
    space = divided(space, key, request.split_factor, request.num_classes, honour_single_block=honour_single_block)
    plan = space.plan(arch, request.num_classes, honour_single_block=honour_single_block)
    return CreamNet(plan, dropout=_dropout(request), global_pool=_options(request).global_pool)


def _build_released(arch_list: str, request: BackboneRequest) -> CreamNet:
    space = PUBLISHED if request.shape == LARGE else PUBLISHED_SMALL
    return _network(request, space, arch_list, honour_single_block=False)


def _build_found(request: BackboneRequest) -> CreamNet:
    honour = bool(_options(request).honour_single_block)
    return _network(request, _space(request), _options(request).arch_list, honour_single_block=honour)


def _build_supernet(request: BackboneRequest) -> Supernet:
    space, depths = _space(request), tuple(_options(request).sta_num)
    interval = (_options(request).flops_minimum, _options(request).flops_maximum)
    if not depths:
        depths = size_supernet(*interval, space).depths
    elif len(depths) != len(space.stages):
        raise UserError(f"--sta_num {depths}: expected {len(space.stages)} numbers of blocks.")
    return Supernet(
        space,
        depths,
        request.num_classes,
        slice_size=_options(request).slice,
        dropout=_dropout(request),
        global_pool=_options(request).global_pool,
        interval=interval,
    )


# names, arch list, input size. 42 and 112 are the published second names.
RELEASED: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("cream_14",), "[[0],[3],[3,3],[3,3],[3],[3],[0]]", 64),
    (("cream_43", "cream_42"), "[[0],[3],[3,1],[3,1],[3,3,3],[3,3],[0]]", 96),
    (("cream_114", "cream_112"), "[[0],[3],[3,3],[3,3],[3,3,3],[3,3],[0]]", 160),
    (("cream_287",), "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]", 224),
    (("cream_481",), "[[0],[3,4,3,1],[3,2,3,0],[3,3,3,1,1],[3,3,3,3],[3,3,3,3],[0]]", 224),
    (("cream_604",), "[[0],[3,3,2,3,3],[3,2,3,2,3],[3,2,3,2,3],[3,3,2,2,3,3],[3,3,2,3,3,3],[0]]", 224),
)
CROP_PCT = 0.875
SPLITS = {LARGE: (1, 2, 4), SMALL: (1, 2, 4)}

for _names, _arch_list, _size in RELEASED:
    for _name in _names:
        backbones.add(
            _name,
            Backbone(
                build=partial(_build_released, _arch_list),
                family="cream",
                split_factors=SPLITS,
                options=CreamOptions,
                crop_size=_size,
                crop_pct=CROP_PCT,
            ),
        )
backbones.add(
    "cream",
    Backbone(build=_build_found, family="cream", split_factors=SPLITS, options=CreamOptions, crop_pct=CROP_PCT),
)
backbones.add(
    "cream_supernet",
    Backbone(
        build=_build_supernet,
        family="cream",
        split_factors={LARGE: (1,), SMALL: (1,)},
        options=CreamOptions,
        crop_pct=CROP_PCT,
    ),
)
