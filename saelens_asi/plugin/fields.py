"""The plugin's fields of SAELens's training configs, added in place: the flags, and how a flagged run is kept.

The class objects stay the same, so that registries, isinstance checks, third-party subclasses and the command line
see them. A config that leaves all of them at their defaults is saved exactly as before.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias, get_args

import simple_parsing
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from saelens_asi.initialization import INITIALIZER_NAME, ActiveSubspaceInit
from saelens_asi.sparse_adam import SilentMoments

# Of any architecture. Its config is untyped: SAELens's type lacks the fields, and what one architecture has alone.
AnyTrainingSAE: TypeAlias = TrainingSAE[Any]

FLAGS = {"initializer": "default", "optimizer": "adam", "silent_moments": "decay", "revive": "off"}
# Of a run with one of the flags set, or with one of these: when it is saved, and what stops it.
KEEPING = {
    "checkpoint_minutes": 10.0,
    "keep_checkpoints": 2,
    "checkpoint_buffer": 8.0,
    "max_skipped_fraction": 0.01,
    "resume": None,
    "batch_shards": 1,
}
DEFAULTS: dict[str, Any] = {**FLAGS, **KEEPING}
INITIALIZERS = ("default", INITIALIZER_NAME)
# What a field may be, for those that are a choice; the initializer may also be settings.
CHOICES = {
    "optimizer": ("adam", "sparse_adam"),
    "silent_moments": get_args(SilentMoments),
    "revive": ("off", "auto"),
}

_HELP = {
    "optimizer": "'adam' (SAELens's own), or 'sparse_adam': a feature that is silent in a step keeps its weights.",
    "silent_moments": "Of 'sparse_adam': in a step in which a feature is silent its moments decay ('decay', as in the "
    "code released with arXiv 2508.16929), or stay too ('keep').",
    "revive": "'off', or 'auto': features whose silence is evidence that they are dead start again where the error is, "
    "while training goes on. Of the TopK family.",
    "checkpoint_minutes": "Minutes between checkpoints of a run with initializer, optimizer or one of these set, and "
    "longer where they would take over 1 %% of the time; 0: only those of n_checkpoints.",
    "keep_checkpoints": "How many of the checkpoints by time or interrupt stay; those of n_checkpoints all do.",
    "checkpoint_buffer": "Up to this many GiB, a checkpoint holds the activations of the mixing buffer, so that a "
    "resume is exact; 0: never.",
    "max_skipped_fraction": "Share of activations that may be left out because they are not finite.",
    "resume": "'latest', the newest whole checkpoint below the folder of checkpoints, or a folder. For runners without "
    "resume_from_checkpoint; that setting takes 'latest' too.",
    "batch_shards": "Of a run that torchrun has launched: parts that a batch is split into; features are spread over "
    "the other processes.",
}

_GENERATED = ("__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__")


def asks_for_plugin(cfg: TrainingSAEConfig) -> bool:
    """Whether a training config sets one of the plugin's fields."""
    return any(getattr(cfg, name, default) != default for name, default in DEFAULTS.items())


def initializer_settings(cfg: TrainingSAEConfig) -> ActiveSubspaceInit | None:
    """The settings that a config asks for; None for SAELens's own initialization."""
    initializer = cfg.initializer  # type: ignore[attr-defined]
    if initializer == INITIALIZER_NAME:
        return ActiveSubspaceInit()
    return None if initializer == "default" else initializer


def _checked_initializer(value: object, d_in: int | None) -> str | ActiveSubspaceInit:
    if isinstance(value, Mapping):  # a config read back from JSON
        value = ActiveSubspaceInit.from_dict(value)
    if isinstance(value, ActiveSubspaceInit):
        if d_in is not None:
            value.check_width(d_in)
        return value
    if isinstance(value, str) and value in INITIALIZERS:
        return value
    raise ValueError(f"initializer={value!r} must be one of {INITIALIZERS}, or a saelens_asi.ActiveSubspaceInit(...)")


def _checked_choice(name: str, value: object) -> str:
    if value not in CHOICES[name]:
        raise ValueError(f"{name}={value!r} must be one of {CHOICES[name]}")
    return value  # type: ignore[return-value]


def _checked_keeping(name: str, value: Any) -> Any:
    if name == "resume":
        if value is not None and not isinstance(value, str):
            raise ValueError(f"resume={value!r} must be 'latest', the folder of a checkpoint, or None")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be a number of at least 0")
    if name == "batch_shards" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"batch_shards={value!r} must be an integer of at least 1")
    if name == "keep_checkpoints" and value < 1:
        raise ValueError(f"keep_checkpoints={value!r} must be at least 1: the newest is what a resume goes on from")
    if name == "max_skipped_fraction" and value > 1:
        raise ValueError(f"max_skipped_fraction={value!r} must be at most 1")
    return value


