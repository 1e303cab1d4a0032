"""A small hub on 127.0.0.1: as much of the Hugging Face hub's protocol as huggingface_hub's downloads need.

    with HubServer() as server:
        commit = server.put("owner/name", {"config.json": b"{}"})              # a model
        server.put("owner/set", {"data/train.csv": b"..."}, kind="dataset")
        server.use(monkeypatch, tmp_path)          # in this process; tmp_path becomes HF_HOME
        subprocess.run(..., env=server.environment(tmp_path))                   # or in another one
        ...
        assert server.bodies() == ["config.json"]                               # what travelled

`put` again moves the branch (older commits stay readable); `revision=` names another branch or a tag; `convert`
publishes a data set's Parquet copy.
Misbehaviour, to set and reset at any time:

    server.status = 503          every request gets this status
    server.broken = "name"       bodies of that file stop half-way, and a second try is answered 500
    server.hang = 30             seconds that every request waits first (ends early when the server closes)
    server.hidden.add("owner/name")    private to others: 401 as for a missing repository
    server.gated.add("owner/name")     listed, but its files are refused with 403
    server.lfs = "ab..."               the sha256 that is given for every file
    server.sick["/tree/"] = function   what answers requests whose path has that part: it gets the request's handler,
                                       and may write anything to it; see SICK and `sickly`

Not a hub in anything else: no upload, no LFS or Xet storage, no pagination, no token is ever checked.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer:
    def __init__(self):
        self.requests = []  # (method, path) in the order of arrival
        self.status, self.broken, self.hang = None, None, 0
        self.hidden, self.gated, self.sick = set(), set(), {}
        self.lfs = None
        self.refs = {}  # (kind, repository id) -> {revision: commit}
        self.commits = {}  # commit -> {file name: bytes}
        self._sent = []
        self._closing = threading.Event()

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = functools.partial(self._server.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, repo_id, files, *, kind="model", revision="main"):
        """Publish `files` ({name: bytes}) as the state of `revision`; returns the commit hash."""
        commit = hashlib.sha1(repr((repo_id, kind, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs.setdefault((kind, repo_id), {})[revision] = commit
        self.refs[kind, repo_id][commit] = commit
        return commit

    def convert(self, repo_id, splits):
        """Publish {"CONFIG/SPLIT": [bytes of each file]} as the hub's converter does, beside the main branch, without
        a card; returns the commit hash."""
        numbered = {f"{place}/{i:04d}.parquet": data for place, files in splits.items() for i, data in enumerate(files)}
        files = numbered | {".gitattributes": b"*.parquet filter=lfs"}
        return self.put(repo_id, files, kind="dataset", revision="refs/convert/parquet")

    def bodies(self):
        """Names of the files whose content was sent since the last call, sorted."""
        sent, self._sent = self._sent, []
        return sorted(sent)

    def environment(self, home):
        """Environment variables of a process that uses this hub, with its cache in `home`."""
        ours = ("HF_", "HUGGINGFACE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}

    def use(self, monkeypatch, home):
        """Point huggingface_hub in this process, which read its environment at import, to this hub."""
        from huggingface_hub import close_session, constants

        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # it may have been opened with other proxy settings
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, path = self.server_hub, unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append((self.command, path))
        if hub.hang:
            hub._closing.wait(hub.hang)
        for part, answer in hub.sick.items():
            if part in self.path:
                self.close_connection = True
                with contextlib.suppress(OSError):  # the other side has had enough
                    answer(self)
                return
        if hub.status:
            return self._send(hub.status, b"", {})
        api = path.startswith("api/")
        plural, path = path.removeprefix("api/").split("/", 1) if api else ("models", path)
        if path.startswith("datasets/"):
            plural, path = path.split("/", 1)
        kind = plural.removesuffix("s")
        names = [name for k, name in hub.refs if k == kind and f"{path}/".startswith(f"{name}/")]
        repo_id = names[0] if names else None
        if repo_id is None or repo_id in hub.hidden:
            return self._error(401, "RepoNotFound")
        action, _, rest = path[len(repo_id) + 1 :].partition("/")
        revisions = hub.refs[kind, repo_id]
        revision = next((r for r in revisions if f"{rest}/".startswith(f"{r}/")), None) if rest else "main"
        if revision not in revisions:
            return self._error(404, "RevisionNotFound")
        commit = revisions[revision]
        files = hub.commits[commit]
        if action == "resolve":
            return self._resolve(repo_id, commit, rest[len(revision) + 1 :])
        if action == "tree":
            value = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            value = {"id": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo_id, commit, name):
        hub = self.server_hub
        if repo_id in hub.gated:
            return self._error(403, "GatedRepo")
        data = hub.commits[commit].get(name)
        if data is None:
            return self._error(404, "EntryNotFound")
        headers = {"ETag": f'"{hub.lfs or hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        status, start = 200, 0
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        if self.command == "GET":
            if hub.broken == name and start:
                return self._send(500, b"", {})
            hub._sent.append(name)
        self._send(status, data[start:], headers, cut=hub.broken == name)

    def _error(self, status, code):
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status, body, headers, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut


# --- answers of a sick hub


def sickly(status=200, body=b"", endless=False, pause=0.0, **headers):
    """An answer with these headers (`_` for `-`) and this body; `endless` repeats it, `pause` seconds after each."""

    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        while handler.command == "GET":
            handler.wfile.write(body)
            if not endless or handler.server_hub._closing.wait(pause):
                return

    return answer


def listed(*names, sha="a" * 40):
    """A listing of a repository as the hub's JSON."""
    return json.dumps({"id": "o/m", "sha": sha, "siblings": [{"rfilename": name} for name in names]}).encode()


