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

Not a hub in anything else: no upload, no LFS or Xet storage, no pagination, no token is ever checked.
"""

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
        self.hidden, self.gated = set(), set()
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
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
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
