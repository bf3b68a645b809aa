"""What a resumed run makes of what has changed since: flags, the data, the number of steps in an epoch. Ours.

What becomes of a flag stands at its field (`utils.options.option(..., resume=...)`); here the two runs are compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from record.checkpoint import Checkpoint
from utils.errors import UserError
from utils.options import OF_CALL, SAME, TAKES


@dataclass
class Position:
    """Where training stands. All count from 0.

    Attributes:
        epoch, batch: the next epoch, and the next batch in it.
        step: place in the schedule: `epoch` whole epochs of today's number of steps, and `batch`.
        done: batches trained on in all; differs from `step` where the number of steps in an epoch has changed.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How an epoch is made of batches.

    Attributes:
        steps_per_epoch: batches.
        global_batch: images of a batch over all processes.
        images: of training, without what is held out.
        names: hash of the names of all training images; "" where they have none.
        val_fraction: part of the training set that is held out.
        test_fraction: part of the images that a hash of their names has drawn for the test; 0: the split is the data's.
    """

    steps_per_epoch: int
    global_batch: int
    images: int
    names: str = ""
    val_fraction: float = 0.0
    test_fraction: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def before(cls, state: Checkpoint, now: "Pace") -> Self:
        """That of the run before; of checkpoints that do not say it (written before this version), worked out.

        Args:
            now: of this run, whose data an older checkpoint is taken to be of.
        """
        stored = state.get("pace")
        if stored is not None:
            return cls(**stored)
        config, place = state["config"], state["sampler"]
        # one node is assumed, as such a checkpoint does not say how many there were
        global_batch = int(config["batch_size"])
        whole, rest = divmod(now.images, global_batch)
        steps = whole + (rest > 0 and (not config.get("drop_last", True) or not whole))
        if place["epoch"] > 0:  # its own count is better than ours
            steps = (place["step"] - place["batch"]) // place["epoch"] or steps
        return cls(
            steps_per_epoch=steps,
            global_batch=global_batch,
            images=now.images,
            val_fraction=float(config.get("val_fraction", 0.0)),
        )


def changed_flags(
    before: Mapping[str, Any], now: Mapping[str, Any], choices: Mapping[str, str | None], origins: Mapping[str, str]
) -> list[str]:
    """What a resumed run has other flags for than the run before, as "lr 0.1 → 0.5 (flag)".

    Args:
        before, now: values by flag name, as plain data; what only one of them has is passed over.
        choices: what a resume does, by flag name.
        origins: where the values of now come from.

    Raises:
        UserError: a flag that must be as it was.
    """
    changed = []
    for name in now:
        choice = choices.get(name)
        if name not in before or choice == OF_CALL or _are_alike(before[name], now[name]):
            continue
        if choice == SAME:
            raise UserError(
                f"--resume: the checkpoint is of a run with --{name} {_shown(before[name])}, "
                f"and this one has --{name} {_shown(now[name])}: that would not be the same run. "
                "Start anew, with --pretrained for its weights."
            )
        happens = "" if choice in (None, TAKES) else f": {choice}"
        changed.append(f"{name} {_shown(before[name])} → {_shown(now[name])} ({origins.get(name, 'default')}{happens})")
    return changed


def _are_alike(before: Any, now: Any) -> bool:
    """Whether two values of a flag mean the same; one that takes `auto` today may have been 0 or 1 alone."""
    return bool(before == now or (isinstance(before, bool) and isinstance(now, str) and _shown(before) == now))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def check_classes(before: list[str] | None, now: tuple[str, ...]) -> None:
    """Refuse data of other classes than the run before has learnt.

    Raises:
        UserError: the line names the first class that differs.
    """
    if before is None or list(before) == list(now):
        return
    if len(before) != len(now):
        raise UserError(f"--resume: the run before has learnt {len(before)} classes, and --data has {len(now)}.")
    at = next(i for i, name in enumerate(now) if name != before[i])
    raise UserError(
        f"--resume: class {at} is {now[at]!r} in --data and {before[at]!r} in the checkpoint: the classes must be the "
        "same ones, in the same order."
    )


def _test_part(pace: Pace) -> str:
    return f"{pace.test_fraction:g} of the images by a hash" if pace.test_fraction else "the data's own split"


def position_now(place: Mapping[str, int], before: Pace, now: Pace, *, order_follows_batches: bool) -> Position:
    """Where a run goes on, after the same share of training, whatever the number of steps in an epoch is now.

    Args:
        place: epoch, batch, step and, in newer checkpoints, done.
        before, now: how an epoch was and is made.
        order_follows_batches: the order of the images depends on the size of a batch.

    Raises:
        UserError: within an epoch that cannot be entered at the same image, or other images would be held out.
    """
    epoch, batch, step = (int(place[key]) for key in ("epoch", "batch", "step"))
    done = int(place.get("done", step))
    other_images = before.images != now.images or bool(before.names and now.names and before.names != now.names)
    if before.test_fraction != now.test_fraction:
        raise UserError(
            f"--test_fraction: the run before tested on {_test_part(before)}, and this one would on {_test_part(now)}, "
            "some of which were trained on."
        )
    # what a hash of names has drawn stays where it is when images come or go
    is_stable = bool(now.test_fraction)
    others = other_images and not is_stable
    if (before.val_fraction or now.val_fraction) and (others or before.val_fraction != now.val_fraction):
        raise UserError(
            f"--val_fraction {now.val_fraction:g}: other images would be held out than before (the run before: "
            f"--val_fraction {before.val_fraction:g} of the training images it had), and some of them were trained on."
        )
    same = (before.steps_per_epoch, before.global_batch) == (now.steps_per_epoch, now.global_batch)
    if same and not (other_images and 0 < batch < before.steps_per_epoch):
        return Position(epoch, batch, step, done)
    if batch in (0, before.steps_per_epoch):
        batch = now.steps_per_epoch if batch else 0
        return Position(epoch, batch, epoch * now.steps_per_epoch + batch, done)
    where = f"--resume: the run before was stopped within epoch {epoch + 1}, after {batch * before.global_batch} images"
    if other_images:
        raise UserError(
            f"{where} of {before.images}, and the training images are other ones now ({now.images}): go on from a "
            "checkpoint of whole epochs, --resume PATH."
        )
    whole, rest = divmod(batch * before.global_batch, now.global_batch)
    if rest or order_follows_batches or whole > now.steps_per_epoch:
        why = "whose order depends on the size of a batch" if order_follows_batches else "which no whole batches make"
        raise UserError(
            f"{where}, {why} (--batch_size: {before.global_batch} images in all then, {now.global_batch} now): keep "
            "the size to the end of the epoch, or go on from a checkpoint of whole epochs, --resume PATH."
        )
    return Position(epoch, whole, epoch * now.steps_per_epoch + whole, done)
