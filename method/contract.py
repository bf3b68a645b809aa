"""The contract between a method and the trainer, and the registry of methods."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from loss.classification import CROSS_ENTROPY, ClassLoss
from method.inner import average_over_processes
from method.options import NoOptions
from method.peers import Peers
from model import BackboneRequest, split_list
from model.registry import MemberForm
from model.splitnet import SplitNet
from utils.distributed import broadcast_buffers
from utils.mesh import Mesh
from utils.options import Options
from utils.registry import Registry
from utils.targets import Targets

OwnOptions = TypeVar("OwnOptions", bound=Options)
LOGITS = "logits"


class Progress(NamedTuple):
    """Where training stands when a step is made; all counted from 0.

    epoch: current epoch. step: optimiser-independent count of batches since the start of training.
    batch: batch within the epoch. steps_per_epoch, epochs: totals. learning_rate: of this step.
    indices_B: int64 [B] positions of the images in the training set (for memory banks).
    weight_decay: of the main optimiser, for methods with inner optimisers of their own.
    is_last: the last batch of its epoch, or of training.
    updates: the weights are updated after this batch: it ends a group of --iters_to_accumulate batches.
    counts_W: images of this batch in every process that has a part of it; empty where nobody says.
    """

    epoch: int
    step: int
    batch: int
    steps_per_epoch: int
    epochs: int
    learning_rate: float
    indices_B: Tensor
    weight_decay: float = 0.0
    is_last: bool = False
    updates: bool = True
    counts_W: tuple[int, ...] = ()


class TrainingData(NamedTuple):
    """What a method may ask about the data, once, before it is placed on its device.

    classes: names of the K classes in order. mean, std: by which images are normalised, per channel, in [0, 1].
    crop_size: side of the networks' input in pixels.
    """

    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    crop_size: int


class StepOutput(NamedTuple):
    """What a method's forward returns.

    loss: scalar to minimise, a mean over the batch, not yet divided by --iters_to_accumulate.
    metrics: detached scalar tensors by name, `loss_ce` among them; the names become TensorBoard tags.
    logits_SBK: detached logits of the S networks, for the training accuracy and for naming a network gone non-finite.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logits_SBK: Tensor


