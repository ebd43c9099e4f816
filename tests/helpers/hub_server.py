"""A Hugging Face Hub on the loopback interface and in memory, with failures that a test can switch on.

It has what huggingface_hub needs for models and small data sets.

    with HubServer({"hf_alice": "alice"}) as hub:  # token -> user
        ...  # HF_ENDPOINT=hub.url and HF_TOKEN in the environment of a process that has yet to import huggingface_hub

Large files go through git LFS if the client has HF_HUB_DISABLE_XET=1, and through Xet otherwise. For Xet the server
gives the client a folder (`xet_store`) instead of a storage service.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
LARGE = (".safetensors", ".bin", ".pt")  # endings of the files that .gitattributes sends to LFS


@dataclass(frozen=True)
class LargeFile:
    """A pointer to content in the LFS store or the Xet store; `xet` is its Merkle hash in the Xet store."""

    sha256: str
    size: int
    xet: str | None = None


@dataclass
class Commit:
    """A commit: its files by path (small files with their content), its title and its parent."""

    files: dict[str, bytes | LargeFile]
    title: str = "initial commit"
    parent: str | None = None


@dataclass
class Repo:
    """A repository: its commits by id, and the branches and tags that point to them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        seed = f"{branch} {commit.parent} {commit.title} {len(self.commits)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = commit, oid
        return oid

    def resolve(self, revision: str) -> str:
        """Return the id of the commit that a branch, a tag or a commit id names."""
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found or revision

    def files(self, revision: str) -> dict[str, bytes | LargeFile]:
        return self.commits[self.resolve(revision)].files


@dataclass
class Refusal(Exception):
    """An error to answer a request with; huggingface_hub chooses its exception by the code."""

    status: int
    message: str
    code: str = ""


@dataclass
class Answer:
    """The answer to a request: a body (JSON or bytes), headers and a status."""

    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class HubServer:
    """The state of the Hub, and the thread that serves it.

    Args:
        tokens: the user of each token.
        xet_store: folder for the large files of clients with Xet.

    Attributes:
        url: address of the server.
        repos: repositories by id, `user/name`.
        uploads: hashes of the files that were stored through LFS, in order.
    """

    def __init__(self, tokens: dict[str, str], xet_store: Path | None = None) -> None:
        self.tokens, self.xet_store = tokens, xet_store
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.lock = threading.RLock()
        self._cut: str | int | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def cut_upload(self, number: int) -> None:
        """Break the connection in the middle of the `number`-th large file to come (from 1), until `mend()` is called.

        The upload of this file is broken each time that the client tries it.
        """
        with self.lock:
            self._cut = number

    def cut_commit(self) -> None:
        """Break the connection in the middle of each commit, until `mend()` is called."""
        self._cut = "commit"

    def mend(self) -> None:
        """Stop breaking connections."""
        self._cut = None

    def cuts(self, path: str) -> bool:
        """Return whether to break the connection of a request that sends data to a path."""
        with self.lock:
            if self._cut == "commit":
                return "/commit/" in path
            if isinstance(self._cut, int) and path.startswith(
                "/lfs/"
            ):  # `_cut` counts down, and then holds the path of the file
                self._cut -= 1
                if self._cut == 0:
                    self._cut = path
            return self._cut == path

    def head(self, repo_id: str, branch: str = "main") -> str:
        """Return the commit id at the end of a branch."""
        return self.repos[repo_id].branches[branch]

    def names(self, repo_id: str, revision: str = "main") -> set[str]:
        """Return the names of a revision's files."""
        return set(self.repos[repo_id].files(revision))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _xet_files(store: Path) -> dict[str, LargeFile]:
    """Return the files in a local Xet store by their SHA-256, from its shards of 48-byte records."""

    def hexadecimal(hash_: bytes) -> str:  # of four little-endian numbers
        return "".join(hash_[i : i + 8][::-1].hex() for i in range(0, 32, 8))

    found = {}
    for path in store.rglob("*.mdb"):
        records = [
            path.read_bytes()[i:][:48] for i in range(48, path.stat().st_size, 48)
        ]  # the first record is the header
        while records[0][:32] != b"\xff" * 32:
            head = records.pop(0)
            flags, count = struct.unpack("<II", head[32:40])
            size = sum(struct.unpack("<I", segment[36:40])[0] for segment in records[:count])
            del records[: count * (2 if flags >> 31 else 1)]  # the segments of the file, and their hashes if flagged
            if flags >> 30 & 1:
                sha256 = hexadecimal(records.pop(0))
                found[sha256] = LargeFile(sha256, size, hexadecimal(head))
    return found


