"""The pages: every public name is on them, nothing else is, every link arrives, every page can be
found."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from imports import FILES, imports_of

import wdhook
import wdhook.plot

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "wdhook"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
API = "".join(page.read_text() for page in sorted(DOCS.glob("api*.md")))

DIRECTIVE = re.compile(
    r"^\.\. auto(?:function|class|exception|data):: (?P<name>[\w.]+)", re.MULTILINE
)
FENCE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")


def public_names() -> set[str]:
    """What a user may import, by its full name."""
    names = {
        f"wdhook.{name}" for name in wdhook.__all__ if not inspect.ismodule(getattr(wdhook, name))
    }
    for face in (wdhook.plot, wdhook.schedules):
        mine = getattr(face, "__all__", None) or [
            n for n, f in vars(face).items() if _is_function_of(face, n, f)
        ]
        names |= {f"{face.__name__}.{name}" for name in mine}
    for path in (PACKAGE / "integrations").glob("[!_]*.py"):
        # Read, not imported: their frameworks may be absent. Their functions serve the callbacks.
        classes = [
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
        ]
        names |= {
            f"wdhook.integrations.{path.stem}.{name}"
            for name in classes
            if not name.startswith("_")
        }
    return names


def _is_function_of(module: ModuleType, name: str, thing: object) -> bool:
    return (
        inspect.isfunction(thing)
        and thing.__module__ == module.__name__
        and not name.startswith("_")
    )


# -- names -----------------------------------------------------------------------------------------


def test_the_page_of_names_has_every_public_name_once_and_no_other() -> None:
    """docs/api*.md are made from the docstrings of exactly what is public."""
    listed = DIRECTIVE.findall(API)
    assert sorted(listed) == sorted(public_names())


def test_the_public_names_are_seen() -> None:
    """The check above is not blind: it knows names of each face, and private ones are not among
    them."""
    names = public_names()
    assert {
        "wdhook.attach",
        "wdhook.plot.norms",
        "wdhook.integrations.lightning.WeightDecay",
    } <= names
    assert "wdhook.plot._draw" not in names
    assert not any("_callback" in name for name in names)
    assert DIRECTIVE.findall(".. autofunction:: wdhook.nothing\n   :no-index:") == [
        "wdhook.nothing"
    ]


def classes() -> list[type]:
    """Public classes that are no errors."""
    found = [getattr(wdhook, name) for name in wdhook.__all__]
    return [
        thing
        for thing in found
        if inspect.isclass(thing) and not issubclass(thing, (Exception, Warning))
    ]


def undocumented(owner: type) -> list[str]:
    """Public members that the class defines itself and that autodoc would leave out, having nothing
    to say."""
    told = inspect.getdoc(owner) or ""
    return [
        name
        for name, member in vars(owner).items()
        if not name.startswith("_")
        and not inspect.getdoc(member)
        and not re.search(rf"^\s+{name}: ", told, re.MULTILINE)
    ]


@pytest.mark.parametrize("owner", classes(), ids=lambda owner: owner.__name__)
def test_every_member_is_documented(owner: type) -> None:
    """Methods, properties and fields of public classes have a docstring, or a line under
    Attributes."""
    assert undocumented(owner) == []


def test_an_undocumented_member_is_seen() -> None:
    """The check above can fail."""

    class Sample:
        """A class.

        Attributes:
            told: here.
        """

        told = untold = ()

        def silent(self) -> None: ...

        def spoken(self) -> None:
            """Say it."""

    assert {"silent"} <= set(undocumented(Sample)) <= {"silent", "untold"}


def raised(function: Callable[..., object]) -> set[str]:
    """The errors that a docstring lists under Raises."""
    _, _, rest = (inspect.getdoc(function) or "").partition("Raises:\n")
    block = rest.split("\n\n")[0]
    return set(re.findall(r"\b\w+(?:Error|Warning)\b", block))


def members() -> Iterator[Callable[..., object]]:
    """Every public function, method and property."""
    for name in wdhook.__all__:
        thing = getattr(wdhook, name)
        if inspect.isfunction(thing):
            yield thing
        elif inspect.isclass(thing):
            yield from (
                m for n, m in vars(thing).items() if not n.startswith("_") and inspect.getdoc(m)
            )


def test_errors_under_raises_exist() -> None:
    """No docstring names an error that wdhook does not have."""
    named = set().union(*(raised(member) for member in members()))
    assert "SelectorError" in named  # of plan, attach and others
    assert named <= set(wdhook.__all__)


def test_every_error_is_explained_to_users() -> None:
    """Each error and the warning is on a page that says when it comes, not only on the page of
    names."""
    pages = "".join(
        page.read_text() for page in DOCS.glob("*.md") if page.stem.split("-")[0] != "api"
    )
    errors = {name for name in wdhook.__all__ if name.endswith(("Error", "Warning"))}
    silent = {name for name in errors if f"`{name}`" not in pages}
    assert silent == {"WdhookError"}  # the base, which nobody raises by itself


# -- what the pages say exists ---------------------------------------------------------------------


def unknown(text: str) -> set[str]:
    """Names ``wdhook.x`` and ``decay.x`` in a page that do not exist."""
    public = public_names()
    found = (
        set(re.findall(r"\bwdhook(?:\.[A-Za-z_]\w*)+(?![\w/])", text)) - public
    )  # "wdhook.doctor/1" is a schema
    wrong = {name for name in found if not _exists(name)}
    handle = set(re.findall(r"(?<![\w.])decay\.([A-Za-z_]\w*)", text))
    return wrong | {f"decay.{name}" for name in handle if not hasattr(wdhook.WeightDecay, name)}


def _exists(name: str) -> bool:
    """Whether it is a module, a public name or a member of one."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    owner = name.rpartition(".")[0]
    if owner.count(".") > 1:  # a member of a callback
        return any(owner == known for known in public_names())
    thing: object = importlib.import_module("wdhook")
    for part in name.split(".")[1:]:
        if not hasattr(thing, part) or part.startswith("_") != part.startswith("__"):
            return False
        thing = getattr(thing, part)
    return True


