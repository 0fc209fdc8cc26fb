"""A small Hugging Face Hub on loopback, for the unmodified `huggingface_hub` client (through HF_ENDPOINT).

It keeps everything in memory: repositories as lists of commits, each a table of files by path. To try pushing and
pulling without an account, `python tests/local_hub.py` serves one until Ctrl-C.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TOKEN = "hf_local_secret"
USER = "me"

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by id, the newest last, their messages, and branches and tags that name them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files) -> str:
        digest = hashlib.sha1(f"{branch}{len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        self.commits[digest.hexdigest()] = files
        self.names[branch] = digest.hexdigest()
        return digest.hexdigest()


class HubError(Exception):
    """An answer with an error code, as the Hub gives it."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None):
        super().__init__(code)
        self.response = JSONResponse({"error": code}, status, headers={"X-Error-Code": code, **(headers or {})})


class LocalHub:
    """The server's state, and what a test may do to it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_download_after: int | None = None
        self.cut_upload_after: int | None = None
        self.refuse_commits = False
        self.endpoint = ""

    # --- Requests ----------------------------------------------------------------------------------------------------

    def repository(self, request: Request) -> Repository:
        repository = self.repositories.get(request.path_params["repo"])
        allowed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            raise HubError(401 if not allowed else 404, "RepoNotFound")
        return repository

    def files(self, request: Request) -> tuple[str, Files]:
        repository, revision = self.repository(request), unquote(request.path_params.get("revision", "main"))
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    async def whoami(self, request: Request) -> Response:
        return JSONResponse({"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized")
        body = await request.json()
        name = f"{body.get('organization') or USER}/{body['name']}"
        answer = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repositories:
            return JSONResponse({"error": "exists", **answer}, 409)
        private = bool(body.get("private")) or body.get("visibility") == "private"
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return JSONResponse(answer)

    async def preupload(self, request: Request) -> Response:
        files = (await request.json())["files"]
        large = re.compile(r"\.(safetensors|onnx|png|data|pt|bin)$")
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if large.search(f["path"]) else "regular", "shouldIgnore": False}
            for f in files
        ]
        return JSONResponse({"files": modes})

    async def lfs_batch(self, request: Request) -> Response:
        objects = (await request.json())["objects"]
        for entry in objects:
            if entry["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"}}
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request) -> Response:
        content = b""
        async for chunk in request.stream():
            content += chunk
            if self.cut_upload_after is not None and len(content) > self.cut_upload_after:
                self.cut_upload_after = None
                request.scope["abort"]()
                raise ConnectionError
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            raise HubError(400, "BadContent")
        self.blobs[request.path_params["oid"]] = content
        return Response()

    async def commit(self, request: Request) -> Response:
        repository = self.repository(request)
        if self.refuse_commits:
            raise HubError(503, "Overloaded")
        branch = unquote(request.path_params["revision"])
        files = dict(repository.commits[repository.names.get(branch, repository.names["main"])])
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(branch, files)
        url = f"{self.endpoint}/{request.path_params['repo']}/commit/{commit}"
        return JSONResponse({"success": True, "commitOid": commit, "commitUrl": url})

    async def name(self, request: Request) -> Response:
        """Make a branch or tag."""
        repository, body = self.repository(request), await request.json()
        start = body.get("startingPoint") or request.path_params["revision"]
        target = repository.names.get(start, repository.names["main"])
        repository.names[body.get("tag") or unquote(request.path_params["revision"])] = target
        return JSONResponse({})

    async def info(self, request: Request) -> Response:
        commit, files = self.files(request)
        siblings = [{"rfilename": path} for path in sorted(files)]
        name = request.path_params["repo"]
        private = self.repositories[name].private
        return JSONResponse({"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    async def tree(self, request: Request) -> Response:
        _, files = self.files(request)
        return JSONResponse([{"type": "file", "path": path, **_identity(files[path])} for path in sorted(files)])

    async def paths_info(self, request: Request) -> Response:
        _, files = self.files(request)
        wanted = (await request.form()).getlist("paths")
        return JSONResponse([{"type": "file", "path": p, **_identity(files[str(p)])} for p in wanted if p in files])

    async def resolve(self, request: Request) -> Response:
        commit, files = self.files(request)
        content = files.get(request.path_params["path"])
        if content is None:
            raise HubError(404, "EntryNotFound", {"X-Repo-Commit": commit})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-ETag": etag, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        start, status = 0, 200
        if match := re.match(r"bytes=(\d+)-", request.headers.get("range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return StreamingResponse(self._stream(content[start:]), status, headers=headers)

    async def _stream(self, content: bytes) -> AsyncIterator[bytes]:
        cut = self.cut_download_after
        if cut is not None and len(content) > cut:
            self.cut_download_after = None
            yield content[:cut]
            raise ConnectionError  # uvicorn closes the connection in the middle of the body
        yield content

    def application(self) -> Starlette:
        repo, revision = "{repo:path}", "{revision}"
        api = f"/api/models/{repo}"
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create),
            ("POST", f"{api}/preupload/{revision}", self.preupload),
            ("POST", f"{api}/commit/{revision}", self.commit),
            ("POST", f"{api}/branch/{revision}", self.name),
            ("POST", f"{api}/tag/{revision}", self.name),
            ("POST", f"{api}/paths-info/{revision}", self.paths_info),
            ("GET", f"{api}/tree/{revision}", self.tree),
            ("GET", f"{api}/revision/{revision}", self.info),
            ("GET", api, self.info),
            ("POST", f"/{repo}.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", "/lfs/{oid}", self.lfs_put),
            ("GET", f"/{repo}/resolve/{revision}/{{path:path}}", self.resolve),
        ]

        async def answer_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HubError)
            return error.response

        application = Starlette(
            routes=[Route(path, handler, methods=[method]) for method, path, handler in routes],
            exception_handlers={HubError: answer_error},
        )

        async def logged(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.requests.append(f"{scope['method']} {scope['path']}")
                scope["abort"] = send.__self__.transport.abort  # uvicorn's connection
            await application(scope, receive, send)

        return logged  # pyright: ignore[reportReturnType]


def _identity(content: bytes) -> dict[str, Any]:
    sha = hashlib.sha256(content).hexdigest()
    return {"oid": sha[:40], "size": len(content), "lfs": {"oid": sha, "size": len(content), "pointerSize": 134}}


@contextmanager
def local_hub(port: int = 0) -> Iterator[LocalHub]:
    """A running hub, on any free port; its `endpoint` is the value for HF_ENDPOINT."""
    hub = LocalHub()
    server = uvicorn.Server(uvicorn.Config(hub.application(), port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    with local_hub(8642) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={running.endpoint} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
