"""The Hugging Face hub: bring the files that a model or a data set needs into the local cache.

`huggingface_hub` does the transfer, the cache (HF_HOME, HF_HUB_CACHE), the token and HF_HUB_OFFLINE. Added
here are the choice of files, a quick answer where the hub can't be reached (its own downloads retry for 20 s
and more), and the guarantee that a folder handed back holds every file that was chosen. Left out: uploads,
and a second cache of our own.
"""

import glob
import re
import threading
from concurrent.futures import Future
from pathlib import Path

from minilora.errors import InputError

# One request that lists a repository takes well under a second; a hub that needs longer than this is down.
PATIENCE_SECONDS = 8
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
    if cached and cached.name == commit and _holds(cached, chosen):
        return cached
    return _download(repo_id, kind, revision, chosen)


def _list(repo_id, kind, revision):
    """The commit that `revision` names on the hub and its file names, from one request without retries."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(library_name="minilora")

    def ask():
        return api.repo_info(repo_id, repo_type=kind, revision=revision, timeout=PATIENCE_SECONDS)

    try:
        info = _within(PATIENCE_SECONDS, ask)
        return info.sha, [file.rfilename for file in info.siblings]
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
        reason = " ".join(str(error).split()) or type(error).__name__
    raise HubUnreachable(
        f"cannot reach the hub for {kind} {repo_id!r} (tried {api.endpoint}: {reason}), and the cache"
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


def _download(repo_id, kind, revision, chosen):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    again = "run again: it goes on with what is missing"
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                repo_type=kind,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in chosen],
                library_name="minilora",
            )
        )
    except Exception as error:  # the transport's errors have no common name, see _list
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise _refusal(error, repo_id, kind, revision) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the download of {kind} {repo_id!r} broke off ({reason}); {again}") from error
    if not _holds(folder, chosen):  # snapshot_download falls back to a partial cache if the hub goes away
        raise InputError(f"the download of {kind} {repo_id!r} broke off; {again}")
    return folder


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
    reason = " ".join(str(error).split())
    return InputError(f"the hub refused {kind} {repo_id!r} ({reason}); check the id and the revision")


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
    names = _listing(folder.name, repo_id, kind)
    if names is not None:
        return _holds(folder, choose(names))
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


def _listing(commit, repo_id, kind):
    """The repository's file names as huggingface_hub noted them at download, or None (an older cache)."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(repo_id, repo_type=kind, revision=commit)
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return None
    return [file.path for file in tree]


def _holds(folder, names):
    return all((folder / name).is_file() for name in names)
