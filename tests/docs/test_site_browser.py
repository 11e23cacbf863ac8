"""The built site in Chromium: nothing overflows, pictures follow the colours, the search finds.

Needs the extra `site` and Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "playwright", "PIL")

if CHROMIUM is None or any(find_spec(name) is None for name in NEEDED):
    pytest.skip("the extra `site` or Chromium is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


def opened(browser: Any, page: Path, width: int, scheme: str, query: str = "") -> Any:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto(f"{page.as_uri()}{query}")
    return tab


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_overflows(site: Path, browser: Any, width: int, scheme: str) -> None:
    """No page is wider than the window, on a desk and on a telephone."""
    found = {}
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for page in sorted(site.glob("*.html")):
        tab.goto(page.as_uri())
        found[page.name] = tab.evaluate(OVERFLOW)
    tab.close()
    assert {name: pixels for name, pixels in found.items() if pixels > 0} == {}


def test_an_overflow_is_seen(site: Path, browser: Any, tmp_path: Path) -> None:
    """Twin: a page that is too wide is measured as such."""
    wide = tmp_path / "wide.html"
    wide.write_text('<div style="width: 500px">x</div>')
    tab = opened(browser, wide, 390, "light")
    assert tab.evaluate(OVERFLOW) > 0
    tab.close()


FIGURES = [("how-it-works", "timeline"), ("science", "equilibrium"), ("science", "roles")]
FIGURES += [("command-line", "plan"), ("performance", "growth")]


@pytest.mark.parametrize(("page", "name"), FIGURES, ids=lambda value: value)
@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_follow_the_colour_scheme(
    site: Path, browser: Any, page: str, name: str, width: int
) -> None:
    """The paper of a drawing is light on a light page, and dark on a dark one."""
    from PIL import Image

    brightness = {}
    for scheme in ("light", "dark"):
        tab = opened(browser, site / f"{page}.html", width, scheme)
        figure = tab.locator(f'img[src$="{name}.svg"]')
        figure.scroll_into_view_if_needed()
        pixels = Image.open(BytesIO(figure.screenshot())).convert("L")
        brightness[scheme] = pixels.getpixel((3, 3))
        tab.close()
    assert brightness["light"] > 200
    assert brightness["dark"] < 60


@pytest.mark.parametrize("name", [name for _, name in FIGURES])
def test_telephones_get_narrow_drawings(site: Path, browser: Any, name: str) -> None:
    """At 390 pixels the browser takes the drawing of that width, and at 1280 the wide one."""
    page = next(page for page, figure in FIGURES if figure == name)
    for width, folder in ((390, "_static/figures"), (1280, "_images")):
        tab = opened(browser, site / f"{page}.html", width, "light")
        source = tab.locator(f'img[src$="{name}.svg"]').evaluate("image => image.currentSrc")
        assert f"/{folder}/{name}.svg" in source
        tab.close()


WORDS = {
    "freeze": "resume-and-finetuning",
    "tied weights": "which-parameters",
    "bf16": "amp",
    "wandb": "logging",
    "RMSNorm": "which-parameters",
    "GradScaler": "amp",
    "FSDP": "distributed",
    "LoRA": "resume-and-finetuning",
    "half-life": "how-much",
    "attach": "api",
}


@pytest.mark.parametrize(("words", "page"), WORDS.items(), ids=WORDS)
def test_the_search_finds(site: Path, browser: Any, words: str, page: str) -> None:
    """A word that people look for leads to the page that answers."""
    tab = opened(browser, site / "search.html", 1280, "light", f"?q={words}")
    tab.wait_for_selector("#search-results ul.search li a")
    tab.wait_for_function("document.querySelector('#search-results p')?.textContent.length > 0")
    links = tab.locator("#search-results ul.search li a").evaluate_all(
        "links => links.map(link => link.getAttribute('href').split('#')[0].split('?')[0])"
    )
    tab.close()
    assert f"{page}.html" in links


def test_the_search_does_not_find_what_is_not_there(site: Path, browser: Any) -> None:
    """Twin: a word of no page has no results."""
    tab = opened(browser, site / "search.html", 1280, "light", "?q=marmalade")
    tab.wait_for_function("document.querySelector('#search-results p')?.textContent.length > 0")
    assert tab.locator("#search-results ul.search li a").count() == 0
    tab.close()


def test_the_optimizers_can_be_filtered_and_sorted(site: Path, browser: Any) -> None:
    """Words filter all packages at once, a click on a heading sorts, another turns around."""
    tab = opened(browser, site / "optimizers.html", 1280, "light")
    found = tab.locator(".optimizers-found")
    assert not found.is_visible()
    tab.get_by_label("Filter the optimizers").fill("torch-optimi lion")
    rows = lambda: found.locator("tbody tr").all_inner_texts()  # noqa: E731
    assert rows()
    assert all("lion" in row.lower() and "torch-optimi" in row for row in rows())
    tab.get_by_label("Filter the optimizers").fill("prodigy")
    heading = found.locator("th button", has_text=re.compile("^optimizer$"))
    heading.click()
    names = [row.split("\t")[1] for row in rows()]
    assert len(names) > 2
    assert names == sorted(names, key=str.lower)
    heading.click()
    assert [row.split("\t")[1] for row in rows()] == names[::-1]
    tab.get_by_label("Filter the optimizers").fill("")
    assert not found.is_visible()
    tab.close()


def test_examples_paste_as_code(site: Path, browser: Any) -> None:
    """The button copies the code of a doctest, without prompts and without results."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.goto((site / "start.html").as_uri())
    block = tab.locator("div.highlight", has_text="wdhook.plan(model, 5e-4)").first
    block.hover()
    block.locator("button.copybtn").click()
    copied = tab.evaluate("navigator.clipboard.readText()")
    context.close()
    assert copied.startswith("import torch, wdhook\n")
    assert ">>>" not in copied
    assert "weight decay 0.0005" not in copied
    compile(copied, "pasted", "exec")