# Names of files, and a callback `decay` whose handle is `decay.decay`.
OTHERS = re.compile(r"\.(json|png)$|^decay\.decay$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_what_exists(page: Path) -> None:
    """A renamed function cannot live on in a page."""
    assert {name for name in unknown(page.read_text()) if not OTHERS.search(name)} == set()


def test_a_name_that_does_not_exist_is_seen() -> None:
    """The check above can fail."""
    text = "`wdhook.attach(model)`, `wdhook.atach`, decay.remove(), decay.restart(), "
    text += "wdhook.Plan.diff, wdhook.Plan.dif"
    assert unknown(text) == {"wdhook.atach", "decay.restart", "wdhook.Plan.dif"}


# -- links -----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def broken(page: Path, text: str) -> list[str]:
    """Relative links of a page to a file or a heading that is not there."""
    prose = CODE.sub("", FENCE.sub("", text))
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", prose)
    found = []
    for target in (a or b for a, b in targets):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        there = (
            text if not name else file.read_text() if file.suffix == ".md" and file.exists() else ""
        )
        if (name and not file.exists()) or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_arrives(page: Path) -> None:
    """Links within the repository lead to a file, and to a heading of it."""
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_seen() -> None:
    """The check above can fail, for files and for headings; code is no link."""
    text = "# A `b` c\n[1](modes.md#which-moment) [2](modes.md#no) [3](no.md) "
    text += "[4](#a-b-c) [5](#b) `[6](x)`\n"
    text += "```\n[7](y)\n```\n"
    assert broken(DOCS / "here.md", text) == ["modes.md#no", "no.md", "#b"]


def test_every_page_can_be_found() -> None:
    """Each page is in one table of contents of the site, and in the README's list.

    The parts of the API reference are in the list of its first page, and not in the README.
    """
    parts = _listed("api")
    listed = [line for line in _listed("index") if line != "Index of terms <genindex>"]
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert sorted([*listed, *parts]) == sorted(pages)
    assert all(part.startswith("api-") for part in parts)
    readme = (ROOT / "README.md").read_text()
    assert {page for page in listed if f"(docs/{page}.md)" not in readme} == set()


def _listed(page: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for tree in trees for line in tree.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def test_every_room_has_its_place() -> None:
    """The list of rooms in docs/how-it-works.md has each room once, below everything that it
    imports."""
    text = (DOCS / "how-it-works.md").read_text()
    listed = re.findall(r"`(\w+(?:\.py|/))`", text[text.index("| room | in → out |") :])
    place: dict[str, int] = {}
    for i, name in enumerate(listed):
        place.setdefault(name.removesuffix(".py").removesuffix("/"), i)
    inside = {n: path for n, path in FILES.items() if n not in ("__init__", "__main__")}
    assert place.keys() == {name.split(".")[0] for name in inside}
    for name, path in inside.items():
        above = {other.split(".")[0] for other in imports_of(path)} - {"__init__"}
        late = {other for other in above if place[other] > place[name.split(".")[0]]}
        assert not late, f"{name} imports {late}, which the page lists below it"
