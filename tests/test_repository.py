"""The repository stands alone: it names nothing outside itself, and what it names is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Assembled, so that this file does not find itself.
OUTSIDE = ["../" + "shared", "shared" + "/gpu", "DESIGN" + ".md", "ptx" + "emu", "/work" + "/", "/home" + "/"]
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def tracked() -> list[Path]:
    """The files of the repository: git's, or in an unpacked archive all that are not made by tools."""
    try:
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        found = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        found = [p for p in ROOT.rglob("*") if not any(part.startswith((".", "__pycache__")) for part in p.parts)]
    return [p for p in found if p.is_file() and p.suffix not in (".gz", ".png")]


FILES = tracked()


def test_files_were_found() -> None:
    assert ROOT / "README.md" in FILES and Path(__file__).resolve() in FILES


@pytest.mark.parametrize("word", OUTSIDE)
def test_nothing_outside_is_mentioned(word: str) -> None:
    found = [str(p.relative_to(ROOT)) for p in FILES if word in p.read_text(encoding="utf-8")]
    assert not found, f"{word!r} stands in {found}"


@pytest.mark.parametrize("page", [p for p in FILES if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# In prose a name in backquotes with one of these endings is a file of the repository, by its path from the root, from
# the page or from the package.
FILE = re.compile(r"`([\w./-]+\.(?:py|md|toml|cff|yaml|json|png))`")
OTHERS = {"demo.png", "digits.png"}  # what a command writes


@pytest.mark.parametrize("page", [p for p in FILES if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    folders = [ROOT, page.parent, *(p.parent for p in FILES if p.suffix == ".py")]
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        assert name in OTHERS or any((folder / name).exists() for folder in folders), f"{page.name} names {name}"


# Numbers are drawn by seeds.generator alone, in the code of child processes too, which stands in strings. Where another
# way of drawing stands in tests/: how often, and why.
DRAWS = re.compile(r"\b(?:default_rng|RandomState|Random)\(|\brandom\.seed\(|\bfrom random import|\bimport random\b")
OTHER_DRAWS = {
    "tests/seeds.py": (2, "what moves them"),
    "tests/ptx/launching.py": (1, "the order of warps by the emulator's option, which a test walks"),
}


def test_every_seed_is_moved_by_one_variable() -> None:
    found = {}
    for path in (p for p in FILES if p.suffix == ".py" and p.is_relative_to(ROOT / "tests") and p != Path(__file__)):
        if draws := DRAWS.findall(path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = len(draws)
    assert found == {name: n for name, (n, _) in OTHER_DRAWS.items()}
