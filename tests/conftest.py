"""What pytest needs to know beyond pyproject.toml: two markers, --quick, --ladder and --share."""

import pytest
import seeds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip the tests marked slow or processes")
    parser.addoption("--ladder", action="store_true", help="also the CUDA tests that take hours in the emulator")
    parser.addoption(
        "--share", type=int, default=1, metavar="N", help="every N-th test, others for another NUMBA_ATTN_TEST_SEED"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: starts fresh Python processes, some of which compile")
    config.addinivalue_line("markers", "ladder: part of the CUDA kernels' whole verification; runs with --ladder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    n = config.getoption("--share")
    if n < 1:
        raise pytest.UsageError(f"--share is {n}; it takes a whole number of at least 1")
    items[:] = items[seeds.SHIFT % n :: n]
    if not config.getoption("--ladder"):
        hours = pytest.mark.skip(reason="takes long in the emulator: --ladder")
        for item in items:
            if "ladder" in item.keywords:
                item.add_marker(hours)
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="--quick")
        for item in items:
            if "slow" in item.keywords or "processes" in item.keywords:
                item.add_marker(skip)
