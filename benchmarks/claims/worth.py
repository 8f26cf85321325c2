"""Whether the features that a cure revives are worth having: how redundant, how dense, what they carry and know.

    python -m benchmarks.claims.worth                     # the SAEs that the plan's comparison kept
    python -m benchmarks.claims.worth --sweep d_sae       # those that a sweep kept (--save-saes)
    python -m benchmarks.claims.worth --sae topk=FOLDER "topk seed 1"=FOLDER asi_sparse_adam=FOLDER --baseline topk

Writes results/claims/worth.jsonl anew after each SAE: a line for what all are compared on, one for each SAE, and one
for each control.

Which features of an SAE are those that it has and the baseline lacks? Where both started from the same directions (one
seed, one subspace), feature i of one is feature i of the other: those that live here and are dead there. Elsewhere
features do not correspond: hardly one of a short run is found in another seed of itself. There each live feature of the
baseline takes the feature that is nearest to it, one each, and *added* are those that are left: as many as the SAE has
more, those that are least like any of the baseline's. Shares of features without a counterpart at a cosine of 0.5 and
0.7 stand beside them; a second seed of the baseline shows what these are without any cure.

Where sae-bench is installed (``benchmarks.claims.sae_bench_probing`` says how), its own sparse probing runs too.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from scipy.sparse import csr_array
from torch import Tensor

from benchmarks.claims import tasks
from benchmarks.claims.dictionaries import Dictionary, Record, carried, novelty, parts, shape
from benchmarks.claims.evidence import RESULTS, chosen_rates
from benchmarks.claims.grid import HOOK
from benchmarks.claims.knowledge import (
    Scores,
    encoded,
    probe_all,
    probe_features,
    probe_raw,
    random_dictionary,
    summary,
)
from benchmarks.claims.plan import BASELINE, items
from benchmarks.claims.probes import Examples
from benchmarks.claims.rivals import RIVALS
from benchmarks.claims.sae_bench_probing import sae_bench_scores
from benchmarks.claims.sources import CACHE, MAIN, activations
from benchmarks.claims.train import sae_folder as planned_folder
from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.hooks import HookedModel
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.evaluation.reconstruction import chunk_size
from saelens_asi.resume import written_whole
from saelens_asi.sweep import read_sweep
from saelens_asi.sweep.cells import cell_of
from saelens_asi.sweep.run import sae_folder


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        held_out: activations by which features count as live.
        sampled: features whose largest cosine is looked for.
        part_tokens: tokens of text on which parts of a dictionary reconstruct.
        loss_tokens: of these, tokens on which predictions are compared.
        draws: random parts of each size.
        splits: of the documents, for the probes.
        most: examples of a class to fit on, and to test on.
        text: that is probed.
    """

    held_out: int = 200_000
    sampled: int = 8192
    part_tokens: int = 16_384
    loss_tokens: int = 4096
    draws: int = 2
    splits: int = 5
    most: tuple[int, int] = (500, 250)
    text: tasks.TextSizes = field(default_factory=tasks.TextSizes)


@dataclass(frozen=True, eq=False)
class Text:
    """What SAEs of one hook are looked at with.

    Attributes:
        model: a TransformerBridge.
        held_out: documents for the predictions.
        activations: (n, d) held-out ones.
        probed: (n_tokens, d) activations of the text that is told apart.
        told_apart: examples made of these, by kind.
        hook_name: where all this is read.
        context: tokens in a window.
    """

    model: HookedModel
    held_out: Any
    activations: Tensor
    probed: Tensor
    told_apart: Mapping[str, Examples]
    hook_name: str
    context: int = 128


