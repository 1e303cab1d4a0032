import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import SICK_FILES, SICK_LISTINGS, HubServer, sickly

from minilora import hub
from minilora.errors import InputError

ROOT = Path(__file__).parents[1]
FILES = {
    "config.json": b'{"a": 1}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 30,
    "pytorch_model[1].bin": b"pickle",
    "onnx/model.onnx": b"onnx",
}
WANTED = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def weights(names):
    chosen = [name for name in names if name.endswith((".json", ".safetensors"))]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise InputError("no safetensors there")
    return chosen


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def forget_listings(home):
    """As left by a huggingface_hub that does not note the repository's listing."""
    listings = list(home.rglob("trees/*.json"))
    assert listings
    for path in listings:
        path.unlink()
    sys.modules["huggingface_hub._tree_cache"]._IN_MEMORY_TREE_CACHE.clear()


def test_only_the_chosen_files_travel_and_only_once(server, tmp_path, capfd):
    commit = server.put("owner/model", FILES)
    folder = hub.fetch("owner/model", weights)
    assert folder == tmp_path / "hf/hub/models--owner--model/snapshots" / commit
    assert contents(folder) == {name: FILES[name] for name in WANTED}
    assert server.bodies() == WANTED
    assert "Fetching 3 files" in capfd.readouterr().err

    assert hub.fetch("owner/model", weights) == folder
    assert server.bodies() == []
    assert capfd.readouterr() == ("", "")


def test_file_names_are_not_patterns(server):
    server.put("owner/model", FILES | {"pytorch_model1.bin": b"other"})
    assert hub.fetch("owner/model", lambda names: ["pytorch_model[1].bin"]).is_dir()
    assert server.bodies() == ["pytorch_model[1].bin"]


def test_data_sets_branches_tags_and_commits(server):
    old = server.put("owner/set", {"a.csv": b"old"}, kind="dataset")
    server.put("owner/set", {"a.csv": b"tag"}, kind="dataset", revision="v1")
    server.put("owner/set", {"a.csv": b"branch"}, kind="dataset", revision="refs/convert/parquet")
    server.put("owner/set", {"a.csv": b"new"}, kind="dataset")
    server.put("owner/set", {"a.csv": b"model"})
    found = {
        revision: contents(hub.fetch("owner/set", list, kind="dataset", revision=revision))
        for revision in (old, "v1", "refs/convert/parquet", "main", None)
    }
    assert found == {
        old: {"a.csv": b"old"},
        "v1": {"a.csv": b"tag"},
        "refs/convert/parquet": {"a.csv": b"branch"},
        "main": {"a.csv": b"new"},
        None: {"a.csv": b"new"},
    }


def test_a_branch_that_moved_is_followed_and_a_commit_in_the_cache_needs_no_network(server):
    old = server.put("owner/model", FILES)
    hub.fetch("owner/model", weights)
    new = server.put("owner/model", FILES | {"config.json": b"{}"})
    folder = hub.fetch("owner/model", weights)
    assert (folder.name, (folder / "config.json").read_bytes()) == (new, b"{}")
    assert server.bodies() == sorted(WANTED + ["config.json"])  # of the second commit only what differs

    server.requests.clear()
    assert hub.fetch("owner/model", weights, revision=old).name == old
    assert server.requests == []


def test_a_commit_fetched_by_its_hash_serves_its_branch_offline_too(server):
    commit = server.put("owner/model", FILES)
    hub.fetch("owner/model", weights, revision=commit)
    hub.fetch("owner/model", weights)
    assert server.bodies() == WANTED
    server.status = 503
    assert hub.fetch("owner/model", weights).name == commit


@pytest.mark.parametrize("status", [500, 503, 429, 403, 404])
def test_a_hub_that_is_down_is_answered_from_the_cache_or_at_once(server, tmp_path, monkeypatch, status):
    server.put("owner/model", FILES)
    server.put("owner/other", FILES)
    folder = hub.fetch("owner/model", weights)
    server.status, slept = status, []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert hub.fetch("owner/model", weights) == folder
    with pytest.raises(hub.HubUnreachable) as caught:
        hub.fetch("owner/other", weights)
    assert slept == []  # it was not tried again later
    assert str(caught.value) == (
        f"cannot reach the hub for model 'owner/other' (tried {server.url}: it answered {status}), and the"
        f" cache {tmp_path / 'hf/hub'} holds no complete copy of revision 'main'; three ways on: go online"
        " once; set HF_HOME to a cache from a machine that has it; or name a local folder or file instead"
    )


