"""What is said of revived features: each measure finds what was planted, and does not find what was not."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import SAE
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from benchmarks.claims import dictionaries, features, plan, probes, records, sae_bench_probing, tasks, worth
from benchmarks.claims.sae_bench_probing import Classes
from saelens_asi.sweep import METHODS, Cell
from saelens_asi.sweep.cells import SweepStore
from saelens_asi.sweep.run import sae_folder
from tests.helpers import tiny


def random_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def inference_sae(architecture: str, tmp_path, d_sae: int = 48) -> SAE:
    """With weights at random, saved and loaded as a sweep does."""
    sae = tiny.training_sae(architecture, d_sae=d_sae)
    with torch.no_grad():
        for i, weights in enumerate(sae.parameters()):
            weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(i)).abs() ** 0.5)
        sae.W_enc.copy_(random_rows(*sae.W_enc.shape, seed=8))
        sae.W_dec.copy_(random_rows(*sae.W_dec.shape, seed=9))
    sae.cfg.metadata.hook_name = tiny.ATTN_OUT
    sae.save_inference_model(str(tmp_path))
    return SAE.load_from_disk(tmp_path)


# ---- geometry and firings


def test_duplicates_are_found_and_nothing_is_its_own():
    rows = random_rows(40, 64)
    planted = torch.cat([rows, 3 * rows[:6] + 0.01 * random_rows(6, 64, seed=1)])
    assert features.redundancy(planted, sample=1000)["above_0.9"] == pytest.approx(12 / 46)
    assert features.redundancy(rows, sample=1000)["above_0.9"] == 0
    assert features.redundancy(rows, sample=1000)["quantile_0.99"] < 0.8


def test_opposite_directions_are_no_duplicates():
    row = random_rows(1, 64)
    assert features.redundancy(torch.cat([row, -row]), sample=9)["quantile_0.5"] == pytest.approx(-1)


def test_cosines_in_blocks_are_those_of_the_whole(monkeypatch):
    rows, others = random_rows(30, 8), random_rows(50, 8, seed=1)
    whole = (normalize(rows, dim=1) @ normalize(others, dim=1).T).amax(dim=1)
    monkeypatch.setattr(features, "_BLOCK", 7 * 50)
    torch.testing.assert_close(features.largest_cosines(rows, others), whole)
    others_of = features.largest_cosines(others, others, torch.arange(50))
    torch.testing.assert_close(features.nearest_others(others), others_of)
    assert features.nearest_others(others[:1]).tolist() == [-math.inf]


def test_redundancy_falls_with_the_number_it_is_counted_among():
    rows = random_rows(400, 8)
    among = [features.redundancy(rows, 100, among=n)["quantile_0.5"] for n in (20, 100, 400)]
    assert among == sorted(among)
    assert features.redundancy(rows, 100, among=20)["features"] == 20


def test_effective_features_are_those_that_share_the_firings():
    counts = torch.tensor([100] * 8 + [0] * 5)
    assert features.density(counts, 1000)["effective_features"] == pytest.approx(8)
    assert features.density(counts, 1000)["log10_rate_0.5"] == pytest.approx(-1)
    counts[0] = 1_000_000
    assert features.density(counts, 1_000_000)["effective_features"] < 1.1


# ---- which are added, and what a part carries


def dictionary(rows: torch.Tensor, counts: torch.Tensor) -> dictionaries.Dictionary:
    return dictionaries.Dictionary(SimpleNamespace(W_dec=rows), counts, {"n_tokens": 100})


def test_every_feature_of_the_baseline_takes_the_one_it_became():
    rows = random_rows(20, 64)
    ours = torch.cat([random_rows(10, 64, seed=2), 2 * rows + 0.1 * random_rows(20, 64, seed=1)])
    assert features.unmatched(ours, rows).nonzero().squeeze(1).tolist() == list(range(10))
    assert not features.unmatched(rows, ours).any()
    assert features.unmatched(ours, rows[:0]).all()


def test_pairs_are_taken_in_the_order_of_their_cosines(monkeypatch):
    rows, others = random_rows(40, 6), random_rows(25, 6, seed=1)
    cosines = normalize(rows, dim=1) @ normalize(others, dim=1).T
    left = torch.ones(40, dtype=torch.bool)
    for _ in range(25):
        row, other = divmod(int(cosines.argmax()), 25)
        cosines[row], cosines[:, other], left[row] = -9, -9, False
    monkeypatch.setattr(features, "_BLOCK", 7 * 40)
    assert features.unmatched(rows, others).equal(left)


def test_features_are_matched_among_live_ones_alone():
    rows = random_rows(20, 64)
    ours = torch.cat([2 * rows + 0.1 * random_rows(20, 64, seed=1), random_rows(10, 64, seed=2)]).flip(0)
    baseline = dictionary(rows, torch.tensor([5] * 15 + [0] * 5))
    counts = torch.ones(30, dtype=torch.long)
    counts[0] = 0
    counts[3] = 29
    record, added = dictionaries.novelty(dictionary(ours, counts), baseline)
    # Features 10 to 14 have a counterpart that is dead, 1 to 9 have none, 0 is dead itself.
    assert added.tolist() == list(range(1, 15))
    assert (record["told_by"], record["added"]) == ("match", 14)
    assert record["share_of_live"] == pytest.approx(14 / 29)
    assert record["share_of_firings"] == pytest.approx((13 + 29) / (28 + 29))
    assert record["without_counterpart_0.7"] == pytest.approx(14 / 29)
    assert record["baseline_without_counterpart_0.7"] == 0


def test_after_one_start_features_go_by_their_numbers():
    rows = random_rows(30, 64)
    ours = dictionary(rows + 0.5 * random_rows(30, 64, seed=1), torch.tensor([1] * 25 + [0] * 5))
    baseline = dictionary(rows, torch.tensor([0] * 5 + [1] * 15 + [0] * 5 + [1] * 5))
    told_by, added = dictionaries.added_features(ours, baseline)
    assert told_by == "number"
    assert added.tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]


def test_a_dictionary_adds_nothing_to_itself():
    one = dictionary(random_rows(20, 64), torch.ones(20, dtype=torch.long))
    record, added = dictionaries.novelty(one, one)
    assert not len(added)
    assert record["baseline_without_counterpart_0.5"] == 0


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "batchtopk"])
def test_a_part_chooses_among_its_own_features_alone(architecture, tmp_path):
    sae, x = inference_sae(architecture, tmp_path), random_rows(200, tiny.D_MODEL, seed=3)
    kept = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29])
    part = features.restricted(sae, kept)
    hidden = SAE.load_from_disk(tmp_path)
    others = torch.ones(48, dtype=torch.bool).index_fill(0, kept, False)
    # What is never chosen: pre-activations of 0 for magnitudes, of minus infinity for values.
    hidden.W_enc.data[:, others] = 0
    hidden.b_enc.data[others] = 0 if architecture == "abstopk" else -1e9
    expected, acts = hidden.encode(x), part.encode(x)
    assert not expected[:, others].any()
    torch.testing.assert_close(acts, expected[:, kept])
    torch.testing.assert_close(part.decode(acts), hidden.decode(expected))
    assert (acts != sae.encode(x)[:, kept]).any() or architecture in ("jumprelu", "batchtopk")
    if architecture == "topk":
        assert int((acts != 0).sum(dim=1).max()) == sae.cfg.k


def test_a_part_smaller_than_k_uses_all_it_has(tmp_path):
    part = features.restricted(inference_sae("topk", tmp_path), torch.tensor([4, 9]))
    assert part.cfg.k == 2
    part.encode(random_rows(10, tiny.D_MODEL))


def test_all_features_are_the_sae_and_none_its_bias(tmp_path):
    sae, x = inference_sae("topk", tmp_path), random_rows(20, tiny.D_MODEL, seed=3)
    torch.testing.assert_close(features.restricted(sae, torch.arange(48))(x), sae(x))
    torch.testing.assert_close(features.silent(sae)(x), sae.b_dec.expand(20, -1))
    assert (sae.encode(x) != 0).any()


def test_what_cannot_be_restricted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one feature"):
        features.restricted(inference_sae("topk", tmp_path), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="gated SAEs cannot be restricted"):
        features.restricted(tiny.training_sae("gated"), torch.tensor([1]))


# ---- probes


def planted_examples(informative: bool, seed: int = 0) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """60 documents of 10 rows; of 40 sparse columns the one numbered 17 is larger in the class."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(60), 10)
    labels = (documents % 2).astype(np.int8)
    x = rng.random((600, 40)) * (rng.random((600, 40)) < 0.2)
    x[:, 3] *= 100  # large, and means nothing
    if informative:
        x[:, 17] = 0.1 * rng.random(600) + labels
    return csr_array(x), labels, documents


