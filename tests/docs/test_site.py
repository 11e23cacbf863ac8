"""The built site: links arrive, names of others lead to their pages, the index has its terms."""

from __future__ import annotations

from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

if any(find_spec(name) is None for name in ("sphinx", "furo", "myst_parser", "sphinx_copybutton")):
    pytest.skip("the extra `docs` is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


def pages(site: Path) -> list[Path]:
    """All pages but those of the source, which are made from the code."""
    return sorted(site.glob("*.html"))


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
