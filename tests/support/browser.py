"""A Chromium without a window, driven over a pipe: what it says of a page, pictures and prints.

With the standard library alone, by the DevTools protocol. Any browser of the family on the PATH
will do (on Debian `apt install chromium-headless-shell`). The docs' pictures of a report are made
by

    PYTHONPATH=tests/support python tests/support/browser.py RUN/report/report.html docs/images
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
PATIENCE = 900.0  # seconds for one answer, on a machine that does much else
NEWS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def find_browser() -> str | None:
    """The path of a browser that `Browser` can drive; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `with Browser(find_browser()) as browser:`."""

    def __init__(self, path: str) -> None:
        self._path, self._count, self._rest, self._session = path, 0, b"", ""
        self.errors: list[str] = []  # what the pages shown so far complained of

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        # Away from 3 and 4, where the browser expects its ends.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
        flags += [f"--user-data-dir={self._profile.name}", "--disable-background-networking"]
        flags += ["--no-sandbox"] * (os.geteuid() == 0) + ["--hide-scrollbars"]
        self._process = subprocess.Popen(
            [self._path, *flags, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # Python's own are closed all the same
            preexec_fn=place,
        )
        for end in (read, write, *ends):
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol, of the page once there is one; returns its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        """The next message, which `errors` keeps if it is a complaint of the page."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            piece = os.read(self._read, 1 << 20) if ready else b""
            assert piece, f"{self._path} does not answer, or has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in NEWS:
            said = message["params"]
            level = said.get("entry", {}).get("level", said.get("type", "error"))
            if level in ("error", "warning"):
                self.errors.append(json.dumps(said))
        return message

    def show(
        self,
        page: Path,
        width: int,
        height: int = 900,
        scheme: str = "light",
        media: str = "screen",
    ) -> None:
        """Opens a file at a width in CSS pixels, in a colour scheme, as on a screen or in print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page that is shown."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """A PNG of what is seen of the page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def printed(self) -> bytes:
        """The page as a PDF on A4."""
        paper: Mapping[str, float] = {"paperWidth": 8.27, "paperHeight": 11.69}
        found = self.call("Page.printToPDF", preferCSSPageSize=True, **paper)
        return base64.b64decode(found["data"])


def main(page: Path, folder: Path) -> None:
    """Takes the docs' four pictures of a page: of a desktop and a phone, light and dark."""
    from PIL import Image  # comes with matplotlib

    path = find_browser()
    assert path, f"none of {', '.join(NAMES)} is on the PATH"
    folder.mkdir(parents=True, exist_ok=True)
    with Browser(path) as browser:
        for device, width, height in (("desktop", 1280, 1440), ("phone", 390, 844)):
            for scheme in ("light", "dark"):
                browser.show(page, width, height, scheme)
                # 256 colours of text and lines: half the size
                image = Image.open(io.BytesIO(browser.picture())).convert("RGB").quantize()
                image.save(folder / f"report-{device}-{scheme}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
