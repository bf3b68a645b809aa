"""Name -> object tables. A new backbone, data set or method registers itself from its own file."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from utils.errors import UserError

T = TypeVar("T")
Resolver = TypeVar("Resolver", bound=Callable[[str], Any])


def nearest_name(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a misspelt name, or an empty string where nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


class Registry(Generic[T]):
    """A table of named things of one kind, filled by importing every module of a package.

    Names that nobody has to list, such as those of a library, are made by resolvers when they are asked for.

    Args:
        kind: what the table holds, as users say it ("backbone"); used in error messages.
        flag: the command-line flag that takes the name ("--arch").
        package: dotted package whose modules register themselves; imported on the first look-up.
        also: what a name may be besides the registered ones, for error messages.
    """

    def __init__(self, kind: str, flag: str, package: str, also: str = "") -> None:
        self.kind = kind
        self.flag = flag
        self.package = package
        self.also = also
        self._items: dict[str, T] = {}
        self._resolvers: list[Callable[[str], T | None]] = []
        self._loaded = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that files one object under each of the names; a name taken already is an error."""

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise KeyError(f"{self.kind} {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def add(self, name: str, item: T) -> None:
        """File `item` under `name`."""
        self.register(name)(item)

    def add_resolver(self, resolve: Resolver) -> Resolver:
        """Decorator: `resolve` is asked about names that nobody registered, and gives None for those not its own."""
        self._resolvers.append(resolve)
        return resolve

    def load(self) -> None:
        """Import every module of the package once, so that all of them have registered."""
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self.package}.{module}")

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self.load()
        return sorted(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, object) pairs in sorted order."""
        for name in self.names():
            yield name, self._items[name]

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._items

    def get(self, name: str) -> T:
        """The object filed under `name`.

        Raises:
            UserError: no such name; the message names the flag, the nearest name and all the known ones.
        """
        self.load()
        if name in self._items:
            return self._items[name]
        for resolve in self._resolvers:
            found = resolve(name)
            if found is not None:
                return found
        raise UserError(
            f"{self.flag} {name!r} is not a known {self.kind}.{nearest_name(name, self._items)} "
            f"Known: {', '.join(sorted(self._items))}{f', {self.also}' if self.also else ''}."
        )
