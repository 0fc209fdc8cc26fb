"""Export the embedded model for browsers, draw every class in headless Chromium and keep a screenshot of the page.

    python examples/web_page.py [SCREENSHOT]

Needs Chromium (apt install chromium) and playwright (pip install playwright).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from dit_hub.export import export_web

screenshot = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/web.png")
screenshot.parent.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch) / "page"
    export_web("dit-toy-shapes", folder)
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().split("port ")[1].split()[0]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 700})
            page.goto(f"http://127.0.0.1:{port}/")
            page.click("button:text-is('all')", timeout=60_000)
            status = page.locator("#status", has_text="drawn")
            status.wait_for(timeout=120_000)
            print(status.inner_text())
            page.screenshot(path=screenshot, full_page=True)
            browser.close()
    finally:
        server.kill()
print(f"Written: {screenshot}")
