"""Shared fixtures: the module under test, a small demo data set, the reference outputs."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ecg_helpers as helpers  # noqa: E402


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A codesubset/ of 48 + 16 synthetic exams. Read only: copy what a test changes."""
    return helpers.make_demo_codesubset(tmp_path_factory.mktemp("demo"), n_train=48, n_test=16)


@pytest.fixture(scope="session")
def demo_h5(demo_folder, tmp_path_factory):
    """train.h5 of the demo data. Read only."""
    return helpers.build_h5(demo_folder / "train" / "RECORDS.txt", tmp_path_factory.mktemp("h5") / "train.h5", workers=1)
