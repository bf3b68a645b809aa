"""Networks by name: registry, builder and SplitNet under one import; the rooms below have the rest."""

from model.build import backbone_request, build_splitnet, network_requests
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
    split_list,
)
from model.splitnet import SplitNet
from model.staged import StagedBackbone, classifier_name

__all__ = [
    "LARGE",
    "SMALL",
    "Backbone",
    "BackboneBuilder",
    "BackboneRequest",
    "DivisionPlan",
    "SplitNet",
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
    "split_list",
]
