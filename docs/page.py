"""Make the README's picture of the server's page: `PYTHONPATH=. .venv/bin/python docs/page.py`, after `make test`.

The embedded model in a real server, the page in the system's Chromium; captions by a fixed rule, as in pictures.py.
"""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.serving.process import running
from latentrt.bundle.bundle import EMBEDDED

TARGET = Path(__file__).parent / "images" / "page.webp"
WIDTH, HEIGHT = 1200, 900
DRAWN = 8


def main() -> None:
    """Draw by the page's keyboard shortcut, then look while one more job runs."""
    captions = json.loads((EMBEDDED / "captions.json").read_text(encoding="utf-8"))
    *done, last = captions[:: len(captions) // (DRAWN + 1)][: DRAWN + 1]
    options = ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "hide-scrollbars", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    with running() as server, Chrome(options, ChromeService(shutil.which("chromedriver"))) as chrome:
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        chrome.get(server.url)
        wait = WebDriverWait(chrome, 60, 0.02)
        wait.until(lambda _: chrome.find_element(By.NAME, "num_inference_steps").get_attribute("value"))
        for number, caption in enumerate(done, 1):
            draw(chrome, prompt=caption, seed=0)
            wait.until(lambda _, number=number: len(chrome.find_elements(By.CSS_SELECTOR, ".tile")) == number)
        draw(chrome, prompt=last, n=3, num_inference_steps=150)
        wait.until(lambda _: len(chrome.find_elements(By.CSS_SELECTOR, ".frame img")) == 3)
        picture = Image.open(BytesIO(chrome.get_screenshot_as_png())).convert("RGB")
    picture.save(TARGET, quality=90, method=6)


def draw(chrome: Chrome, **settings: object) -> None:
    """Fill the form in and press Ctrl+Enter."""
    for name, value in settings.items():
        field = chrome.find_element(By.NAME, name)
        field.clear()
        field.send_keys(str(value))
    chrome.find_element(By.NAME, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)


if __name__ == "__main__":
    main()
