"""Activations of one hook, to be iterated any number of times."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import as_vectors, hook_points, keep_mask, read_activations, special_token_ids
from saelens_asi.activations.tokens import token_batches

logger = logging.getLogger(__name__)


class HookActivations:
    """Batches of (n, width) activations at one hook, special tokens left out; each iteration reads the data anew.

    The forward pass stops at the hook. Heads of ``hook_z`` are laid side by side.

    Args:
        model: a HookedTransformer or TransformerBridge.
        data: (n_windows, n_positions) token ids; or rows of a dataset with a column ``tokens``, ``input_ids`` or
            ``text``, as ``token_batches`` reads them.
        hook_name: name or alias as in ``model.hook_dict``.
        n_tokens: activations in an iteration; None for all of the data.
        batch_size: windows in one forward pass.
        context_size: length of the windows that text is packed into; longer tokenized rows are cut.
        exclude_special_tokens: leave out BOS, EOS, padding and the like, as in SAELens: True, False or token ids.
        cache: keep the activations of the first whole iteration in memory, and the model idle after it.
        progress: show a progress bar while the model runs.

    Raises:
        ValueError: for a hook that does not exist or holds no vectors; while iterating, for data without tokens.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        hook_name: str,
        n_tokens: int | None = None,
        *,
        batch_size: int = 8,
        context_size: int = 256,
        exclude_special_tokens: bool | Sequence[int] = True,
        cache: bool = False,
        progress: bool = True,
    ) -> None:
        if n_tokens is not None and n_tokens < 1:
            raise ValueError(f"n_tokens={n_tokens} must be at least 1")
        if isinstance(data, Iterator):
            raise ValueError(
                f"data is a {type(data).__name__}, which can be read once only: give a dataset, a list or token ids"
            )
        self.points = hook_points(model, hook_name)
        if len(self.points) != 1:
            raise ValueError(f"hook_name={hook_name!r} stands for {len(self.points)} hooks: name one")
        self.model, self.data, self.n_tokens = model, data, n_tokens
        self.batch_size, self.context_size = batch_size, context_size
        self.special_ids = special_token_ids(model, exclude_special_tokens)
        self.cache, self.progress = cache, progress
        self._kept: list[Tensor] | None = None

    @property
    def hook_name(self) -> str:
        return next(iter(self.points))

    def __iter__(self) -> Iterator[Tensor]:
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for batch in self._read():
            if self.cache:
                kept.append(batch)
            yield batch
        if self.cache:
            self._kept = kept

    def _read(self) -> Iterator[Tensor]:
        n_read, device = 0, getattr(self.model.cfg, "device", None) or "cpu"
        with tqdm(total=self.n_tokens, desc=self.hook_name, unit="token", disable=not self.progress) as bar:
            for tokens, is_text in token_batches(self.model, self.data, self.batch_size, self.context_size):
                keep = keep_mask(tokens, self.special_ids) & is_text
                rows = keep.flatten().nonzero().squeeze(1)[: None if self.n_tokens is None else self.n_tokens - n_read]
                if not len(rows):
                    continue
                found: list[Tensor] = []
                readers = {self.hook_name: found.append}
                read_activations(self.model, tokens.to(device), self.points, readers, is_text.to(device))
                vectors = as_vectors(found[0], tokens.shape, self.hook_name)
                n_read += len(rows)
                bar.update(len(rows))
                yield vectors.index_select(0, rows.to(vectors.device))
                if n_read == self.n_tokens:
                    return
        if not n_read:
            raise ValueError("the data holds no token that counts: check the data and exclude_special_tokens")
        if self.n_tokens is not None:
            logger.warning("the data ended after %d of n_tokens=%d tokens", n_read, self.n_tokens)
