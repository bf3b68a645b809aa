"""What a backbone is, by which name it is known, and the one function that builds a (divided) network from its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from recipe.datasets import ROWS, row_for
from recipe.preprocessing import Preprocessing
from recipe.transformers import TokenMixer
from utils.errors import UserError
from utils.registry import Registry

if TYPE_CHECKING:  # the flags are read before torch is imported, and the names of backbones are among them
    from torch import Tensor, nn

DIVIDE_BY = ("params", "macs")
CHANNELS, ARGUMENTS = "channels", "arguments"  # the two ways of dividing a network that is not ours
ASKED = "asked"  # widths that somebody gave, by whichever of the two ways the network goes
FAR = 0.25  # the figure that is not budgeted may differ by this part before a plan's line says so


@dataclass(frozen=True, kw_only=True)
class DivisionPlan:
    """One of S copies beside the undivided network.

    Attributes:
        arch, split_factor: what is divided, by S.
        divide_by: what the solver matched, "params" or "macs"; "table" where the family's own rule decides.
        stages: name of each width.
        widths_full, widths: of the undivided network and of one copy.
        params_full, params_one, macs_full, macs_one: parameters, and multiply-adds for one image.
        way: "channels", where `stages` are runs of layers; "arguments", where they are the paths of constructor
            arguments; "" where nothing is solved.
        library: the package and version that the network comes from.
    """

    arch: str
    split_factor: int
    divide_by: str
    stages: tuple[str, ...]
    widths_full: tuple[float, ...]
    widths: tuple[float, ...]
    params_full: int
    params_one: int
    macs_full: int
    macs_one: int
    way: str = ""
    library: str = ""

    @property
    def params_difference(self) -> float:
        """Parameters of the S copies together over those of the undivided network, minus 1."""
        return self.split_factor * self.params_one / self.params_full - 1

    @property
    def macs_difference(self) -> float:
        """Multiply-adds of the S copies together over those of the undivided network, minus 1."""
        return self.split_factor * self.macs_one / self.macs_full - 1

    def summary(self) -> str:
        """One line: how near the copies come to the undivided network."""
        other = self.macs_difference if self.divide_by == "params" else self.params_difference
        far = f"; note that the {'MACs' if self.divide_by == 'params' else 'parameters'} differ by {other:+.0%}"
        return (
            f"{self.arch} divided by {self.split_factor} ({self.divide_by}): "
            f"{self.split_factor} x {self.params_one / 1e6:.3f} M parameters ({self.params_difference:+.2%} of "
            f"{self.params_full / 1e6:.3f} M), {self.split_factor} x {self.macs_one / 1e6:.2f} M MACs "
            f"({self.macs_difference:+.2%} of {self.macs_full / 1e6:.2f} M)"
            f"{far if self.way and abs(other) > FAR else ''}"
        )

    def table(self) -> str:
        """The width of every stage before and after, and `summary`."""
        rows = [("stage", "S = 1", f"S = {self.split_factor}")]
        rows += [
            (name, f"{before:g}", f"{after:g}")
            for name, before, after in zip(self.stages, self.widths_full, self.widths, strict=True)
        ]
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a.ljust(sizes[0])}  {b.rjust(sizes[1])}  {c.rjust(sizes[2])}" for a, b, c in rows]
        return "\n".join([*lines, self.summary()])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            **asdict(self),
            "width_names": list(self.stages),
            "params_difference": self.params_difference,
            "macs_difference": self.macs_difference,
        }


T = TypeVar("T")

SMALL = "small"  # CIFAR-shaped: 3x3 stem, three stages, 32x32-like images
LARGE = "large"  # ImageNet-shaped: stride-2 stem, four stages, 224-like images


@dataclass(frozen=True, kw_only=True)
class MemberForm:
    """How M members share one network: a kind of `model.members.FORMS`, M, and the kind's own numbers by name."""

    kind: str
    members: int
    numbers: Mapping[str, float | int | str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as a checkpoint keeps it."""
        return {"kind": self.kind, "members": self.members, "numbers": dict(self.numbers)}

    @property
    def least_input(self) -> tuple[int, int]:
        """(images, channels) of the smallest input that the one network takes."""
        return {"batch_ensemble": (self.members, 3), "mimo": (1, 3 * self.members)}.get(self.kind, (1, 3))


@dataclass(frozen=True, kw_only=True)
class BackboneRequest:
    """Everything that decides the structure of one of the S networks.

    Attributes:
        arch: registered name.
        split_factor: S; the network built is ONE of the S small ones (S = 1: undivided).
        num_classes: K.
        shape: SMALL or LARGE, see `image_shape`.
        dataset: name of the data set; a few published dropout rates depend on it.
        crop_size: side of the square input in pixels.
        options: values of the family's own flags by field name, beside those of others: see `family_options`.
        divide_by: what the solver matches, "params" or "macs"; None: parameters. Not for families with a table.
        widths: what the solver found before, as a checkpoint keeps it; None: it solves.
        form: M members in one network, in place of one of S; None: none.
        way: how the network is divided, "channels" or "arguments"; "": channels, as all checkpoints without it;
            "asked", until `solved_request` has settled it.
        width_names: of the widths: constructor arguments, where the way is theirs.
        library: the package and version that the plan was made with.
        fits_images: whether patches and windows are fitted to small images.
    """

    arch: str
    split_factor: int = 1
    num_classes: int = 10
    shape: str = SMALL
    dataset: str = "cifar10"
    crop_size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    divide_by: str | None = None
    widths: tuple[float, ...] | None = None
    form: MemberForm | None = None
    way: str = ""
    width_names: tuple[str, ...] = ()
    library: str = ""
    fits_images: bool = True


class BackboneBuilder(Protocol):
    """What a family file registers for each of its names."""

    def __call__(self, request: BackboneRequest) -> nn.Module:
        """Build one network; the module maps [B, 3, H, W] to logits [B, K]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One registry entry.

    Attributes:
        build: makes one network from a request that `check_request` has accepted.
        family: name of the family ("resnet"), equal to its file's name.
        split_factors: shape -> the legal S in ascending order; an open rule ("any S up to 64") lists them all.
            A shape that is not a key cannot be built.
        options: dataclass of the family's own flags (fields made by utils.options.option), or None.
        options_in: names of a network's tensors -> the flags of the family that they show, for released files, which
            do not say; None where no flag changes the names.
        crop_size: the architecture's own input size on imagenet, None where the data set decides.
        crop_pct: side of its input over the short side of the image in evaluation, None where the data set decides.
        build_wide: makes the same network with twice the width in its last stage (a branch of DKS), or None where
            the family cannot express it.
        plan: for networks of any origin, what the solver makes of a request; None where a table of the family decides.
        pretrained: fetches the weights that the network's library publishes, by state-dict name; None: there are none.
        layer_numbers: network -> the layer of every parameter by name, counted from the image, as the network's
            library has it; None where it has no such count.
        preprocessing: name of a released file, or any other -> how the library's weights want images; None: nobody
            says it.
        released_name: name of a tensor in the library's files -> that in today's networks; None: they are the same.
        parts: (network, what it was built from) -> its `model.staged.Staged`, None where it has no parts that run one
            after another; for networks that are no StagedBackbone themselves.
        fit: an undivided network's request -> the same with the arguments that small images take; None: none.
        token_mixer: request -> what the recipe of transformers wants to know, None where the network is none.
        takes_size: name -> whether its class is built for one size of images; None: none of the family is.
    """

    build: BackboneBuilder
    family: str
    split_factors: Mapping[str, tuple[int, ...]]
    options: type | None = None
    options_in: Callable[[Collection[str]], Mapping[str, Any]] | None = None
    crop_size: int | None = None
    crop_pct: float | None = None
    build_wide: BackboneBuilder | None = None
    plan: Callable[[BackboneRequest], DivisionPlan] | None = None
    pretrained: Callable[[], Mapping[str, Tensor]] | None = None
    layer_numbers: Callable[[nn.Module], Mapping[str, int] | None] | None = None
    preprocessing: Callable[[str], Preprocessing] | None = None
    released_name: Callable[[str], str] | None = None
    parts: Callable[[nn.Module, BackboneRequest], Any] | None = None
    fit: Callable[[BackboneRequest], BackboneRequest] | None = None
    token_mixer: Callable[[BackboneRequest], TokenMixer | None] | None = None
    takes_size: Callable[[str], bool] | None = None


# file of model/backbone/ -> the architectures that it registers; none for one that has only a resolver
_NAMES: dict[str, tuple[str, ...]] = {
    "cifar_resnet": ("resnet20_cifar", "resnet32_cifar", "resnet56_cifar", "resnet110_cifar"),
    "cream": (
        "cream",
        "cream_supernet",
        "cream_14",
        "cream_42",
        "cream_43",
        "cream_112",
        "cream_114",
        "cream_287",
        "cream_481",
        "cream_604",
    ),
    "densenet": ("densenet190",),
    "efficientnet": (*(f"efficientnetb{i}" for i in range(9)), "efficientnetl2"),
    "hcgnet": ("hcgnet_A1_cifar", "hcgnet_A2_cifar"),
    "imagenet_resnet": tuple(f"resnet{depth}_imagenet" for depth in (18, 34, 50, 101, 152)),
    "pyramidnet": ("pyramidnet164", "pyramidnet272"),
    "resnest": ("resnest101", "resnest200", "resnest269"),
    "resnet": tuple(f"resnet{depth}" for depth in (20, 32, 50, 56, 101, 110, 152, 164, 200)),
    "resnexst": ("resnexst50_4x16d", "resnexst50_4x32d", "resnexst50_8x16d", "resnexst101_8x32d"),
    "resnext": ("resnext29_8x64d", "resnext29_16x64d", "resnext50_32x4d", "resnext101_32x4d", "resnext101_64x4d"),
    "senet": (
        *(f"se_resnet{depth}" for depth in (50, 101, 110, 152, 164)),
        "se_resnet50_B",
        "se_resnext101_64x4d",
        "se_resnext101_64x4d_B",
        "senet113",
        "senet154",
    ),
    "shake_resnet": ("shake_resnet26_2x96d",),
    "shufflenetv2": ("ShuffleNetV2_05x_cifar", "ShuffleNetV2_1x_cifar", "ShuffleNetV2_1x_imagenet"),
    "timm_nets": (),
    "torchvision_nets": (),
    "user_factory": (),
    "wide_resnet": (
        "wide_resnet16_2",
        "wide_resnet16_4",
        "wide_resnet16_8",
        "wide_resnet16_12",
        "wide_resnet28_10",
        "wide_resnet40_10",
        "wide_resnet50_2",
        "wide_resnet50_3",
        "wide_resnet52_8",
        "wide_resnet101_2",
    ),
    "wrn": (
        *(f"wrn_{depth}_{widen}" for depth in (10, 16, 22, 28, 40) for widen in (1, 2, 4, 8, 10)),
        "wrn_16_2_cifar",
        "wrn_28_4_cifar",
        "wrn_40_2_cifar",
    ),
}

backbones: Registry[Backbone] = Registry(
    "backbone", "--arch", f"{__package__}.backbone", also="torchvision/NAME, timm/NAME, FILE.py:FACTORY", index=_NAMES
)

# ways of giving a network of ours other widths than its family's table has. They build networks, and so stand above
# what builds networks: this table is how it reaches them.
ways: Registry[BackboneBuilder] = Registry(
    "way of dividing", "--stage_widths", f"{__package__}.division", index={"resizing": (CHANNELS,)}
)


def archs_matching(pattern: str) -> list[str]:
    """The names that --arch takes and that a shell's pattern fits: ours, then those of libraries.

    Raises:
        UserError: there are none; the line names near ones.
    """
    found = backbones.matching(pattern)
    if not found:
        near = backbones.near(pattern.strip("*?"))
        shown = f" Near: {', '.join(near)}." if near else ""
        raise UserError(f"--list_archs {pattern}: no name that --arch takes matches.{shown}")
    return found


def image_shape(dataset: str, crop_size: int) -> str:
    """SMALL or LARGE: which form of a network a data set takes; open data sets go by their size."""
    return LARGE if ROWS[row_for(dataset, crop_size)].is_large else SMALL


def has_two_forms(arch: str) -> bool:
    """Whether a name of ours stands for one network on small images, and for another on large ones."""
    return arch in backbones and len(backbones.get(arch).split_factors) > 1


def check_request(request: BackboneRequest) -> Backbone:
    """The registry entry of a request.

    Raises:
        UserError: unknown arch, a shape the family does not have, or an S that its division rule does not allow.
    """
    entry = backbones.get(request.arch)
    if request.shape not in entry.split_factors:
        others = " or ".join(entry.split_factors)
        raise UserError(
            f"--arch {request.arch} exists for {others} images only, and --dataset {request.dataset} "
            f"(--crop_size {request.crop_size}) has {request.shape} ones. Pick another --arch or data set."
        )
    legal = entry.split_factors[request.shape]
    has_own_widths = entry.plan is None and request.widths is not None  # so no table has to know S
    if request.split_factor not in legal and not has_own_widths:
        shown = ", ".join(map(str, legal)) if len(legal) <= 20 else f"{legal[0]} to {legal[-1]}"
        raise UserError(
            f"--split_factor {request.split_factor} is not possible for --arch {request.arch} "
            f"({request.shape} images): use {shown}."
        )
    if request.divide_by is not None and entry.plan is None and request.form is None:
        raise UserError(
            f"--divide_by {request.divide_by}: --arch {request.arch} is divided by the paper's table, and the flag is "
            "for torchvision/NAME, timm/NAME and FILE.py:FACTORY. Leave it away."
        )
    return entry


def family_options(kind: type[T], request: BackboneRequest) -> T:
    """A family's own options out of those of all families; what is not said keeps its default."""
    own = {item.name for item in fields(kind)} & request.options.keys()  # type: ignore[arg-type]
    return kind(**{name: request.options[name] for name in own})


def solved_request(request: BackboneRequest) -> BackboneRequest:
    """The request with what the solver finds for it, where it decides and nothing is found yet.

    Raises:
        UserError: as `check_request`, or a network that cannot be divided.
    """
    entry = check_request(request)
    if request.way == ASKED:
        return _settled(request, entry)
    if entry.plan is None or request.widths is not None:
        return request
    if request.split_factor == 1:
        return request if entry.fit is None else entry.fit(request)
    return planned(request, entry.plan(request))


def _settled(request: BackboneRequest, entry: Backbone) -> BackboneRequest:
    """The request with the way by which the widths that somebody gave are meant."""
    assert request.widths is not None
    by_channels = replace(request, way="")
    if entry.plan is None or request.split_factor == 1:
        return by_channels
    plan = entry.plan(replace(by_channels, widths=None))
    if plan.way != ARGUMENTS:
        return by_channels
    if len(request.widths) != len(plan.stages):
        raise UserError(
            f"--arch {request.arch} is divided by {len(plan.stages)} numbers ({', '.join(plan.stages)}), and "
            f"--stage_widths names {len(request.widths)}: see python -m model.division {request.arch}."
        )
    return replace(request, way=ARGUMENTS, width_names=plan.stages, library=plan.library)


def planned(request: BackboneRequest, plan: DivisionPlan) -> BackboneRequest:
    """The request with a plan's widths."""
    return replace(
        request, widths=plan.widths, way=plan.way, width_names=plan.stages if plan.way else (), library=plan.library
    )


def build_network(request: BackboneRequest) -> nn.Module:
    """One of the S networks of a division: [B, 3, H, W] -> logits [B, K].

    Raises:
        UserError: as `solved_request`.
    """
    request = solved_request(request)
    entry = check_request(request)
    has_own_widths = entry.plan is None and request.widths is not None and request.form is None
    build = ways.get(CHANNELS) if has_own_widths else entry.build
    network = build(request)
    note_request(network, request)
    return network


@dataclass(frozen=True)
class _Origin:
    """What a network of others was built from, as a hook of it that does nothing.

    No name of ours may hide one of theirs, so it cannot be an attribute; a hook goes along with copies and pickles.
    """

    request: BackboneRequest

    def __call__(self, module: nn.Module, keys: Any) -> None:
        """Nothing."""

    def __deepcopy__(self, memo: Any) -> _Origin:
        return self


def note_request(network: nn.Module, request: BackboneRequest) -> None:
    """Remember what a network was built from: our own know it themselves."""
    if check_request(request).plan is None:
        network.request = request  # type: ignore[assignment]
        return
    hooks = network._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Origin)]:
        del hooks[key]
    network.register_load_state_dict_post_hook(_Origin(request))


def known_request(network: nn.Module) -> BackboneRequest | None:
    """What a network was built from, its solved widths included; None where `build_network` did not build it."""
    for hook in network._load_state_dict_post_hooks.values():
        if isinstance(hook, _Origin):
            return hook.request
    own = getattr(network, "request", None)
    return own if isinstance(own, BackboneRequest) else None


def request_of(network: nn.Module) -> BackboneRequest:
    """What a network of `build_network` was built from, its solved widths included."""
    request = known_request(network)
    assert request is not None
    return request


def split_list(arch: str) -> list[str]:
    """The entries of a comma list of backbones."""
    return [name.strip() for name in arch.split(",") if name.strip()]


def names_user_code(arch: str) -> bool:
    """Whether looking this name up runs a file of the user's: FILE.py:FACTORY."""
    return ".py:" in arch
