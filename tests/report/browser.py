"""A headless Chromium driven over its own protocol, for tests that look at pages."""

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--remote-debugging-port=0",
    *(f"--disable-{x}" for x in _OFF),
]


class Browser:
    """One tab. `said` collects console messages and errors, `asked` the addresses that the page asked for."""

    def __init__(self, socket):
        self._socket, self._number, self.said, self.asked = socket, 0, [], []

    async def call(self, method, **params):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message):
        kind, params = message.get("method"), message.get("params", {})
        if kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(params)
        if kind == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])

    async def open(self, address):
        for domain in ("Runtime", "Log", "Network", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=address)
        while await self.value("document.readyState") != "complete":
            await asyncio.sleep(0.05)

    async def value(self, code):
        found = await self.call("Runtime.evaluate", expression=code, returnByValue=True)
        return found["result"].get("value")

    async def size(self, width, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)

    async def dark(self, dark=True):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Tab": 9}[key]
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    async def picture(self, path):
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def look(address, visit):
    """Open an address and run `visit(browser)` on it."""

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
                if found := re.search(r"DevTools listening on ws://127.0.0.1:(\d+)/", line):
                    break
            else:
                raise RuntimeError("Chromium did not start")
            return asyncio.run(run(found[1]))
        finally:
            process.kill()