class _Handler(BaseHTTPRequestHandler):
    """The handler of one connection, which finds the route of a request and sends the answer."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        if self.command in ("POST", "PUT") and self.hub.cuts(path):
            self._break_connection()
            return
        body = self._read()
        try:
            with self.hub.lock:
                answer = self._route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            answer = Answer({"error": refusal.message}, headers, refusal.status)
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _break_connection(self) -> None:
        """Read half of the request's body, and close the connection without an answer."""
        self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
        self.close_connection = True

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        content = answer.body if raw else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if raw else "application/json"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                request = Request(self.hub, self.hub.tokens.get(token), self.command, body)
                return route(request, *(unquote(group or "") for group in match.groups()))
        raise Refusal(404, f"no route for {self.command} {path}")


@dataclass
class Request:
    """A request with its user and body, and the routes, which answer it."""

    hub: HubServer
    user: str | None
    method: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repository, or refuse if the user may not read it, or (with `write`) not change it."""
        repo, owner = self.hub.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise Refusal(403 if self.user else 401, "you may not write to it")
        return repo

    def whoami(self) -> Answer:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return Answer({"type": "user", "name": self.user, "orgs": []})

    def validate_card(self) -> Answer:
        """Accept any model card; the rules of the real Hub are not known here."""
        return Answer({"errors": [], "warnings": []})

    def create_repo(self) -> Answer:
        asked = self.json()
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.user != repo_id.split("/")[0]:
            raise Refusal(403 if self.user else 401, f"you cannot create a repo of {repo_id.split('/')[0]}")
        known = {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.hub.repos:
            return Answer({"error": "You already created this model repo", **known}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[repo_id] = Repo(private)
        repo.add("main", Commit({".gitattributes": "".join(f"*{end} filter=lfs\n" for end in LARGE).encode()}))
        return Answer(known)

    def upload_modes(self, repo_id: str, revision: str) -> Answer:
        """Answer for each file whether it is small or large, and its hash if the revision has it already."""
        files, answers = self.repo(repo_id, write=True).files(revision), []
        for asked in self.json()["files"]:
            there, mode = files.get(asked["path"]), "lfs" if asked["path"].endswith(LARGE) else "regular"
            oid = there.sha256 if isinstance(there, LargeFile) else there and _git_hash(there)
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": answers})

    def lfs_batch(self, repo_id: str) -> Answer:
        self.repo(repo_id, write=True)
        objects = []
        for asked in self.json()["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
            actions = {} if asked["oid"] in self.hub.stored else {"actions": {"upload": upload}}
            objects.append({"oid": asked["oid"], "size": asked["size"], "authenticated": True, **actions})
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_object(self, oid: str) -> Answer:
        if self.method == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "the content does not have this hash")
            self.hub.stored[oid] = self.body
            self.hub.uploads.append(oid)
            return Answer(b"")
        return Answer(self.hub.stored[oid], {"ETag": f'"{oid}"'})

    def xet_token(self, repo_id: str, kind: str, revision: str) -> Answer:
        self.repo(repo_id, write=kind == "write")
        expires, url = int(time.time()) + 3600, f"local://{self.hub.xet_store}"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Answer({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers)

    def commit(self, repo_id: str, branch: str) -> Answer:
        """Add a commit from lines of JSON, completely or (with an error) not at all."""
        repo = self.repo(repo_id, write=True)
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        commit = Commit(dict(repo.files(branch)), parent=repo.branches[branch])
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                commit.title = value["summary"]
                if value.get("parentCommit") not in (None, commit.parent):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                commit.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                commit.files[value["path"]] = self._stored(value["oid"])
            elif kind == "deletedFile":
                commit.files.pop(value["path"], None)
            else:
                raise Refusal(400, f"a {kind} in a commit is not supported here")
        oid = repo.add(branch, commit)
        return Answer({"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def _stored(self, oid: str) -> LargeFile:
        if oid in self.hub.stored:
            return LargeFile(oid, len(self.hub.stored[oid]))
        found = _xet_files(self.hub.xet_store).get(oid) if self.hub.xet_store else None
        if found is None:
            raise Refusal(400, f"the large file {oid} was not uploaded")
        return found

    def branch(self, repo_id: str, name: str) -> Answer:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[name] = repo.resolve(self.json().get("startingPoint") or "main")
        return Answer({})

    def tag(self, repo_id: str, revision: str) -> Answer:
        repo = self.repo(repo_id, write=True)
        repo.tags[self.json()["tag"]] = repo.resolve(revision)
        return Answer({})

    def info(self, repo_id: str, revision: str) -> Answer:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision or "main")
        known = {"id": repo_id, "sha": sha, "lastModified": DATE, "private": repo.private, "tags": []}
        return Answer({**known, "siblings": [{"rfilename": name} for name in repo.commits[sha].files]})

    def tree(self, repo_id: str, revision: str, folder: str) -> Answer:
        """List all files of a revision, including those in subfolders."""
        within = f"{folder}/" if folder else ""
        files = {name: file for name, file in self.repo(repo_id).files(revision).items() if name.startswith(within)}
        if folder and not files:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for name, file in sorted(files.items()):
            if isinstance(file, LargeFile):
                entry = {"oid": _git_hash(file.sha256.encode()), "size": file.size}
                entry |= {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}, "xetHash": file.xet}
            else:
                entry = {"oid": _git_hash(file), "size": len(file)}
            entries.append({"type": "file", "path": name, **entry})
        return Answer(entries)

    def resolve(self, repo_id: str, revision: str, name: str) -> Answer:
        """Send a small file, or redirect to the store of a large file, which is on another host as on the real Hub."""
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        file = repo.commits[sha].files.get(name)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if isinstance(file, bytes):
            return Answer(file, {"X-Repo-Commit": sha, "ETag": f'"{_git_hash(file)}"'})
        etag, place = f'"{file.sha256}"', f"http://localhost:{self.hub.server.server_port}/lfs/{file.sha256}"
        headers = {"X-Repo-Commit": sha, "X-Linked-Etag": etag, "X-Linked-Size": str(file.size), "Location": place}
        if file.xet:
            refresh = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": file.xet, "X-Xet-Refresh-Route": refresh}
        return Answer(b"", headers, status=302)


_REPO = "([^/]+/[^/]+)"
_API = f"/api/(?:models|datasets)/{_REPO}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", Request.whoami),
    ("POST", "/api/validate-yaml", Request.validate_card),
    ("POST", "/api/repos/create", Request.create_repo),
    ("POST", f"{_API}/preupload/([^/]+)", Request.upload_modes),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", Request.lfs_batch),
    ("PUT GET HEAD", "/lfs/([0-9a-f]{64})", Request.lfs_object),
    ("GET", f"{_API}/xet-(read|write)-token/([^/]+)", Request.xet_token),
    ("POST", f"{_API}/commit/([^/]+)", Request.commit),
    ("POST", f"{_API}/branch/([^/]+)", Request.branch),
    ("POST", f"{_API}/tag/([^/]+)", Request.tag),
    ("GET", f"{_API}(?:/revision/([^/]+))?", Request.info),
    ("GET", f"{_API}/tree/([^/]+)(?:/(.+))?", Request.tree),
    ("GET HEAD", f"(?:/datasets)?/{_REPO}/resolve/([^/]+)/(.+)", Request.resolve),
]
