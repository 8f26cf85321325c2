"""What a command is: how its flags are parsed and explained, and how it ends."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NoReturn

import simple_parsing
from datasets.exceptions import DatasetsError
from sae_lens.training._interruption import InterruptedException
from simple_parsing.helpers.custom_actions import BooleanOptionalAction
from simple_parsing.wrappers.dataclass_wrapper import DataclassWrapper
from simple_parsing.wrappers.field_wrapper import DashVariant

from saelens_asi.plugin.launch import is_launched

# What a wrong model, dataset, folder, flag or value raises, here and below; anything else is a bug, with its traceback.
# The hub's errors are OSErrors. FloatingPointError: activations or weights that are not finite ended a run.
BAD_INPUT = (ValueError, OSError, ImportError, argparse.ArgumentError, DatasetsError, FloatingPointError)

# TransformerLens answers a wrong name with all names of models there are.
_LONGEST_ERROR = 600

# Spellings of flags that went, and what they are called now.
_OLD_FLAGS = {"--hook": "--hooks", "--hook-name": "--hooks"}


class _Formatter(simple_parsing.SimpleHelpFormatter):
    """Help as the docstrings have it: no quotes of markup, per cent signs as they are, defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("(default: %(default)s)", "").replace("``", "").strip().rstrip(".")
        if action.required and action.option_strings:
            text += " (required)"
        default = action.default
        if isinstance(default, list | tuple):
            shown = " ".join(map(str, default))
        else:
            shown = "" if default is None or default is False or default == argparse.SUPPRESS else str(default)
        return (f"{text}; default: {shown}" if shown else text).replace("%", "%%")

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        shown = super()._format_args(action, default_metavar).replace("Literal", "word")
        return shown[1:-1] if shown.startswith("[") and shown.endswith("]") else shown

    def _format_usage(self, usage: str | None, actions: Iterable[argparse.Action], *args: Any) -> str:
        """Positional arguments and flags that must be given; all others are listed below."""
        needed = [action for action in actions if action.required]
        words = [self._format_args(action, "") for action in needed if not action.option_strings]
        words += [
            f"{action.option_strings[-1]} {self._format_args(action, '')}" for action in needed if action.option_strings
        ]
        return f"usage: {' '.join([self._prog, *words])} [flags]\n\n"


class _Group(DataclassWrapper):
    """Flags of one settings class under its name; those of a command itself under ``flags``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Help comes from ``Attributes:`` alone. Python 3.13 indents docstrings in another way than the source, so that
        # simple_parsing would take lines of them for fields, and what stands below for their help.
        nothing = {"comment_above": "", "comment_inline": "", "docstring_below": ""}
        for one in self.fields:
            one._docstring = replace(one._docstring, **nothing)

    @property
    def title(self) -> str:
        own = self.dataclass.__module__.startswith("saelens_asi.cli.")
        return "flags" if own else self.dataclass.__name__

    @property
    def description(self) -> str:
        return argparse.SUPPRESS


class Parser(simple_parsing.ArgumentParser):
    """Errors are one line; a flag that is given has a value."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _preprocessing(self, *args: Any, **kwargs: Any) -> None:
        super()._preprocessing(*args, **kwargs)
        for action in self._actions:
            if not isinstance(action, BooleanOptionalAction):
                action.nargs = {"?": None, "*": "+"}.get(str(action.nargs), action.nargs)
            action.required = action.required or not action.option_strings


@dataclass(frozen=True)
class Command:
    """A command: its flags, what it does, and what to do after an interruption.

    Attributes:
        name: what follows ``saelens-asi``.
        about: for ``--help``.
        run: called with one object of each class of ``settings``.
        settings: dataclasses. Every field is a flag; its help is what the class says of it under ``Attributes:``.
        resume: what to do after an interruption, from the objects that ``run`` is called with.
        prefixes: in front of the flags of a settings class.
        takes_processes: whether processes of torchrun share its work.
    """

    name: str
    about: str
    run: Callable[..., object]
    settings: tuple[type, ...]
    resume: Callable[..., str]
    prefixes: Mapping[type, str] = field(default_factory=dict)
    takes_processes: bool = False

    def parser(self) -> Parser:
        parser = Parser(
            prog=f"saelens-asi {self.name}",
            description=self.about,
            formatter_class=_Formatter,
            add_option_string_dash_variants=DashVariant.DASH,
        )
        for i, settings in enumerate(self.settings):
            prefix = self.prefixes.get(settings, "")
            parser.add_arguments(settings, f"settings_{i}", prefix=prefix, dataclass_wrapper_class=_Group)
        return parser

    def parse(self, args: Sequence[str]) -> list[Any]:
        """One object of each class of ``settings``. Raises ValueError for a flag or a value that is wrong."""
        parsed = self.parser().parse_args([_present_spelling(arg) for arg in args])
        return [getattr(parsed, f"settings_{i}") for i in range(len(self.settings))]

    def main(self, args: Sequence[str]) -> None:
        """Parse and run. Bad input ends in one line and code 2, a signal in a line that says how to go on."""
        set_up_logging()
        settings: list[Any] = []

        def resume() -> str:
            return self.resume(*settings) if settings else "nothing has been done yet"

        with ends_in_one_line(self.name, resume):
            settings += self.parse(args)
            if is_launched() and not self.takes_processes:
                raise ValueError(f"saelens-asi {self.name} is the work of one process: start it without torchrun")
            self.run(*settings)


def _present_spelling(arg: str) -> str:
    """``--n_tokens`` as ``--n-tokens``, and flags that were renamed; a value stays as it is."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    flag = flag.replace("_", "-")
    return _OLD_FLAGS.get(flag, flag) + equals + value


def set_up_logging(level: int = logging.WARNING) -> None:
    """Messages as they are: this package's from INFO on, those of all others from ``level`` on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(level)
    logging.getLogger("saelens_asi").setLevel(logging.INFO)
    # It says a second time, at length, what becomes the error of a flag.
    logging.getLogger("simple_parsing").setLevel(logging.CRITICAL)


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a scheduler or ``kill``; whatever saves its work on Ctrl-C saves it here too."""


@contextmanager
def ends_in_one_line(name: str, resume: Callable[[], str]) -> Iterator[None]:
    """How every command ends: bad input with code 2, SIGINT with 130, SIGTERM with 143, one line each."""
    # SAELens's runner replaces both handlers, and leaves its own behind.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if in_main_thread:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except BAD_INPUT as error:
        message = textwrap.shorten(str(error), _LONGEST_ERROR, placeholder=" ...") or type(error).__name__
        print(f"saelens-asi {name}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, InterruptedException) as stop:
        print(f"\nsaelens-asi {name}: interrupted: {resume()}", file=sys.stderr)
        raise SystemExit(128 + _signal_of(stop)) from None
    finally:
        for number, handler in before.items() if in_main_thread else ():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _signal_of(stop: BaseException) -> int:
    """Number of the signal; SAELens's handler, which replaces ours while it trains, has it in its frame alone."""
    if isinstance(stop, Terminated):
        return signal.SIGTERM
    trace = stop.__traceback__ if isinstance(stop, InterruptedException) else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return signal.SIGINT if trace is None else trace.tb_frame.f_locals.get("sig_num", signal.SIGINT)
