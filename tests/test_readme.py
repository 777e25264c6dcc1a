"""The README promises what its Python blocks do: they run here, in order, in one namespace, as a reader types them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> int:
    """Run the Python blocks of a page of Markdown in one namespace; their number."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {}
    found = list(BLOCK.finditer(text))
    for block in found:
        line = text.count("\n", 0, block.start(1))
        # Blank lines in front, so that a traceback points at the line of the page.
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    return len(found)


def test_python_blocks_run() -> None:
    assert run_blocks(README) >= 4


@pytest.mark.parametrize("command", ["numba-attn demo", "python -m pytest"])
def test_setup_commands_need_only_python(command: str) -> None:
    lines = [x for x in README.read_text(encoding="utf-8").splitlines() if x.endswith("/" + command)]
    assert len(lines) == 1 and lines[0].startswith("python3 -m venv ")
