"""Networks by name: registry, builder and SplitNet under one import; the rooms below have the rest."""

from typing import TYPE_CHECKING

from model.registry import (
    LARGE,
    SMALL,
    Backbone,
    BackboneBuilder,
    BackboneRequest,
    DivisionPlan,
    backbones,
    build_network,
    check_request,
    family_options,
    image_shape,
    names_user_code,
    request_of,
    solved_request,
    split_list,
)
from utils.lazy import lazily

if TYPE_CHECKING:
    from model.build import backbone_request, build_splitnet, network_requests
    from model.splitnet import SplitNet
    from model.staged import Staged, StagedBackbone, classifier_name, staged_parts

__all__ = [
    "LARGE",
    "SMALL",
    "Backbone",
    "BackboneBuilder",
    "BackboneRequest",
    "DivisionPlan",
    "SplitNet",
    "Staged",
    "StagedBackbone",
    "backbone_request",
    "backbones",
    "build_network",
    "build_splitnet",
    "check_request",
    "classifier_name",
    "family_options",
    "image_shape",
    "names_user_code",
    "network_requests",
    "request_of",
    "solved_request",
    "split_list",
    "staged_parts",
]
__getattr__ = lazily(__name__, "build", "splitnet", "staged")
