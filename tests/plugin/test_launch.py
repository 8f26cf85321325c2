"""How processes meet that torchrun has started, and started again."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from saelens_asi.plugin import launch


@pytest.fixture
def server() -> dist.TCPStore:
    """What torchrun keeps for all starts of its processes."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def _meet(server: dist.TCPStore, order: list[str]) -> set[str]:
    """Names that processes agree on which call themselves by these, the first of them as the first; begun in order."""
    ranks = {name: rank for rank, name in enumerate(sorted(order))}

    def join(name: str) -> str:
        store = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=30))
        return launch._name_of_start(store, ranks[name], len(order), name)

    with ThreadPoolExecutor(len(order)) as pool:
        return set(pool.map(join, order))


def test_processes_that_live_agree_whatever_earlier_ones_left(server):
    assert _meet(server, ["a0", "a1", "a2"]) == {"a0"}
    assert _meet(server, ["b2", "b1", "b0"]) == {"b0"}, "the first comes last, after others saw the start before"
    server.set("start", "c0")  # a first process that ended before the others came
    server.set("c0 1", "c1")
    assert _meet(server, ["d1", "d0"]) == {"d0"}


def test_a_start_that_never_comes_is_an_error(server, monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", 0.1)
    monkeypatch.setattr(launch, "_LOOK", 0.05)
    server.set("start", "gone")
    with pytest.raises(TimeoutError, match=r"process 1 of 2 waited 0\.1 s for the others"):
        launch._name_of_start(server, 1, 2, "here")


def test_each_run_is_told_what_its_first_start_was_given(server, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(launch, "_rendezvous", lambda: (server, 0, 1))

    def start(own: str, *values: Any) -> list[Any]:
        monkeypatch.setattr(launch, "_OWN", own)
        monkeypatch.setattr(launch, "_runs", itertools.count())
        return [launch.of_first_start(value) for value in values]

    assert start("first", {"folder": "a"}) == [None]
    assert start("second", {"folder": "b"}, {"folder": "c"}) == [{"folder": "a"}, None]
    assert start("third", {"folder": "d"}, {"folder": "e"}) == [{"folder": "a"}, {"folder": "c"}]
    assert json.loads(server.get("run 0"))[0] == "first"


def test_without_torchrun_no_start_is_a_second_one(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launch.of_first_start({"folder": "a"}) is None
