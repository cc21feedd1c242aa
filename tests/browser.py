"""A real browser without a screen, for tests of pages: Chromium, driven by Selenium. Nothing is asked of any network."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--lang=en",
)  # fmt: skip


class Browser:
    """A window of Chromium, and what its console has said."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, fragment: str = "") -> None:
        """A page of this machine in a window of that size; `fragment` follows its # in the address."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")  # the same address with another fragment would not be loaded again
        self.driver.get(f"{path.as_uri()}{fragment and '#' + fragment}")

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of an asynchronous JavaScript function returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1]; const given = [...arguments].slice(0, -1);"
            f"const run = async (...arguments) => {{ {script} }};"
            "run(...given).then((value) => done({ value }), (error) => done({ error: String(error.stack) }));"
        )
        answer = self.driver.execute_async_script(wrapped, *arguments)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def console(self) -> list[str]:
        """Warnings and errors since the last call; what a page says for information is left out."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        if whole:
            box = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
            self.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": box[0], "height": box[1], "deviceScaleFactor": 1, "mobile": box[0] < 600},
            )
        self.driver.save_screenshot(os.fspath(path))
        return path


@contextlib.contextmanager
def running() -> Iterator[Browser]:
    """A browser with an empty profile. Tests that start one are marked `needs("chromium")`."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.set_script_timeout(600)  # a machine may do other things too
            yield Browser(driver)
        finally:
            driver.quit()