def test_a_hub_that_hangs_is_given_up_on(server, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.3)
    server.put("owner/model", FILES)
    server.hang = 600
    start = time.monotonic()
    with pytest.raises(hub.HubUnreachable, match="no answer in 0.3 s|timed out"):
        hub.fetch("owner/model", weights)
    assert time.monotonic() - start < 300


def test_a_name_look_up_that_hangs_is_given_up_on():
    answer, ended = threading.Event(), []
    with pytest.raises(TimeoutError):
        hub._within(0.2, lambda: ended.append(answer.wait(60)))
    assert ended == []
    answer.set()
    assert hub._within(600, lambda: 5) == 5
    with pytest.raises(KeyError):
        hub._within(1, lambda: {}[0])


def test_a_page_that_is_not_the_hub_counts_as_unreachable(server, monkeypatch):
    server.status = 200  # an empty body in place of JSON, as from a sign-in page
    with pytest.raises(hub.HubUnreachable, match="cannot reach the hub"):
        hub.fetch("owner/model", weights)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("lost", WANTED[1:])
def test_an_incomplete_cache_is_not_used(server, tmp_path, lost, listed):
    server.put("owner/model", FILES)
    folder = hub.fetch("owner/model", weights)
    (folder / lost).unlink()
    if not listed:
        forget_listings(tmp_path)
    server.status = 503
    with pytest.raises(hub.HubUnreachable):
        hub.fetch("owner/model", weights)
    server.status = None
    assert contents(hub.fetch("owner/model", weights)) == {name: FILES[name] for name in WANTED}


def test_a_complete_cache_without_a_listing_is_used_and_a_useless_one_is_not(server, tmp_path):
    server.put("owner/model", FILES)
    folder = hub.fetch("owner/model", weights)
    forget_listings(tmp_path)
    server.status = 503
    assert hub.fetch("owner/model", weights) == folder
    for name in WANTED[1:]:
        (folder / name).unlink()
    with pytest.raises(hub.HubUnreachable):
        hub.fetch("owner/model", weights)


def test_what_choose_refuses_is_refused_online_and_offline(server):
    server.put("owner/model", {"config.json": b"{}", "model.bin": b"pickle"})
    hub.fetch("owner/model", lambda names: ["config.json"])
    for status in (None, 503):
        server.status = status
        with pytest.raises(InputError, match="^no safetensors there$"):
            hub.fetch("owner/model", weights)


def test_a_download_that_breaks_off_leaves_no_half_file_and_resumes(server):
    server.put("owner/model", FILES)
    server.broken = WANTED[2]
    with pytest.raises(InputError) as caught:
        hub.fetch("owner/model", weights)
    assert str(caught.value).startswith("the download of model 'owner/model' broke off (")
    assert str(caught.value).endswith("run again: it goes on with what is missing")
    assert not isinstance(caught.value, hub.HubUnreachable)
    server.status = 503
    with pytest.raises(hub.HubUnreachable):
        hub.fetch("owner/model", weights)
    server.status = server.broken = None
    server.bodies()
    assert contents(hub.fetch("owner/model", weights)) == {name: FILES[name] for name in WANTED}
    assert WANTED[2] in server.bodies()


def test_a_hub_that_goes_away_before_the_download_leaves_nothing_partial_in_use(server, tmp_path):
    server.put("owner/model", FILES)
    hub.fetch("owner/model", lambda names: ["config.json"])
    forget_listings(tmp_path)

    def choose(names):
        server.status = 404
        return WANTED

    with pytest.raises(InputError, match="^the download of model 'owner/model' broke off; run again"):
        hub.fetch("owner/model", choose)


