#!/usr/bin/env python3
# /// script
# dependencies = ["nox>=2025.5"]
# ///
"""The tasks of the project: `nox -l` lists them, `nox -s quick` runs one in an environment of its own."""

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "venv"


@nox.session(default=False)
def tests(session: nox.Session) -> None:
    """All tests of the CPU."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """The tests that take seconds."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "--quick", *session.posargs)


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """The tests with each minor version of Numba, which makes environments of its own: -- --part sample."""
    session.run("python", "tests/versions.py", *session.posargs)


@nox.session(default=False)
def cuda(session: nox.Session) -> None:
    """The CUDA kernels: compiled, assembled, run in the emulator."""
    session.install("-e", ".[test,ladder]")
    session.run("python", "-m", "pytest", "tests/cuda", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff and mypy, as pre-commit runs them."""
    session.install("-e", ".[test,dev]")
    session.run("pre-commit", "run", "--all-files", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The site, into docs/_build; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", "docs/_build", *session.posargs)


@nox.session(default=False)
def doctest(session: nox.Session) -> None:
    """The examples of the docstrings."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "tests/test_docs.py", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The asv suite on this checkout."""
    session.install("-e", ".[bench]")
    session.run("asv", "run", "-E", "existing", *session.posargs)


if __name__ == "__main__":
    nox.main()