def test_the_probe_picks_the_feature_that_knows():
    x, labels, documents = planted_examples(informative=True)
    rows = probes.split(labels, documents, (500, 250), seed=0)
    score, picked = probes.sparse_probe(x, labels, rows, 1, np.arange(40))
    assert picked.tolist() == [17]
    assert score == (1, 1)
    without, picked = probes.sparse_probe(x, labels, rows, 5, np.delete(np.arange(40), 17))
    assert 17 not in picked
    assert without.auc < 0.7


def test_no_probe_knows_what_nothing_says():
    x, labels, documents = planted_examples(informative=False)
    aucs = []
    for seed in range(4):
        rows = probes.split(labels, documents, (500, 250), seed)
        aucs += [probes.sparse_probe(x, labels, rows, 5, np.arange(40))[0].auc]
        aucs += [
            probes.dense_probe(x, labels, documents, rows, seed).auc,
            probes.random_probe(x, labels, rows, 5, 0).auc,
        ]
    assert abs(np.mean(aucs) - 0.5) < 0.05


def test_the_dense_probe_finds_what_many_columns_say_together():
    x, labels, documents = planted_examples(informative=False)
    many = x.toarray() + 0.15 * labels[:, None] * np.r_[np.zeros(10), np.ones(30)]
    rows = probes.split(labels, documents, (500, 250), seed=0)
    dense = probes.dense_probe(csr_array(many), labels, documents, rows, seed=0)
    assert dense.auc > 0.95
    assert probes.sparse_probe(csr_array(many), labels, rows, 1, np.arange(40))[0].auc < dense.auc - 0.1