def test_a_repository_that_cannot_be_read_says_what_to_do(server):
    server.put("owner/model", FILES)
    server.put("owner/hidden", FILES)
    server.put("owner/gated", FILES)
    server.hidden.add("owner/hidden")
    server.gated.add("owner/gated")
    unreadable = (
        "the hub has no {} {!r} that you can read; check the id, or run `hf auth login` if it is private or gated"
    )
    cases = [
        (("owner/missing", "model", None), unreadable.format("model", "owner/missing")),
        (("owner/hidden", "model", None), unreadable.format("model", "owner/hidden")),
        (("owner/model", "dataset", None), unreadable.format("dataset", "owner/model")),
        (
            ("owner/gated", "model", None),
            "model 'owner/gated' is gated: ask for access on its hub page, then run `hf auth login`",
        ),
        (
            ("owner/model", "model", "v9"),
            "model 'owner/model' has no revision 'v9'; check the branch, tag or commit",
        ),
    ]
    for (repo_id, kind, revision), message in cases:
        with pytest.raises(InputError) as caught:
            hub.fetch(repo_id, weights, kind=kind, revision=revision)
        assert type(caught.value) is InputError and str(caught.value) == message
    for repo_id in ("a/b/c", "owner/", "own er/model"):
        with pytest.raises(InputError, match="is not a hub id"):
            hub.fetch(repo_id, weights)


def run(environment, *arguments):
    code = (
        "import json, time\n"
        "from minilora import hub\n"
        "from minilora.errors import InputError\n"
        "slept = []\n"
        "time.sleep = slept.append\n"
        "try: print(json.dumps(['folder', str(hub.fetch('owner/model', list))]))\n"
        "except InputError as error: print(json.dumps([type(error).__name__, str(error)]))\n"
        "assert not slept, slept\n"  # as before it tries again
    )
    environment = environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_honoured_in_a_process_of_its_own(tmp_path):
    with HubServer() as server:
        commit = server.put("owner/model", FILES)
        environment = server.environment(tmp_path / "home")
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        kind, message = run(offline)
        assert kind == "HubUnreachable" and "HF_HUB_OFFLINE" in message
        assert server.requests == []

        kind, folder = run(environment)
        assert (kind, Path(folder).name) == ("folder", commit)
        assert Path(folder).is_relative_to(tmp_path / "home")
        server.requests.clear()
        assert run(offline) == ["folder", folder]
        assert server.requests == []

        elsewhere = environment | {"HF_HUB_CACHE": str(tmp_path / "cache")}
        assert Path(run(elsewhere)[1]).is_relative_to(tmp_path / "cache")

    # The server is gone now: refused connections.
    assert run(environment) == ["folder", folder]
    kind, message = run(environment | {"HF_HOME": str(tmp_path / "empty")})
    assert kind == "HubUnreachable" and server.url in message


def test_importing_the_module_does_not_import_huggingface_hub():
    code = "import sys, minilora.hub; assert not {'huggingface_hub', 'torch', 'numpy'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# --- a sick or hostile hub

SECRETS = ("PASSW0RD", "PASS%57", "hf_secret")


