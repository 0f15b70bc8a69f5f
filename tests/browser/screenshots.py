"""Take the README's pictures of the page: `python tests/browser/screenshots.py [--subspace FILE]`.

Starts the page on a working folder of its own, draws a few blends, and writes `app/screenshots/*.png` small enough to be
kept in the repository.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from conftest import CHROMIUM, FLAGS, ROOT, Server, make_subspace
from PIL import Image
from playwright.sync_api import Page, sync_playwright

READY_MADE = ROOT / "share_diffusion" / "assets" / "concepts.safetensors"
FOLDER = ROOT / "app" / "screenshots"
PROMPT, SEED = "watercolor painting of a robot on a beach", 11
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


def keep(view: Page, name: str) -> None:
    """Write what the window shows, in 128 colours."""
    FOLDER.mkdir(exist_ok=True)
    with Image.open(io.BytesIO(view.screenshot())) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


def says(view: Page, where: str, word: str) -> None:
    """Wait until a line says something."""
    script = "([where, word]) => document.querySelector(where + ' p')?.textContent.includes(word)"
    view.wait_for_function(script, arg=[where, word])


def draw(view: Page, names: list[str], count: int) -> None:
    """Blend concepts from their cards and draw."""
    for name in names:
        view.locator(f"#cards button[data-id={name}]").click()
        view.wait_for_selector(f"#mixer li .chip[aria-label='Take {name} out']")
    view.locator("#prompt textarea").fill(PROMPT)
    view.locator("#fresh-seed input").uncheck()
    view.locator("#seed input").fill(str(SEED))
    view.locator("#count input").fill(str(count))
    view.locator("#count input").press("Enter")
    view.click("#draw")
    says(view, "#status", "in ")
    view.wait_for_timeout(1500)


def take(server: Server, names: list[str]) -> None:
    """Open the page wide and narrow, light and dark, and keep what it shows."""
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        view = chromium.new_context(viewport=WIDE).new_page()
        view.set_default_timeout(300_000)
        view.goto(server.address)
        view.wait_for_selector("#cards button")
        view.wait_for_function("() => [...document.querySelectorAll('#cards button')].every(card => card.querySelector('img'))")
        draw(view, names[:2], 1)
        keep(view, "draw")
        view.emulate_media(color_scheme="dark")
        view.set_viewport_size(PHONE)
        view.wait_for_timeout(1500)
        keep(view, "phone-dark")
        view.emulate_media(color_scheme="light")
        view.set_viewport_size(WIDE)
        for tab, name in (("Compare", "compare"), ("Inside", "inside")):
            view.get_by_role("tab", name=tab, exact=True).click()
            view.wait_for_timeout(2500)
            if name == "compare":
                view.click("#pair-draw")
                says(view, "#pair-caption", "without")
                view.wait_for_timeout(1500)
            keep(view, name)
        chromium.close()


def main() -> None:
    """Start the page, take the pictures, stop the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subspace", type=Path, default=READY_MADE)
    parser.add_argument("--concepts", nargs="+", default=["watercolor", "robot"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        if arguments.subspace.is_file():
            server.file = arguments.subspace.resolve()
        else:
            make_subspace(server.file)
        server.start()
        try:
            take(server, arguments.concepts)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
