"""The rooms of the package: an import goes to the same room or to one below it, and no two files import each other.

Imports inside functions count too, as do those that only a type checker reads.
"""

import ast
from pathlib import Path

import pytest

import numba_attn

PACKAGE = Path(numba_attn.__file__).parent

# From the top down. A room is a folder, or a module of the package itself. Rooms of one line do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("app",),
    ("__init__",),
    ("api",),
    ("dispatch",),
    ("cpu/launch", "cuda/host", "dense"),
    ("reference", "cpu", "cuda"),
    ("gradients",),
    ("plan",),
    ("options",),
    ("mask",),
    ("userfn",),
    ("arrays", "online", "philox", "cache"),
)
FLOOR = {room: len(FLOORS) - n for n, rooms in enumerate(FLOORS) for room in rooms}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name without the package's own, a package as its __init__."""
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


MODULES = files()


def room_of(module: str) -> str:
    parts = module.split(".")
    return max((room for room in FLOOR if room.split("/") == parts[: room.count("/") + 1]), key=len)


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module names in an import statement."""
    found = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            elif node.module and node.module.split(".")[0] == "numba_attn":
                base = node.module.split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            for name in node.names:
                inner = ".".join([*base, name.name])  # a module, a package, or a name in one of the two
                places = inner, f"{inner}.__init__", ".".join(base), ".".join([*base, "__init__"])
                found.add(next(place for place in places if place in MODULES))
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "numba_attn":
                    inner = ".".join(name.name.split(".")[1:])
                    found.add(inner if inner in MODULES else ".".join(filter(None, [inner, "__init__"])))
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_every_module_is_in_a_room() -> None:
    assert {room_of(m) for m in MODULES} == set(FLOOR)
    assert sum(map(len, IMPORTS.values())) > 100, "the imports were not read"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    own = room_of(module)
    for other in IMPORTS[module]:
        room = room_of(other)
        assert room == own or FLOOR[room] < FLOOR[own], f"{module} imports {other}, which is not below it"


def test_no_circle() -> None:
    left = dict(IMPORTS)
    while bottom := [m for m, below in left.items() if not below & left.keys()]:
        for module in bottom:
            del left[module]
    assert not left, f"these import each other: {left}"
