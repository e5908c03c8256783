"""A real browser that reads pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Curves


def log(run: Path, version: str, *lines: str) -> None:
    path = run / "logs" / version / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The page, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
WIDTHS = (1200, 390)


class Browser:
    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path, width: int) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.as_uri())
        assert self.js("return window.innerWidth") == width

    def js(self, script: str):
        return self.driver.execute_script(script)

    def text(self, css: str = "body") -> str:
        return self.js(f"return document.querySelector({css!r}).innerText")

    def count(self, css: str) -> int:
        return self.js(f"return document.querySelectorAll({css!r}).length")

    def cells(self) -> list[list[str]]:
        script = (
            "return [...document.querySelectorAll('#summary tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
        )
        return self.js(script)

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def check(self) -> None:
        """What holds for every page."""
        assert [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert {url.split(":")[0] for url in self.requests()} <= {"file", "data"}
        widest = "return [document.documentElement.scrollWidth, window.innerWidth]"
        content, window = self.js(widest)
        assert content <= window, f"the page is {content} pixels wide in a window of {window}"
        broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)"
        assert self.js(broken) == []