def test_no_document_is_on_both_sides_and_classes_are_balanced():
    documents = np.repeat(np.arange(30), 7)
    labels = np.where(documents < 6, 1, 0)
    labels[::5] = -1
    rows = probes.split(labels, documents, (20, 250), seed=1)
    assert not {*documents[rows.train]} & {*documents[rows.test]}
    for part in rows:
        assert np.mean(labels[part]) == 0.5
        assert len({*part.tolist()}) == len(part)
    assert len(rows.train) == 40
    with pytest.raises(ValueError, match="give more documents"):
        probes.split(np.ones(210, dtype=int), documents, (20, 20), seed=0)


def test_the_fit_is_where_the_penalized_loss_has_no_slope():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), (rng.random(200) < 0.4).astype(int)
    weights, bias = probes.fit(x, y, penalty=2.0)
    left = 1 / (1 + np.exp(-(x @ weights + bias))) - y
    np.testing.assert_allclose(x.T @ left + 2.0 * weights, 0, atol=1e-2)
    assert abs(left.sum()) < 1e-2
    assert np.linalg.norm(probes.fit(x, y, penalty=200.0)[0]) < np.linalg.norm(weights)


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    logits, y = rng.integers(-3, 4, 40).astype(float), rng.integers(0, 2, 40)
    pairs = logits[y == 1][:, None] - logits[y == 0]
    assert probes.score(logits, y).auc == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def test_the_interval_of_splits_is_wider_than_that_of_independent_values():
    values = [0.1, 0.2, 0.3, 0.4]
    found = probes.interval(values)
    naive = 3.182 * np.std(values, ddof=1) / 2
    assert found["mean"] == pytest.approx(0.25)
    assert found["plus_minus"] == pytest.approx(naive * np.sqrt(1 + 4 * 3 / 7), rel=1e-3)


