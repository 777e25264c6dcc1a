"""The examples in the docstrings run and print what they say; the pages' Python runs too."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from test_readme import run_blocks

import numba_attn as na
from numba_attn import mask, options

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


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.parametrize("name", sorted(set(na.__all__) - {"ScoreMod", "reference"}))
def test_public_names_have_a_place_on_the_page(name: str) -> None:
    """ScoreMod is made by score_mod alone. The page has the functions of `reference`."""
    assert re.search(rf"^\.\. auto\w+:: {name}$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE), (
        f"docs/api.md does not have {name}"
    )


@pytest.mark.parametrize("name", sorted(set(mask.__all__) - {"Mask"}))
def test_masks_are_named_where_a_reader_looks(name: str) -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    places = {
        "the line 'mask' of the README's table": next(x for x in readme.splitlines() if x.startswith("| mask |")),
        "the meaning of mask in numba_attn/options.py": options.options_of(options.Options)["mask"].meaning,
        "the docstring of Mask": inspect.getdoc(na.Mask) or "",
    }
    for place, text in places.items():
        assert name in names_in(text), f"{place} does not name {name}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path) -> None:
    run_blocks(page)
