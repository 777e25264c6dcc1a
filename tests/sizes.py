"""How large the pieces of the code are: `python tests/sizes.py [folder ...]`, from any folder.

Files over 600 lines, functions over 80 lines (without their docstring), functions with more than 8 parameters. The
parameters of public functions are counted apart: the options of attention are theirs by design.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("numba_attn", "tests", "benchmarks", "examples")
MOST_LINES, MOST_FUNCTION, MOST_PARAMETERS = 600, 80, 8
PUBLIC = ("numba_attn/api.py", "numba_attn/reference.py", "numba_attn/mask/constructors.py")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Large(NamedTuple):
    size: int
    where: str


def lines_of(function: Function) -> int:
    """Lines from def to the end, without the docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    doc = ast.get_docstring(function, clean=False)
    hidden = first.end_lineno - first.lineno + 1 if doc is not None and first.end_lineno else 0
    return function.end_lineno - function.lineno + 1 - hidden


def parameters_of(function: Function) -> int:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    return len([p for p in named if p.arg not in ("self", "cls")])


def measure(folder: str) -> dict[str, list[Large]]:
    """What is too large in a folder, the largest first."""
    found: dict[str, list[Large]] = {"files": [], "functions": [], "parameters": [], "public parameters": []}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            found["files"].append(Large(text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                where = f"{name}:{node.lineno} {node.name}"
                if lines_of(node) > MOST_FUNCTION:
                    found["functions"].append(Large(lines_of(node), where))
                if parameters_of(node) > MOST_PARAMETERS:
                    public = name in PUBLIC and not node.name.startswith("_")
                    found["public parameters" if public else "parameters"].append(Large(parameters_of(node), where))
    return {what: sorted(large, reverse=True) for what, large in found.items()}


def main(folders: list[str]) -> None:
    for folder in folders or FOLDERS:
        found = measure(folder)
        counts = ", ".join(f"{len(large)} {what}" for what, large in found.items())
        print(f"{folder}: {counts}")
        for what, large in found.items():
            for size, where in large:
                print(f"  {what:17} {size:5}  {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