def worth(
    folders: Mapping[str, Path],
    baseline: str,
    text: Text,
    sizes: Sizes,
    out: Path | None = None,
    source: Mapping[str, str] | None = None,
) -> Record:
    """The record of each SAE by method, and of what they are compared with; written to ``out`` after each.

    Args:
        folders: of the SAEs, by name.
        baseline: which of them the others are compared with.
        text: what they are looked at with.
        sizes: how much.
        out: a file of JSON, line by line.
        source: names of model and text, for the record.

    Raises:
        ValueError: where the baseline is not among the SAEs.
    """
    if baseline not in folders:
        raise ValueError(f"baseline={baseline!r} is not among the SAEs {list(folders)}")
    loaded = {name: Dictionary.load(folder, text.activations) for name, folder in folders.items()}
    fewest = min(len(one.live) for one in loaded.values())
    raw = summary(
        probe_all(csr_array(text.probed.float().numpy()), text.told_apart, probe_raw, sizes.splits, sizes.most)
    )
    place = {"baseline": baseline, "hook_name": text.hook_name, "context_size": text.context}
    settings = {**(source or {}), **asdict(sizes), **place}
    result: Record = {"settings": settings, "raw_activations": raw, "random_dictionary": {}, "methods": {}}
    control = functools.cache(lambda d_sae, k: _control(text, sizes, d_sae, k))
    scores: dict[str, Scores] = {}
    for name in sorted(loaded, key=lambda one: one != baseline):  # what the others are compared with comes first
        dictionary = loaded[name]
        print(f"{name}: {len(dictionary.live):,} live features of {len(dictionary.counts):,}", flush=True)
        new, added = novelty(dictionary, loaded[baseline])
        scores[name] = _scores_of(dictionary, added, text, sizes)
        result["methods"][name] = {
            "folder": folders[name].name,
            **shape(dictionary, fewest, sizes.sampled),
            "beside_baseline": new,
            "carried": _carried(dictionary, added, text, sizes),
            "probing": summary(scores[name], None if name == baseline else scores[baseline]),
        }
        d_sae, k = dictionary.sae.cfg.d_sae, int(getattr(dictionary.sae.cfg, "k", 32))
        result["random_dictionary"][f"d_sae={d_sae}, k={k}"] = control(d_sae, k)
        _write(result, out)
    result["sae_bench"] = _sae_bench({name: one.sae for name, one in loaded.items()}, text, sizes)
    _write(result, out)
    return result


def _write(result: Record, out: Path | None) -> None:
    if out is not None:
        with written_whole(out) as unfinished:
            unfinished.write_text("".join(json.dumps(_rounded(line)) + "\n" for line in as_lines(result)))


def as_lines(result: Record) -> list[Record]:
    """The record as lines of its file, each with what it is of: all, an sae, or a control."""
    lines = [{"what": "all", **{name: result[name] for name in ("settings", "raw_activations")}}]
    lines += [{"what": "sae", "name": name, **of} for name, of in result["methods"].items()]
    lines += [{"what": "control", "name": name, "probing": of} for name, of in result["random_dictionary"].items()]
    return [*lines, *([{"what": "sae_bench", "scores": result["sae_bench"]}] if "sae_bench" in result else [])]


def _rounded(value: Any) -> Any:
    """With five significant digits: more than intervals allow."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _sae_bench(saes: Mapping[str, SAE], text: Text, sizes: Sizes) -> Record:
    """SAEBench's own probes on the same text; why not, where it is not installed."""
    try:
        return {**sae_bench_scores(saes, text.probed, text.told_apart, sizes.most)}
    except ImportError as error:
        return {"left_out": str(error)}


def _carried(dictionary: Dictionary, added: Tensor, text: Text, sizes: Sizes) -> Record:
    return carried(
        parts(dictionary, added, sizes.draws), text.model, text.held_out, hook_name=text.hook_name,
        n_tokens=sizes.part_tokens, loss_tokens=sizes.loss_tokens, context_size=text.context,
    )  # fmt: skip


def _scores_of(dictionary: Dictionary, added: Tensor, text: Text, sizes: Sizes) -> Scores:
    sae, live = dictionary.sae, dictionary.live
    others = live[~torch.isin(live, added)]
    candidates = {"best": np.arange(sae.cfg.d_sae), "best of added": added.numpy(), "best of others": others.numpy()}
    activations = encoded(sae.encode, text.probed, chunk_size(sae))
    return probe_all(activations, text.told_apart, probe_features(candidates), sizes.splits, sizes.most)


