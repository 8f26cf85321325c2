"""Whether the features that a cure revives are worth having: how redundant, how dense, what they carry and know.

    python -m benchmarks.claims.worth                     # the SAEs that the plan's comparison kept
    python -m benchmarks.claims.worth --sweep d_sae       # those that a sweep kept (--save-saes)
    python -m benchmarks.claims.worth --sae topk=FOLDER "topk seed 1"=FOLDER asi_sparse_adam=FOLDER --baseline topk

Each SAE is two lines of results/claims/worth.jsonl as soon as it is measured, beside one for what all are compared on
and one for each control. The same command goes on where it stopped, and several processes share the work.

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
from collections.abc import Callable, Iterable, Mapping
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
from benchmarks.claims.dictionaries import Dictionary, Record, added_features, carried, novelty, parts, shape
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
from benchmarks.claims.records import append, lines, taken
from benchmarks.claims.rivals import RIVALS
from benchmarks.claims.sae_bench_probing import Classes, sae_bench_scores
from benchmarks.claims.sources import CACHE, MAIN, activations
from benchmarks.claims.train import sae_folder as planned_folder
from saelens_asi.activations.cache import cache_activations
from saelens_asi.activations.hooks import HookedModel
from saelens_asi.activations.loading import load_documents, load_model
from saelens_asi.evaluation.reconstruction import chunk_size
from saelens_asi.resume import differences
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


@dataclass(frozen=True)
class Lines:
    """The file of what is measured: a line for what all are compared on, two for each SAE, one for each control.

    Attributes:
        path: of JSON, line by line.
        settings: of everything in it.
    """

    path: Path
    settings: Record

    def check(self) -> None:
        """Raise ValueError for a file with other settings."""
        found = [line["settings"] for line in self.read() if line["what"] == "all"]
        if found and found[0] != _rounded(self.settings):
            changed = differences(found[0], _rounded(self.settings))
            raise ValueError(f"{self.path} holds what was measured with other settings ({changed}): give another --out")

    def read(self) -> list[Record]:
        return lines(self.path) if self.path.exists() else []

    def add(self, what: str, name: str, measure: Callable[[], Record]) -> None:
        """Measure what is not there, unless another process is about it."""
        with taken({"file": self.path.name, **self.settings, "what": what, "name": name}) as mine:
            if mine and not any((line["what"], line["name"]) == (what, name) for line in self.read()):
                append(self.path, _rounded({"what": what, "name": name, **measure()}))


def worth(
    folders: Mapping[str, Path],
    baseline: str,
    text: Text,
    sizes: Sizes,
    out: Path,
    source: Mapping[str, str] | None = None,
) -> list[Record]:
    """The lines of each SAE, and of what they are compared with; ``out`` has each when it is measured.

    Args:
        folders: of the SAEs, by name.
        baseline: which of them the others are compared with.
        text: what they are looked at with.
        sizes: how much.
        out: a file of JSON, line by line; what it has is not measured again.
        source: names of model and text, for the record.

    Raises:
        ValueError: where the baseline is not among the SAEs, or ``out`` was measured with other settings.
    """
    if baseline not in folders:
        raise ValueError(f"baseline={baseline!r} is not among the SAEs {list(folders)}")
    place = {"baseline": baseline, "hook_name": text.hook_name, "context_size": text.context}
    known = Lines(out, {**(source or {}), **asdict(sizes), **place})
    known.check()
    compared = Compared(folders, baseline, text, sizes)
    known.add("all", "", lambda: {"settings": known.settings, **compared.raw()})
    for name in folders:
        known.add("sae", name, functools.partial(compared.measured, name))
        known.add("sae_bench", name, functools.partial(compared.in_sae_bench, name))
    for d_sae, k in {(sae.cfg.d_sae, int(getattr(sae.cfg, "k", 32))) for sae in map(compared.sae, folders)}:
        known.add("control", f"d_sae={d_sae}, k={k}", functools.partial(compared.control, d_sae, k))
    return known.read()


def _rounded(value: Any) -> Any:
    """With five significant digits: more than intervals allow. Tuples become the lists that JSON has."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclass(frozen=True, eq=False)
