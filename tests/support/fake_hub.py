"""A `huggingface_hub` of one repository, put in the real one's place; and, for the real one, a hub
on this machine.
"""

import base64
import contextlib
import fnmatch
import http.server
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0ffee"


class FakeHub:
    """Files by name, with their content; `calls` is what was asked of it.

    configs: of a data set's card. error: the name of what every request for the repository raises;
    one that the client does not have is a ConnectionError.

    For pushes: `who` the token is of, `repositories` that are there with whether they are private,
    `pushed` files by name, and `fails`, what a function of the client raises, by its name.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        files: dict[str, str],
        configs: Any = None,
        error: str | None = None,
    ) -> None:
        self.files, self.configs, self.error, self.calls = files, configs, error, []
        self.who: dict[str, Any] = {"name": "me", "orgs": [{"name": "Our-Lab"}]}
        self.repositories: dict[str, bool] = {}
        self.pushed: dict[str, bytes] = {}
        self.fails: dict[str, Exception] = {}
        errors = types.ModuleType("huggingface_hub.errors")
        missing = type("RepositoryNotFoundError", (Exception,), {})
        self.errors = {
            "RepositoryNotFoundError": missing,
            "GatedRepoError": type("GatedRepoError", (missing,), {}),
            "RevisionNotFoundError": type("RevisionNotFoundError", (Exception,), {}),
            "LocalTokenNotFoundError": type("LocalTokenNotFoundError", (EnvironmentError,), {}),
            "HFValidationError": type("HFValidationError", (ValueError,), {}),
        }
        vars(errors).update(self.errors)
        hub = types.ModuleType("huggingface_hub")
        vars(hub).update(
            errors=errors,
            repo_info=self.repo_info,
            snapshot_download=self.snapshot_download,
            whoami=self.whoami,
            create_repo=self.create_repo,
            upload_folder=self.upload_folder,
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    def repo_info(self, repo: str, repo_type: str, revision: str | None) -> Any:
        self.calls.append((repo_type, repo, revision))
        if self.error:
            raise self.errors.get(self.error, ConnectionError)("no route\n to host")
        self._fail("repo_info")
        if not self.files and repo not in self.repositories:
            raise self.errors["RepositoryNotFoundError"]("404")
        card = types.SimpleNamespace(to_dict=lambda: {"configs": self.configs, "license": "mit"})
        siblings = [types.SimpleNamespace(rfilename=name) for name in self.files]
        private = self.repositories.get(repo, False)
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings, card_data=card, private=private)

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

    def _fail(self, name: str) -> None:
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict[str, Any]:
        self._fail("whoami")
        return self.who

    def create_repo(self, repo: str, private: bool, repo_type: str, exist_ok: bool) -> None:
        assert repo_type == "model" and exist_ok
        self._fail("create_repo")
        self.repositories.setdefault(repo, private)  # of one that is there nothing changes

    def upload_folder(
        self,
        repo_id: str,
        folder_path: Path,
        repo_type: str,
        commit_message: str,
        allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> Any:
        self._fail("upload_folder")
        assert repo_id in self.repositories and repo_type == "model" and commit_message
        files = {
            name: path.read_bytes()
            for path in folder_path.rglob("*")
            if path.is_file()
            and (name := str(path.relative_to(folder_path)))
            and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        }
        for name in list(self.pushed):
            stale = any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns)
            if stale and name not in files:
                del self.pushed[name]
        self.calls.append(sorted(name for name in files if self.pushed.get(name) != files[name]))
        self.pushed |= files
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")


class Refusal(Exception):
    """What the client raises for an answer of the hub with this status."""

    def __init__(self, status: int, text: str = "no\n way") -> None:
        super().__init__(text)
        self.response = types.SimpleNamespace(status_code=status)


@contextlib.contextmanager
def hub_on_this_machine(token: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Gives the address of a hub with the model repositories of one user, `me`, who has `token`,
    and the files that are in them, by repository and name. It knows what a push asks of it.
    """
    there: dict[str, bytes] = {}
    repositories: dict[str, bool] = {}

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        @property
        def address(self) -> str:
            return f"http://{self.headers['Host']}"

        def answer(self, value: Any, status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_request(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/whoami-v2":
                return self.answer({"name": "me", "type": "user", "orgs": []})
            if path == "/api/repos/create":
                given = json.loads(body)
                repo = f"{given.get('organization') or 'me'}/{given['name']}"
                private = given.get("private", given.get("visibility") == "private")
                status = 409 if repo in repositories else 200
                repositories.setdefault(repo, bool(private))
                return self.answer({"url": f"{self.address}/{repo}"}, status)
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            _, _, _, owner, name, *rest = path.split("/")
            repo = f"{owner}/{name}"
            if repo not in repositories:
                return self.answer({"error": "Repository not found"}, 404)
            own = [key.removeprefix(f"{repo}/") for key in there if key.startswith(f"{repo}/")]
            if not rest or rest[0] == "revision":
                about = {"id": repo, "private": repositories[repo], "sha": COMMIT}
                return self.answer(about | {"siblings": [{"rfilename": one} for one in own]})
            if rest[0] == "tree":
                tree = [{"type": "file", "path": one, "size": 1, "oid": "0"} for one in own]
                return self.answer(tree)
            if rest[0] == "preupload":
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if rest[0] == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        there[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
                    elif line["key"] == "deletedFile":
                        del there[f"{repo}/{value['path']}"]
                url = f"{self.address}/{repo}/commit/{COMMIT}"
                return self.answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
            return self.answer({"error": f"{path}: not known"}, 404)

        do_GET = do_POST = handle_request

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
