"""Shared fixtures. No test needs a network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from jaxtyping import install_import_hook

from tests.helpers.shapes import CHECKED

install_import_hook(CHECKED, "tests.helpers.shapes.typechecked")  # before anything imports the package

import pytest
import torch

from saelens_asi.sparse import kernels

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# The models are too small for more than one; with more, results must not change.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# Tests that speak of bits and kernels: `make capabilities` runs them again as lesser processors would.
BITS = (
    "activations/test_cache.py",
    "evaluation/test_metrics.py",
    "initialization/test_weights.py",
    "lorsa/test_gradients.py",
    "lorsa/test_resume.py",
    "lorsa/test_training.py",
    "plugin/test_exact_resume.py",
    "plugin/test_multi_resume.py",
    "plugin/test_resume.py",
    "plugin/test_sparse_adam.py",
    "plugin/test_sparse_steps.py",
    "plugin/test_stream.py",
    "sparse/",
    "sparse_adam/",
    "spectra/",
    "test_resume.py",
)


_OF_NO_PROCESSOR = {"test_triton_kernels.py", "test_shards.py", "test_selection.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest file first: of two processes one would otherwise wait for it at the end.
    items.sort(key=lambda item: item.path.name != "test_real_model.py")
    for item in items:
        # Killed processes take half a minute each, and end as any resume does; Triton looks at no processor, and what
        # processes tell one another is compared and copied, whatever they have computed.
        left_out = "kill" in item.name or item.path.name in _OF_NO_PROCESSOR
        if item.path.relative_to(TESTS).as_posix().startswith(BITS) and not left_out:
            item.add_marker(pytest.mark.bits)


@pytest.fixture(autouse=True)
def _signal_handlers_of_a_program() -> Iterator[None]:
    """Python's own: SAELens's runners leave theirs behind, and a background job of a shell ignores SIGINT."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for number, handler in own.items():
        signal.signal(number, handler)
    yield
    for number, handler in own.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compiled kernels where they can be had, and with torch's operations alone."""
    monkeypatch.setattr(kernels, "enabled", request.param)


@pytest.fixture(scope="session")
def model():
    """A tiny randomly initialised HookedTransformer."""
    from tests.helpers import tiny

    return tiny.hooked_transformer()


@pytest.fixture(scope="session")
def dataset():
    """256 tokenized sequences of 16."""
    from tests.helpers import tiny

    return tiny.tokens()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as transformers saves models."""
    from tests.helpers import tiny

    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bridge(llama_folder: Path):
    """The tiny Llama as a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(llama_folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def hooked_llama(llama_folder: Path):
    """The same weights as a HookedTransformer."""
    from tests.helpers.hooked import load_hooked_transformer

    return load_hooked_transformer(llama_folder)


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Run a fresh interpreter in a folder, with ``tests`` importable; returns what it printed."""

    def run(*args: str, cwd: Path) -> str:
        # SAELens writes the keys of a cfg.json in the order of a set: a fixed hash seed makes two runs comparable.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
