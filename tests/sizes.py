"""How large the pieces of the code are: `python tests/sizes.py [folder ...]`, from any folder.

Files over 600 lines, functions over 80 lines (without their docstring), functions with more than 8 parameters. The
parameters of public functions are counted apart: the options of attention are theirs by design. Then, of each folder,
the comment lines in 100 lines that are not blank, and the names of one letter in 100 names that are bound there.
"""

import ast
import io
import sys
import tokenize
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
    """Without self, and of a user's function without the score and the indices, which the library calls it with."""
    a = function.args
    named = [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs] if p.arg not in ("self", "cls")]
    return len(named) - 5 if named[:5] == ["s", "b", "h", "i", "j"] else len(named)


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


def comment_lines(text: str) -> int:
    """Lines that are a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith("#") for t in tokens)


def bound_names(tree: ast.Module) -> list[str]:
    """Each parameter and each name that is assigned, once a scope: the same name in two functions counts twice."""
    found: set[tuple[int, str]] = set()
    scopes: list[tuple[int, ast.AST]] = [(0, tree)]
    while scopes:
        scope, node = scopes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            scope = id(node)
        if isinstance(node, ast.arg):
            found.add((scope, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add((scope, node.id))
        scopes += [(scope, child) for child in ast.iter_child_nodes(node)]
    return [name for _, name in found if name != "_"]


def density(folder: str) -> str:
    """Comment lines and names of one letter, each in 100."""
    lines = comments = 0
    names: list[str] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines += sum(bool(line.strip()) for line in text.splitlines())
        comments += comment_lines(text)
        names += bound_names(ast.parse(text))
    commented = 100 * comments / max(lines, 1)
    single = 100 * sum(len(name) == 1 for name in names) / max(len(names), 1)
    return f"{lines} lines, {commented:.1f} % comments, {single:.0f} % one-letter names"


def folders_with_code(folder: str) -> list[str]:
    """The folder itself and those in it that hold Python files."""
    inside = {str(path.parent.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    return sorted(inside | {folder})


def main(folders: list[str]) -> None:
    for folder in folders or FOLDERS:
        found = measure(folder)
        counts = ", ".join(f"{len(large)} {what}" for what, large in found.items())
        print(f"{folder}: {counts}")
        for what, large in found.items():
            for size, where in large:
                print(f"  {what:17} {size:5}  {where}")
        for inside in folders_with_code(folder):
            print(f"  {density(inside)}: {inside}, with what is in it")


if __name__ == "__main__":
    main(sys.argv[1:])
