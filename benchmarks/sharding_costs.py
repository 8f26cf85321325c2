"""What a step of many processes costs, as arithmetic: bytes that travel, memory, and time on GPUs.

Bytes are those that ``Group.traffic`` counts (``benchmarks.sharding check`` compares them). Memory of weights, moments
and counters is that of the tensors; buffers are what the code asks for. Time is a model that nobody has measured on a
GPU: what arithmetic, memory, links and launches take at least, each at an assumed share of its peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FLOAT, INDEX = 4, 8  # bytes of float32 and of int64
GPUS_A_NODE = 8

# What SAELens's own default asks for: the history is recorded, and W&B is told, once in so many steps.
STEPS_A_RECORD = 10

# Of saelens_asi/sparse/topk.py: scores of a tile, and features in it.
_TILE_ENTRIES, _TILE_FEATURES = 2**26, 2**15


class Sizes(NamedTuple):
    """Of an SAE and its batch; ``d_sae`` and ``batch`` are those of all processes together."""

    d_in: int
    d_sae: int
    k: int
    batch: int


class Mesh(NamedTuple):
    """Processes that share the features of one SAE, and parts that a batch is split into (``batch_shards``)."""

    features: int
    tokens: int = 1

    @property
    def n(self) -> int:
        """All processes."""
        return self.features * self.tokens


class Hardware(NamedTuple):
    """A GPU in a node of eight, by its data sheet."""

    name: str
    memory: float  # bytes
    flops: float  # dense products in bfloat16, a second
    memory_bandwidth: float  # bytes a second
    link: float  # bytes a second that a GPU sends to others of its node
    network: float  # bytes a second that a GPU sends to other nodes


# NVIDIA's data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU" (SXM): 1,979 TFLOPS in bfloat16 with sparsity,
# so 989 dense; NVLink 900 GB/s, both directions together. The network: a port of 400 Gb/s for each GPU, as in NVIDIA's
# DGX H100.
H100 = Hardware("H100", 80e9, 989e12, 3.35e12, 450e9, 50e9)
H200 = Hardware("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9)

# Assumed: the share of a peak that is reached; what a message of NCCL takes from one GPU to the next beside its bytes,
# and one of gloo from one process to the next; what the host takes to launch an operation.
EFFICIENCY = {"product": 0.6, "memory": 0.7, "link": 0.8}
LATENCY, CPU_LATENCY, LAUNCH = 5e-6, 30e-6, 6e-6

# Counted in the code, on a GPU inside bfloat16 autocast. A score is written in two bytes, read and widened to four, has
# its bias added and its scale multiplied, and is read for the maxima of groups.
_BYTES_A_SCORE = 2 + 6 + 8 + 8 + 4
# Rows of float32 read or written for an entry: decoding reads one; its product with the error copies two and reads
# both; the two sums of gradients read one each.
_ROWS_AN_ENTRY = 1 + 6 + 2
# For a feature that fired: two gradients are written, read for the norm, divided (read and write), one encoder row is
# read for b_dec; of two tables the rows of parameter and moments are copied out, updated (four read, three written) and
# copied back.
_ROWS_A_FEATURE = 2 + 2 + 4 + 1 + 2 * (6 + 7 + 6)
# Operations of a tile's product and its two passes of top-k, of a chunk of 2^25 numbers in SparseAdam, of 2,048 entries
# in products, of 2,048 features in a sum of gradients.
_LAUNCHES = {"tile": 80, "adam": 20, "products": 8, "sums": 6}
_ADAM_NUMBERS, _CHUNK_ROWS = 2**25, 2048


def summed(n_bytes: float, n: int) -> float:
    """What a process sends for a sum or a maximum over n processes, as a ring has it."""
    return 2 * n_bytes * (n - 1) / n


def gathered(n_bytes: float, n: int) -> float:
    """What a process sends so that all n have what each of them had."""
    return n_bytes * (n - 1)


def exchanged(n_bytes: float, n: int) -> float:
    """What a process sends that gives each of n a part of what it has."""
    return n_bytes * (n - 1) / n


def features_here(sizes: Sizes, mesh: Mesh) -> int:
    """Of a process; the last may have fewer."""
    return -(-sizes.d_sae // mesh.features)


def tokens_here(sizes: Sizes, mesh: Mesh) -> int:
    """Of a batch that a process sees; others may see one less."""
    return -(-sizes.batch // mesh.tokens)


def most_active(sizes: Sizes, mesh: Mesh) -> int:
    """Features of a process that fire on its tokens, were all equally frequent: in real data fewer do."""
    entries = tokens_here(sizes, mesh) * sizes.k
    return round(-features_here(sizes, mesh) * math.expm1(entries * math.log1p(-1 / sizes.d_sae)))


def step_bytes(sizes: Sizes, mesh: Mesh, active: int) -> dict[str, float]:
    """What a process sends in a step of a TopK SAE, by what it is for.

    Args:
        sizes: of the SAE and its batch.
        mesh: of the processes.
        active: features that fired, in the process of those with the same features in which most did.
    """
    d_in, n_tokens = sizes.d_in, tokens_here(sizes, mesh)
    merged = FLOAT * (2 * d_in + 1) + INDEX
    padded = -(-n_tokens // mesh.features) * mesh.features
    return {
        # To the process that looks after a token, and back what it found: a score and a count.
        "scores": exchanged(FLOAT * padded * (sizes.k + 2), mesh.features),
        "partial decodes": summed(FLOAT * n_tokens * d_in, mesh.features),
        "gradient of b_dec": summed(FLOAT * d_in, mesh.n) + summed(FLOAT * d_in, mesh.tokens),
        "rows of gradients": gathered(merged * active + 2 * INDEX, mesh.tokens),
        "firing counts": summed(INDEX * features_here(sizes, mesh), mesh.tokens),
        # Whether to save and which signal came; the norm, and how many features are dead; three losses.
        "agreements": summed(2 * 8, mesh.n) + 2 * summed(8, mesh.features) + summed(3 * FLOAT, mesh.tokens),
    }


def record_bytes(sizes: Sizes, mesh: Mesh) -> float:
    """What a step that is recorded sends beside that, in the first 100,000 tokens: a count or three more later on."""
    both = 2 * (FLOAT * sizes.d_in * tokens_here(sizes, mesh) + INDEX)  # activations and reconstructions
    counts = summed(8, mesh.features) + summed(3 * 8, mesh.features)
    return gathered(both, mesh.tokens) + counts + summed(2 * 8, mesh.n) + summed(4, mesh.n)


def activation_bytes(sizes: Sizes, mesh: Mesh) -> float:
    """What a process sends of the language model's activations, which travel once, for each step."""
    return gathered(FLOAT * sizes.d_in * sizes.batch / mesh.n, mesh.n)


