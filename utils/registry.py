"""Name -> object tables. A new backbone, data set or method registers itself from its own file."""

import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from utils.errors import UserError

T = TypeVar("T")
Resolver = TypeVar("Resolver", bound=Callable[[str], Any])
Lister = TypeVar("Lister", bound=Callable[[], Iterable[str]])


NEAR = 5  # names that stand for a long list of them


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
        index: module of the package -> the names that it registers, none for one that has only resolvers. Names of
            listed modules are known, and misspelt ones refused, without importing them, which may take seconds; a
            module that is not listed is imported for that.
    """

    def __init__(
        self, kind: str, flag: str, package: str, also: str = "", index: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.kind = kind
        self.flag = flag
        self.package = package
        self.also = also
        self.index = {module: tuple(names) for module, names in (index or {}).items()}
        self._home = {name: module for module, names in self.index.items() for name in names}
        self._items: dict[str, T] = {}
        self._resolvers: list[Callable[[str], T | None]] = []
        self._listers: list[Callable[[], Iterable[str]]] = []
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

    def add_lister(self, names: Lister) -> Lister:
        """Decorator: `names` tells the names that a resolver knows, as far as they can be told; see `matching`."""
        self._listers.append(names)
        return names

    def _modules(self) -> list[str]:
        package = importlib.import_module(self.package)
        return sorted(info.name for info in pkgutil.iter_modules(package.__path__))

    def load(self) -> None:
        """Import every module of the package once, so that all of them have registered."""
        if self._loaded:
            return
        self._loaded = True
        for module in self._modules():
            importlib.import_module(f"{self.package}.{module}")

    def _load_unlisted(self) -> None:
        """Import what the index does not tell of; nothing where it is complete."""
        if not self._loaded:
            for module in set(self._modules()) - set(self.index):
                importlib.import_module(f"{self.package}.{module}")

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._load_unlisted()
        return sorted({*self._items, *self._home})

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, object) pairs in sorted order."""
        self.load()
        for name in sorted(self._items):
            yield name, self._items[name]

    def matching(self, pattern: str) -> list[str]:
        """Registered names, then those of libraries, that a shell's pattern fits, as a whole or behind the last slash.

        Imports every module of the package, and what the listers ask.
        """
        self.load()
        known = [*self.names(), *(name for names in self._listers for name in sorted(names()))]
        return [name for name in known if any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition("/")[2]))]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._home or name in self.names()

    def get(self, name: str) -> T:
        """The object filed under `name`.

        Raises:
            UserError: no such name; the message names the flag, the nearest name and all the known ones.
        """
        if name not in self._items and name in self._home:
            importlib.import_module(f"{self.package}.{self._home[name]}")
        if name not in self._items:
            self.load()
        if name in self._items:
            return self._items[name]
        for resolve in self._resolvers:
            found = resolve(name)
            if found is not None:
                return found
        raise self.unknown(name)

    def unknown(self, name: str) -> UserError:
        """What to say of a name that is not here: all the known ones, of many the near ones of the nearest's family."""
        known, near = self.names(), self.near(name)
        if len(known) <= 2 * NEAR:
            shown = f"Known: {', '.join(known)}"
        else:
            shown = f"Near: {', '.join(near)}" if near else f"--help lists all {len(known)}"
        return UserError(
            f"{self.flag} {name!r} is not a known {self.kind}.{nearest_name(name, known)} "
            f"{shown}{f'; also {self.also}' if self.also else ''}."
        )

    def near(self, name: str) -> list[str]:
        """Up to five names that are like this one, those of the nearest one's module first; none for gibberish."""
        likely = difflib.get_close_matches(name, self.names(), n=len(self.names()), cutoff=0.4)
        family = self._home.get(likely[0]) if likely else None
        return sorted(likely, key=lambda other: self._home.get(other) != family)[:NEAR]
