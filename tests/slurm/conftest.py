"""Four nodes of Slurm on this machine, shared by all tests of this folder; the tiny run, as the trainer's tests have it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Unavailable, start, stop
from tiny_run import data_folder, recipe_file

__all__ = ["data_folder", "recipe_file"]


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        try:
            yield start(Path(folder))
        except Unavailable as reason:
            pytest.skip(str(reason))
        finally:
            stop(Path(folder))


@pytest.fixture
def cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, all of its nodes idle before and no job left behind."""
    for name in ("PATH", "LD_LIBRARY_PATH", "SLURM_CONF"):
        if name in running_cluster.environment:
            monkeypatch.setenv(name, running_cluster.environment[name])
    running_cluster.until_idle()
    yield running_cluster
    for job in running_cluster.call("squeue", "--noheader", "--format=%i").split():
        running_cluster.call("scancel", job)
    running_cluster.until_empty()
