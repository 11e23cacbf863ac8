"""What ``my_file.py:build`` and its kin name, and the model that it makes."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._base.errors import WdhookError
from .inputs import parse_kwargs
from .shared import UsageError, first_line

TARGETS = """\
targets:
  my_file.py:build             a function without arguments, a class, or a module object in a file
  package.module:attribute     the same in anything that can be imported
  timm:vit_base_patch16_224    a model of timm, by the name that timm.create_model takes
  hf:BertConfig                a configuration or a model class of transformers; nothing is downloaded
"""

_KINDS = TARGETS.partition("\n")[2].rstrip()


# -- what a target names ----------------------------------------------------------------------------------------


def load(target: str) -> Any:
    """What `target` names: an object of a file or a package, or what builds a model of timm or transformers.

    Raises:
        UsageError: there is no such thing, or importing it raised an error.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(f"`target` must be PLACE:NAME.\n  got: {target!r}\n{_KINDS}")
    if place == "timm":
        return partial(_imported("timm").create_model, attribute)
    if place == "hf":
        return _of_transformers(attribute)
    module = _run_file(Path(place)) if place.endswith(".py") else _imported(place)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise UsageError(
            f"`target` names something that is not there.\n  got: {target!r}\n"
            f"  there are: {_listed(module, attribute)}\n"
            "  Write PLACE:NAME with one of these names"
        ) from error


def _listed(module: Any, like: str) -> str:
    names = [
        name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
    ]
    shown = get_close_matches(like, names, n=5) or [
        *names[:15],
        *(["..."] if len(names) > 15 else []),
    ]
    return ", ".join(shown) or "no functions and no classes"


def _imported(name: str) -> Any:
    try:
        with users_code(f"import {name}"):
            return importlib.import_module(name)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            raise UsageError(
                f"`target` names a package that cannot be imported.\n  package: {name}\n"
                f"  {cause}\n  Install it, or run the command in the folder that holds it; a file ends with .py"
            ) from cause
        raise


def _run_file(path: Path) -> Any:
    """Import a file by its path. What lies beside it can be imported by it, as when Python runs it."""
    if not path.is_file():
        raise UsageError(
            f"`target` names a file that does not exist.\n  file: {path}\n  folder: {Path.cwd()}"
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = (
        path.stem if path.stem.isidentifier() and path.stem not in sys.modules else "_wdhook_target"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with users_code(str(path)):
            spec.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    return module


def _of_transformers(name: str) -> Callable[..., nn.Module]:
    transformers = _imported("transformers")
    known = getattr(transformers, name, None)
    if isinstance(known, type) and issubclass(known, transformers.PretrainedConfig):
        return lambda **kwargs: transformers.AutoModel.from_config(known(**kwargs))
    config = getattr(known, "config_class", None)
    if isinstance(known, type) and config is not None:
        return lambda **kwargs: known(config(**kwargs))
    raise UsageError(
        "`hf:` takes a configuration or a model class of transformers: it downloads nothing.\n"
        f"  got: {name!r}\n"
        "  For example hf:BertConfig, or hf:BertForMaskedLM; its sizes with --kwargs 'num_hidden_layers=4'"
    )


# -- building ---------------------------------------------------------------------------------------------------


def build_model(
    target: str, kwargs: str | None = None, *, meta: bool = False
) -> tuple[nn.Module, str | None]:
    """The model that `target` names or makes.

    Args:
        target: see `TARGETS`.
        kwargs: keyword arguments of what makes the model, as ``"a=1, b='x'"``.
        meta: build it on the meta device, where parameters have shapes and no memory.

    Returns:
        The model, and why it is on the CPU although `meta` was asked for (None if it is not).

    Raises:
        UsageError: there is no such thing, it raised an error, or it made something else.
    """
    named = load(target)
    given = parse_kwargs(kwargs)
    if isinstance(named, nn.Module):
        if given:
            raise UsageError(
                f"`--kwargs` is for what makes a model.\n  target: {target} is a model already"
            )
        return named, None
    why = None
    if meta:
        try:
            with torch.device("meta"), redirect_stdout(sys.stderr):
                return _checked(named(**given), target), None
        except UsageError:
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever it is: the CPU will tell whether it is the user's
            why = f"{type(error).__name__}: {first_line(error)}"
    with users_code(target):
        made = call(named, target, given)
    return _checked(made, target), why


def call(named: Any, target: str, kwargs: dict[str, Any]) -> Any:
    """Call what a target names."""
    if not callable(named):
        raise UsageError(
            f"`target` must name a function, a class or a model.\n  target: {target}\n  is: {type(named).__name__}"
        )
    return named(**kwargs)


def _checked(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"`target` must make a torch.nn.Module.\n  target: {target}\n  made: {type(made).__name__}\n"
            "  Name a function that returns the model alone"
        )
    return made


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run code of the user: what it prints goes to stderr, what it raises becomes a `UsageError` that says where.

    Errors of wdhook pass: they speak for themselves.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (UsageError, WdhookError):
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            "\n".join(
                [
                    f"{what} raised an error.",
                    f"  {type(error).__name__}: {first_line(error)}",
                    *_places(error),
                ]
            )
        ) from error


def _places(error: BaseException) -> Iterator[str]:
    """Where the user's code was entered, and where the error came from; not where in torch, if there is a choice."""
    skipped = (str(Path(__file__).parents[1]), "<frozen", importlib.__file__)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skipped)
    ]
    frames = [
        f for f in frames if not f.filename.startswith(str(Path(torch.__file__).parent))
    ] or frames
    for frame in frames[:1] + frames[1:][-1:]:
        yield f"  at: {frame.filename}:{frame.lineno}, in {frame.name}"
