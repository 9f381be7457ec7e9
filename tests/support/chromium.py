"""A real browser without a window, by its DevTools protocol."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-gpu", "--no-first-run")


class Page:
    """One page of a browser of its own.

    Args:
        directory: for its profile.
        url: to open.
        size: of the window.
    """

    def __init__(self, directory: Path, url: str, size: tuple[int, int] = (1200, 800)) -> None:
        from websockets.sync.client import connect

        command = [PROGRAM, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={directory}", "about:blank"]
        self._browser = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        found = None
        for line in self._browser.stderr:
            if found := re.search(r"ws://([^/]+)/", line):
                break
        assert found, "the browser does not start"
        (target,) = [
            one
            for one in json.load(urllib.request.urlopen(f"http://{found[1]}/json/list", timeout=10))
            if one["type"] == "page"
        ]
        self._socket = connect(target["webSocketDebuggerUrl"], max_size=1 << 26)
        self._ids = itertools.count(1)
        self.log: list[str] = []
        """What the page wrote to its console, and requests that failed."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*size)
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.log.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def js(self, expression: str) -> Any:
        """What an expression gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.js(expression)):
            assert time.monotonic() < deadline, f"{expression}: not within {seconds} s; {self.log}"
            time.sleep(0.05)
        return found

    def type(self, text: str) -> None:
        """Into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **more)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()
        self._browser.terminate()
        self._browser.wait(timeout=20)
        self._browser.stderr.close()
