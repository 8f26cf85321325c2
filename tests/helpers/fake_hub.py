"""A model hub in memory: what huggingface_hub would send is kept, nothing leaves the machine.

Replaced is the network edge alone: commits, and questions about repositories and files. Which files of a folder are
sent, and what is asked and written before, is huggingface_hub's and SAELens's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub import hf_api as hub_api
from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError


class FakeHub:
    """Repositories by name, files of each by path; and the paths in the order in which they came."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.order: list[str] = []

    def create_repo(self, repo_id: str, exist_ok: bool = False) -> None:
        if repo_id in self.repositories and not exist_ok:
            raise ValueError(f"{repo_id} exists already")
        self.repositories.setdefault(repo_id, {})

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        if repo_id not in self.repositories:
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError(f"404: {repo_id}", response=response)
        return SimpleNamespace(id=repo_id)

    def file_exists(self, repo_id: str, path: str) -> bool:
        return path in self.repositories.get(repo_id, {})

    def commit(self, repo_id: str, operations: Iterable[Any], message: str) -> CommitInfo:
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            with operation.as_file() as file:
                self.repositories[repo_id][operation.path_in_repo] = file.read()
            self.order.append(operation.path_in_repo)
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid="0")


def replace_the_network(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub that huggingface_hub and SAELens's upload meet from now on."""
    hub = FakeHub()
    upload = importlib.import_module("sae_lens.training.upload_saes_to_huggingface")

    def create_commit(self: Any, repo_id: str, operations: Any, *, commit_message: str, **others: Any) -> CommitInfo:
        return hub.commit(repo_id, operations, commit_message)

    def metadata_of(url: str, **others: Any) -> None:
        owner, name, _, _, *path = url.removeprefix("https://huggingface.co/").split("/")
        if not hub.file_exists(f"{owner}/{name}", "/".join(path)):
            raise EntryNotFoundError(f"404: {url}")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **others: hub.create_repo(repo_id, **others))
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id, **others: hub.repo_info(repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, path, **others: hub.file_exists(repo_id, path))
    monkeypatch.setattr(upload, "create_repo", hub.create_repo)
    monkeypatch.setattr(upload, "get_hf_file_metadata", metadata_of)
    # Large files then go with the commit, instead of by a protocol of their own.
    monkeypatch.setattr(hub_api, "is_xet_available", lambda: False, raising=False)
    return hub