# ---- classes that text gives


class Words:
    """A tokenizer of words and signs, each with the space in front of it, as models' are."""

    bos_token_id = 1

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        spans = [match.span() for match in re.finditer(r"\s*(\w+|[^\w\s]+)", text)]
        ids = [2 + (end - start) for start, end in spans]
        return SimpleNamespace(input_ids=ids, offset_mapping=spans)


CODE = 'def add(a, b):  # sum of both\n    return a + 12\n\nx = "if a: b"'


def test_python_tokens_have_the_class_that_the_tokenizer_says():
    windows = tasks.Windows.cut({5: CODE}, Words(), length=24, per_document=1)
    classes = tasks.classes_of_tokens(windows, {5: CODE})[0]
    words = [CODE[start:end].strip() for start, end in windows.spans[0]]
    named = {word: (("none", *tasks.PYTHON_CLASSES)[number]) for word, number in zip(words, classes, strict=True)}
    assert {named[word] for word in ("def", "return")} == {"keyword"}
    assert {named[word] for word in ("add", "x")} == {"identifier"}
    assert {named[word] for word in ("sum", "of", "both", "#")} == {"comment"}
    assert named["12"] == "number"
    assert {named[word] for word in ("+", "=", "):")} == {"operator"}
    assert {named[word] for word in ("if", ":")} == {"string"}  # in quotes


def test_a_token_of_two_classes_and_code_that_is_none_have_no_class():
    text = "a['k'] + b # c d e f"
    windows = tasks.Windows.cut({0: text}, Words(), length=5, per_document=1)
    classes = tasks.classes_of_tokens(windows, {0: text})
    assert "['" in [text[start:end] for start, end in windows.spans[0]]
    assert classes[0].tolist()[:3] == [2, 0, 3]
    assert not tasks.classes_of_tokens(windows, {0: "(" * 30}).any()


def test_windows_are_whole_pieces_behind_bos():
    texts = {7: " ".join(f"w{i}" for i in range(50)), 9: "too short"}
    windows = tasks.Windows.cut(texts, Words(), length=9, per_document=4)
    assert windows.tokens.shape == (4, 9)
    assert windows.documents.tolist() == [7] * 4
    assert (windows.tokens[:, 0] == 1).all()
    assert len({tuple(map(tuple, one.tolist())) for one in windows.spans}) == 4


def test_examples_are_means_over_a_window_and_single_tokens():
    windows = tasks.Windows(torch.zeros(2, 4, dtype=torch.long), np.array([3, 8]), np.zeros((2, 3, 2)))
    activations = np.arange(10.0)[:, None] ** 2  # two rows of other text in front
    pooled = windows.pooled({"task": np.array([True, False])}, first_row=2).of(csr_array(activations))
    np.testing.assert_allclose(pooled.toarray()[:, 0], [(9 + 16 + 25) / 3, (49 + 64 + 81) / 3], rtol=1e-6)
    single = windows.single_tokens(np.array([[0, 2, 1], [0, 0, 2]]), ("one", "two"), first_row=2)
    assert single.of(csr_array(activations)).toarray()[:, 0].tolist() == [16, 25, 81]
    assert single.documents.tolist() == [3, 3, 8]
    assert single.labels["two"].tolist() == [1, 0, 1]


# ---- SAEBench's probes


