"A real browser and the servers that it visits; servers always end, and only write in a folder of the test."

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = Path(sys.executable).parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ARTEFACTS = ROOT / "build" / "screenshots"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(command: list[str], address: str, folder: Path, **environment: str) -> Iterator[None]:
    "Run a server until it answers at `address`, and end it afterwards."
    names = (
        "HOME",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR",
    )
    places = {name: str(folder / name.lower()) for name in names}
    for place in places.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    news = Path(
        places["JUPYTERLAB_SETTINGS_DIR"],
        "@jupyterlab",
        "apputils-extension",
        "notification.jupyterlab-settings",
    )
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    settings = {
        **os.environ,
        **places,
        "PATH": f"{COMMANDS}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=ROOT)
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {(folder / 'server.log').read_text()[-2000:]}")
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except urllib.error.HTTPError:
                break  # it answers, if only to say no
            except OSError:
                time.sleep(0.25)
        else:
            raise RuntimeError(f"no answer from {address}: {(folder / 'server.log').read_text()[-2000:]}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def chromium() -> Iterator:
    "A headless Chromium; the test is skipped, with a message, if there is none."
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: not tested in a browser"
    )
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as context:
        if found is None and not os.path.exists(context.chromium.executable_path):
            pytest.skip("no Chromium: not tested in a browser")
        browser = context.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def keep(page, name: str) -> None:
    "A screenshot for people: build/screenshots/NAME.png."
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")
