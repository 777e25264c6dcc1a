"""The examples in the docstrings run and print what they say; the pages' Python runs too."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from test_readme import run_blocks

import numba_attn as na

DOCS = Path(__file__).resolve().parent.parent / "docs"

# What needs a GPU's compiler to be imported has no examples.
MODULES = [
    m.name for m in pkgutil.walk_packages(na.__path__, "numba_attn.") if not m.name.startswith("numba_attn.cuda")
]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_examples_of_a_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", na.__all__)
def test_public_names_have_an_example(name: str) -> None:
    """All but the records that a function of the same page makes."""
    thing = getattr(na, name)
    if inspect.ismodule(thing) or name in ("Gradients", "Pullback", "ScoreMod", "where"):
        pytest.skip("shown where it is made")
    assert ">>> " in (inspect.getdoc(thing) or ""), f"{name} has no example"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path) -> None:
    run_blocks(page)
