"""Chromium for tests: a few lines of the WebDriver protocol (W3C WebDriver), which chromedriver speaks over HTTP.

`with Browser() as browser:` gives a window. `open` goes to an address, `run` executes JavaScript in the page, `click`
and `type` do what a user does; `console()` and `requests()` give what happened since they were last asked. Debian's
packages are chromium and chromium-driver. With MINILORA_BROWSER=required in the environment a missing browser fails
the tests; else they are left out, with the reason.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the standard
NAMES = ("chromedriver",), ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip
WAIT = 120  # seconds that a busy machine may take for one answer


def programs():
    """The paths of (chromedriver, the browser), None for one that is missing."""
    return [next(filter(None, map(shutil.which, names)), None) for names in NAMES]


def need_browser():
    """Leave the test out where there is no browser, or fail it where MINILORA_BROWSER=required."""
    if None in programs():
        missing = "no chromium with chromedriver is installed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("MINILORA_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(f"browser tests are left out: {missing}")


class Browser:
    """A window of a headless Chromium with a fresh profile; use it as a context manager."""

    def __enter__(self):
        driver, browser = programs()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        environment = os.environ | {name: self.profile.name for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
        self.log = open(Path(self.profile.name) / "chromedriver.log", "w+")
        self.process = subprocess.Popen([driver, "--port=0"], stdout=self.log, stderr=self.log, env=environment)
        self.session = ""
        try:
            self.address = f"http://127.0.0.1:{self._port()}"
            options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={self.profile.name}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"/session/{made['sessionId']}"
            self.open("about:blank")  # the browser's own first page asks for much
            self.console(), self.requests()
            self.open("about:blank")  # the browser's own first page asks for much
            self.console(), self.requests()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        try:
            if self.session:
                self._call("DELETE", self.session)
        finally:
            self.process.terminate()
            self.process.wait()
            self.log.close()
            self.profile.cleanup()

    def _port(self):
        """The port that chromedriver chose, from what it prints."""
        for _ in range(100 * WAIT):
            said = Path(self.log.name).read_text()
            if found := re.search(r"started successfully on port (\d+)", said):
                return found[1]
            assert self.process.poll() is None, said
            time.sleep(0.01)
        raise TimeoutError(said)

    def _call(self, method, path, body=None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=WAIT) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise RuntimeError(f"{value['error']}: {value['message']}") from None

    def _do(self, path, body):
        return self._call("POST", self.session + path, body)

    # --- what a test does

    def open(self, address):
        """Go to an address, or to a file's path, and wait until it is loaded."""
        self._do("/url", {"url": address.resolve().as_uri() if isinstance(address, Path) else address})

    def run(self, script, *arguments):
        """The value that `script`, the body of a JavaScript function, returns; it sees `arguments`."""
        return self._do("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script, *arguments):
        """Wait until `script` returns something that is true, and give it back."""
        end = time.monotonic() + WAIT
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"this did not become true: {script}"
            time.sleep(0.02)
        return found

    def click(self, selector):
        self._do(f"/element/{self._find(selector)}/click", {})

    def type(self, selector, text):
        self._do(f"/element/{self._find(selector)}/value", {"text": text})

    def _find(self, selector):
        return self._do("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def look(self, width=1400, height=900, dark=False):
        """Set the size of the window in pixels, and whether the reader prefers a dark ground."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def devtools(self, command, **parameters):
        """A command of the Chrome DevTools protocol."""
        return self._do("/goog/cdp/execute", {"cmd": command, "params": parameters})

    # --- what it gives back

    def console(self):
        """[(level, message)] of the console since the last call: errors of scripts and of loading, and warnings."""
        return [(entry["level"], entry["message"]) for entry in self._do("/se/log", {"type": "browser"})]

    def requests(self):
        """The addresses that were asked for since the last call, those within a page (data:) too."""
        events = [json.loads(entry["message"])["message"] for entry in self._do("/se/log", {"type": "performance"})]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path, whole=False):
        """Write what the window shows, or with `whole` all of the page, as PNG."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))