@pytest.fixture
def sick(server, monkeypatch):
    """The local hub, impatient limits, and a user, a password and a token that no message may show."""
    from huggingface_hub import constants

    for name, value in (("PATIENCE_SECONDS", 3), ("SLOW_SECONDS", 1), ("LISTING_BYTES", 4 << 20)):
        monkeypatch.setattr(hub, name, value)
    monkeypatch.setattr(hub, "FILE_BYTES", 8 << 20)
    monkeypatch.setattr(constants, "ENDPOINT", server.url.replace("//", "//someone:PASSW0RD@"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.put("owner/model", FILES)
    return server


def refused(tmp_path, capfd, error=InputError):
    """The one line with which the hub's model is refused, after checks that hold for each refusal."""
    with pytest.raises(error) as caught:
        hub.fetch("owner/model", weights)
    message, shown = str(caught.value), "".join(capfd.readouterr())
    assert "\n" not in message and len(message) < 800
    assert not [secret for secret in SECRETS if secret in message + shown]
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped.safetensors").exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 32 << 20
    return message


def test_a_connection_that_the_hub_has_closed_is_opened_again(sick):
    asked = []

    def close_first(handler):
        asked.append(handler.path)
        handler.close_connection = True
        if len(asked) == 1:
            sick.sick.clear()  # from now on it answers

    sick.sick["/api/"] = close_first
    assert contents(hub.fetch("owner/model", weights)) == {name: FILES[name] for name in WANTED}
    assert len(asked) == 1
    sick.sick["/api/"] = lambda handler: (asked.append(handler.path), setattr(handler, "close_connection", True))
    sick.put("owner/other", FILES)
    with pytest.raises(hub.HubUnreachable, match="Server disconnected"):
        hub.fetch("owner/other", weights)
    assert len(asked) == 3  # once more, not for ever


@pytest.mark.parametrize("name", SICK_LISTINGS)
def test_a_sick_listing_is_refused(sick, tmp_path, capfd, name):
    sick.sick["/api/"] = SICK_LISTINGS[name]
    message = refused(tmp_path, capfd)
    parts = {"endless": "more to send than it listed", "drip": "no answer in|less than", "claim": "40,000,0",
             "commit": "not the listing", "numbers": "not the listing", "null": "not the listing",
             "absolute": "leads out of its folder", "parent": "leads out of its folder",
             "packed": "a compressed answer", "limited": "to wait 99,999 s", "down": "answered 503"}  # fmt: skip
    assert any(part in message for part in parts.get(name, "cannot reach|refused").split("|")), message


@pytest.mark.parametrize("name", SICK_FILES)
@pytest.mark.parametrize("part", ["/resolve/", "/tree/"])
def test_a_sick_file_or_tree_is_refused(sick, tmp_path, capfd, part, name):
    sick.sick[part] = SICK_FILES[name]
    message = refused(tmp_path, capfd)
    assert "the download of model 'owner/model' broke off" in message or name in ("missing", "html", "short"), message
    sick.sick.clear()
    assert contents(hub.fetch("owner/model", weights)) == {name: FILES[name] for name in WANTED}


def test_pages_of_a_tree_without_end_are_refused(sick, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(hub, "LISTING_BYTES", 300_000)
    page = json.dumps([{"type": "file", "path": "x", "size": 1, "oid": "0"}]).encode()
    sick.sick["/tree/"] = sickly(body=page, Link=f'<{sick.url}/api/models/owner/model/tree/x>; rel="next"')
    assert "more to send than it listed" in refused(tmp_path, capfd)


def test_content_of_another_hash_is_not_kept(sick, tmp_path, capfd):
    sick.put("owner/model", {"model.safetensors": b"content"})
    sick.lfs = hashlib.sha256(b"other").hexdigest()
    assert "model.safetensors whose sha256 is not the one it lists" in refused(tmp_path, capfd)
    assert not list(tmp_path.rglob("model.safetensors")) and sick.bodies() == ["model.safetensors"]
    sick.put("owner/model", {"model.safetensors": b"content", "x": b""})
    sick.lfs = hashlib.sha256(b"content").hexdigest()
    assert contents(hub.fetch("owner/model", weights)) == {"model.safetensors": b"content"}


def test_user_and_password_of_the_address_are_sent_and_not_shown(sick, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", sick.url.replace("//", "//someone:PASS%57@"))
    seen, real = [], sick._server.RequestHandlerClass._answer
    monkeypatch.setattr(sick._server.RequestHandlerClass, "_answer",
                        lambda handler: [seen.append(handler.headers["Authorization"]), real(handler)])  # fmt: skip
    hub.fetch("owner/model", weights)
    assert len(seen) >= 4 and set(seen) == {"Basic c29tZW9uZTpQQVNTVw=="}  # someone:PASSW


def test_a_password_is_not_shown_where_nothing_answers(sick, tmp_path, capfd, monkeypatch):
    from huggingface_hub import constants

    for address in ("http://someone:PASSW0RD@127.0.0.1:9", "someone:PASSW0RD@127.0.0.1:9", "gopher://a:PASSW0RD@b"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        message = refused(tmp_path, capfd, hub.HubUnreachable)
        assert "cannot reach the hub" in message or "HF_ENDPOINT is not an address" in message
