import shutil

import pytest
import torch

from meswitch import Artifact
from meswitch.slots import ExpertStore
from tests.support.slow_disk import Disk


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def own(deltas, tmp_path):
    """Artifacts of the family in directories that a test may damage."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in deltas.items()}


@pytest.fixture
def open_store():
    """A store over directories, by name, that notices when they are replaced."""
    opened = []

    def make(directories, *, watch=True, **options):
        artifacts = {name: Artifact.open(path) for name, path in directories.items()}
        store = ExpertStore(artifacts, **{"device": torch.device("cpu"), "slots": 2} | options)
        if watch:
            store.watch()
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()
