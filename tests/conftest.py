"""What pytest needs to know beyond pyproject.toml: a marker for tests that start processes, and --quick."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip the tests marked slow or processes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: starts fresh Python processes, some of which compile")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="--quick")
        for item in items:
            if "slow" in item.keywords or "processes" in item.keywords:
                item.add_marker(skip)
