"""`python -m sphinx -W --keep-going -n docs build/docs` makes the site; see CONTRIBUTING.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import wdhook

HERE = Path(__file__).parent

project = "wdhook"
copyright = "wdhook contributors, MIT"  # noqa: A001 (Sphinx names it)
release = version = wdhook.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["figures", "inventories"]
# The page of optimizers is one table after another, made by a test.
suppress_warnings = ["myst.header"]
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

# The names of others that our pages use, in small files: a build needs no network.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.txt"),
    "python": ("https://docs.python.org/3/", "inventories/python.txt"),
    "matplotlib": ("https://matplotlib.org/stable/", "inventories/matplotlib.txt"),
}
# Names as signatures have them → names as the inventories have them.
ALIASES = {
    "Any": "typing.Any",
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "nn.LayerNorm": "torch.nn.LayerNorm",
    "nn.Module": "torch.nn.Module",
    "nn.Parameter": "torch.nn.parameter.Parameter",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
}

# Docstrings put arguments and values in single backticks as well as names: names become links.
default_role = "py:obj"
_PRIVATE = r"wdhook\._.*|Audit|History|Overrides|Recipe|Toward|.*Error"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", _PRIVATE)]

maximum_signature_line_length = 90  # longer ones get a line for each argument

# Pasted code is code: prompts and results stay behind.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

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

# Words that people look for, where the page has other ones; the index and the search know them.
INDEX = {
    "amp": ["bf16", "bfloat16", "fp16", "mixed precision", "gradient accumulation", "clipping"],
    "compile": ["CUDA graphs"],
    "distributed": ["DDP", "FSDP", "tensor parallel", "ZeRO"],
    "how-much": ["half-life", "timescale", "which λ", "hyperparameters"],
    "logging": ["wandb", "Weights & Biases", "TensorBoard", "MLflow"],
    "migration": ["no_decay", "parameter groups"],
    "recipes": ["examples", "scripts", "Hydra", "LightningCLI", "YAML", "GPT", "ViT", "GAN"],
    "resume-and-finetuning": ["freeze", "frozen layers", "LoRA", "checkpoint"],
    "which-parameters": ["RMSNorm", "LayerNorm", "tied weights", "embeddings", "bias"],
}


def setup(app: Sphinx) -> None:
    """Draw equations without scripts, and add what Markdown cannot say."""
    app.add_html_math_renderer("mathml", (draw_equation, None), (draw_equation, None))
    app.connect("doctree-read", use_public_names)
    app.add_transform(AddIndex)
    app.connect("doctree-resolved", add_narrow_figures)
    app.connect("html-page-context", add_scripts)


def draw_equation(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write an equation as MathML, which browsers draw by themselves: nothing is fetched."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def use_public_names(app: Sphinx, tree: nodes.document) -> None:
    """Let references of signatures point to the names that the inventories have."""
    for reference in tree.findall(addnodes.pending_xref):
        target = reference["reftarget"]
        reference["reftarget"] = ALIASES.get(target, target)


class AddIndex(SphinxTransform):
    """Put the index terms of a page at its beginning."""

    default_priority = 500  # before Sphinx collects the terms, at 850

    def apply(self, **_: Any) -> None:
        """Change the page that is being read."""
        page = self.env.docname
        terms = INDEX.get(page, [])
        if terms:
            entries = [("single", term, f"index-{page}", "", None) for term in terms]
            self.document[0].insert(1, nodes.target("", "", ids=[f"index-{page}"]))
            self.document[0].insert(1, addnodes.index(entries=entries))


def add_narrow_figures(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Offer telephones a drawing of their width, where there is one."""
    if app.builder.format != "html":
        return
    for image in list(tree.findall(nodes.image)):
        name = Path(image["uri"]).name
        if not (HERE / "_static" / "figures" / name).exists():
            continue
        source = f'<source media="(max-width: 40em)" srcset="_static/figures/{name}">'
        begin = nodes.raw("", f"<picture>{source}", format="html")
        end = nodes.raw("", "</picture>", format="html")
        place = image.parent
        at = place.index(image)
        place.insert(at + 1, end)
        place.insert(at, begin)


def add_scripts(app: Sphinx, page: str, *_: Any) -> None:
    """Let the table of optimizers be filtered and sorted."""
    if page == "optimizers":
        app.add_js_file("optimizers.js")
