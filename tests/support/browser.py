"""A real headless browser, driven over the DevTools protocol by what the project has anyway (websockets).

On Debian: apt-get install chromium-headless-shell. Any Chromium or Chrome does; GADCORE_BROWSER names another one.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, "Enter": 13, "Tab": 9}
STARTS_WITHIN_S = 60


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    named = os.environ.get("GADCORE_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless browser whose profile, and so whose localStorage, lies in a folder; a context manager.

    errors: what pages have thrown or been refused. requested: the addresses that pages have asked for.
    """

    def __init__(self, profile: Path) -> None:
        self._profile, self._number = profile, 0
        self.errors: list[str] = []
        self.requested: list[str] = []
        self.loaded = False

    def __enter__(self) -> Browser:
        port_file = self._profile / "DevToolsActivePort"
        port_file.unlink(missing_ok=True)
        # Chromium's own sandbox does not start for root, as in most containers; the page comes from this repository.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        address = ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={self._profile}"]
        with (self._profile / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(find_browser()), *flags, *address, "about:blank"], stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + STARTS_WITHIN_S
        while not port_file.exists() or not port_file.read_text().strip():
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise RuntimeError(f"the browser did not start:\n{(self._profile / 'browser.log').read_text()[-2000:]}")
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        self._connection = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        self._socket = self._connection.__enter__()
        self._session: str | None = None
        pages = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        # Closed in order, so that localStorage is on disk.
        self.call("Browser.close")
        self._connection.__exit__(None, None, None)
        self._process.wait(STARTS_WITHIN_S)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; raises RuntimeError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        method, data = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(data["exceptionDetails"]))
        elif method == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.errors.append(data["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(data["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, path: Path) -> None:
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + STARTS_WITHIN_S
        while not self.loaded:
            assert time.monotonic() < end, f"{path} did not load"
            self.run("0")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, *, repeat: bool = False, modifiers: int = 0) -> None:
        """A key of KEYS, as if pressed on the keyboard; modifiers: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=repeat, **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Into the focused field."""
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """Sets the size of the window in CSS pixels, and the colour scheme: light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def downloads_to(self, folder: Path) -> None:
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
