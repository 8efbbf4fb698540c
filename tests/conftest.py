"""Shared fixtures: a small demo data set, its HDF5 file; the module and the tools can be imported."""
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
    h5_file = tmp_path_factory.mktemp("h5") / "train.h5"
    return helpers.build_h5(demo_folder / "train" / "RECORDS.txt", h5_file, workers=1)