def all_bytes(sizes: Sizes, mesh: Mesh, active: int) -> dict[str, float]:
    """What a process sends in a step of a run: with activations, and a share of the records."""
    records = record_bytes(sizes, mesh) / STEPS_A_RECORD
    return {"activations": activation_bytes(sizes, mesh), **step_bytes(sizes, mesh, active), "records": records}


def batch_step_bytes(sizes: Sizes, mesh: Mesh, calls: int = 9) -> tuple[float, float]:
    """The least and the most that a process sends in a step of a BatchTopK, of features alone.

    Scores that processes offer travel, padded to the most that one of them does: no less than its part of those that
    are kept, and no more than twice the average for each token that it sees. Where tokens could have more, twice as
    many travel of these in a further look.

    Args:
        sizes: of the SAE and its batch.
        mesh: of the processes.
        calls: how often processes spoke in the step: five times beside the looks, four times in each of these.
    """
    rest = sum(n_bytes for part, n_bytes in step_bytes(sizes, mesh, active=0).items() if part != "scores")
    a_look = gathered(8, mesh.n) + summed(8, mesh.n) + summed(FLOAT, mesh.n)
    least = rest + a_look + gathered(FLOAT * sizes.batch * sizes.k / mesh.n, mesh.n)
    # Whether scores above the last threshold are enough; which of equals come first.
    most = rest + summed(8, mesh.n) + gathered(8 + INDEX * sizes.batch, mesh.n)
    for look in range((calls - 5) // 4):
        width = min(features_here(sizes, mesh), 2 * sizes.k * 2**look)
        most += a_look + gathered(FLOAT * tokens_here(sizes, mesh) * width, mesh.n)
    return least, most


def state_bytes(sizes: Sizes, mesh: Mesh) -> dict[str, int]:
    """Memory of a process that lasts from step to step, by what it is for; the mixing buffer is not counted."""
    n, d_in = features_here(sizes, mesh), sizes.d_in
    weights = FLOAT * (n * (2 * d_in + 1) + d_in)
    return {"weights": weights, "moments": 2 * weights, "norms": FLOAT * n, "counters": 2 * FLOAT * n}


def screen_bytes(sizes: Sizes, mesh: Mesh) -> int:
    """Memory of the 8-bit copies of encoder rows, on a CPU with numba; nothing on a GPU."""
    return features_here(sizes, mesh) * (sizes.d_in + 4 * FLOAT)


def step_memory(sizes: Sizes, mesh: Mesh, active: int) -> dict[str, float]:
    """Memory that a step needs beside that on a GPU, by what it is for: buffers that the code asks for."""
    n, n_tokens, width = features_here(sizes, mesh), tokens_here(sizes, mesh), FLOAT * sizes.d_in
    features = min(n, _TILE_FEATURES)
    tile = min(_TILE_ENTRIES, n_tokens * features)
    # Own rows, padded, those of all processes, and their sum.
    copies = 0 if mesh.tokens == 1 else 2 + mesh.tokens + min(mesh.tokens, n / max(1, active))
    return {
        # The whole batch; of the tokens seen here what the encoder reads, reconstruction, error, and their gradients.
        "batch": width * (sizes.batch + 6 * n_tokens),
        # Own scores with features, padded and exchanged; those of all processes twice, and which equal the last.
        "selection": n_tokens * sizes.k * (20 + 8 + 9),
        "tile of scores": 6 * tile + 2 * features * sizes.d_in,
        "rows of gradients": 2 * width * active * (1 + copies),
        "firing counts": INDEX * n,
    }


def fits(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> bool:
    """Whether a process has room for it, with a tenth left."""
    return memory(sizes, mesh) < 0.9 * gpu.memory


def memory(sizes: Sizes, mesh: Mesh) -> float:
    """Bytes of a process on a GPU, the mixing buffer not counted."""
    buffers = step_memory(sizes, mesh, most_active(sizes, mesh))
    return sum(state_bytes(sizes, mesh).values()) + sum(buffers.values())


def device_seconds(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> dict[str, float]:
    """What a GPU takes for its part of a step, by what bounds it."""
    n, n_tokens, active = features_here(sizes, mesh), tokens_here(sizes, mesh), most_active(sizes, mesh)
    entries = n_tokens * sizes.k / mesh.features
    # Of decoder rows that moved the norms are renewed, of all where that is more than a quarter; a 32nd is looked at.
    norms = n / 32 + (n if active > n // 4 else 3 * active)
    rows = _ROWS_AN_ENTRY * entries + _ROWS_A_FEATURE * active + 8 * n_tokens + norms
    moved = gpu.memory_bandwidth * EFFICIENCY["memory"]
    return {
        "encoder product": 2.0 * n_tokens * n * sizes.d_in / (gpu.flops * EFFICIENCY["product"]),
        "weights to bfloat16": 6.0 * n * sizes.d_in / moved,
        "passes over scores": _BYTES_A_SCORE * float(n_tokens) * n / moved,
        "rows": FLOAT * sizes.d_in * rows / moved,
        "selection": 9 * FLOAT * n_tokens * sizes.k / moved,
    }


def host_seconds(sizes: Sizes, mesh: Mesh) -> float:
    """What launching a step takes, which goes on beside the device's work."""
    n, n_tokens, active = features_here(sizes, mesh), tokens_here(sizes, mesh), most_active(sizes, mesh)
    features = min(n, _TILE_FEATURES)
    loops = {
        "tile": math.ceil(n / features) * math.ceil(n_tokens * features / _TILE_ENTRIES),
        "adam": 2 * math.ceil(active * sizes.d_in / _ADAM_NUMBERS),
        "products": math.ceil(n_tokens * sizes.k / mesh.features / _CHUNK_ROWS),
        "sums": 2 * math.ceil(active / _CHUNK_ROWS),
    }
    return LAUNCH * sum(_LAUNCHES[name] * times for name, times in loops.items())


def link_seconds(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> dict[str, float]:
    """What the links take, by group: neighbours share features, so that these groups lie in one node while they can."""
    of_part = all_bytes(sizes, mesh, most_active(sizes, mesh))
    features_a_node = min(mesh.features, GPUS_A_NODE)
    tokens_a_node = min(mesh.tokens, GPUS_A_NODE // features_a_node)

    def seconds(parts: Sequence[str], size: int, a_node: int, n_sums: int, n_gathers: int) -> float:
        if size == 1:
            return 0.0
        # Sums of few numbers go along trees, what is gathered from one to the next.
        hops = n_sums * 2 * math.ceil(math.log2(size)) + n_gathers * (size - 1)
        return sum(of_part[part] for part in parts) / bandwidth(size, a_node, gpu) + hops * LATENCY

    return {
        "features": seconds(["scores", "partial decodes"], mesh.features, features_a_node, n_sums=3, n_gathers=2),
        "tokens": seconds(
            ["rows of gradients", "firing counts", "records"], mesh.tokens, tokens_a_node, n_sums=3, n_gathers=4
        ),
        "all": seconds(["activations", "gradient of b_dec"], mesh.n, min(mesh.n, GPUS_A_NODE), n_sums=1, n_gathers=1),
    }


def bandwidth(size: int, a_node: int, gpu: Hardware) -> float:
    """Bytes a second that each process of a group sends, of which ``a_node`` lie in one node.

    Rings of a group that spans nodes leave a node through the ports of all its members there.
    """
    link = gpu.link if size <= a_node else min(gpu.link, a_node * gpu.network)
    return link * EFFICIENCY["link"]


def step_seconds(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> float:
    """A step on GPUs, without the language model; nothing overlaps but launching and what was launched, and beside
    the whole step processes tell one another, in a ring over the CPU, whether to save and which signal came."""
    device = sum(device_seconds(sizes, mesh, gpu).values())
    step = max(device, host_seconds(sizes, mesh)) + sum(link_seconds(sizes, mesh, gpu).values())
    return max(step, 2 * (mesh.n - 1) * CPU_LATENCY)


def efficiency(sizes: Sizes, mesh: Mesh, gpu: Hardware) -> float:
    """The time of one GPU with room for everything, as a share of what all GPUs together take."""
    return step_seconds(sizes, Mesh(1), gpu) / (mesh.n * step_seconds(sizes, mesh, gpu))


def meshes(n: int) -> Iterator[Mesh]:
    """All ways to share features and tokens among n processes."""
    return (Mesh(n // tokens, tokens) for tokens in range(1, n + 1) if n % tokens == 0)


def best_mesh(sizes: Sizes, n: int, gpu: Hardware) -> Mesh | None:
    """The quickest of those that fit; None where none does."""
    fitting = [mesh for mesh in meshes(n) if fits(sizes, mesh, gpu)]
    return min(fitting, key=lambda mesh: step_seconds(sizes, mesh, gpu), default=None)
