"""Which tests may be skipped. With `--no-skips` a test that is skipped fails, unless this machine lacks what cannot be
installed on it for a test. A run ends with one line that says what was skipped and why.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest


def _lacks_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or " avx2" not in cpuinfo.read_text()


def _cannot_isolate() -> bool:
    from tasks.sandbox import isolation_available

    return isolation_available()[0] == "none"


def _not_installed(module: str) -> Callable[[], bool]:
    return lambda: find_spec(module) is None


# (pattern of a reason, whether it is true of this machine). Libraries of gigabytes are not installed for a test.
LEGITIMATE: list[tuple[str, Callable[[], bool]]] = [
    (r"needs AVX2", _lacks_avx2),
    (r"needs the CUDA plugin", _not_installed("jax_cuda12_plugin")),
    (r"could not import 'torch'", _not_installed("torch")),
    (r"could not import 'lm_eval'", _not_installed("lm_eval")),
    (r"could not import 'tenacity'", _not_installed("tenacity")),  # of lm-eval[api]
    (r"needs Linux", lambda: sys.platform != "linux"),
    (r"needs isolation", _cannot_isolate),
    (r"tested as auto, or not allowed here", lambda: True),
    (r"root is exempt from the limit on processes", lambda: True),
    (r"this jaxlib comes without its header", lambda: True),
]
NOT_BUILT = "rustbpe is not built: install the project with `pip install .`"


def is_legitimate(reason: str) -> bool:
    return any(re.search(pattern, reason) and holds() for pattern, holds in LEGITIMATE)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why the test or module was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class SkipPolicy:
    """A pytest plugin: `--no-skips`, skips for want of `rustbpe`, and the closing line."""

    def __init__(self, forbidden: bool):
        self.forbidden = forbidden
        self.skipped: Counter[str] = Counter()

    def _check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if self.forbidden and report.skipped and not hasattr(report, "wasxfail") and not is_legitimate(_reason(report)):
            report.outcome = "failed"
            report.longrepr = f"--no-skips: this test should run here and was skipped: {_reason(report)}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None and _is_rustbpe_missing(call.excinfo.value):
            call.excinfo = pytest.ExceptionInfo.from_exc_info(_skip_error())
        report = yield
        self._check(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        self._check(report)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped[_reason(report)] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped[_reason(report)] += 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.skipped.most_common())
        terminalreporter.write_line(f"skipped: {reasons or 'nothing'}")


def pytest_addoption(parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail skipped tests, unless tests/skips.py allows it")


def pytest_configure(config) -> None:
    config.pluginmanager.register(SkipPolicy(config.getoption("no_skips")), "skip_policy")


def _is_rustbpe_missing(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "rustbpe"


def _skip_error():
    try:
        pytest.skip(NOT_BUILT)
    except BaseException:
        return sys.exc_info()
