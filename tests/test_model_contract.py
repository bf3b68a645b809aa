"""What every registered backbone must do. A new file in model/backbone/ is tested as soon as it is there."""

import copy
from collections import Counter
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from model import LARGE, SMALL, BackboneRequest, backbones, build_network, build_splitnet
from model.layers.random import RandomLayer
from model.layers.sync_norm import ProcessSyncBatchNorm, synchronise_batchnorm
from model.staged import StagedBackbone
from utils.macs import count_macs, count_params

NUM_CLASSES = 7
CROP_SIZES = {SMALL: 32, LARGE: 64}

# Small members for the checks that compute; a family that is not here is represented by its first name.
LIGHT = ("resnet20", "resnet50", "resnext29_8x64d", "resnext50_32x4d", "se_resnet110", "se_resnet50", "wide_resnet16_8")
LIGHT += ("pyramidnet164", "resnexst50_4x16d", "wide_resnet50_2", "resnet18_imagenet", "resnet32_cifar")
# Families with a second implementation behind a flag: one member each.
VARIANTS = (
    ("densenet190", SMALL, {"is_official_densenet": False}),
    ("efficientnetb0", LARGE, {"is_lukemelas_efficientnet": True, "is_efficientnet_user_crop": True}),
)


# Every registered architecture at every size of image that it is for.
FORMS = [(arch, shape) for arch, entry in backbones.items() for shape in entry.split_factors]


def make_request(arch, shape, split_factor, options=None):
    dataset = "cifar10" if shape == SMALL else "imagenet"
    return BackboneRequest(
        arch=arch,
        split_factor=split_factor,
        num_classes=NUM_CLASSES,
        shape=shape,
        dataset=dataset,
        crop_size=CROP_SIZES[shape],
        options=options or {},
    )


def large_split(arch, shape):
    """A large legal S, so that the network is small."""
    return max(s for s in backbones.get(arch).split_factors[shape] if s <= 16)


def some_split_factors(arch, shape):
    """All legal S; where a formula takes any, some of each kind."""
    legal = backbones.get(arch).split_factors[shape]
    return legal if len(legal) <= 8 else (1, 2, 3, 5, 8, 12, 16)


def representative_requests():
    """One (arch, shape) of each family and each second implementation, at a large legal S."""
    members = {}
    for arch, entry in backbones.items():
        for shape in entry.split_factors:
            member = members.setdefault((entry.family, shape), arch)
            if arch in LIGHT and member not in LIGHT:
                members[entry.family, shape] = arch
    for (_, shape), arch in members.items():
        yield make_request(arch, shape, large_split(arch, shape))
    for arch, shape, options in VARIANTS:
        if arch in backbones:
            yield make_request(arch, shape, large_split(arch, shape), options)


def every_form():
    """Every architecture with one S, another one in turn, and with every S.

    The quick suite takes one S for a member of each family, the default one every S for it and one S for all others.
    """
    members = {(request.arch, request.shape) for request in representative_requests()}
    for number, (arch, shape) in enumerate(FORMS):
        factors = some_split_factors(arch, shape)
        one = factors[number % len(factors)]
        for_one, for_all = ((), pytest.mark.slow) if (arch, shape) in members else (pytest.mark.slow, pytest.mark.long)
        yield pytest.param(arch, shape, (one,), id=f"{arch}-{shape}-s{one}", marks=for_one)
        yield pytest.param(arch, shape, factors, id=f"{arch}-{shape}-all", marks=for_all)


def request_id(request):
    return "-".join(map(str, (request.arch, request.shape, f"s{request.split_factor}", *request.options)))


REQUESTS = {request_id(request): request for request in representative_requests()}
representatives = pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())


def unused_names(network: nn.Module) -> set[str]:
    """Parameters that exist for released checkpoints only."""
    return network.unused_parameter_names() if hasattr(network, "unused_parameter_names") else set()


def make_images(request: BackboneRequest, batch: int, size: int | None = None) -> Tensor:
    size = size or request.crop_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@lru_cache
