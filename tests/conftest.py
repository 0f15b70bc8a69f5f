"""What several test files need: the training scripts importable as a user's shell runs them, and a working folder."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # each worker, and what it starts, keeps to its share of the cores: torch collapses where they are fought for
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with a space in its name, made the current one."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def one_thread():
    """Train with one thread: several may add up in another order from run to run, and the last bit goes with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
