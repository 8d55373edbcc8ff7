"""A headless Chromium for the tests of the page, and a user's actions in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.serve.fake_engine import PATIENCE

REQUIRED = "BROWSER_REQUIRED"  # set by .ci/run where it has one: then skipping is no option
MISSING = "no Chromium with its driver: apt-get install chromium chromium-driver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it will not start as root with one
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--window-size=1200,900",
    "--host-resolver-rules=MAP page.test 127.0.0.1",  # another machine, for all that a browser knows
)
# Elements that need a name for screen readers.
NAMED = {"button", "textbox", "combobox", "spinbutton", "slider", "progressbar", "link", "image", "dialog", "form"}


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Yield one that was started for this; skip the test where there is none."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (binary and driver):
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(MISSING)
    options = ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Visitor:
    """A user at the page of a server."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome, self.url = chrome, url
        self.expected: list[str] = []  # parts of the messages that the console may show
        chrome.get("about:blank")
        chrome.get_log("browser")
        chrome.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})

    def visit(self, state: str = "ready") -> Visitor:
        """Open the page and wait until it knows the server."""
        self.chrome.get(self.url)
        self.server_is(state)
        if state == "ready":
            self.until(lambda: self.one("[name=num_inference_steps]").get_attribute("value"))
        return self

    def server_is(self, state: str) -> None:
        """Wait until the page shows this state."""
        self.until(lambda: self.one("#state").get_attribute("data-state") == state)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def until(self, check: Callable[[], Any]) -> Any:
        """Return the check's result once it is true; elements that the page replaces meanwhile are looked up again."""
        wait = WebDriverWait(self.chrome, PATIENCE, 0.02, [StaleElementReferenceException, IndexError])
        return wait.until(lambda _: check())

    def reads(self, text: str, selector: str = "#work") -> None:
        """Wait until the text is shown there."""
        self.until(lambda: any(text in element.text for element in self.all(selector)))

    def count(self, number: int, selector: str) -> list[WebElement]:
        """Wait until there are so many; return them."""
        return self.until(lambda: len(found := self.all(selector)) == number and (found or True))

    def set(self, **settings: object) -> None:
        """Write into fields of the form."""
        for name, value in settings.items():
            field = self.one(f"[name={name}]")
            field.clear()
            field.send_keys(str(value))

    def press(self, *keys: str) -> None:
        """Press keys in the focused element; a modifier holds for the last one."""
        *held, last = keys
        chain = ActionChains(self.chrome)
        for key in held:
            chain.key_down(key)
        chain.send_keys(last)
        for key in held:
            chain.key_up(key)
        chain.perform()

    def draw(self, prompt: str, **settings: object) -> None:
        """Draw by keyboard."""
        self.set(prompt=prompt, **settings)
        self.press(Keys.CONTROL, Keys.ENTER)

    def click(self, text: str, within: str = "body") -> None:
        """Click the button with this text."""
        selector = f"{within} :is(button, summary)"
        found = self.until(lambda: next((one for one in self.all(selector) if one.text == text), None))
        self.run("arguments[0].scrollIntoView({ block: 'center' })", found)
        found.click()

    @property
    def focused(self) -> str:
        """The name of the focused element."""
        return str(self.chrome.switch_to.active_element.accessible_name)

    def run(self, script: str, *arguments: object) -> Any:
        """Return the value of a script."""
        return self.chrome.execute_script(script, *arguments)

    def nameless(self) -> list[str]:
        """Return roles of elements that have no name for a screen reader."""
        tree = self.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        seen = [node for node in tree if not node["ignored"] and node["role"]["value"] in NAMED]
        assert len(seen) > 10
        return [node["role"]["value"] for node in seen if not node.get("name", {}).get("value", "").strip()]

    def emulate(self, **features: str) -> None:
        """Set media features, as prefers_color_scheme="dark"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    @contextmanager
    def width(self, pixels: int) -> Iterator[None]:
        """Set the screen's width; narrow is a phone's."""
        screen = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        yield
        self.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def complaints(self) -> list[str]:
        """Return the console's messages that were not expected."""
        messages = [entry["message"] for entry in self.chrome.get_log("browser") if entry["level"] != "INFO"]
        return [message for message in messages if not any(part in message for part in self.expected)]
