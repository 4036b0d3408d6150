# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""The page in a browser, as it is installed on the machine: Debian's and Ubuntu's package is `chromium`."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.helpers import tiny_trainer
from trl_distreward import LogSamplesCallback
from trl_distreward.run_report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FOUND = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    FOUND is None, reason=f"no browser that prints a page as it sees it: install one of {', '.join(BROWSERS)}"
)
MEASURE = """<script>
window.addEventListener("load", () => {
  const charts = [...document.querySelectorAll("svg[role=img]")].map(e => e.getBoundingClientRect());
  const images = [...document.images].map(e => e.naturalWidth);
  const lines = [...document.querySelectorAll("figure.chart path.line.s0")].map(e => e.getTotalLength());
  const measured = {
    charts: charts.filter(r => r.width > 100 && r.height > 10).length, images, lines,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: window.innerWidth, ink: getComputedStyle(document.body).color };
  document.documentElement.setAttribute("data-measured", JSON.stringify(measured));
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    settings = {"eval_strategy": "steps", "eval_steps": 1, "log_reward_diagnostics": True}
    trainer = tiny_trainer(folder, max_steps=3, **settings)
    trainer.add_callback(LogSamplesCallback(trainer))
    trainer.train()
    return write_report(folder)


def opened(path, profile, *options):
    """The page as the browser has it, and what it says in its console."""
    command = [FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--log-level=0", "--dump-dom", *options, path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_browser_shows_the_page_without_a_word_in_the_console(page, tmp_path):
    dom, console = opened(page, tmp_path)
    assert console == [] and "<title>run: report of a run</title>" in dom
    assert dom.count('role="img"') == page.read_text().count('role="img"') > 8
    # and would say it, had the page asked for anything or run a script
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("<main>", '<main><script>1</script><img src="x.png" alt="">'))
    _, console = opened(broken, tmp_path)
    assert len(console) == 2 and all("Content Security Policy" in line for line in console), console


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_charts_and_images_are_drawn_and_nothing_sticks_out(page, tmp_path, width, dark):
    measured = page.with_name(f"measured-{width}.html")
    free = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # which would not let the ruler run
    measured.write_text(free.replace("</body>", f"{MEASURE}</body>"))
    options = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    dom, console = opened(measured, tmp_path, f"--window-size={width},900", *options)
    found = json.loads(html.unescape(re.search(r'data-measured="([^"]*)"', dom)[1]))
    assert console == [] and found["width"] == width and found["overflow"] <= 0
    assert found["charts"] == page.read_text().count('role="img"')
    assert all(length > 10 for length in found["lines"]) and len(found["lines"]) > 8
    assert len(found["images"]) == 4 and all(size > 0 for size in found["images"])
    red = int(re.search(r"rgb\((\d+)", found["ink"])[1])
    assert red > 200 if dark else red < 50
