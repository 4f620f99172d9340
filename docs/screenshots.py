"""Pictures of TensorBoard's pages for docs/dashboards.md, taken by a Chromium without a window.

python docs/screenshots.py LOGDIR            LOGDIR: the folder of the runs to show, as `tensorboard --logdir` takes it

Needs a `chromium` (apt-get install chromium) and nothing else; Leap itself does not need one.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent / "images"
# picture -> (what stands behind TensorBoard's address, height in pixels)
PAGES = {
    "monitors": ("#custom_scalars", 1000),
    "hparams": ("#hparams", 480),
    "text": ("#text&tagFilter=samples", 640),
    "health": ("#text&tagFilter=health", 440),
    "figures": ("#images&tagFilter=frontier", 640),
    "speed": ("#scalars&tagFilter=speed", 480),
}
WIDTH, PATIENCE = 1280, 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(address: str) -> None:
    """Until the page is served. Raises TimeoutError after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"{address} did not answer")


def take(browser: str, address: str, path: Path, height: int, patience: float) -> None:
    """One picture, once the page has been drawn for `patience` seconds."""
    subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={path}",
            f"--window-size={WIDTH},{height}", f"--timeout={int(1000 * patience)}",
            f"--virtual-time-budget={int(1000 * patience)}", address,
        ],
        check=True, capture_output=True, timeout=PATIENCE + 4 * patience,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--to", type=Path, default=HERE)
    parser.add_argument("--only", nargs="+", choices=list(PAGES), default=list(PAGES), metavar="PICTURE")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a page may take to draw")
    args = parser.parse_args()
    browser = shutil.which(args.browser)
    if browser is None:
        parser.error(f"--browser={args.browser} is not installed; type apt-get install chromium")
    args.to.mkdir(parents=True, exist_ok=True)
    port = free_port()
    logdir = args.logdir.resolve()  # its name alone is shown on the pages
    board = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port), "--load_fast=false"],
        cwd=logdir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/")
        time.sleep(args.seconds / 2)  # until the events are read
        for name in args.only:
            page, height = PAGES[name]
            path = args.to.resolve() / f"{name}.png"
            take(browser, f"http://127.0.0.1:{port}/?darkMode=false{page}", path, height, args.seconds)
            print(f"{path}: {path.stat().st_size // 1000} kB")
    finally:
        board.terminate()
        board.wait()


if __name__ == "__main__":
    main()
