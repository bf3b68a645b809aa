"""Optional packages that flags ask for: what each is called, and the line that installs it. Imports none of them."""

from importlib.util import find_spec

from utils.errors import UserError

# --sink -> (module, what pip installs for it, as the extra of that name in pyproject.toml)
SINK_PACKAGES = {"wandb": ("wandb", "wandb>=0.17"), "mlflow": ("mlflow", "mlflow>=2.14")}


def check_sink(name: str) -> None:
    """Refuse a sink whose package is missing.

    Raises:
        UserError: with the line that installs it.
    """
    module, requirement = SINK_PACKAGES[name]
    if find_spec(module) is None:
        raise UserError(
            f"--sink {name} needs the package {module}, which is not installed: pip install '{requirement}'."
        )
