"""A headless Chromium, driven over the DevTools protocol, for tests of pages."""

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DISABLED = ("gpu", "quic", "background-networking", "component-update", "sync")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--remote-debugging-port=0",
    *(f"--disable-{x}" for x in _DISABLED),
]


class Browser:
    """A tab that collects console `messages` and the addresses of all `requests`."""

    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self.messages, self.requests = [], []

    async def call(self, method, **params):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            self._collect(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _collect(self, message):
        kind, params = message.get("method"), message.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(params)
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    async def open(self, address):
        for domain in ("Runtime", "Log", "Network", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=address)
        while await self.evaluate("document.readyState") != "complete":
            await asyncio.sleep(0.05)

    async def evaluate(self, code):
        evaluated = await self.call("Runtime.evaluate", expression=code, returnByValue=True)
        return evaluated["result"].get("value")

    async def set_size(self, width, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)

    async def set_dark(self, dark=True):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Tab": 9}[key]
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    async def screenshot(self, path):
        captured = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(captured["data"]))


def visit_page(address, visit):
    """Open an address, and return what `visit(browser)` returns."""

    async def run(port):
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new") as answer:
                socket = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(socket, max_msg_size=0) as connection:
                browser = Browser(connection)
                await browser.open(address)
                return await visit(browser)

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            for line in process.stderr:
                if match := re.search(r"DevTools listening on ws://127.0.0.1:(\d+)/", line):
                    break
            else:
                raise RuntimeError("Chromium did not start")
            return asyncio.run(run(match[1]))
        finally:
            process.kill()
