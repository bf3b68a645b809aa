"""What methods share whose members take the place of several networks: --num_members M, one backbone, no division."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from method.contract import Method, OwnOptions
from utils.errors import UserError

# flags that need networks of their own, for methods whose members share one
MEMBERS_ARE_ONE: Mapping[str, str] = {
    "is_identical_init": "its members share one network",
    "is_train_sep": "its members share one network",
}


def refuse_several_networks(method: str, given: Mapping[str, Any]) -> None:
    """Refuse flags that ask for several networks where a method's members take their place.

    Args:
        method: its name.
        given: all that was set, by flag name.

    Raises:
        UserError: a list of backbones, or a division.
    """
    if "," in str(given.get("arch", "")):
        raise UserError(f"--method {method} takes one backbone, and --arch names several: --num_members says how many.")
    if given.get("split_factor", 1) != 1:
        raise UserError(
            f"--split_factor {given['split_factor']}: --method {method} divides nothing, its --num_members take the "
            "place of S. Leave it away."
        )


class MemberMethod(Method[OwnOptions]):
    """A method whose members are made of one backbone.

    Class attributes:
        name: of the method, for errors.
    """

    name: ClassVar[str]
    networks_from_list = False
    incompatible = MEMBERS_ARE_ONE

    @classmethod
    def implied_flags(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing; refuses several networks."""
        refuse_several_networks(cls.name, given)
        return {}

    def losses_in_sum(self) -> int:
        """One where the members' losses are averaged (--member_loss mean)."""
        return 1 if getattr(self.options, "member_loss", "sum") == "mean" else super().losses_in_sum()


def joined_losses(losses_M: Sequence[Tensor], how: str) -> Tensor:
    """The members' losses as one scalar, by --member_loss: their "sum" or their "mean"."""
    stacked_M = torch.stack([*losses_M])
    return stacked_M.sum() if how == "sum" else stacked_M.mean()
