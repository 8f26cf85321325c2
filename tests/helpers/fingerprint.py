"""Losses and files of stock and flagged runs, of Lorsa, spectra, evaluation, autopsy and of every command, as digests.

Two versions of the package behave alike where this prints the same for both, on one machine:

    python tests/helpers/fingerprint.py > now.json
    PYTHONPATH=OTHER_CHECKOUT python tests/helpers/fingerprint.py > then.json

It stands alone, so that it runs against any checkout. What a clock wrote (seconds) is left out, and so are figures and
pages of prose.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
sys.path.insert(1, str(Path(__file__).parent))

import tiny  # type: ignore[import-not-found]
import torch
from sae_lens import LoggingConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

import saelens_asi as asi
from saelens_asi import cli
from saelens_asi import lorsa as lo

FLAGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "initializer": {"initializer": asi.ActiveSubspaceInit(d_init=4, n_tokens=256)},
    "optimizer": {"optimizer": "sparse_adam"},
    "both": {"initializer": "active_subspace", "optimizer": "sparse_adam"},
}
# Whether commands count in tokens; earlier versions counted windows and sequences.
TOKENS = importlib.util.find_spec("saelens_asi.cli.flags") is not None

# A clock's, a process's, or prose.
_TIMED = re.compile(r'"(seconds|cpu_seconds|seconds_per_1k_tokens|modified_ns|folder)": [^,}\n]*')
_LEFT_OUT = (".png", ".html", ".md", ".log")


def digest(value: Any) -> str:
    """Of tensors by their bytes, of all else by its repr."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, dict):
        return digest(sorted((str(key), digest(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return digest(repr([digest(one) for one in value]))
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def files(folder: Path) -> dict[str, str]:
    """Digests of everything below a folder: tensors of safetensors and torch files, text without seconds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.suffix in _LEFT_OUT:
            continue
        if path.parent.name == "activations":  # SAELens's cache carries times; what is trained from it tells all
            continue
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=False)
        elif path.suffix in (".json", ".jsonl"):
            content = _TIMED.sub("", path.read_text())
        else:
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = digest(content)
    return found


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Paths in what is written do not say where it was written."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def losses_recorded() -> Iterator[list[float]]:
    """Losses of all SAELens steps inside the block."""
    losses: list[float] = []
    fit = SAETrainer.fit

    def recorded(self: Any) -> Any:
        step = self.step

        def one_step(batch: torch.Tensor) -> Any:
            output = step(batch)
            losses.append(output.loss.item())
            return output

        self.step = one_step
        return fit(self)

    SAETrainer.fit = recorded  # type: ignore[method-assign]
    try:
        yield losses
    finally:
        SAETrainer.fit = fit  # type: ignore[method-assign]


def runner_runs() -> dict[str, Any]:
    """Every architecture in SAELens's runner, with and without the flags, checkpoints included."""
    report = {}
    for architecture in tiny.ARCHITECTURES:
        for name, flags in FLAGS.items():
            with tempfile.TemporaryDirectory() as folder, inside(folder), losses_recorded() as losses:
                torch.manual_seed(1)
                sae = tiny.sae_config(architecture, normalize_activations="expected_average_only_in", **flags)
                changes = {"output_path": "output", "checkpoint_path": "checkpoints", "n_checkpoints": 1}
                logger = LoggingConfig(log_to_wandb=False, wandb_id="run", wandb_log_frequency=2)
                cfg = tiny.runner_config(sae, ".", logger=logger, save_final_checkpoint=True, **changes)
                tiny.run(cfg, tiny.hooked_transformer(), tiny.tokens())
                report[f"{architecture}, {name}"] = {"losses": digest(losses), **files(Path(folder))}
    return report


def wide_runs() -> dict[str, Any]:
    """Steps with enough features for screens, grouped top-k and compiled loops."""
    report = {}
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0] * torch.logspace(0, -3, 96)
    for architecture in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        for name in ("both", "initializer"):
            data = torch.Generator().manual_seed(2)
            batches = (torch.randn(512, 96, generator=data) @ basis.T + 0.3 for _ in range(60))
            torch.manual_seed(1)
            with losses_recorded() as losses:
                trainer = tiny.trainer(
                    architecture, batches, 30, d_in=96, d_sae=4096, k=16, aux_loss_coefficient=0.03,
                    dead_feature_window=5, **{**FLAGS[name], "initializer": asi.ActiveSubspaceInit(n_tokens=1024)},
                    **({"matryoshka_widths": [512, 4096]} if architecture.startswith("matryoshka") else {}),
                )  # fmt: skip
                sae = trainer.fit()
            report[f"{architecture}, {name}"] = {"losses": digest(losses), "weights": digest(dict(sae.state_dict()))}
    return report


def library() -> dict[str, Any]:
    """Spectra, decomposition, loss by components, evaluation, autopsy and Lorsa on a tiny Llama."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder, inside(folder):
        tiny.save_llama(Path("tiny_llama"))
        model = TransformerBridge.boot_transformers("tiny_llama", device="cpu", dtype=torch.float32)
    tokens = torch.tensor(tiny.tokens(64)["tokens"])
    hooks = ["blocks.*.hook_attn_out", "blocks.1.attn.hook_z"]
    spectra = asi.activation_spectra(model, tokens, hooks, n_tokens=700, progress=False)
    parts = asi.decompose_attention_output(model, tokens, 1)
    losses = asi.loss_recovered(model, tokens[:8], "blocks.1.hook_attn_out", [2, 8])
    torch.manual_seed(0)
    sae = tiny.training_sae("topk")
    evaluation = asi.evaluate(sae, model, tokens, hook_name="blocks.1.hook_attn_out", loss_tokens=64, progress=False)
    x = tiny.activations(2000)
    found = asi.autopsy(sae, x, n_sample=500, progress=False)
    lorsa = lo.Lorsa.from_attention(model, 1, n_ov_heads=64, k=8, n_ctx=16)
    data = lo.CachedSequences.collect(model, 1, tokens)
    done = lo.initialize_lorsa_(lorsa, lo.read_attention(model, 1), lo.batches(data, 8), lo.LorsaInit())
    with tempfile.TemporaryDirectory() as out:
        lo.train_lorsa(lorsa, data, lo.LorsaTraining(steps=30, checkpoint_every=10), out=out, progress=False)
        run = files(Path(out))
    return {
        "spectra": {name: digest([s.mean, s.covariance, s.n_tokens]) for name, s in spectra.items()},
        "decomposition": digest([parts.variance, parts.head_share, parts.identity_error]),
        "components": digest([losses.clean, losses.zero, losses.mean, losses.components[2], losses.components[8]]),
        "evaluation": digest(json.dumps(evaluation.to_dict(), sort_keys=True)),
        "autopsy": digest(json.dumps(found.to_dict(), sort_keys=True)),
        "lorsa": {"initialization": digest([done.d_init, done.norm, done.initial_nmse]), **run},
    }


def commands() -> dict[str, Any]:
    """What the commands write, on a tiny model and text by name."""
    report = {}
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        tiny.save_llama(Path("tiny_llama"))
        Path("documents").mkdir()
        tiny.save_text(Path("documents"), 60, 120)
        source = ["--model", "./tiny_llama", "--dataset", "./documents"]
        window = ["--context-size", "16"]
        demo = ["demo", *source, "--d-sae", "64", "--k", "4", "--training-tokens", "8192", "--held-out-tokens", "600"]
        demo += ["--loss-tokens", "64"] if TOKENS else ["--loss-windows", "4"]
        calls = {
            "demo": [
                *demo,
                *window,
                *(("--loss-tokens", "64") if TOKENS else ("--loss-windows", "4")),
                "--out",
                "demo",
            ],
            "spectrum": ["spectrum", *source, *window, "--n-tokens", "900", "--loss-tokens", "64", "--out", "spectrum"],
            "evaluate": ["evaluate", "demo", *source, "--n-tokens", "500", "--loss-tokens", "64", "--out", "evaluate"],
            "autopsy": ["autopsy", "demo/stock", *source, "--n-tokens", "900", "--n-sample", "300", "--out", "autopsy"],
            "sweep": [
                *("sweep", *source, *window, "--d-sae", "48", "64", "--k", "4", "--cached-tokens", "2000"),
                *("--held-out-tokens", "400", "--training-tokens", "2048", "--batch-size", "128", "--out", "sweep"),
            ],
            "lorsa": [
                *("lorsa", "train", *source, *window, "--n-ov-heads", "64", "--k", "8", "--steps", "20"),
                *("--lr-warm-up-steps", "4", "--n-sequences", "64"),
                *(("--held-out-tokens", "256") if TOKENS else ("--held-out-sequences", "16")),
                *(("--loss-tokens", "64") if TOKENS else ("--loss-sequences", "4")),
                *("--out", "lorsa"),
            ],
        }
        for name, call in calls.items():
            torch.manual_seed(0)
            cli.main(call)
            report[name] = files(Path(folder) / name)
    return report


def main() -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        report = {"runner": runner_runs(), "wide": wide_runs(), "library": library(), "commands": commands()}
    print(json.dumps(report, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
