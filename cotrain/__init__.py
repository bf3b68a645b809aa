"""The project for other projects: `from cotrain import load, divide, SplitNet, losses, methods`.

In the repository this lies beside the other rooms; an installed wheel has them all below this one name. The names are
made when they are first asked for, so that the commands answer `--help` without waiting for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cotrain.losses as losses
    from evaluation.loading import load
    from method import methods
    from model import SplitNet
    from model.divide import divide

__all__ = ["SplitNet", "divide", "load", "losses", "methods"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    import cotrain.losses as losses
    from evaluation.loading import load
    from method import methods
    from model import SplitNet
    from model.divide import divide

    globals().update(SplitNet=SplitNet, divide=divide, load=load, losses=losses, methods=methods)
    return globals()[name]