def trained(name: str) -> nn.Module:
    """The representative of that id as after training: every branch counts, statistics are those of real batches."""
    request = REQUESTS[name]
    network = build_splitnet(request, seed=3, train_separately=True).models[0]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = 1.0
    with torch.no_grad():
        network(make_images(request, 8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


@pytest.mark.parametrize(("arch", "shape", "split_factors"), list(every_form()))
def test_every_architecture_divides_and_learns(arch, shape, split_factors):
    params = []
    for split_factor in split_factors:
        with torch.device("meta"):
            network = build_network(make_request(arch, shape, split_factor))
        assert isinstance(network, StagedBackbone)
        assert network.training
        classifier = network.get_submodule(network.classifier_name)
        assert isinstance(classifier, nn.Linear)
        assert classifier.out_features == NUM_CLASSES
        params.append(count_params(network))
        # met twice under one key, a random layer draws the same numbers twice
        met = Counter()
        for name, module in network.named_modules():
            if isinstance(module, (RandomLayer, nn.Dropout, nn.Dropout2d)):
                module.register_forward_hook(lambda *_, name=name, met=met: met.update([name]))
        # without storage the graph of the gradients is there all the same
        logits_BK = network(torch.empty(2, 3, CROP_SIZES[shape], CROP_SIZES[shape], device="meta"))
        assert logits_BK.shape == (2, NUM_CLASSES)
        logits_BK.sum().backward()
        without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
        assert without == unused_names(network)
        assert set(met.values()) <= {1}
        one = torch.empty(1, 3, CROP_SIZES[shape], CROP_SIZES[shape], device="meta")
        assert network.eval()(one).shape == (1, NUM_CLASSES)
    # several S may leave one number of groups
    assert params == sorted(params, reverse=True)
    assert len(params) == 1 or params[-1] < params[0]
    assert count_macs(network, (3, CROP_SIZES[shape], CROP_SIZES[shape])) > 0


@representatives
def test_every_parameter_in_use_learns(request_):
    network = copy.deepcopy(trained(request_id(request_))).train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    nn.functional.cross_entropy(network(make_images(request_, 4)), torch.tensor([0, 1, 2, 3])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == unused_names(network)
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    moved = {name for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])}
    assert any(name.endswith("running_var") for name in moved)


@representatives
def test_parts_compose_and_evaluation_changes_nothing(request_):
    network = trained(request_id(request_))
    images_BCHW = make_images(request_, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        logits_BK = network(images_BCHW)
        taps, embedding_BD = network.forward_features(images_BCHW)
        odd_BK = network(make_images(request_, 1, request_.crop_size + 5))
        assert torch.equal(network.classify(embedding_BD), logits_BK)

    assert logits_BK.shape == (2, NUM_CLASSES)
    assert embedding_BD.shape == (2, network.get_submodule(network.classifier_name).in_features)
    assert len(taps) == len(network.stages)
    sizes = [tap.shape[-1] for tap in taps]
    assert sizes == sorted(sizes, reverse=True)
    assert (logits_BK[0] - logits_BK[1]).abs().max() > 1e-2 * logits_BK.abs().max()
    assert odd_BK.shape == (1, NUM_CLASSES)
    assert odd_BK.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@representatives
def test_batch_and_memory_layout_do_not_matter(request_):
    # a deep network of random weights makes much of a last bit, so compare in float64
    network = copy.deepcopy(trained(request_id(request_))).double()
    images_BCHW = make_images(request_, 2).double()
    with torch.inference_mode():
        logits_BK = network(images_BCHW)
        single_BK = torch.cat([network(image_BCHW) for image_BCHW in images_BCHW.split(1)])
        network.to(memory_format=torch.channels_last)
        last_BK = network(images_BCHW.to(memory_format=torch.channels_last))
    assert logits_BK.dtype == torch.float64
    torch.testing.assert_close(single_BK, logits_BK, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last_BK, logits_BK, rtol=1e-9, atol=1e-9)


@representatives
def test_synchronised_norms_leave_it_as_it_is_and_none_stays_behind(request_):
    network = copy.deepcopy(trained(request_id(request_)))
    keys = list(network.state_dict())
    images_BCHW = make_images(request_, 2)
    ran = []
    with torch.inference_mode():
        expected_BK = network(images_BCHW)
        synchronise_batchnorm(network, torch.device("cpu"))
        hook = register_module_forward_pre_hook(lambda module, _: ran.append(module))
        try:
            assert torch.equal(network(images_BCHW), expected_BK)
        finally:
            hook.remove()
    norms = {id(module) for module in ran if isinstance(module, _BatchNorm)}
    assert norms
    assert norms <= {id(module) for module in network.modules() if isinstance(module, ProcessSyncBatchNorm)}
    assert list(network.state_dict()) == keys


@representatives
def test_a_fresh_network_runs_in_bfloat16_and_takes_another_ones_weights(request_):
    source = trained(request_id(request_))
    target = build_splitnet(request_, seed=4, train_separately=True).models[0].eval()
    images_BCHW = make_images(request_, 1)
    with torch.inference_mode():
        fresh_BK = target(images_BCHW)
        first_BCHW = target.forward_features(images_BCHW)[0][0]
        with torch.autocast("cpu", torch.bfloat16):
            half_taps, half_BD = target.forward_features(images_BCHW)
            assert target.classify(half_BD).isfinite().all()
        # later stages of random weights are noise in bfloat16
        torch.testing.assert_close(half_taps[0].float(), first_BCHW, rtol=0, atol=0.1 * float(first_BCHW.abs().max()))
        logits_BK = source(images_BCHW)
        assert not torch.equal(fresh_BK, logits_BK)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target(images_BCHW), logits_BK)
