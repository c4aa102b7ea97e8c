"""The pictures of `docs/`, each taken in Chromium from the page that its study made.

    python -m benchmarks.pictures [name ...]     all of them, or some; studies resume, so a second look is quick
    python -m benchmarks.pictures --list

Runs the command that stands beside the picture, in the repository's own `studies/`.  Data come through Keras's
loaders; without a network, the environment variable LRTUNE_DATA names a folder that has mnist.npz,
fashion-mnist/*.gz and clothing/, as for the slow tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")

SWEEP = "#sweep-1, #sweep-1 + p, #sweep-1 ~ .grid.wide > *"
"""A sweep's heading and finding, and the pictures of all its rates together."""


@dataclass(frozen=True)
class Picture:
    """A picture and where it comes from.

    Attributes:
        file: where it goes, in `docs/`.
        command: words after `lrtune` that make the page.
        page: the page, in `studies/`.
        parts: selector of what is shown: the picture spans all that it finds.
        width: width of the window, in pixels.
    """

    file: str
    command: tuple[str, ...]
    page: str
    parts: str
    width: int = 1132


PICTURES = {
    "mnist-range-test": Picture(
        "examples/mnist-range-test.png",
        ("range-test", "studies/mnist_convnet.toml"),
        "mnist_convnet/range_test.html",
        "main > .card:first-child",
        1060,
    ),
    "fashion-mnist": Picture(
        "examples/fashion-mnist.png",
        ("tune", "studies/fashion_mnist_sweep.toml"),
        "fashion_mnist_sweep/report.html",
        SWEEP,
    ),
    "clothing": Picture(
        "examples/clothing.png",
        ("tune", "studies/clothing_xception.toml", "--objective.kwargs.weights", "random", "--confirm.finalists", "0"),
        "clothing_xception/report.html",
        SWEEP,
    ),
    "clinical-trial": Picture(
        "examples/clinical-trial.png",
        ("tune", "studies/clinical_trial.toml"),
        "clinical_trial/report.html",
        SWEEP,
    ),
}


@contextlib.contextmanager
def offline_data() -> Iterator[None]:
    """Point Keras's loaders to the folder that LRTUNE_DATA names; they are left alone without it."""
    folder = os.environ.get("LRTUNE_DATA")
    if folder is None:
        yield
        return
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(Path(folder) / "fashion-mnist", Path(home) / "datasets" / "fashion-mnist")
        os.environ["CLOTHING_PHOTOS"] = str(Path(folder) / "clothing")
        import keras.src.datasets.mnist as mnist
        import keras.src.utils.file_utils as files

        files.config.keras_home = lambda: home

        mnist.get_file = lambda *_, **__: str(Path(folder) / "mnist.npz")  # its copy need not have the checksum
        yield


def run(words: Sequence[str]) -> None:
    """Run a command of lrtune in this process.

    Raises:
        SystemExit: when it fails.
    """
    from pipeline.cli import main

    print(f"lrtune {' '.join(words)}", file=sys.stderr)
    sys.argv = ["lrtune", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


def take(picture: Picture) -> Path:
    """Take a picture of a page's parts in Chromium.

    Returns:
        The file.
    """
    from playwright.sync_api import sync_playwright

    path = ROOT / "docs" / picture.file
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        page = browser.new_page(viewport={"width": picture.width, "height": 900}, color_scheme="light")
        page.goto((ROOT / "studies" / picture.page).as_uri())
        page.wait_for_function("[...document.querySelectorAll('.figure')].every(f => f.querySelector('.main-svg'))")
        boxes = [box for part in page.locator(picture.parts).all() if (box := part.bounding_box())]
        left, top = min(b["x"] for b in boxes), min(b["y"] for b in boxes)
        right, bottom = max(b["x"] + b["width"] for b in boxes), max(b["y"] + b["height"] for b in boxes)
        margin = 12
        clip = {
            "x": max(left - margin, 0), "y": top - margin,
            "width": right - max(left - margin, 0) + margin, "height": bottom - top + 2 * margin,
        }  # fmt: skip
        page.screenshot(path=path, full_page=True, clip=clip)
        browser.close()
    return path


def main(words: Sequence[str]) -> None:
    """Make the pictures that are named, or all."""
    if "--list" in words:
        for name, picture in PICTURES.items():
            print(f"{name:18} docs/{picture.file:30} lrtune {' '.join(picture.command)}")
        return
    unknown = [name for name in words if name not in PICTURES]
    if unknown or CHROMIUM is None:
        sys.exit(f"no picture named {unknown[0]}" if unknown else "Chromium is not installed")
    os.chdir(ROOT)
    with offline_data():
        for name in words or PICTURES:
            run(PICTURES[name].command)
            print(take(PICTURES[name]).relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
