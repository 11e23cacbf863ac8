"""`python -m sphinx -W --keep-going -n docs build/docs` makes the site; see CONTRIBUTING.md."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import wdhook

project = "wdhook"
copyright = "wdhook contributors, MIT"  # noqa: A001 (Sphinx names it)
release = version = wdhook.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
suppress_warnings = [
    "myst.header"
]  # the page of optimizers is one table after another, made by a test
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the same slugs as on GitHub, where these pages are read too

# Frameworks are not needed to read the docstrings of their callbacks.
autodoc_mock_imports = ["lightning", "pytorch_lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Docstrings put names, arguments and values in single backticks; a name becomes a link.
default_role = "py:obj"
_ELSEWHERE = (
    r"(torch|collections|typing|matplotlib)\..*|wdhook\._.*|nn\..*|"
    r"Any|Audit|Figure|History|Overrides|.*Error"
)
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", _ELSEWHERE)]

maximum_signature_line_length = 90  # longer ones get a line for each argument

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "wdhook"
html_static_path = ["_static"]
html_css_files = ["wdhook.css"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ff", "color-brand-content": "#7cc4ff"},
}


def setup(app: Sphinx) -> None:
    """Equations as MathML, which browsers draw by themselves: no script, and nothing is fetched."""

    def draw(translator: Any, node: nodes.math | nodes.math_block) -> None:
        translator.body.append(
            tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
        )
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (draw, None), (draw, None))