def _parse_initializer(text: str) -> str | ActiveSubspaceInit:
    try:
        return _checked_initializer(json.loads(text) if text.startswith("{") else text, None)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_fields() -> None:
    """Add the fields to ``TrainingSAEConfig`` and to every subclass that exists."""
    TrainingSAEConfig.__annotations__.update(
        initializer=Any,
        optimizer=str,
        silent_moments=str,
        revive=str,
        checkpoint_minutes=float,
        keep_checkpoints=int,
        checkpoint_buffer=float,
        max_skipped_fraction=float,
        resume=str | None,
        batch_shards=int,
    )
    TrainingSAEConfig.initializer = simple_parsing.field(  # type: ignore[attr-defined]
        default=DEFAULTS["initializer"],
        type=_parse_initializer,
        metavar="{default,active_subspace,JSON}",
        help="Weights at the start: 'default' (SAELens's own), 'active_subspace' (arXiv 2508.16929), or its settings "
        'as JSON, such as \'{"d_init": 0.2, "n_tokens": 100000}\'.',
    )
    for name, choices in CHOICES.items():
        made = simple_parsing.field(default=DEFAULTS[name], choices=list(choices), type=str, help=_HELP[name])
        setattr(TrainingSAEConfig, name, made)
    for name, default in KEEPING.items():
        kind = str if name == "resume" else TrainingSAEConfig.__annotations__[name]
        setattr(TrainingSAEConfig, name, simple_parsing.field(default=default, type=kind, help=_HELP[name]))
    _decorate_again(TrainingSAEConfig, fresh=tuple(DEFAULTS))
    _wrap_methods()
    _decorate_subclasses(TrainingSAEConfig)


def _decorate_subclasses(cls: type) -> None:
    subclass: type
    for subclass in cls.__subclasses__():
        if "__dataclass_fields__" in subclass.__dict__:
            _decorate_again(subclass)
        _decorate_subclasses(subclass)


def _decorate_again(cls: Any, fresh: tuple[str, ...] = ()) -> None:
    """Run ``dataclass`` on a dataclass again, so that its generated methods know the base's new fields."""
    old_fields = cls.__dataclass_fields__
    for name in inspect.get_annotations(cls):
        if name in old_fields and name not in fresh and old_fields[name]._field_type is dataclasses._FIELD:  # type: ignore[attr-defined]
            setattr(cls, name, _copied(old_fields[name]))
    for name in _GENERATED:
        method = cls.__dict__.get(name)
        if inspect.isfunction(method) and inspect.unwrap(method).__code__.co_filename == "<string>":
            delattr(cls, name)  # made by dataclass(), which never replaces a method that is there
    if "__match_args__" in cls.__dict__:
        del cls.__match_args__
    params = cls.__dataclass_params__
    options = {name: getattr(params, name) for name in ("init", "repr", "eq", "order", "unsafe_hash", "frozen")}
    dataclasses.dataclass(**options, kw_only=bool(fresh))(cls)


def _copied(field: dataclasses.Field[Any]) -> Any:
    options = {name: getattr(field, name) for name in ("init", "repr", "hash", "compare", "metadata", "kw_only")}
    if field.default is not dataclasses.MISSING:
        options["default"] = field.default
    if field.default_factory is not dataclasses.MISSING:
        options["default_factory"] = field.default_factory
    return dataclasses.field(**options)


def _wrap_methods() -> None:
    """Check the fields whenever they are set; leave them out of what is saved when they are at their defaults."""
    stock_to_dict = TrainingSAEConfig.to_dict
    stock_details = TrainingSAEConfig.get_training_architecture_details

    def __setattr__(self: TrainingSAEConfig, name: str, value: object) -> None:
        if name == "initializer":
            value = _checked_initializer(value, self.__dict__.get("d_in"))
        elif name in CHOICES:
            value = _checked_choice(name, value)
        elif name in KEEPING:
            value = _checked_keeping(name, value)
        object.__setattr__(self, name, value)

    def to_dict(self: TrainingSAEConfig) -> dict[str, object]:
        return _as_saved(stock_to_dict(self))

    def get_training_architecture_details(self: TrainingSAEConfig) -> dict[str, object]:
        return _as_saved(stock_details(self))

    for function, stock in (
        (__setattr__, object.__setattr__),
        (to_dict, stock_to_dict),
        (get_training_architecture_details, stock_details),
    ):
        function.__doc__ = stock.__doc__
        setattr(TrainingSAEConfig, function.__name__, function)


def _as_saved(values: dict[str, object]) -> dict[str, object]:
    values = {name: value for name, value in values.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    for name in ("resume", "batch_shards"):  # of this run alone
        values.pop(name, None)
    initializer = values.get("initializer")
    if isinstance(initializer, ActiveSubspaceInit):
        values["initializer"] = initializer.to_dict()
    return values
