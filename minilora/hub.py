"""The Hugging Face hub: bring the files that a model or a data set needs into the local cache.

`huggingface_hub` does the transfer, the cache (HF_HOME, HF_HUB_CACHE), the token and HF_HUB_OFFLINE. Added
here are the choice of files, a quick answer where the hub can't be reached (its own downloads retry for 20 s
and more), the guarantee that a folder handed back holds every file that was chosen, and limits on the bytes
and the time that a sick or hostile hub can take. Left out: uploads, and a second cache of our own.
"""

import base64
import glob
import os
import re
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

from minilora.errors import InputError, shown
from minilora.files import replacing, sha256

# One request that lists a repository takes well under a second; a hub that needs longer than this is down.
PATIENCE_SECONDS = 8
# A download stops after this many seconds in a row in which fewer bytes a second arrived.
SLOW_SECONDS, SLOW_BYTES = 20, 1000
LISTING_BYTES = 64 << 20  # of all listings in one fetch; 100,000 files take about 40 MiB
FILE_BYTES = 256 << 20  # of a model's file without weights, and of all chosen files where no sizes are listed
LONGEST_WAIT = 60  # seconds that the hub may ask for before the next try
COMMIT = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\b.*")


class HubUnreachable(InputError):
    """The hub gave no answer (offline, timeout, server error) and the cache can't stand in for it."""


def fetch(repo_id, choose, *, kind="model", revision=None):
    """Return the local snapshot folder (a `Path` named after its commit) that holds the chosen files.

    choose    function from the list of the repository's file names to the list of those needed; it may raise
              InputError where the repository lacks what is needed
    kind      "model" or "dataset"
    revision  branch, tag or commit; default: the main branch

    Only chosen files travel, and none that the cache has. A full commit hash whose files are all in the cache
    needs no network. A branch may have moved, so the hub is asked; where it can't be reached, the cache's
    last snapshot of that revision serves if it is complete. The cache holds whole files only, so an
    interrupted download is never used and the next call goes on from there.

    Raises HubUnreachable, or InputError for a repository or revision that is missing, private or gated, and
    for a download that breaks off.
    """
    cached = _cached(repo_id, kind, revision)
    if revision and COMMIT.fullmatch(revision) and _is_complete(cached, choose, repo_id, kind):
        return cached
    try:
        commit, names = _list(repo_id, kind, revision)
    except HubUnreachable:
        if _is_complete(cached, choose, repo_id, kind):
            return cached
        raise
    chosen = choose(names)
    for name in chosen:
        _check_name(name, repo_id, kind)
    if cached and cached.name == commit and _holds(cached, chosen):
        return cached
    return _download(repo_id, kind, revision, commit, chosen)


def _list(repo_id, kind, revision):
    """The commit that `revision` names on the hub and its file names, from one request."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    endpoint, headers = _endpoint()
    api = HfApi(library_name="minilora", endpoint=endpoint, headers=headers)

    def ask(again=True):
        try:
            with _bounded(lambda bounds: 0):
                return api.repo_info(repo_id, repo_type=kind, revision=revision, timeout=PATIENCE_SECONDS)
        except Exception as error:
            if type(error).__name__ != "RemoteProtocolError" or not again:
                raise
            return ask(again=False)  # the hub has closed a connection that was kept for it

    try:
        info = _within(PATIENCE_SECONDS, ask)
        names = [file.rfilename for file in info.siblings or ()]
        if not (isinstance(info.sha, str) and COMMIT.fullmatch(info.sha) and all(isinstance(n, str) for n in names)):
            raise ValueError("its answer is not the listing of a repository")
        return info.sha, names
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a hub id (owner/name): {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        # The hub gives the reason of its refusals in headers; a firewall in its place does not.
        is_refusal = {"x-error-code", "x-error-message"} & {name.lower() for name in error.response.headers}
        if is_refusal and status < 500 and status not in (408, 429):
            raise _refusal(error, repo_id, kind, revision) from error
        reason = f"it answered {status}"
    except TimeoutError:
        reason = f"no answer in {PATIENCE_SECONDS} s"
    # The transport differs between versions of huggingface_hub (httpx, httpx2), so its errors have no name to
    # catch; a sign-in page in place of the hub's JSON ends here too.
    except Exception as error:
        reason = _reason(error)
    raise HubUnreachable(
        f"cannot reach the hub for {kind} {repo_id!r} (tried {endpoint}: {reason}), and the cache"
        f" {constants.HF_HUB_CACHE} holds no complete copy of revision {revision or 'main'!r}; three ways on: go online"
        " once; set HF_HOME to a cache from a machine that has it; or name a local folder or file instead"
    )


def _within(seconds, function):
    """`function()`, or TimeoutError after `seconds` in all.

    A client's own timeout counts per address and does not cover name look-up, so that a firewall that drops
    packets would cost a minute; a daemon thread can be left behind.
    """
    future = Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout=seconds)


def _endpoint():
    """The hub's address without user and password, and the headers that carry them instead.

    huggingface_hub and its transport show the address in warnings and errors.
    """
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    user, _, host = parts.netloc.rpartition("@")
    if parts.scheme not in ("http", "https") or not host:
        raise HubUnreachable("HF_ENDPOINT is not an address such as https://host: correct it, or unset it")
    if not user:
        return constants.ENDPOINT, None
    basic = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"authorization": f"Basic {basic}"}


def _reason(error):
    """What a transport's error says: one line of at most 300 characters, without passwords and tokens."""
    from huggingface_hub import constants, get_token

    text = " ".join(str(error).split()) or type(error).__name__
    user = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[0]
    password = user.partition(":")[2]
    for secret in {user, password, unquote(password), get_token(), os.environ.get("HF_TOKEN")} - {"", None}:
        text = text.replace(secret, "***")
    text = re.sub(r"//[^/\s]*@", "//***@", text)
    return text if len(text) <= 300 else text[:297] + "..."


