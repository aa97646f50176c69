"""A headless Chromium that does what a person does with a page: looks, clicks, types. Spoken to through a pipe."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
# The pipe is at 3 and 4, which Python's own `subprocess` cannot promise.
_TRAMPOLINE = (
    "import fcntl, os, sys; found = [fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3]]; "
    "os.dup2(found[0], 3); os.dup2(found[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Page:
    """One page; `messages` are what its console said, errors among them."""

    def __init__(self, write, read):
        self._write, self._read, self._buffer, self._number, self._session = write, read, b"", 0, None
        self.messages, self.requests = [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._wait(lambda answer: answer.get("id") == self._number)

    def _wait(self, wanted, seconds=60):
        end = time.monotonic() + seconds
        while True:
            while b"\0" in self._buffer:
                text, self._buffer = self._buffer.split(b"\0", 1)
                answer = json.loads(text)
                self._note(answer)
                if wanted(answer):
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer.get("result", answer)
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer.")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended.")
            self._buffer += read

    def _note(self, answer):
        method, parameters = answer.get("method"), answer.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(parameters))
        if method == "Page.javascriptDialogOpening":
            self.messages.append("a dialog opened")
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def show(self, path, *, width=1200, height=900, dark=False, touch=False):
        """Opens a file in a window of this size."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.as_uri())
        self._wait(lambda answer: answer.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of an expression of JavaScript."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def _middle(self, selector):
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', inline: 'center'}})")
        return self.run(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")

    def point(self, selector):
        """Moves the mouse there."""
        x, y = self._middle(selector)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """Clicks with the mouse."""
        x, y = self._middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if kind != "mouseMoved" else "none", clickCount=1
            )

    def press(self, key, text=""):
        """Presses a key."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def accessible(self):
        """Role and name of everything that a screen reader finds."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n]

    def picture(self, path, *, whole=True):
        """Writes a screenshot."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def opened():
    """A page of a Chromium that ends with the block."""
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
        )
        command = [
            sys.executable,
            "-c",
            _TRAMPOLINE,
            str(theirs_read),
            str(theirs_write),
            PROGRAM,
            *options,
            f"--user-data-dir={folder}",
        ]
        process = subprocess.Popen(
            command, pass_fds=(theirs_read, theirs_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_read)
        os.close(theirs_write)
        try:
            yield Page(ours_write, ours_read)
        finally:
            os.close(ours_write)  # the browser ends with its pipe
            os.close(ours_read)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
