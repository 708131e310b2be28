"""Settings that hold for every test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# On a busy machine any example may take seconds.
hypothesis.settings.register_profile("without a deadline", deadline=None)
hypothesis.settings.load_profile("without a deadline")
# Before torch is imported: spinning threads make a small test on a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without what only makes a CPU faster, tests of that have nothing to test. Those by hand are asked for by name."""
    from gadcore.kernels.cpu import native

    reason = native.why_missing("cpu_linear_logprob")
    asked = "by_hand" in config.getoption("markexpr")
    for item in items:
        if reason is not None and item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("by_hand") and not asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run it by -m by_hand"))


class FailuresAtOnce:
    """Says why a test failed as it fails: the summary at the end is lost with a session that is killed before it."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            self._terminal.write_line(f"\n{report.nodeid} ({report.when}): {why[-1000:]}")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    if (terminal := plugins.get_plugin("terminalreporter")) is not None:
        plugins.register(FailuresAtOnce(terminal))


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for the tests of one module, deleted after the last of them: the runs of all modules together would
    ask for gigabytes of disk."""
    folder = tmp_path_factory.mktemp(request.path.stem)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
