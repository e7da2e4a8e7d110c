"""The Gradio page in a real browser: an upload, its report, and a bad file's message.

Needs gradio, selenium and a Chromium with its driver; where one is missing the test says so and is skipped.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import peft_calib

gradio = pytest.importorskip("gradio", reason="the page needs gradio (the `space` extra)")
pytest.importorskip("selenium", reason="driving a browser needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium and chromedriver on this machine", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1700",
)
WAIT_SECONDS = 60


def _app(name: str):
    path = Path(peft_calib.metric_path(name)) / "app.py"
    spec = importlib.util.spec_from_file_location(f"{name}_app", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    served = []

    def open_(name: str):
        page = _app(name).page()
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        served.append(page)
        browser.get(url)
        _wait(browser, lambda d: d.find_element(By.ID, "measure"))
        return browser

    yield open_
    for page in served:
        page.close()


def _wait(driver, condition):
    ignored = [Exception]
    return WebDriverWait(driver, WAIT_SECONDS, ignored_exceptions=ignored).until(condition)


def _upload(driver, path: Path) -> None:
    for button in driver.find_elements(
        By.CSS_SELECTOR, "#file button[aria-label*='emove'], #file button[aria-label='Clear']"
    ):
        button.click()
    _wait(driver, lambda d: d.find_element(By.CSS_SELECTOR, "#file input[type=file]")).send_keys(str(path))
    _wait(driver, lambda d: path.stem in d.find_element(By.ID, "file").text)
    driver.find_element(By.ID, "measure").click()


def _heading(driver) -> str:
    return driver.find_element(By.ID, "heading").text


def test_upload_report_and_bad_file(open_page, tmp_path):
    generator = np.random.default_rng(0)
    p = generator.dirichlet([0.5, 0.5, 0.5], 200)
    y = np.where(generator.random(200) < 0.6, p.argmax(axis=1), generator.integers(0, 3, 200))
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    np.savetxt(good, np.column_stack([p, y]), delimiter=",", header="a,b,c,label", comments="")
    bad.write_text("0.9,0.4,0\n0.3,0.7,1\n")

    driver = open_page("calibration")
    _upload(driver, good)
    _wait(driver, lambda d: "on 200 rows" in _heading(d))
    assert "ECE" in _heading(driver)
    frame = driver.find_element(By.CSS_SELECTOR, "#body iframe")
    driver.switch_to.frame(frame)
    assert driver.find_element(By.TAG_NAME, "h1").text == "Calibration report"
    pictures = driver.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 4
    assert all(driver.execute_script("return arguments[0].naturalWidth", picture) > 300 for picture in pictures)
    driver.switch_to.default_content()
    assert driver.save_screenshot(str(tmp_path / "report.png"))

    _upload(driver, bad)
    _wait(driver, lambda d: "cannot be measured" in _heading(d))
    assert "row 0 sums to 1.3" in _heading(driver)
    assert driver.find_elements(By.CSS_SELECTOR, "#body iframe") == []
    assert driver.save_screenshot(str(tmp_path / "message.png"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("selective_prediction", "AURC"), ("uncertainty", "nats of uncertainty"), ("decision", "is wrong")],
)
def test_the_other_pages_measure_their_example(open_page, name, expected):
    driver = open_page(name)
    driver.find_element(By.ID, "measure").click()
    _wait(driver, lambda d: expected in _heading(d))
    assert len(driver.find_elements(By.CSS_SELECTOR, "#body tr")) > 5
