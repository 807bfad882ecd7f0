"""A headless Chromium that opens a page, does what a person would do there, and takes a picture of it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from websockets.sync.client import connect
from websockets.sync.connection import Connection

TEXT = "document.body.innerText"
PATIENCE = 60.0  # seconds in which a page must show what is asked for
QUIET = [
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",  # the graph of a run is drawn with WebGL, also where there is no graphics card
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]


class Browser:
    """One page, spoken to by the DevTools protocol."""

    def __init__(self, socket: Connection) -> None:
        self._socket, self._number = socket, 0

    def ask(self, method: str, **words: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": words}))
        while True:  # events come between the answers
            answer = json.loads(self._socket.recv(PATIENCE))
            if answer.get("id") == self._number:
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, address: str, width: int, height: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.ask("Page.navigate", url=address)

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(condition):
            if time.monotonic() > deadline:
                sys.exit(f"error: the page never came so far: {condition}; it says: {self.run(TEXT)[:500]}")
            time.sleep(0.2)

    def see(self, text: str) -> None:
        self.wait(f"{TEXT}.includes({json.dumps(text)})")

    def click(self, xpath: str) -> None:
        found = f"document.evaluate({json.dumps(xpath)}, document, null, 9).singleNodeValue"
        self.wait(f"!!({found})")
        self.run(f"{found}.click()")

    def shoot(self, path: Path) -> None:
        """A picture of 256 colours, which is enough for a page and a third of the bytes."""
        time.sleep(1.5)  # what moves comes to rest
        picture = Image.open(io.BytesIO(base64.b64decode(self.ask("Page.captureScreenshot")["data"])))
        picture.convert("RGB").quantize(256).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size // 1024} kB")


@contextmanager
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("error: no Chromium on the PATH; install it (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, *QUIET, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("DevTools listening on "))
            port = line.split("127.0.0.1:")[1].split("/")[0]
            pages = httpx.get(f"http://127.0.0.1:{port}/json").json()
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(address, max_size=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait(20)
