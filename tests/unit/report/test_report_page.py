"""The page in a real browser: nothing on its console, nothing asked of the network, and its pictures are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from made_runs import write_run
from sophia_galore.report.comparison import compare_runs
from sophia_galore.report.run import read_run
from sophia_galore.report.write import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next((found for name in BROWSERS if (found := shutil.which(name))), None)

# Run in the page when all of it is loaded; what it finds out is written where the dumped page shows it.
PROBE = """
<script>
window.addEventListener("load", () => {
  const found = {
    images: Array.from(document.images, image => [image.complete, image.naturalWidth, image.naturalHeight, image.alt]),
    tables: document.querySelectorAll("table").length,
    asked: Array.from(document.querySelectorAll("[src], [href]"), node => node.getAttribute("src") || node.href)
      .filter(address => !address.startsWith("data:")),
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  };
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>
"""


def open_page(page: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Open a page.

    Returns:
        What the probe found, and the lines that came on the browser's console.
    """
    assert BROWSER is not None
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    words = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    if hasattr(os, "getuid") and os.getuid() == 0:
        words.append("--no-sandbox")  # which the superuser can't have
    words += [f"--user-data-dir={folder / 'profile'}", "--window-size=390,800", "--virtual-time-budget=10000"]
    done = subprocess.run([*words, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written is not None, done.stdout[-2000:]
    found: dict[str, Any] = json.loads(unescape(written[1]))
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = [
        read_run(write_run(tmp_path / f"{name}{seed}", seed=seed, evals={0: 3.1, 2: 2.6, 4: end}), name=name)
        for name, end in (("galore", 2.4), ("adamw", 2.3))
        for seed in (1, 2)
    ]
    return write_report(compare_runs(runs, command="sophia-galore compare a.yaml b.yaml"), tmp_path / "report")[0]


# Continuous integration sets the variable, so that a missing browser is not a test that nobody ran.
@pytest.mark.skipif(BROWSER is None and not os.environ.get("NEEDS_CHROMIUM"), reason="no Chromium on this machine")
def test_the_page_opens_without_a_complaint_and_with_its_pictures(page: Path, tmp_path: Path) -> None:
    found, console = open_page(page, tmp_path)
    assert console == []
    assert found["asked"] == []
    assert len(found["images"]) == 2
    for complete, width, height, alt in found["images"]:
        assert complete and width > 300 and height > 100 and alt
    assert found["tables"] == 4  # loss, memory, time, run by run
    assert not found["wide"], "on a telephone the tables scroll, not the page"


@pytest.mark.skipif(BROWSER is None and not os.environ.get("NEEDS_CHROMIUM"), reason="no Chromium on this machine")
def test_the_test_would_see_an_error_and_a_missing_picture(page: Path, tmp_path: Path) -> None:
    broken = page.read_text(encoding="utf-8").replace("<body>", "<body><script>console.error('lost')</script>")
    page.write_text(re.sub(r"data:image/svg\+xml;base64,[^\"]+", "nowhere.svg", broken, count=1), encoding="utf-8")
    found, console = open_page(page, tmp_path)
    assert any("lost" in line for line in console)
    assert found["images"][0][1] == 0
    assert len(found["asked"]) == 1
