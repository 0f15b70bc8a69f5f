"""The real page as a process of its own, on the embedded base with a small real subspace file, and a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from share_diffusion.base import load_base
from share_diffusion.concept import Concept
from share_diffusion.lora import Factors, LoRA
from share_diffusion.models.identity import identify
from share_diffusion.models.layers import select, shape_of
from share_diffusion.subspace import Subspace

ROOT = Path(__file__).resolve().parents[2]
START = 600  # seconds that a busy machine may take
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


def small_lora(modules, seed):
    """A LoRA of rank 2 on every layer, weak enough that the base still draws."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in modules.items():
        (out, width), _ = shape_of(module)
        up, down = torch.randn(out, 2, generator=generator), torch.randn(2, width, generator=generator)
        layers[path] = Factors(up * 0.02, down * 0.02)
    return LoRA(layers, {})


def make_subspace(path):
    """Write a subspace of three concepts for the embedded base."""
    pipeline = load_base("tiny")
    modules = select(pipeline, "attention", True)
    loras = {name: small_lora(modules, seed) for seed, name in enumerate(("watercolor", "robot", "blueprint"))}
    subspace = Subspace.fit(loras, base=identify(pipeline, "tiny"))
    about = {
        "watercolor": ("style", "watercolor painting of a red house on a beach", 0.3),
        "robot": ("subject", "a robot in a forest", 0.32),
        "blueprint": ("style", "blueprint of a yellow car", 0.15),
    }
    concepts = {
        name: Concept(name, concept.coefficients, concept.norm, concept.retention, about[name][0], name,
                      {"prompts": [about[name][1]], "half_weight": about[name][2]})
        for name, concept in subspace.concepts.items()
    }  # fmt: skip
    Subspace(subspace.base, subspace.origin, subspace.layers, subspace.kernels, concepts).save(path)


class Server:
    """A running page: its address, its folder and its subspace file."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "concepts.safetensors"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "app", "--subspace", str(self.file), "--port", str(self.port)]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(self.folder / "outputs"), "--device", "cpu"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            )
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return
            except OSError:
                time.sleep(0.3)
        pytest.fail((self.folder / "log.txt").read_text(errors="replace")[-2000:])

    def stop(self):
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The page on a port of its own, for all tests of this folder."""
    server = Server(tmp_path_factory.mktemp("page"))
    make_subspace(server.file)
    try:
        server.start()
        yield server
    finally:  # also where the start itself fails or is interrupted
        server.stop()


@pytest.fixture(scope="session")
def browser():
    """Chromium; a machine without it skips these tests with a word."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra `test` has it")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def view(browser, server):
    """A fresh window on the page; whatever it asks of other machines is refused, and fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    outside = []

    def local_only(route):
        if route.request.url.startswith((server.address, "data:", "blob:")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()

    context.route("**/*", local_only)
    page = context.new_page()
    page.set_default_timeout(120_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.address)
    page.wait_for_selector("#cards button")
    yield page
    context.close()
    assert outside == []
    assert errors == []