class Compared:
    """SAEs beside one of them, on one text.

    Attributes:
        folders: by name.
        baseline: name of that one.
        text: what they are looked at with.
        sizes: how much.
    """

    folders: Mapping[str, Path]
    baseline: str
    text: Text
    sizes: Sizes

    def sae(self, name: str) -> SAE:
        return SAE.load_from_disk(self.folders[name])

    @functools.cached_property
    def beside(self) -> Dictionary:
        """The baseline."""
        return Dictionary.load(self.folders[self.baseline], self.text.activations)

    @functools.cached_property
    def scores_beside(self) -> Scores:
        """Of probes on the baseline."""
        _, added = added_features(self.beside, self.beside)
        return self._scores(self.beside, added)

    def measured(self, name: str) -> Record:
        """Geometry, firings, what parts carry, and what features know."""
        is_baseline = name == self.baseline
        dictionary = self.beside if is_baseline else Dictionary.load(self.folders[name], self.text.activations)
        print(f"{name}: {len(dictionary.live):,} live features of {len(dictionary.counts):,}", flush=True)
        new, added = novelty(dictionary, self.beside)
        scores = self.scores_beside if is_baseline else self._scores(dictionary, added)
        return {
            "folder": self.folders[name].name,
            **shape(dictionary, len(self.beside.live), self.sizes.sampled),
            "beside_baseline": new,
            "carried": self._carried(dictionary, added),
            "probing": summary(scores, None if is_baseline else self.scores_beside),
        }

    def raw(self) -> Record:
        """What dimensions of the activations know."""
        dimensions = csr_array(self.text.probed.float().numpy())
        scores = probe_all(dimensions, self.text.told_apart, probe_raw, self.sizes.splits, self.sizes.most)
        return {"raw_activations": summary(scores)}

    def control(self, d_sae: int, k: int) -> Record:
        """What random directions know."""
        encode = random_dictionary(self.text.activations.float().mean(dim=0), d_sae, k)
        activations = encoded(encode, self.text.probed, max(1, 2**25 // d_sae))
        return {"probing": summary(self._probed(activations, {"best": np.arange(d_sae)}))}

    def in_sae_bench(self, name: str) -> Record:
        """SAEBench's own probes on the same text; why not, where it is not installed."""
        try:
            return {"scores": sae_bench_scores(self.sae(name), self._classes)}
        except ImportError as error:
            return {"left_out": str(error)}

    @functools.cached_property
    def _classes(self) -> Mapping[str, Classes]:
        return {
            kind: Classes.of(self.text.probed, examples, self.sizes.most)
            for kind, examples in self.text.told_apart.items()
        }

    def _carried(self, dictionary: Dictionary, added: Tensor) -> Record:
        return carried(
            parts(dictionary, added, self.sizes.draws), self.text.model, self.text.held_out,
            hook_name=self.text.hook_name, n_tokens=self.sizes.part_tokens, loss_tokens=self.sizes.loss_tokens,
            context_size=self.text.context,
        )  # fmt: skip

    def _scores(self, dictionary: Dictionary, added: Tensor) -> Scores:
        sae, live = dictionary.sae, dictionary.live
        others = live[~torch.isin(live, added)]
        sets = {"best": np.arange(sae.cfg.d_sae), "best of added": added.numpy(), "best of others": others.numpy()}
        return self._probed(encoded(sae.encode, self.text.probed, chunk_size(sae)), sets)

    def _probed(self, activations: csr_array, sets: Mapping[str, np.ndarray]) -> Scores:
        probe = probe_features(sets)
        return probe_all(activations, self.text.told_apart, probe, self.sizes.splits, self.sizes.most)


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
