"""A `huggingface_hub` of one repository, put in the real one's place."""

import fnmatch
import sys
import types
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0ffee"


class FakeHub:
    """Files by name, with their content; `calls` is what was asked of it.

    configs: of a data set's card. error: the name of what every request for the repository raises;
    one that the client does not have is a ConnectionError.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        files: dict[str, str],
        configs: Any = None,
        error: str | None = None,
    ) -> None:
        self.files, self.configs, self.error, self.calls = files, configs, error, []
        errors = types.ModuleType("huggingface_hub.errors")
        missing = type("RepositoryNotFoundError", (Exception,), {})
        self.errors = {
            "RepositoryNotFoundError": missing,
            "GatedRepoError": type("GatedRepoError", (missing,), {}),
            "RevisionNotFoundError": type("RevisionNotFoundError", (Exception,), {}),
        }
        vars(errors).update(self.errors)
        hub = types.ModuleType("huggingface_hub")
        vars(hub).update(
            errors=errors, repo_info=self.repo_info, snapshot_download=self.snapshot_download
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    def repo_info(self, repo: str, repo_type: str, revision: str | None) -> Any:
        self.calls.append((repo_type, repo, revision))
        if self.error:
            raise self.errors.get(self.error, ConnectionError)("no route\n to host")
        card = types.SimpleNamespace(to_dict=lambda: {"configs": self.configs, "license": "mit"})
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.files]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings, card_data=card)

    def snapshot_download(
        self, repo: str, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> None:
        assert revision == COMMIT  # the branch may have moved on
        wanted = [n for n in self.files if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        self.calls.append(wanted)
        for name in wanted:
            path = local_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.files[name])
