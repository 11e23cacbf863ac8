"""The built site: every link arrives; in a browser nothing overflows, and the search finds words.

Needs the extra `site` and Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_copybutton")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    if any(find_spec(name) is None for name in NEEDED):
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "docs", str(folder)]
    ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(site.glob("*.html"))


# -- links -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The anchors of a page, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src", "srcset") and value:
                self.addresses.append(value)


def dead(site: Path, page: Path, text: str) -> list[str]:
    """Addresses within the site that lead nowhere."""
    found = []
    for address in Page(text).addresses:
        if address.startswith(("http:", "https:", "mailto:", "data:", "javascript:")):
            continue
        name, anchor = urldefrag(address)
        target = page.parent / unquote(name.partition("?")[0]) if name else page
        if not target.exists():
            found.append(address)
        elif anchor and target.suffix == ".html":
            there = text if target == page else target.read_text()
            if unquote(anchor) not in Page(there).ids:
                found.append(address)
    return found


def test_no_link_is_dead(site: Path) -> None:
    """Links, pictures and scripts of every page are there, and so are the anchors they name."""
    assert len(pages(site)) > 20
    found = {page.name: dead(site, page, page.read_text()) for page in pages(site)}
    assert {name: addresses for name, addresses in found.items() if addresses} == {}


def test_a_dead_link_is_seen(site: Path) -> None:
    """Twin: a missing page, a missing anchor and a missing picture are found."""
    text = '<a href="no.html"><a href="modes.html#no"><img src="no.svg"><a href="modes.html">'
    assert dead(site, site / "x.html", text) == ["no.html", "modes.html#no", "no.svg"]


def test_names_of_torch_lead_to_its_documentation(site: Path) -> None:
    """Signatures link to torch, Python and Matplotlib, and every function to its source."""
    addresses = Page((site / "api.html").read_text()).addresses
    assert "https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html" in {
        urldefrag(address)[0] for address in addresses
    }
    assert any(a.startswith("_modules/wdhook/_decay/attach.html#") for a in addresses)
    pictures = Page((site / "api-pictures.html").read_text()).addresses
    assert any("matplotlib.figure.Figure" in address for address in pictures)


def test_the_index_has_the_words_of_others(site: Path) -> None:
    """Terms that our pages do not use as titles lead to a page, at an anchor that exists."""
    text = (site / "genindex.html").read_text()
    for term, page in (
        ("freeze", "resume-and-finetuning"),
        ("tied weights", "which-parameters"),
        ("bf16", "amp"),
        ("wandb", "logging"),
        ("RMSNorm", "which-parameters"),
    ):
        assert f'<a href="{page}.html#index-{page}">{term}</a>' in text


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if find_spec("playwright") is None or find_spec("PIL") is None or CHROMIUM is None:
        pytest.skip("Playwright, Pillow or Chromium is not installed")
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
    for page in pages(site):
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
