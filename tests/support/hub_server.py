"""A stand-in for the Hugging Face hub's HTTP interface: model repositories in memory, commits, large files.

`huggingface_hub` talks to it through HF_ENDPOINT. It keeps what a client sends and answers what the hub answers, as far
as creating repositories, committing to branches, listing and downloading go.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_the_stand_in"


@dataclass
class Repository:
    """visibility: as it was created. branches: name -> commits, each file name -> content."""

    visibility: str | None
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return found[1] if (found := self.commit(revision)) else None

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit[0] == revision), None)

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        names = json.dumps([branch, len(self.branches.get(branch, ())), sorted(files)])
        name = hashlib.sha1(names.encode() + b"".join(files.values())).hexdigest()
        self.branches.setdefault(branch, []).append((name, files))
        return name


class HubServer:
    """The server.

    repositories: by `org/name`. asked: files that were downloaded. large: uploaded, by their SHA-256. status: what it
    answers to everything, None where it answers rightly.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}
        self.status: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer()

            def do_PUT(self):
                self.answer()

            def answer(self, with_body=True):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = unquote(self.path.partition("?")[0])
                status, headers, content = hub.respond(self.command, path, body, self.headers.get("Authorization"))
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """For a process that is to talk to it."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    def respond(self, verb, path, body, authorization):
        """Status, headers and body of an answer."""
        if self.status is not None:
            return _error(self.status, "", "come again")
        writes = verb in ("POST", "PUT") and not path.startswith("/large/")
        if writes and authorization != f"Bearer {TOKEN}":
            return _error(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/validate-yaml":  # of a card, before it is committed
            fields = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return _json({"errors": [] if isinstance(fields, dict) else ["no metadata"], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/large/"):
            oid = path.removeprefix("/large/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.large[oid] = body
            return _json({})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{self.url}/large/"}}
            return _json({
                "transfer": "basic",
                "objects": [
                    item if item["oid"] in self.large else
                    item | {"actions": {"upload": {"href": actions["upload"]["href"] + item["oid"]}}}
                    for item in objects
                ],
            })  # fmt: skip
        if path.startswith("/api/models/"):
            _, _, _, org, name, *rest = path.split("/")
            repository = self.repositories.get(f"{org}/{name}")
            if repository is None:
                return _error(404, "RepoNotFound", "Repository not found")
            return self._api(f"{org}/{name}", repository, rest, body)
        _, org, name, kind, revision, *rest = path.split("/") + [""] * 5
        repository = self.repositories.get(f"{org}/{name}")
        if repository is None or kind != "resolve":
            return _error(404, "RepoNotFound", "Repository not found")
        return self._file(repository, revision, "/".join(filter(None, rest)), verb)

    def _create(self, said):
        name = f"{said['organization']}/{said['name']}" if said.get("organization") else f"me/{said['name']}"
        if name in self.repositories:
            return (
                409,
                {},
                json.dumps({"error": "You already created this model repo", "url": f"{self.url}/{name}"}).encode(),
            )
        self.repositories[name] = Repository(said.get("visibility"))
        self.repositories[name].add("main", {".gitattributes": b"*.safetensors filter=lfs"})
        return _json({"url": f"{self.url}/{name}", "name": name, "id": name})

    def _api(self, name, repository, rest, body):
        kind, revision = rest[0] if rest else "", "/".join(rest[1:]) or "main"
        if kind == "branch":
            if revision in repository.branches:
                return _error(409, "", "Reference already exists")
            repository.branches[revision] = list(repository.branches["main"])
            return _json({})
        if kind == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": item["path"], "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for item in files
            ]  # fmt: skip
            return _json({"files": modes})
        if kind == "commit":
            return self._commit(name, repository, revision, body)
        found = repository.commit(revision)
        if found is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if kind == "tree":
            return _json([
                {"type": "file", "path": file, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
                for file, content in files.items()
            ])  # fmt: skip
        return _json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def _commit(self, name, repository, branch, body):
        if branch not in repository.branches:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repository.branches[branch][-1][1])
        for line in filter(None, body.decode().splitlines()):
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = repository.add(branch, files)
        url = f"{self.url}/{name}/commit/{commit}"
        return _json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _file(self, repository, revision, file, verb):
        found = repository.commit(revision)
        if found is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if file not in files:
            return _error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if verb == "GET":
            self.asked.append(file)
        etag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, files[file]


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status, code, message, headers=None):
    named = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
    return status, named | (headers or {}), json.dumps({"error": message}).encode()
