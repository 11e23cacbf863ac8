"""Loads targets such as ``my_file.py:build`` and builds their model."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._base.errors import WdhookError
from .._base.text import did_you_mean
from .inputs import parse_kwargs
from .shared import UsageError, first_line
from .suggestions import listed, near_file, near_model_of_timm, near_package, place_and_name

TARGETS = """\
targets:
  my_file.py:build             a function without arguments, a class, or a model in a file
  package.module:attribute     the same in anything that can be imported
  timm:vit_base_patch16_224    a model of timm, by the name that timm.create_model takes
  hf:BertConfig                a configuration or a model class of transformers, not downloaded
"""

_KINDS = TARGETS.partition("\n")[2].rstrip()


# -- loading ---------------------------------------------------------------------------------------


def load(target: str) -> Any:
    """Import the object of a target, or a function that builds a model of a library.

    Raises:
        UsageError: there is no such object, or importing it raised an error.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UsageError(
            f"`target` must be PLACE:NAME.\n  got: {target!r}{place_and_name(target)}\n{_KINDS}"
        )
    if place == "timm":
        return _of_timm(attribute)
    if place == "hf":
        return _of_transformers(attribute)
    module = _run_file(Path(place)) if place.endswith(".py") else _imported(place)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise UsageError(
            f"`target` names an object that does not exist.\n  got: {target!r}\n"
            f"  there are: {listed(module, attribute)}\n"
            "  Write PLACE:NAME with one of these names"
        ) from error


def _imported(name: str) -> Any:
    try:
        with users_code(f"import {name}"):
            return importlib.import_module(name)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            raise UsageError(
                f"`target` names a package that cannot be imported.\n"
                f"  package: {name}{near_package(name)}\n  {cause}\n"
                "  Install it, or run the command in the folder that holds it; a file ends with .py"
            ) from cause
        raise


def _run_file(path: Path) -> Any:
    """Import a file by path. The file can import its neighbours, like a script."""
    if not path.is_file():
        raise UsageError(
            f"`target` names a file that does not exist.\n  file: {path}{near_file(path)}\n"
            f"  folder: {Path.cwd()}"
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem
    if not name.isidentifier() or name in sys.modules:
        name = "_wdhook_target"
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


def _of_timm(name: str) -> Callable[..., nn.Module]:
    timm = _imported("timm")
    if ":" not in name and not timm.is_model(name):  # "hf-hub:" and others are timm's to judge
        raise UsageError(
            f"timm has no model of this name.\n  got: {name!r}{near_model_of_timm(name)}\n"
            "  timm.list_models() has all"
        )
    return partial(timm.create_model, name)


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
        f"  got: {name!r}{did_you_mean(name, dir(transformers))}\n"
        "  For example hf:BertConfig, or hf:BertForMaskedLM; "
        "its sizes with --kwargs 'num_hidden_layers=4'"
    )


# -- building --------------------------------------------------------------------------------------


def build_model(
    target: str, kwargs: str | None = None, *, meta: bool = False
) -> tuple[nn.Module, str | None]:
    """Build the model of a target.

    Args:
        target: see `TARGETS`.
        kwargs: keyword arguments of the target, as ``"a=1, b='x'"``.
        meta: build on the meta device, where parameters have shapes and no memory.

    Returns:
        The model; and the reason why it is on the CPU although `meta` was asked for, or None.

    Raises:
        UsageError: the target does not exist, raised an error, or made no model.
    """
    named = load(target)
    given = parse_kwargs(kwargs)
    if isinstance(named, nn.Module):
        if given:
            raise UsageError(
                "`--kwargs` are arguments of a function or a class.\n"
                f"  target: {target} is a model already"
            )
        return named, None
    why = None
    if meta:
        try:
            with torch.device("meta"), redirect_stdout(sys.stderr):
                return _checked(named(**given), target), None
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            # Perhaps an error of the user's, perhaps one of the meta device: the CPU decides.
            why = f"{type(error).__name__}: {first_line(error)}"
    with users_code(target):
        made = call(named, target, given)
    return _checked(made, target), why


def call(named: Any, target: str, kwargs: dict[str, Any]) -> Any:
    """Call the object of a target."""
    if not callable(named):
        raise UsageError(
            "`target` must name a function, a class or a model.\n"
            f"  target: {target}\n  is: {type(named).__name__}"
        )
    return named(**kwargs)


def _checked(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise UsageError(
            "`target` must make a torch.nn.Module.\n"
            f"  target: {target}\n  made: {type(made).__name__}\n"
            "  Name a function that returns the model alone"
        )
    return made


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run code of the user: prints go to stderr, errors become a `UsageError` with a place.

    Errors of wdhook pass unchanged.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (UsageError, WdhookError):
        raise
    except (Exception, SystemExit) as error:
        cause = f"  {type(error).__name__}: {first_line(error)}"
        lines = [f"{what} raised an error.", cause, *_places(error)]
        raise UsageError("\n".join(lines)) from error


def _places(error: BaseException) -> Iterator[str]:
    """The lines where the user's code was entered, and where the error was raised.

    Lines in torch are left out, unless there are no others.
    """
    machinery = (str(Path(__file__).parents[1]), "<frozen", importlib.__file__)
    torch_folder = str(Path(torch.__file__).parent)
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(machinery):
            frames.append(frame)
    outside = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    shown = outside or frames
    for frame in shown[:1] + shown[1:][-1:]:
        yield f"  at: {frame.filename}:{frame.lineno}, in {frame.name}"