def test_classes_for_sae_bench_are_of_one_size_and_share_no_document():
    documents = np.repeat(np.arange(20), 3)
    windows = tasks.Windows(torch.zeros(60, 4, dtype=torch.long), documents, np.zeros((60, 3, 2)))
    labels = {"a": documents % 4 == 0, "b": documents % 4 == 1}
    activations = torch.from_numpy(documents).repeat_interleave(4)[:, None] * 1.0  # which document it is from
    activations[::4] = -1  # BOS
    train, test = sae_bench_probing.by_class(activations, windows.pooled(labels, 0), most=(9, 3))
    assert {name: len(one) for name, one in test.items()} == {"a": 3, "b": 3}
    assert len(train["a"]) == len(train["b"]) <= 9
    assert train["a"].shape[1:] == (3, 1)
    assert (train["a"] % 4 == 0).all()
    assert (test["b"] % 4 == 1).all()
    assert not {*train["a"].unique().tolist()} & {*test["a"].unique().tolist()}
    whole, _ = sae_bench_probing.by_class(activations, windows.pooled({"a": labels["a"]}, 0), most=(9, 3))
    assert whole.keys() == {"a", "not a"}
    assert (whole["not a"] % 4 != 0).all()


def test_sae_bench_finds_what_our_probes_find(tmp_path):
    pytest.importorskip("sae_bench")
    pytest.importorskip("sklearn")
    windows = tasks.Windows(torch.zeros(60, 4, dtype=torch.long), np.arange(60), np.zeros((60, 3, 2)))
    in_class, sae = np.arange(60) % 2 == 0, inference_sae("topk", tmp_path)
    activations = random_rows(240, tiny.D_MODEL)
    activations[np.repeat(in_class, 4)] += 4 * normalize(sae.W_dec.detach()[:1], dim=1)
    told_apart = {"planted": windows.pooled({"planted": in_class}, 0)}
    classes = {kind: Classes.of(activations, examples, most=(20, 8)) for kind, examples in told_apart.items()}
    found = sae_bench_probing.sae_bench_scores(sae, classes)
    assert found["planted"]["llm_test_accuracy"] > 0.9
    assert found["planted"]["sae_top_20_test_accuracy"] > 0.8


# ---- all of it


SIZES = worth.Sizes(held_out=300, part_tokens=60, loss_tokens=60, draws=2, splits=2, most=(20, 10))


@pytest.fixture(scope="module")
def text(model) -> worth.Text:
    """Half of the windows have one more direction in their activations."""
    n, length = 40, 4
    windows = tasks.Windows(torch.zeros(n, length, dtype=torch.long), np.arange(n), np.zeros((n, length - 1, 2)))
    in_class = np.arange(n) % 2 == 0
    probed = tiny.activations(n * length, seed=5)
    probed[np.repeat(in_class, length)] += 2 * normalize(random_rows(1, tiny.D_MODEL, seed=9), dim=1)
    examples = {"planted": windows.pooled({"planted": in_class}, 0)}
    return worth.Text(
        model, tiny.tokens(8), tiny.activations(300), probed.half(), examples, tiny.ATTN_OUT, context=tiny.CONTEXT
    )


def test_every_method_gets_a_record(text, tmp_path):
    for name in ("topk", "ours"):
        inference_sae("topk", tmp_path / name)
    baseline_sae = SAE.load_from_disk(tmp_path / "topk")
    baseline_sae.b_enc.data[:24] = -1e3  # dead
    baseline_sae.save_model(str(tmp_path / "topk"))
    folders = {name: tmp_path / name for name in ("ours", "topk")}
    found = worth.worth(folders, "topk", text, SIZES, tmp_path / "worth.jsonl", {"model": "tiny"})
    written = [json.loads(line) for line in (tmp_path / "worth.jsonl").read_text().splitlines()]
    assert [line["what"] for line in written] == ["all", "sae", "sae_bench", "sae", "sae_bench", "control"]
    assert written == found
    assert written[0]["settings"]["model"] == "tiny"
    assert {line["folder"] for line in written if line["what"] == "sae"} == {"topk", "ours"}
    baseline, own = (next(line for line in written if line["name"] == name) for name in ("topk", "ours"))
    assert baseline["beside_baseline"]["added"] == 0
    assert {"all", "none", "others"} <= baseline["carried"].keys()
    assert "added" not in baseline["carried"]
    added = own["beside_baseline"]["added"]
    assert own["beside_baseline"]["told_by"] == "number"
    assert 0 < added <= 24
    assert own["carried"]["added"]["features"] == own["carried"]["as many as added, at random"]["features"] == added
    assert own["carried"]["none"]["l0"] == own["carried"]["none"]["features"] == 0
    assert own["carried"]["all"]["nmse"] == pytest.approx(own["nmse"], rel=5)
    assert own["redundancy_at_equal_number"]["features"] == baseline["live"] < own["live"]
    assert "auc_less_baseline" in own["probing"]["planted"]["best, k=1"]
    assert "auc_less_baseline" not in baseline["probing"]["planted"]["best, k=1"]
    assert written[0]["raw_activations"]["planted"]["dense"]["auc"]["mean"] > 0.9
    assert written[-1]["name"] == "d_sae=48, k=4"
    assert {"scores", "left_out"} & written[2].keys()
    with pytest.raises(ValueError, match="baseline='auxk' is not among"):
        worth.worth(folders, "auxk", text, SIZES, tmp_path / "other.jsonl")


