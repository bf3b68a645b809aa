"""Flags of the optimiser and the schedule, and of training on several machines."""

from dataclasses import dataclass

from utils.options import BY_RECIPE, OF_CALL, SAME, TAKES, Options, option

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "RMSpropTF")
ITERATION_MODES = ("cos", "step", "poly", "HTD", "exponential", "linear", "cycles")
CLASS_LOSSES = ("ce", "bce")  # see loss.classification.ClassLoss
EPOCH_MODES = ("epoch_cos", "epoch_step")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "aot_eager")
MODES = ITERATION_MODES + EPOCH_MODES


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """Optimiser and schedule"""

    epochs: int = option(300, "training length", unit="epochs", default_text=BY_RECIPE, least=1, resume=TAKES)
    start_epoch: int | None = option(
        None, "first epoch, overriding the checkpoint's", default_text="0, or the checkpoint's", least=0, resume=OF_CALL
    )
    max_steps: int | None = option(
        None, "stop after so many steps in all", unit="steps", default_text="none", least=1, resume=OF_CALL
    )
    patience: int | None = option(
        None,
        "stop once the ensemble's top-1 on held-out images (--val_fraction, val/) has not risen for so long",
        unit="epochs",
        default_text="never",
        least=1,
        resume=TAKES,
    )
    eval_per_epoch: int = option(1, "evaluate every so many epochs", unit="epochs", least=1, resume=TAKES)
    iters_to_accumulate: int = option(1, "steps per update of the weights", unit="steps", least=1, resume=TAKES)
    optimizer: str = option("SGD", "optimiser", choices=OPTIMIZERS, default_text=BY_RECIPE, resume=SAME)
    lr: float = option(
        0.1, "learning rate", aliases=("learning_rate", "init_lr"), default_text=BY_RECIPE, least=0, resume=TAKES
    )
    lr_mode: str = option(
        "cos",
        "shape of the schedule",
        choices=MODES,
        aliases={"lr_type": {"cosine": "epoch_cos", "multistep": "step"}},
        default_text=BY_RECIPE,
        resume=TAKES,
    )
    slow_start_lr: float = option(
        5e-3, "learning rate at which the warm-up starts", default_text=BY_RECIPE, least=0, resume=TAKES
    )
    slow_start_epochs: int = option(
        0, "length of the warm-up; -1: none", unit="epochs", default_text=BY_RECIPE, least=-1, resume=TAKES
    )
    end_lr: float = option(1e-4, "floor of the learning rate", default_text=BY_RECIPE, least=0, resume=TAKES)
    lr_milestones: tuple[int, ...] = option(
        (),
        "epochs at which 'step' multiplies",
        unit="epochs",
        aliases=("milestones",),
        default_text=BY_RECIPE,
        resume=TAKES,
    )
    lr_cycles: int = option(1, "number of restarts of 'cycles', its first cycle included", least=1, resume=TAKES)
    lr_step_multiplier: float = option(0.1, "factor at each milestone", least=0, resume=TAKES)
    lr_multiplier: float = option(
        1.0, "factor for the learning rate of new heads when fine-tuning", least=0, resume=TAKES
    )
    layer_decay: float = option(
        1.0,
        "every layer of a network trains at so much of the rate of the layer above it, the classifier at the full one",
        above=0,
        most=1,
        resume=TAKES,
    )
    decay_factor: float = option(0.97, "factor of 'exponential'", above=0, resume=TAKES)
    decay_epochs: float = option(
        0.8,
        "interval of 'exponential'; length of 'epoch_cos'",
        unit="epochs",
        default_text="0.8; for epoch_cos all",
        above=0,
        resume=TAKES,
    )
    is_linear_lr: bool = option(False, "scale learning rate and momentum with the batch size", resume=TAKES)
    momentum: float = option(0.9, "momentum of SGD and RMSprop", least=0, most=1, resume=TAKES)
    is_nesterov: bool = option(True, "Nesterov momentum in SGD", resume=TAKES)
    optimizer_eps: float | None = option(
        None, "eps of Adam and RMSprop", default_text="the optimiser's own", above=0, resume=TAKES
    )
    weight_decay: float = option(
        1e-4, "weight decay; an explicit value is taken as given", default_text=BY_RECIPE, least=0, resume=TAKES
    )
    is_wd_test: bool = option(
        False, "published: take --weight_decay as given; always so here, accepted", resume=OF_CALL
    )
    is_div_wd: bool = option(True, "multiply the recipe's weight decay by exp(1/S - 1) when S > 1", resume=TAKES)
    div_wd_den: float = option(20.0, "unused in the published code; accepted", resume=OF_CALL)
    is_wd_all: bool = option(False, "decay every parameter", resume=TAKES)
    no_decay: str = option(
        "bias",
        "what is not decayed: every bias; also all parameters of normalisations; or all of one dimension, and what a "
        "network of timm names",
        choices=("bias", "norm_bias", "one_dimensional"),
        default_text=BY_RECIPE,
        resume=TAKES,
    )
    class_loss: str = option(
        "ce",
        "loss against the labels: cross-entropy of the softmax, or binary cross-entropy of every class by itself",
        choices=CLASS_LOSSES,
        resume=TAKES,
    )
    class_weights: str | None = option(
        None,
        "weights of the classes in the cross-entropy: balanced, N / (K · images of the class), or a FILE with a class "
        "and its weight a line",
        metavar="balanced|FILE",
        resume=TAKES,
    )
    clip_grad: float | None = option(
        None, "largest global norm of the gradient", default_text="none", above=0, resume=TAKES
    )
    ema_decay: float = option(
        0.0,
        "decay of the moving average of the weights that is evaluated too; 0: off",
        least=0,
        below=1,
        resume="a new average starts from the restored weights; one that is switched off is dropped",
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """Several machines"""

    placement: str = option(
        "data",
        "what a process holds: all networks, and DDP sends their gradients; or its own networks alone, and only their "
        "logits travel between processes. The same numbers (miscs/together.md)",
        choices=("data", "networks"),
        resume=TAKES,
    )
    network_groups: int | None = option(
        None,
        "N of --placement networks: W processes are N groups of networks times W / N replicas",
        default_text="the largest divisor of S that divides W",
        least=1,
        resume=TAKES,
    )
    exchange: str | None = option(
        None,
        "folder, seen by all machines, through which S jobs with one network each learn from each other; made if "
        "missing. Needs --network",
        metavar="DIR",
        resume=OF_CALL,
    )
    network: int | None = option(
        None,
        "which of the S networks this job trains, counted from 0; needs --exchange",
        default_text="all",
        least=0,
        resume=SAME,
    )
    exchange_every: int = option(
        200,
        "interval at which weights are published, and newer ones of the others taken",
        unit="steps",
        least=1,
        resume=TAKES,
    )
    exchange_burn_in: int | None = option(
        None,
        "how long the network trains alone first; then the weight of what it learns from others rises as in one job",
        unit="epochs",
        default_text="as long as that weight rises",
        least=0,
        resume=TAKES,
    )
    exchange_patience: int | None = option(
        None,
        "a peer whose weights are this much older, or have not changed for so long, is not learnt from until it is "
        "heard of again",
        unit="steps",
        default_text="20 times --exchange_every",
        least=1,
        resume=TAKES,
    )
    exchange_peers: int | None = option(
        None,
        "how many of the peers a step learns from, drawn for every step",
        default_text="all",
        least=1,
        resume=TAKES,
    )
