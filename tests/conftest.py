"""Shared fixtures: the module under test, a small demo data set, the reference outputs."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import ecg_helpers as helpers  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are fastest with one thread, and sums come out alike on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A codesubset/ of 48 + 16 synthetic exams. Read only: copy what a test changes."""
    return helpers.make_demo_codesubset(tmp_path_factory.mktemp("demo"), n_train=48, n_test=16)


@pytest.fixture(scope="session")
def demo_h5(demo_folder, tmp_path_factory):
    """train.h5 of the demo data. Read only."""
    return helpers.build_h5(demo_folder / "train" / "RECORDS.txt", tmp_path_factory.mktemp("h5") / "train.h5", workers=1)


def pytest_terminal_summary(terminalreporter, config):
    """With `--faults`: a table of the faults that were provoked, what must happen, and how it ended."""
    if not config.getoption("--faults"):
        return
    rows = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if report.when == "call" and report.nodeid in config.stash[DOCS]:
                rows.setdefault(report.nodeid.split("[")[0], []).append(outcome)
    terminalreporter.section("faults provoked")
    for number, (name, outcomes) in enumerate(sorted(rows.items()), 1):
        said = next(doc for node, doc in config.stash[DOCS].items() if node.split("[")[0] == name)
        terminalreporter.write_line(f"{number:3d}. {said}  ({name.split('::')[1]}: {outcomes.count('passed')} of {len(outcomes)})")


DOCS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--faults", action="store_true", help="end with a table of the faults that were provoked")


def pytest_collection_modifyitems(config, items):
    """Remember what each test says of itself: its docstring's first line, else its name."""
    said = {item.nodeid: (item.function.__doc__ or "").strip() or item.originalname[5:].replace("_", " ")
            for item in items if hasattr(item, "function")}
    config.stash[DOCS] = {node: text.splitlines()[0] for node, text in said.items()}