def _check_name(name, repo_id, kind):
    """Raise InputError unless `name` is a path that stays inside its repository."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or Path(name).drive:
        raise InputError(f"{kind} {repo_id!r} lists a file {shown(name)}, which leads out of its folder: don't use it")


class _TooMuch(Exception):
    """An answer of the hub is beyond a limit."""


class _Bounds:
    """Counts what all answers of one fetch bring, in any thread; raises _TooMuch beyond the limits.

    room  function that gives the bytes of all chosen files
    """

    def __init__(self, room):
        self.room, self.bytes, self.reading, self.refusal = room, 0, 0, None
        self.lock = threading.Lock()

    def refuse(self, reason):
        self.refusal = self.refusal or _TooMuch(reason)  # files that travel beside this one end with it
        raise self.refusal

    def request(self, request):
        # A compressed answer could unpack to a thousand times of what is counted.
        request.headers["Accept-Encoding"] = "identity"

    def response(self, response):
        headers = response.headers
        if headers.get("content-encoding", "identity") != "identity":
            self.refuse("it sent a compressed answer, which was not asked for")
        asked = re.findall(r"t=(\d{1,9})", headers.get("ratelimit", ""))
        asked += re.findall(r"^\d{1,9}", headers.get("retry-after", ""))
        if response.status_code >= 400 and (wait := max(map(int, asked), default=0)) > LONGEST_WAIT:
            self.refuse(f"it answered {response.status_code} and asks to wait {wait:,} s")
        self.count(1000)  # the headers, about: there may be pages of listings without end
        length = headers.get("content-length", "")
        if response.request.method != "HEAD" and length.isdecimal():
            self.check(self.bytes + int(length[:18]))
        stream = next(c for c in type(response.stream).__mro__ if c.__name__ == "SyncByteStream")
        response.stream = _counted(stream)(response.stream, self)

    def start(self):
        with self.lock:
            if not self.reading:
                self.since, self.before = time.monotonic(), self.bytes
            self.reading += 1

    def stop(self):
        with self.lock:
            self.reading -= 1

    def count(self, size):
        if self.refusal:
            raise self.refusal
        with self.lock:
            self.bytes += size
            if self.reading and (seconds := time.monotonic() - self.since) > SLOW_SECONDS:
                if self.bytes - self.before < SLOW_BYTES * seconds:
                    self.refuse(f"it sent less than {SLOW_BYTES:,} bytes a second for {seconds:.0f} s")
                self.since, self.before = time.monotonic(), self.bytes
        self.check(self.bytes)

    def check(self, size):
        if size > LISTING_BYTES and size > LISTING_BYTES + self.room(self):
            self.refuse(f"it has more to send than it listed: {size:,} bytes")


def _counted(stream):
    """A class of streams, as the transport wants them, that reads another one and counts its bytes."""

    class Counted(stream):
        def __init__(self, inner, bounds):
            self.inner, self.bounds = inner, bounds

        def __iter__(self):
            self.bounds.start()
            try:
                for block in self.inner:
                    self.bounds.count(len(block))
                    yield block
            finally:
                self.bounds.stop()

        def close(self):
            self.inner.close()

    return Counted


@contextmanager
def _bounded(room):
    """Hold huggingface_hub's requests in this block to the limits above."""
    from huggingface_hub import get_session

    bounds, hooks = _Bounds(room), get_session().event_hooks
    hooks["request"].append(bounds.request)
    hooks["response"].append(bounds.response)
    try:
        yield
    finally:
        hooks["request"].remove(bounds.request)
        hooks["response"].remove(bounds.response)


