"""One pass over text: windows of tokens, which of them count, and their activations, hook by hook."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from tqdm.auto import tqdm

from saelens_asi.activations.hooks import (
    HookedModel,
    as_vectors,
    device_of,
    hook_points,
    keep_mask,
    read_activations,
    special_token_ids,
)
from saelens_asi.activations.tokens import TokenData, token_batches
from saelens_asi.sparse.shards import ALONE, Group

logger = logging.getLogger(__name__)


class Windows(NamedTuple):
    """Windows that have been read.

    Attributes:
        tokens: (n_windows, n_positions) ids.
        keep: (n_windows, n_positions) bool, which of them count: no special token, padding or excluded position.
        n_read: activations of them that the readers got; fewer than count where the pass was to end.
    """

    tokens: Tensor
    keep: Tensor
    n_read: int


class TextPass:
    """Forward passes over text that hand the activations of each hook to a reader, and stop at the last hook.

    One hook's activations exist at a time, as far as the model allows: readers are called from inside the forward pass.

    Processes that share a pass take batches in turn: the tokens that count are those of one process, and the readers of
    each get its own.

    Args:
        model: a HookedTransformer or TransformerBridge.
        data: token ids or rows of a dataset, as ``token_batches`` reads them.
        points: of ``hook_points``, or modules of the model.
        n_tokens: activations of each hook; None for all of the data.
        batch_size: windows in one forward pass.
        context_size: length of the windows that text is packed into; longer tokenized rows are cut.
        exclude_special_tokens: leave out BOS, EOS, padding and the like, as in SAELens: True, False or token ids.
        exclude_positions: positions of every window that are left out too; negative ones count from its end.
        group: the processes that share the pass.

    Attributes:
        n_read: activations that each reader has got, of all processes together.
        n_batches: batches of windows behind them.
        digest: of all tokens of these.
        special_ids: ids that are left out.
    """

    def __init__(
        self,
        model: HookedModel,
        data: TokenData,
        points: Mapping[str, nn.Module],
        n_tokens: int | None = None,
        *,
        batch_size: int,
        context_size: int,
        exclude_special_tokens: bool | Sequence[int] = True,
        exclude_positions: Sequence[int] = (),
        group: Group = ALONE,
    ) -> None:
        self.model, self.points, self.n_tokens, self.group = model, points, n_tokens, group
        self.special_ids = special_token_ids(model, exclude_special_tokens)
        self.exclude_positions = exclude_positions
        self.n_read = self.n_batches = 0
        self.digest = hashlib.sha256()
        self._batches = iter(token_batches(model, data, batch_size, context_size))

    @property
    def n_missing(self) -> int | None:
        """Activations that are still to be read; None for all there are."""
        return None if self.n_tokens is None else self.n_tokens - self.n_read

    def skip(self, n_batches: int, n_read: int) -> None:
        """Go past what an earlier pass has read, without the model."""
        for _ in range(n_batches):
            tokens, _ = next(self._batches, (None, None))
            if tokens is None:
                break
            self.digest.update(tokens.cpu().numpy().tobytes())
        self.n_batches, self.n_read = n_batches, n_read

    def read(
        self,
        readers: Mapping[str, Callable[[Tensor], None]],
        *,
        description: str,
        progress: bool = True,
        until: Callable[[], bool] = lambda: True,
    ) -> Iterator[Windows]:
        """Read batch by batch; what is yielded after each is the place for checkpoints.

        Args:
            readers: what to call with the (n, width) activations that count, for names in ``points``. Heads of
                ``hook_z`` are laid side by side.
            description: of the progress bar.
            progress: show it.
            until: windows go on to come when there are activations enough, without forward passes, until this holds.

        Raises:
            ValueError: for a hook that is not reached or holds no vectors.
        """
        with tqdm(
            total=self.n_tokens,
            initial=self.n_read,
            desc=description,
            unit="token",
            disable=not (progress and self.group.is_first),
        ) as bar:
            while self.n_missing != 0 or not until():
                tokens, is_text = next(self._batches, (None, None))
                if tokens is None or is_text is None:
                    return
                keep = keep_mask(tokens, self.special_ids, self.exclude_positions) & is_text
                rows = keep.flatten().nonzero().squeeze(1)[: self.n_missing]
                if len(rows) and self.n_batches % self.group.size == self.group.rank:
                    device = device_of(self.model)
                    inside = {name: _at_rows(name, tokens, rows, reader) for name, reader in readers.items()}
                    read_activations(self.model, tokens.to(device), self.points, inside, is_text.to(device))
                self.n_read += len(rows)
                self.n_batches += 1
                self.digest.update(tokens.cpu().numpy().tobytes())
                bar.update(len(rows))
                yield Windows(tokens, keep, len(rows))

    def check_length(self, at_least: int = 1) -> None:
        """Warn where the data ended early. Raises ValueError for fewer than ``at_least`` activations."""
        if self.n_read < at_least:
            what = f"{self.n_read} tokens that count, and {at_least} are needed"
            raise ValueError(
                f"the data holds {what if at_least > 1 else 'no token that counts'}: check the data, "
                "exclude_special_tokens and exclude_positions"
            )
        if self.n_tokens is not None and self.n_read < self.n_tokens and self.group.is_first:
            logger.warning("the data ended after %d of n_tokens=%d tokens", self.n_read, self.n_tokens)


def _at_rows(name: str, tokens: Tensor, rows: Tensor, reader: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def read(activations: Tensor) -> None:
        vectors = as_vectors(activations, tokens.shape, name)
        # Where all tokens count, a copy would be the costliest part of the pass.
        reader(vectors if len(rows) == len(vectors) else vectors.index_select(0, rows.to(vectors.device)))

    return read


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
        model: HookedModel,
        data: TokenData,
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
        self.exclude_special_tokens = exclude_special_tokens
        special_token_ids(model, exclude_special_tokens)  # here rather than in the first iteration
        self.cache, self.progress = cache, progress
        self._cached: list[Tensor] | None = None

    @property
    def hook_name(self) -> str:
        return next(iter(self.points))

    def __iter__(self) -> Iterator[Tensor]:
        if self._cached is not None:
            yield from self._cached
            return
        batches = []
        for batch in self._read():
            if self.cache:
                batches.append(batch)
            yield batch
        if self.cache:
            self._cached = batches

    def _read(self) -> Iterator[Tensor]:
        text = TextPass(
            self.model,
            self.data,
            self.points,
            self.n_tokens,
            batch_size=self.batch_size,
            context_size=self.context_size,
            exclude_special_tokens=self.exclude_special_tokens,
        )
        batch: list[Tensor] = []
        readers = {self.hook_name: batch.append}
        for windows in text.read(readers, description=self.hook_name, progress=self.progress):
            if windows.n_read:
                yield batch.pop()
        text.check_length()