JSON = {"Content_Type": "application/json"}
# What a hub may answer instead of a repository's listing ...
SICK_LISTINGS = {
    "endless": sickly(body=b'{"rfilename": "x"},' * 50_000, endless=True, **JSON),
    "drip": sickly(body=b" ", endless=True, pause=0.1, **JSON),
    "html": sickly(body=b"<html>Sign in</html>", Content_Type="text/html"),
    "list": sickly(body=b"[]", **JSON),
    "null": sickly(body=b'{"id": "o/m", "sha": null, "siblings": null}', **JSON),
    "numbers": sickly(body=b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": 7}]}', **JSON),
    "commit": sickly(body=listed("config.json", sha="../../../../escaped"), **JSON),
    "absolute": sickly(body=listed("/tmp/escaped.safetensors"), **JSON),
    "parent": sickly(body=listed("../../../../escaped.safetensors"), **JSON),
    "deep": sickly(body=b"[" * 100_000, **JSON),
    "claim": sickly(Content_Length=str(4 * 10**10), **JSON),
    "packed": sickly(body=b"\x1f\x8b", Content_Encoding="gzip", **JSON),
    "scheme": sickly(302, Location="file:///etc/passwd"),
    "ftp": sickly(302, Location="ftp://127.0.0.1/x"),
    "loop": sickly(302, Location="?again"),
    "limited": sickly(429, Retry_After="99999"),
    "down": sickly(503),
    "message": sickly(400, X_Error_Message="x" * 20_000),
}
# ... and of a file or of the tree of files.
SICK_FILES = {
    "endless": sickly(body=bytes(1 << 20), endless=True, X_Repo_Commit="a" * 40, ETag='"e"'),
    "drip": sickly(body=b" ", endless=True, pause=0.1, ETag='"e"'),
    "claim": sickly(body=b"{}", Content_Length=str(4 * 10**10), ETag='"e"'),
    "short": sickly(body=b"{", ETag='"e"'),
    "html": sickly(body=b"<html>Sign in</html>", Content_Type="text/html"),
    "packed": sickly(body=b"\x1f\x8b", Content_Encoding="gzip", ETag='"e"'),
    "scheme": sickly(302, Location="file:///etc/passwd"),
    "loop": sickly(302, Location="?again"),
    "limited": sickly(429, Retry_After="99999"),
    "missing": sickly(404, X_Error_Code="EntryNotFound"),
    "teapot": sickly(418),
}
