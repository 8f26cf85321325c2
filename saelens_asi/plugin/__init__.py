"""The one part of the package that reaches into SAELens. ``register`` is called on import, and is idempotent."""

from __future__ import annotations

import inspect
from typing import Any

from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi.plugin.fields import add_fields
from saelens_asi.plugin.multi_trainer import extend_multi_trainer
from saelens_asi.plugin.trainer import asks_for_plugin, plugin_trainer_class, take_flags_from_runner
from saelens_asi.plugin.upstream import check_upstream

_MARK = "_saelens_asi_registered"


def register() -> None:
    """Add the fields to SAELens's training configs, and have its trainers act on them.

    Raises:
        ImportError: when the installed SAELens is not one that this plugin was made for.
    """
    if _MARK in vars(SAETrainer):
        return
    check_upstream()
    add_fields()
    _extend_trainer()
    extend_multi_trainer()
    setattr(SAETrainer, _MARK, True)


def _extend_trainer() -> None:
    """Every construction of a trainer passes here, whoever does it; configs without our fields pass untouched."""
    stock_new = SAETrainer.__new__
    signature = inspect.signature(SAETrainer.__init__)

    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        given = _given_arguments(signature, args, kwargs)
        sae = given.get("sae")
        if sae is not None:
            take_flags_from_runner(sae, given.get("save_checkpoint_fn"))
            if asks_for_plugin(sae.cfg):
                cls = plugin_trainer_class(cls)  # type: ignore[arg-type]
        return object.__new__(cls) if stock_new is object.__new__ else stock_new(cls, *args, **kwargs)

    SAETrainer.__new__ = staticmethod(__new__)  # type: ignore[assignment]


def _given_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer by name; those of a user's subclass with a signature of its own, as far as named."""
    try:
        return dict(signature.bind_partial(None, *args, **kwargs).arguments)
    except TypeError:
        return kwargs