def _download(repo_id, kind, revision, commit, chosen):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    again = "run again: it goes on with what is missing"
    endpoint, headers = _endpoint()

    def room(bounds):
        entries = _tree(commit, repo_id, kind)
        if entries is None:
            return FILE_BYTES
        entries = [entry for entry in entries if entry.path in chosen]
        for entry in entries:
            if kind == "model" and not entry.path.endswith(".safetensors") and entry.size > FILE_BYTES:
                bounds.refuse(f"its {entry.path} has {entry.size:,} bytes, more than {FILE_BYTES:,}")
        return sum(entry.size for entry in entries)

    try:
        with _bounded(room):
            folder = snapshot_download(
                repo_id,
                repo_type=kind,
                # Not the branch: it is asked for once, and the answer, a folder's name, has been checked.
                revision=commit,
                allow_patterns=[glob.escape(name) for name in chosen],
                library_name="minilora",
                endpoint=endpoint,
                headers=headers,
            )
    except Exception as error:  # see _list
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise _refusal(error, repo_id, kind, revision) from error
        raise InputError(f"the download of {kind} {repo_id!r} broke off ({_reason(error)}); {again}") from error
    if not _holds(folder := Path(folder), chosen):  # where the hub goes away, it is what was in the cache
        raise InputError(f"the download of {kind} {repo_id!r} broke off; {again}")
    _verify(folder, chosen, repo_id, kind)
    if revision != commit:
        ref = folder.parent.parent / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        with replacing(ref) as temporary:
            temporary.write_text(commit)
    return folder


def _verify(folder, chosen, repo_id, kind):
    """Raise InputError, and forget the file, where its content has another sha256 than the hub gave for it.

    The cache keeps a file under the hash that the hub gave: a sha256 for large ones, which is not checked there.
    """
    for path in (folder / name for name in chosen):
        kept = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", kept.name) and sha256(kept) != kept.name:
            kept.unlink()
            path.unlink(missing_ok=True)
            raise InputError(
                f"{kind} {repo_id!r}: the hub sent a {path.name} whose sha256 is not the one it lists; it was removed"
                " from the cache: run again"
            )


def _refusal(error, repo_id, kind, revision):
    """The InputError for an answer with a 4xx status."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return InputError(f"{kind} {repo_id!r} is gated: ask for access on its hub page, then run `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{kind} {repo_id!r} has no revision {revision!r}; check the branch, tag or commit")
    if status in (401, 403, 404):
        return InputError(
            f"the hub has no {kind} {repo_id!r} that you can read; check the id, or run `hf auth login` if it"
            " is private or gated"
        )
    return InputError(f"the hub refused {kind} {repo_id!r} ({_reason(error)}); check the id and the revision")


def lacks_revision(error):
    """Whether an InputError of `fetch` says that the repository is there, but not the revision."""
    from huggingface_hub.errors import RevisionNotFoundError

    return isinstance(error.__cause__, RevisionNotFoundError)


def _cached(repo_id, kind, revision):
    """The cache's snapshot folder for `revision`, complete or not, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # With no file asked for, nothing can be missing: this only looks up the folder.
        folder = snapshot_download(repo_id, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=[])
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a hub id (owner/name): {error}") from error
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _is_complete(folder, choose, repo_id, kind):
    """Whether `folder` (None: no snapshot) holds all that `choose` would pick from the whole repository."""
    if folder is None:
        return False
    entries = _tree(folder.name, repo_id, kind)
    if entries is not None:
        return _holds(folder, choose([entry.path for entry in entries]))
    # Without the repository's listing, what is absent shows in what choose misses, or in the shards' numbers.
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        chosen = choose(present)
    except InputError:
        return False
    shards = {}
    for prefix, index, count in (match.groups() for match in map(SHARD.fullmatch, chosen) if match):
        shards.setdefault((prefix, int(count)), set()).add(int(index))
    return all(len(found) == count for (_, count), found in shards.items())


def _tree(commit, repo_id, kind):
    """The repository's files (path, size) as huggingface_hub noted them at download, or None (an older cache)."""
    import huggingface_hub

    try:
        return huggingface_hub.get_cached_repo_tree(repo_id, repo_type=kind, revision=commit)
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return None


def _holds(folder, names):
    return all((folder / name).is_file() for name in names)
