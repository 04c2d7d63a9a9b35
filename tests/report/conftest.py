"""A real browser for the page's tests, without a screen: Debian's `apt-get install chromium chromium-driver`."""

from __future__ import annotations

import shutil

import pytest

PHONE = (390, 844)
DESKTOP = (1200, 900)


class Browser:
    """One chromium that opens files; a page's messages are its console's and its errors."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, page, size=DESKTOP) -> None:
        """Load a page at a window size in CSS pixels, as a phone below 500 pixels, and forget older messages."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri())

    def messages(self) -> list[str]:
        """What the page wrote to the console since it was opened: errors of scripts and of the security policy too."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments):
        """The value of a script's `return`."""
        return self.driver.execute_script(script, *arguments)

    def visible(self, selector: str) -> list:
        """The elements that a reader sees, in order."""
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def click(self, selector: str) -> None:
        """Click the first such element."""
        self.driver.find_element("css selector", selector).click()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One browser for all tests, in a profile of its own."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not program or not chromedriver:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra `dev`")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(60)
    yield Browser(driver)
    driver.quit()
