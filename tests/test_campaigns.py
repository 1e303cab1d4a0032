"""The commands of tests/campaigns, a few cases of each: they run, count what they did, and find what is broken."""

import subprocess
import sys
import time

import pytest
from campaigns import disk, fuzz, kill

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are limited and namespaces made as Linux does it")


def campaign(run, folder, **options):
    """({kind: its row}, what went wrong) of one case of each kind."""
    rows, wrong = run(folder, 4, time.monotonic(), cases=1, **options)
    return {row["kind"]: row for row in rows}, wrong


@linux
def test_kills(tmp_path):
    rows, wrong = campaign(kill.run, tmp_path, only=["grid of 2"])
    assert list(rows) == ["grid of 2"] and not [line for line in wrong if "left over" not in line]
    assert all(row["folders"] == 1 and row["kills"] >= 1 for row in rows.values())


@linux
def test_damaged_files(tmp_path):
    kinds = ["unigram", "csv"]
    rows, wrong = campaign(fuzz.run, tmp_path, only=kinds)
    assert list(rows) == kinds and wrong == []
    assert all(row["used"] + row["refused"] == row["cases"] == 1 for row in rows.values())


@linux
def test_sick_hubs(tmp_path):
    rows, wrong = fuzz.run_hub(tmp_path, 4, time.monotonic(), cases=8)
    assert wrong == [] and rows[0]["cases"] >= 3 and rows[0]["refused"] >= 1


@linux
def test_full_disks(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        with pytest.raises(SystemExit, match="no mount namespace"):
            disk.run(tmp_path, 4, time.monotonic())
    else:
        rows, wrong = campaign(disk.run, tmp_path, only=["run"])
        assert wrong == [] and rows["run"]["sizes"] == rows["run"]["filled"] == 1


BROKEN = """
import os, time
from pathlib import Path
from campaigns import fuzz
def broken(kind, folder):
    def use():
        if (folder / "file").read_bytes() != b"good":
            HOW
    (folder / "file").write_bytes(b"good")
    return [folder / "file"], lambda draw, data: b"bad", use
fuzz.KINDS["broken"] = broken
fuzz.worker("broken", 1, 0, Path(FOLDER))
"""


@linux
@pytest.mark.parametrize(
    ("how", "found"),
    [("1 // 0", "ZeroDivisionError"), ("os.abort()", "the process died: -6"), ("bytearray(2 << 30)", "MemoryError"),
     ("time.sleep(600)", "no end after 3 s")],
)  # fmt: skip
def test_what_is_broken_is_found(tmp_path, monkeypatch, how, found):
    def command(kind, seed, first, place):
        return [sys.executable, "-c", BROKEN.replace("HOW", how).replace("FOLDER", repr(str(place)))]

    monkeypatch.setattr(fuzz, "command", command)
    monkeypatch.setattr(fuzz, "HANG", 3.0 if "sleep" in how else 60.0)
    [row], [wrong] = fuzz.run(tmp_path, 1, time.monotonic(), cases=1, kinds=["broken"])
    assert row == {"kind": "broken", "cases": 1, "used": 0, "refused": 0, "wrong": 1} and found in wrong
