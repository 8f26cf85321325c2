"""The one part of the package that reaches into SAELens. ``register`` is called on import, and is idempotent."""

from __future__ import annotations

import sae_lens

from saelens_asi.plugin.upstream import check_upstream

_MARK = "_saelens_asi_registered"


def register() -> None:
    """Add the fields to SAELens's training configs, and have its trainers act on them.

    Raises:
        ImportError: when the installed SAELens is not one that this plugin was made for.
    """
    if hasattr(sae_lens, _MARK):
        return
    check_upstream()
    # Not before the check: it names everything that is missing, where these imports would fail at the first of it.
    from saelens_asi.plugin.fields import add_fields
    from saelens_asi.plugin.multi_trainer import extend_multi_trainer
    from saelens_asi.plugin.trainer import extend_trainer

    add_fields()
    extend_trainer()
    extend_multi_trainer()
    setattr(sae_lens, _MARK, True)