def _control(text: Text, sizes: Sizes, d_sae: int, k: int) -> Record:
    encode = random_dictionary(text.activations.float().mean(dim=0), d_sae, k)
    activations = encoded(encode, text.probed, max(1, 2**25 // d_sae))
    probe = probe_features({"best": np.arange(d_sae)})
    return summary(probe_all(activations, text.told_apart, probe, sizes.splits, sizes.most))


def saved_saes(sweep: Path, hook_name: str, d_sae: int, baseline: str) -> dict[str, Path]:
    """Folders of the SAEs that a sweep kept: of each method at its chosen rate the first seed, of the baseline two.

    Raises:
        ValueError: where two of them have one name, or none was kept.
    """
    rows = [row for row in read_sweep(sweep) if (row["hook_name"], row["d_sae"]) == (hook_name, d_sae)]
    found: dict[str, Path] = {}
    for row in chosen_rates(rows):
        name = row["method"] if row["seed"] == 0 else f"{row['method']} seed {row['seed']}"
        folder = sae_folder(sweep, cell_of(row), hook_name)
        if name in found:
            raise ValueError(f"{sweep} has several cells of {name} at d_sae={d_sae}: name folders with --sae")
        if (row["seed"] == 0 or name == f"{baseline} seed 1") and folder.exists():
            found[name] = folder
    if not found:
        raise ValueError(f"{sweep} kept no SAE of {d_sae} features on {hook_name}: train it with --save-saes")
    return found


def planned_saes(parts: Iterable[str]) -> dict[str, Path]:
    """Folders of the SAEs that parts of the plan kept, by contender, and by its seed where that is not the first.

    Raises:
        ValueError: where none was kept.
    """
    found = {}
    for item in items(parts):
        folder = planned_folder(item)
        if item.save and folder.exists():
            name = RIVALS[item.contender].title if item.contender in RIVALS else item.contender
            found[name if not item.cell.seed else f"{name}, seed {item.cell.seed}"] = folder
    if not found:
        raise ValueError(f"{', '.join(parts)} kept no SAE: python -m benchmarks.claims.train {' '.join(parts)}")
    return found


def read_text(model_name: str, dataset: str, hook_name: str, given: Tensor | None, context: int, sizes: Sizes) -> Text:
    """Model, documents and activations; these are cached beside those of the sweeps.

    Args:
        model_name: of ``load_model``.
        dataset: of ``load_documents``.
        hook_name: where activations are read.
        given: (n, d) held-out activations that are cached; they are read anew unless told.
        context: tokens in a window.
        sizes: how much.
    """
    model = load_model(model_name)
    _, held_out = load_documents(dataset, 4 * sizes.held_out)
    tokens, told_apart = tasks.probed_text(model.tokenizer, sizes.text)
    read = functools.partial(cache_activations, model=model, hook_names=hook_name, dtype="float16")
    own = f"{model_name}_{hook_name}".replace(".", "_")
    (probed,) = read(
        CACHE / f"{own}_{len(tokens)}_probed", data=tokens, n_tokens=tokens.numel(), exclude_special_tokens=False,
        context_size=sizes.text.length,
    ).values()  # fmt: skip
    if given is not None:
        activations = given[: sizes.held_out]
    else:
        folder = CACHE / f"{own}_{dataset}_{sizes.held_out}_worth"
        (activations,) = read(folder, data=held_out, n_tokens=sizes.held_out, context_size=context).values()
    return Text(model, held_out, activations, probed, told_apart, hook_name, context)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["factorial", "rivals"], help="of the plan, whose SAEs are read")
    parser.add_argument("--sweeps", type=Path, default=RESULTS / "claims", help="folder of the sweeps' folders")
    parser.add_argument("--sweep", help="whose SAEs are read instead")
    parser.add_argument("--d-sae", type=int, default=8192, help="of a sweep's")
    parser.add_argument("--sae", nargs="*", default=[], metavar="NAME=FOLDER", help="SAEs instead of both")
    parser.add_argument("--baseline", help="unless told TopK as the paper starts it")
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--model", help="the sweep's unless told, or smollm2")
    parser.add_argument("--dataset", help="the sweep's unless told, or linux-doc")
    parser.add_argument("--held-out", type=Path, metavar="FILE.npy", help="held-out activations that are cached")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims" / "worth.jsonl")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (one.partition("=") for one in args.sae)}
    missing = [str(folder) for folder in folders.values() if not (folder / SAE_CFG_FILENAME).exists()]
    if missing:
        parser.error(f"--sae takes NAME=FOLDER of an SAE, and there is none in {', '.join(missing)}")
    source: Record = {"model": "smollm2", "dataset": "linux-doc", "context_size": 128}
    baseline = args.baseline or ("topk" if args.sweep or folders else BASELINE)
    if args.sweep and not folders:
        folders = saved_saes(args.sweeps / args.sweep, args.hook, args.d_sae, baseline)
        source |= json.loads((args.sweeps / args.sweep / "sweep.json").read_text())
    source |= {name: value for name in ("model", "dataset") if (value := getattr(args, name))}
    held_out = torch.from_numpy(np.load(args.held_out, mmap_mode="c")) if args.held_out else None
    if not folders:
        folders = planned_saes(args.parts)
        held_out = activations(MAIN, args.hook)[1] if held_out is None else held_out
    sizes = Sizes()
    text = read_text(source["model"], source["dataset"], args.hook, held_out, source["context_size"], sizes)
    about = {"model": source["model"], "dataset": source["dataset"]}
    worth(folders, baseline, text, sizes, args.out, about)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
