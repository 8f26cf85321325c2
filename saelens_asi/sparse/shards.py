"""How features and tokens are spread over processes, and what these tell one another.

A process that is alone is a group of size one, for which nothing travels: there is one path for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Dimensions of the mesh: processes along the first hold the same features and see other tokens, along the second the
# same tokens and other features. Neighbours, which are on one machine, exchange what belongs to a token.
MESH = ("tokens", "features")


# Its name since torch 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What a process has sent so far: calls, and bytes as rings of processes send them (see ``Group``)."""

    calls: int = 0
    n_bytes: float = 0.0


@dataclass(frozen=True)
class Group:
    """Processes that speak with one another, all in the same order.

    What a process sends, of a tensor of b bytes among n processes: 2 b (n - 1) / n for a sum or a maximum, b (n - 1)
    for what is gathered, b (n - 1) / n for what is exchanged or the first one's.

    Attributes:
        rank: of this process among them.
        size: how many they are; 1 for a process that is alone.
        handle: torch's group; None for a process that is alone, and for all processes there are.
        traffic: counts what this process sends; shared by all groups of a run.
    """

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and says what is to be written and said once."""
        return self.rank == 0

    def sum_(self, tensor: Shaped[Tensor, " ..."]) -> Shaped[Tensor, " ..."]:
        """Replace a tensor by the sum of all processes' tensors, which has the same bits in each."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Shaped[Tensor, " ..."]) -> Shaped[Tensor, " ..."]:
        """Replace a tensor by the elementwise maximum over all processes."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def max_later(self, tensor: Shaped[Tensor, " ..."]) -> Callable[[], Shaped[Tensor, " ..."]]:
        """``max_`` while this process goes on: what is returned waits for the others and gives their maximum."""
        if self.size == 1 or tensor.numel() == 0:
            return lambda: tensor
        self._count(tensor, 2 / self.size)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.handle, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.size > 1 and tensor.numel() > 0:
            self._count(tensor, 2 / self.size)
            dist.all_reduce(tensor, op=op, group=self.handle)
        return tensor

    def as_first_(self, tensor: Shaped[Tensor, " ..."]) -> Shaped[Tensor, " ..."]:
        """Replace a tensor by the first process's."""
        if self.size > 1 and tensor.numel() > 0:
            self._count(tensor, 1 / self.size)
            first = 0 if self.handle is None else dist.get_global_rank(self.handle, 0)
            dist.broadcast(tensor, first, group=self.handle)
        return tensor

    def gather(self, tensor: Shaped[Tensor, " ..."]) -> Shaped[Tensor, " n_processes ..."]:
        """The tensors of all processes, which have one shape, in the order of their ranks."""
        if self.size == 1:
            return tensor[None]
        tensor = tensor.contiguous()
        self._count(tensor, 1)
        gathered = tensor.new_empty(self.size * max(1, tensor.numel()))
        if tensor.numel() > 0:
            _all_gather(gathered, tensor.view(-1), group=self.handle)
        return gathered[: self.size * tensor.numel()].view(self.size, *tensor.shape)

    def exchange(self, tensor: Shaped[Tensor, "n_processes ..."]) -> Shaped[Tensor, "n_processes ..."]:
        """Give each process its part of a tensor; returns the parts that all have for this one, in their order."""
        if self.size > 1 and tensor.numel() > 0:
            tensor = tensor.contiguous()
            self._count(tensor, 1 / self.size)
            received = torch.empty_like(tensor)
            dist.all_to_all_single(received, tensor, group=self.handle)
            return received
        return tensor

    def gather_rows(
        self, tensor: Shaped[Tensor, "n ..."], counts: Sequence[int] | None = None
    ) -> list[Shaped[Tensor, "m ..."]]:
        """The tensors of all processes, whose numbers of rows may differ; padded to the most rows.

        Args:
            tensor: this process's.
            counts: rows of each process's; None to ask for them in a call of its own.
        """
        if self.size == 1:
            return [tensor]
        counts = counts or self.gather(torch.tensor([len(tensor)], device=tensor.device)).flatten().tolist()
        padded = tensor
        if len(tensor) < max(counts):
            padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
            padded[: len(tensor)] = tensor
        return [rows[:n] for rows, n in zip(self.gather(padded), counts, strict=True)]

    def gather_objects(self, value: Any) -> list[Any]:
        """Small values of all processes, of any kind, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def of_first(self, value: Any) -> Any:
        """The first process's value, in all."""
        return self.gather_objects(value if self.is_first else None)[0]

    def parts(self, n: int) -> list[range]:
        """What each process takes of n things, in the order of their ranks: parts as even as may be."""
        edges = [i * n // self.size for i in range(self.size + 1)]
        return [range(*part) for part in pairwise(edges)]

    def _count(self, tensor: Tensor, shares: float) -> None:
        """A call in which this process sends each other one so many times a tensor's bytes, on average."""
        self.traffic.calls += 1
        self.traffic.n_bytes += shares * tensor.numel() * tensor.element_size() * (self.size - 1)


ALONE = Group()


@dataclass(frozen=True)
class Shard:
    """One process's part of an autoencoder: features ``first`` to ``stop`` of ``d_sae``.

    Attributes:
        d_sae: features of all processes together.
        first: the first that lies here.
        stop: one more than the last.
        features: the processes that see the same tokens and hold the other features.
        tokens: those that hold the same features and see the other tokens of a batch.
        world: all.
        mesh: torch's, of all; None for a process that is alone.
    """

    d_sae: int
    first: int
    stop: int
    features: Group = ALONE
    tokens: Group = ALONE
    world: Group = ALONE
    mesh: DeviceMesh | None = None

    @classmethod
    def whole(cls, d_sae: int) -> Shard:
        """All features, in a process that is alone."""
        return cls(d_sae, 0, d_sae)

    @property
    def n_features(self) -> int:
        """How many features lie here."""
        return self.stop - self.first

    @property
    def is_whole(self) -> bool:
        """Whether this process is alone."""
        return self.world.size == 1

    def part(self, n_tokens: int) -> slice:
        """Which tokens of a batch this process sees."""
        own = self.tokens.parts(n_tokens)[self.tokens.rank]
        return slice(own.start, own.stop)

    def own(self, whole: Shaped[Tensor, "d_sae ..."], dim: int = 0) -> Shaped[Tensor, "n_features ..."]:
        """This process's part of a tensor with features along ``dim``."""
        return whole.narrow(dim, self.first, self.n_features)

    def of_all(self, own: Shaped[Tensor, "n_features ..."]) -> Shaped[Tensor, "d_sae ..."]:
        """The parts of all processes, put together in each."""
        return torch.cat(self.features.gather_rows(own))


@dataclass(frozen=True)
class Processes:
    """All processes of a run, and how they share the work: features and tokens."""

    world: Group = ALONE
    features: Group = ALONE
    tokens: Group = ALONE
    mesh: DeviceMesh | None = None

    @classmethod
    def spread(cls, batch_shards: int, device_type: str) -> Processes:
        """The mesh of torch.distributed's processes; one that is alone where it was not initialised.

        Args:
            batch_shards: parts that a batch is split into; features are spread over the others.
            device_type: of the device that the autoencoder lies on.

        Raises:
            ValueError: for ``batch_shards`` that does not divide the number of processes.
        """
        n = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if n % batch_shards:
            raise ValueError(f"batch_shards={batch_shards} must divide the {n} processes of this run")
        if n == 1:
            return cls()
        mesh = init_device_mesh(device_type, (batch_shards, n // batch_shards), mesh_dim_names=MESH)
        traffic = Traffic()
        tokens, features = (
            Group(mesh.get_local_rank(name), mesh.size(i), mesh.get_group(name), traffic) for i, name in enumerate(MESH)
        )
        return cls(Group(dist.get_rank(), n, None, traffic), features, tokens, mesh)

    def shard(self, d_sae: int) -> Shard:
        """This process's part of an autoencoder. Raises ValueError for fewer features than processes to hold them."""
        first, stop = bounds(d_sae, self.features.size)[self.features.rank]
        return Shard(d_sae, first, stop, self.features, self.tokens, self.world, self.mesh)


def bounds(d_sae: int, n: int) -> Sequence[tuple[int, int]]:
    """Where the features of each of n processes begin and end: as ``torch.chunk`` has it, and so torch's own shards.

    Raises ValueError where a process would have none.
    """
    size = -(-d_sae // n)
    if size * (n - 1) >= d_sae:
        raise ValueError(f"d_sae={d_sae} features cannot be spread over {n} processes: some would have none")
    return [(i * size, min(d_sae, (i + 1) * size)) for i in range(n)]