def test_what_the_file_has_is_not_measured_again_and_other_settings_are_refused(text, tmp_path, monkeypatch):
    for name in ("topk", "ours", "more"):
        inference_sae("topk", tmp_path / name)
    out, folders = tmp_path / "worth.jsonl", {name: tmp_path / name for name in ("topk", "ours", "more")}
    monkeypatch.setattr(records, "CACHE", tmp_path)
    calls: list[str] = []
    measured = worth.Compared.measured
    monkeypatch.setattr(worth.Compared, "measured", lambda self, name: calls.append(name) or measured(self, name))
    few = {name: folders[name] for name in ("topk", "ours")}
    assert worth.worth(few, "topk", text, SIZES, out) == worth.worth(few, "topk", text, SIZES, out)
    worth.worth(folders, "topk", text, SIZES, out)
    assert calls == ["topk", "ours", "more"]
    with pytest.raises(ValueError, match="splits was 2 and is 3"):
        worth.worth(folders, "topk", text, replace(SIZES, splits=3), out)


def test_the_saes_of_a_sweep_are_found_at_their_best_rates(tmp_path):
    store = SweepStore(tmp_path, {})
    measured = {"hook_name": "h", "dead_fraction": 0.0}
    for method in ("topk", "asi_sparse_adam"):
        for seed in (0, 1, 2):
            for lr, nmse in ((1e-3, 0.2), (2e-3, 0.1)):
                cell = Cell(**METHODS[method], d_sae=64, k=4, lr=lr, seed=seed)
                store.add(cell, {**measured, "nmse": nmse})
                sae_folder(tmp_path, cell, "h").mkdir(parents=True)
    found = worth.saved_saes(tmp_path, "h", 64, "topk")
    assert found.keys() == {"topk", "topk seed 1", "asi_sparse_adam"}
    assert all("lr=0.002" in folder.name and folder.is_dir() for folder in found.values())
    with pytest.raises(ValueError, match="kept no SAE of 128 features"):
        worth.saved_saes(tmp_path, "h", 128, "topk")


def test_the_saes_of_the_plan_are_found_by_contender_and_seed(tmp_path, monkeypatch):
    def item(contender: str, seed: int, save: bool = True) -> SimpleNamespace:
        return SimpleNamespace(contender=contender, cell=Cell(seed=seed), save=save)

    planned = [item(plan.BASELINE, 0), item(plan.BASELINE, 1), item("aligned", 0), item("TopK, mean, active", 0, False)]
    monkeypatch.setattr(worth, "items", lambda parts: planned)
    monkeypatch.setattr(worth, "planned_folder", lambda one: tmp_path / f"{one.contender}_{one.cell.seed}")
    with pytest.raises(ValueError, match="factorial kept no SAE"):
        worth.planned_saes(["factorial"])
    for one in planned:
        worth.planned_folder(one).mkdir()
    assert worth.planned_saes(["factorial"]).keys() == {
        plan.BASELINE,
        f"{plan.BASELINE}, seed 1",
        "Aligned Training",
    }
