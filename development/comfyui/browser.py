"""A headless Chromium on ComfyUI's page, for the page tests."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from .client import Client, Json

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PAGE_SECONDS = 100


def missing_programs() -> list[str]:
    """What of a browser and its driver is not on this machine's path; empty if all is."""
    missing = [] if any(map(shutil.which, BROWSERS)) else ["chromium"]
    return missing if shutil.which("chromedriver") else [*missing, "chromedriver"]


@contextlib.contextmanager
def chromium(width: int = 1920, height: int = 1080) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile; it and its driver are gone afterwards."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # With the path given, selenium does not look for a driver to download.
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.set_script_timeout(PAGE_SECONDS)
            yield driver
        finally:
            driver.quit()


def open_page(driver: webdriver.Chrome, server: Client, **settings: object) -> None:
    """Show the server's page with its nodes registered; one that is open with these settings stays.

    `settings` are the page's own, with _ for the dot ("Comfy_VueNodes_Enabled"): kept on the
    server, so set before the page asks for them.
    """
    # A first visit otherwise opens the template browser over the canvas.
    values = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}
    values |= {name.replace("_", "."): value for name, value in settings.items()}
    if getattr(driver, "settings", None) == values and driver.current_url.startswith(server.url):
        return
    driver.settings = values
    server.post("/settings", values)
    driver.get(server.url)
    ready = "return !!(window.app?.graph && window.LiteGraph?.registered_node_types?.KSampler)"
    WebDriverWait(driver, PAGE_SECONDS).until(lambda page: page.execute_script(ready))


def load_workflow(driver: webdriver.Chrome, workflow: Json) -> None:
    """Open a workflow as the page's own menu does, and show all of it."""
    in_page(driver, "await app.loadGraphData(arguments[0]);", workflow)


def in_page(driver: webdriver.Chrome, script: str, *arguments: object) -> object:
    """Run the body of an async function in the page → what it returns."""
    wrapped = f"""
const done = arguments[arguments.length - 1];
(async (...arguments_) => {{ const arguments = arguments_; {script} }})(...arguments)
    .then(value => done({{value}}), error => done({{error: String(error?.stack ?? error)}}));
"""
    answer = driver.execute_async_script(wrapped.replace("arguments_", "given"), *arguments)
    if "error" in answer:
        raise RuntimeError(f"The page failed: {answer['error']}")
    return answer.get("value")