class Method(nn.Module, Generic[OwnOptions]):
    """One way of learning together: the networks, the training-only parts beside them, and the loss.

    A method is wrapped by DDP as a whole, so every trainable part is a submodule. `state_dict()` minus the entries
    of `network` is what a checkpoint keeps under `method`. A step is, in this order and each once: `before_step`,
    `forward`, the backward pass, `reduce_gradients` where the method does that itself, the update of the weights, and
    `after_step`; whoever makes steps, the trainer or a loop of your own, calls all of them. In a group of accumulated
    batches, every batch has its `before_step` and `forward`, and the last one has the rest. Before the first step of
    an epoch that `fresh_optimizer_at` names, the main optimiser forgets what it has gathered
    (`training.optim.start_anew`).

    The trainer calls `train()` every epoch. What must stay frozen then, such as an older copy of the networks that
    teaches them, is wrapped in `method.inner.Asleep`.

    Class attributes:
        Options: frozen dataclass of the method's own flags.
        shared_view: True if all networks must see one and the same view.
        reduces_own_gradients: True if the method averages gradients over processes itself (no DDP wrapper).
        decides_on_host: True if what a step computes depends on numbers that the host reads in it, so that a step can
            neither be compiled nor replayed from a CUDA graph.
        runs_networks_itself: True if it calls the single networks, or parts of them, in place of `network(views)`.
        incompatible: flags that must not be on with the method, each with the reason.
        learns_from_copies: True if all that a network learns from others is their logits of its own view, so that
            copies that other jobs have published will do (--exchange); `forward` calls `among_peers` then.
        fine_tunes: True if --pretrained weights bring the recipe of fine-tuning, False if the method's own stays.
        networks_from_list: True if `--arch a,b` (full networks, S = length of the list) makes sense.
        exchanges: what a step of the method brings together of its networks: LOGITS where the loss depends on each
            network through its logits [B, K] alone and nothing that is trained lies beside the networks, so that they
            may stand in different processes (--placement networks); else in words what they share or exchange.

    Attributes:
        class_loss: what a prediction costs against the labels, one value an image.
        sampler: how training batches are put together, "shuffled" or "class_balanced"; an instance may change it.
        peers: copies of the networks that other jobs train, which `network` learns from, where this job has one of S.
        mesh: how the networks are spread over the processes; None: every process holds all.
    """

    Options: ClassVar[type] = NoOptions
    shared_view: ClassVar[bool] = False
    reduces_own_gradients: ClassVar[bool] = False
    decides_on_host: ClassVar[bool] = False
    runs_networks_itself: ClassVar[bool] = False
    networks_from_list: ClassVar[bool] = True
    learns_from_copies: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = True
    incompatible: ClassVar[Mapping[str, str]] = {}
    exchanges: ClassVar[str] = LOGITS
    sampler: str = "shuffled"
    mesh: Mesh | None = None

    def __init__(self, network: SplitNet, options: OwnOptions, *, class_loss: ClassLoss = CROSS_ENTROPY) -> None:
        super().__init__()
        self.network = network
        self.options = options
        self.class_loss = class_loss
        self.peers: Peers | None = None

    @classmethod
    def may_be_spread(cls) -> bool:
        """Whether its networks may stand in different processes (--placement networks)."""
        return cls.exchanges == LOGITS and not cls.runs_networks_itself

    @classmethod
    def recipe(
        cls, dataset_recipe: str, epochs: int | None, given: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The method's own published defaults by flag name, put before the data set's recipe. None by default.

        Args:
            dataset_recipe: row of the published recipes that the data takes.
            epochs: as set, or None.
            given: all that was set, by flag name; None: nothing.
        """
        return {}

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values of flags of the networks that the method's own flags decide, by name; as if the user had set them.

        Args:
            given: all that was set, by flag name.

        Raises:
            UserError: something was set that contradicts them.
        """
        return {}

    @classmethod
    def backbone_names(cls, arch: str, options: OwnOptions) -> list[str]:
        """The backbones that `--arch` stands for: the entries of a comma list, unless a method knows more names."""
        return split_list(arch)

    @classmethod
    def member_form(cls, options: OwnOptions, request: BackboneRequest, seed: int) -> MemberForm | None:
        """How the method's members share one network; None: they are networks of their own."""
        return None

    @classmethod
    def network_plan(cls, options: OwnOptions) -> Mapping[str, Any]:
        """Fields of the networks' request (`BackboneRequest`) that a file of the method's own decides; none by default.

        Raises:
            UserError: the file cannot be read.
        """
        return {}

    def undecayed_parameters(self) -> set[str]:
        """Names of parameters that take no weight decay whatever they are."""
        return set()

    def rate_factors(self) -> dict[str, float]:
        """Learning rates of single parameters by name, in multiples of the optimiser's."""
        return {}

    def fresh_optimizer_at(self, milestones: Sequence[int]) -> Sequence[int]:
        """Epochs, counted from 0, at whose start the main optimiser is made anew: its momentum starts from nothing.

        Args:
            milestones: epochs at which the schedule multiplies the learning rate; empty where it has none.
        """
        return ()

    def meet(self, data: TrainingData) -> None:
        """Called once after construction, before the method is placed on its device: what the images are.

        Raises:
            UserError: the method cannot be trained on such data.
        """

    def prepare(self, labels_N: Tensor, seed: int) -> None:
        """Called once before training with the int64 labels [N] of the training set, in the order of its indices."""

    @abstractmethod
    def forward(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> StepOutput:
        """Views [V, B, C, H, W] (V = S, or 1 where all networks share one view) -> loss and metrics.

        A step may be replayed from a CUDA graph, which runs this once: a number of `progress` that changes from step
        to step must come by a tensor that `before_step` writes. (`progress.indices_B` is such a tensor.)
        """

    def among_peers(self, logits_SBK: Tensor, views_SBCHW: Tensor, progress: Progress) -> Tensor:
        """The logits that networks are compared by: the networks' own and, of one of S, its peers' constant ones.

        [S, B, K] in float32 or better -> the same; with peers [1, B, K] -> [1 + P, B, K], in the order of the numbers.
        """
        if self.peers is None:
            return logits_SBK
        image_BCHW = self.network.expand_views(views_SBCHW)[0]
        return self.peers.join(logits_SBK, image_BCHW, epoch=progress.epoch, step=progress.step)

    def peers_warm_up(self, epochs: int) -> int:
        """Epochs, of so many, over which the weight of what is learnt from others rises."""
        return 0

    def summed_class_loss(self, logits_SBK: Iterable[Tensor], targets: Targets) -> Tensor:
        """Mean of `class_loss` over the batch, summed over the networks: S logits [B, K] -> scalar."""
        return torch.stack([self.class_loss(logits_BK, targets).mean() for logits_BK in logits_SBK]).sum()

    def losses_in_sum(self) -> int:
        """How many networks' losses the loss of `forward` is the sum of: divided by it, numbers of networks compare."""
        return self.network.num_members

    def row_prefix(self, i: int) -> str:
        """What the names of further rows of network i begin with: its number, where there are several networks."""
        return f"{i + 1}_" if self.network.split_factor > 1 else ""

    def before_step(self, views_SBCHW: Tensor, targets: Targets, progress: Progress) -> None:
        """Called before the forward pass of a step: what `forward` needs of this step, what is learnt on the side."""

    def after_step(self, views_SBCHW: Tensor, targets: Targets, output: StepOutput, progress: Progress) -> None:
        """Called after the main optimiser's step."""

    def reduce_gradients(self) -> None:
        """Average the gradients over the processes; called after the backward pass where `reduces_own_gradients`."""
        gradients = [p.grad for _, p in self.trained_parameters() if p.grad is not None]
        average_over_processes(gradients, None if self.mesh is None else self.mesh.data_dim)

    def synchronise(self) -> None:
        """Called in every process before evaluation and checkpointing: make all buffers those of the first process.

        The first of those that hold the same networks.
        """
        broadcast_buffers(self, None if self.mesh is None else self.mesh.data_dim)

    def deployed(self) -> nn.Module:
        """What parameters and MACs are counted of: images [1, 3, H, W] -> logits. Default: all networks."""
        return self.network

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that `forward` calls once each and --compile compiles; none if what they compute varies."""
        return [] if self.decides_on_host else [*self.network.models]

    def run_files(self, *, final: bool) -> Mapping[str, str | bytes]:
        """Files by name that the trainer writes into the run directory after every epoch: text, and PNG pictures.

        Called in the process that writes; pictures also go to TensorBoard. `final`: the last call.
        """
        return {}

    def extra_logits(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] by name of classifiers beside the networks, for evaluations during training."""
        return {}

    def complete_figures(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The figures of such an evaluation, with what the method derives from them under `extra`: top-1 in percent."""
        return figures

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) pairs for the main optimiser; everything trainable by default."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def training_state(self) -> dict[str, Any]:
        """Training-only state for the checkpoint: tensors and plain values. Default: all but the networks' tensors."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("network.")}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `training_state`."""
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        missing = self.load_state_dict(tensors, strict=False).missing_keys
        lost = [k for k in missing if not k.startswith("network.")]
        if lost:
            raise KeyError(f"method state lacks {', '.join(lost)}")


methods: Registry[type[Method[Any]]] = Registry("method", "--method", str(__package__))
