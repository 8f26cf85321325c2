"""Revival in training: what it moves and what it leaves, exact resumes, screens that agree, many processes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig
from torch import Tensor

from saelens_asi import ActiveSubspaceInit, read_history
from saelens_asi.activations.sae_state import shard_of
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin import fresh_start, revival
from saelens_asi.plugin.checkpoints import check_whole
from saelens_asi.plugin.revival import REVIVAL, Revival
from saelens_asi.plugin.topk_pass import encoder_of
from saelens_asi.resume import MANIFEST
from saelens_asi.sparse import kernels
from saelens_asi.sparse.rows import Workspace, row_norms
from saelens_asi.sparse.screens import screened_top_k
from saelens_asi.sparse.topk import Query, encode_top_k
from tests.helpers import kept_run, many, tiny
from tests.helpers.processes import in_processes

FAMILY = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
D_SAE, BATCH = 48, 512


class Batches(kept_run.Batches):
    """Enough tokens that silence of 20 steps rules out a hundredth of the mean rate."""

    def __init__(self, d_active: int = 5) -> None:
        super().__init__()
        self.d_active = d_active

    def __next__(self) -> Tensor:
        self.n += 1
        return tiny.activations(BATCH, d_active=self.d_active, seed=self.n)


@pytest.fixture(autouse=True)
def _rounds_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    _short(monkeypatch)


def _short(patch: pytest.MonkeyPatch, first_share: float = 0.0) -> None:
    """Rounds every few steps, and no new start but where a test is about one."""
    patch.setattr(revival, "ROUND_STEPS", 5)
    patch.setattr(fresh_start, "_FIRST_SHARE", first_share)


def _trainer(architecture: str = "topk", n_steps: int = 60, **settings: Any) -> Any:
    own = {"d_sae": D_SAE, "revive": "auto", "aux_loss_coefficient": 0.0, "provider": Batches()}
    own |= {"train_batch_size_samples": BATCH, "total_training_samples": n_steps * BATCH}
    return tiny.trainer(architecture, **{**own, **settings})


@torch.no_grad()
def _kill_(sae: Any, rows: slice, bias: float = -1e3) -> None:
    sae.b_enc[rows] = bias


def _watched(trainer: Any) -> list[tuple[int, list[int]]]:
    """The step and the features of every round that moves some."""
    rounds: list[tuple[int, list[int]]] = []
    stock = trainer.revival.write_

    def write_(found: Any, *args: Any) -> None:
        rounds.append((args[-1], found.rows.tolist()))
        stock(found, *args)

    trainer.revival.write_ = write_
    return rounds


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_features_that_die_come_back(architecture, optimizer):
    """A planted dying feature is revived, fires, and starts with fresh moments and counters."""
    flags = {"initializer": ActiveSubspaceInit(d_init=12, n_tokens=512), "optimizer": optimizer}
    trainer = _trainer(architecture, provider=Batches(d_active=12), **flags)
    planted, stock_step = slice(10, 14), trainer.step

    def step(batch: Tensor) -> Any:
        if trainer.steps_done() == 10 and architecture != "abstopk":
            _kill_(trainer.sae, planted)
        if trainer.steps_done() == 10 and architecture == "abstopk":  # ranked by magnitude: too short to be among the k
            with torch.no_grad():
                trainer.sae.W_enc[:, planted] *= 1e-6
                trainer.sae.b_enc[planted] = 0
        return stock_step(batch)

    trainer.step = step
    rounds = _watched(trainer)
    trainer.fit()
    revived = {row for at, rows in rounds if at > 10 for row in rows}
    assert revived >= set(range(10, 14))
    assert trainer.revival.n_revived == sum(len(rows) for _, rows in rounds)
    assert trainer.sae.cfg.metadata["n_revived_features"] == trainer.revival.n_revived
    assert (trainer.n_forward_passes_since_fired[planted] < 10).float().mean() > 0.7


def _is_rare_turn(step: int) -> bool:
    """One step of ten at first, which shows how rare it is, then one of thirty."""
    return step % 10 == 0 if step <= 100 else step % 30 == 10


def _rare_batches() -> Iterator[Tensor]:
    """A direction of its own, on one token of some batches."""
    for step, batch in enumerate(Batches()):
        x = batch.clone()
        x[:, -1] = 1.0
        if _is_rare_turn(step):
            x[0, -1] = 41.0
        yield x


def test_a_rare_feature_is_left_alone():
    """Silent on 15,000 tokens time and again, where 10,000 are enough to rule out a hundredth of the mean rate."""
    trainer = _trainer(provider=_rare_batches(), n_steps=210, optimizer="sparse_adam", lr=1e-4)
    with torch.no_grad():  # it alone fires on those tokens first of all, and on no others
        trainer.sae.W_dec[7] = torch.nn.functional.one_hot(torch.tensor(15), 16).float()
        trainer.sae.W_enc[:, 7] = trainer.sae.W_dec[7]
        trainer.sae.b_enc[7] = -10.0
    _kill_(trainer.sae, slice(20, 30))
    rounds, silences, stock_step = _watched(trainer), [], trainer.step

    def step(batch: Tensor) -> Any:
        output = stock_step(batch)
        silences.append(int(trainer.n_forward_passes_since_fired[7]))
        return output

    trainer.step = step
    trainer.fit()
    assert max(silences[:100]) == 9
    assert max(silences) == 29
    assert {row for _, rows in rounds for row in rows} >= set(range(20, 30))
    assert not any(7 in rows for _, rows in rounds)


def test_features_that_never_fired_have_their_time():
    """Not before the silence rules out a tenth of the mean rate: 13,000 tokens here, in 26 steps."""
    trainer = _trainer(n_steps=45, optimizer="sparse_adam", d_sae=480)
    _kill_(trainer.sae, slice(0, 400))
    rounds = _watched(trainer)
    trainer.fit()
    assert rounds[0][0] == 30
    assert len(rounds[0][1]) <= 480 // 8  # as many as a round moves at most


def test_nothing_is_revived_in_the_last_part_of_a_run():
    for changes, last in (({}, 160), ({"lr_decay_steps": 90}, 110)):
        trainer = _trainer(n_steps=200, optimizer="sparse_adam", **changes)
        assert trainer.revival.is_due(last)
        assert not any(trainer.revival.is_due(step) for step in range(last + 1, 201))


def test_what_starts_again_starts_as_at_the_beginning():
    for optimizer in ("adam", "sparse_adam"):
        trainer = _trainer(n_steps=20, optimizer=optimizer)
        _kill_(trainer.sae, slice(0, 8))
        moved: list[Tensor] = []
        stock = trainer.revival.write_

        def write_(found: Any, *args: Any, trainer: Any = trainer, moved: Any = moved, stock: Any = stock) -> None:
            before = copy.deepcopy(trainer.optimizer.state_dict()["state"])
            stock(found, *args)
            rows = found.rows
            others = torch.ones(D_SAE, dtype=torch.bool).index_fill_(0, rows, False)
            for name, param in trainer.sae.named_parameters():
                if name == "b_dec":
                    continue
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = trainer.optimizer.state[param][key]
                    moment = moment.t() if name == "W_enc" else moment
                    assert not moment[rows].any()
                    assert moment[others].any()
            for counts in (trainer.n_forward_passes_since_fired, trainer.act_freq_scores):
                assert not counts[rows].any()
            assert before.keys() == trainer.optimizer.state_dict()["state"].keys()
            torch.testing.assert_close(trainer.sae.W_dec[rows], trainer.sae.W_enc[:, rows].t(), rtol=0, atol=0)
            moved.append(rows)

        trainer.revival.write_ = write_
        trainer.fit()
        assert moved


def test_revived_rows_are_no_duplicates():
    trainer = _trainer(n_steps=40, optimizer="sparse_adam")
    _kill_(trainer.sae, slice(0, 30))
    found_any = False
    stock = trainer.revival.write_

    def write_(found: Any, *args: Any) -> None:
        nonlocal found_any
        found_any = True
        dead = trainer.n_forward_passes_since_fired >= 2
        stock(found, *args)
        dead[found.rows] = False
        rows = torch.nn.functional.normalize(trainer.sae.W_dec.detach(), dim=1)
        cosines = rows[found.rows] @ rows.T
        cosines[torch.arange(len(found.rows)), found.rows] = 0
        cosines[:, dead] = 0
        assert cosines.max() <= revival.MAX_COSINE + 1e-5

    trainer.revival.write_ = write_
    trainer.fit()
    assert found_any


def test_screens_and_norms_know_of_revived_rows():
    """After every round the next selection is the exact one, and nothing had to be looked at anew."""
    trainer = _trainer(n_steps=45, optimizer="sparse_adam", d_sae=512, k=4)
    _kill_(trainer.sae, slice(0, 300))
    checked = 0
    stock = trainer.revival.write_

    def write_(found: Any, *args: Any) -> None:
        nonlocal checked
        stock(found, *args)
        steps, sae = trainer._sparse_steps, trainer.sae
        torch.testing.assert_close(steps.decoder_norms, row_norms(sae.W_dec.detach()), rtol=0, atol=0)
        assert steps.current_decoder_norms(sae) is steps.decoder_norms
        encoder, x = encoder_of(sae, steps.decoder_norms), tiny.activations(64, seed=9) - sae.b_dec.detach()
        if steps.screen is None or steps.screen.approximation is None:
            return  # without kernels
        assert steps.screen.knows(encoder)
        assert steps.screen.approximation.describes(encoder, slice(0, 512))
        best, _ = screened_top_k(x, encoder, 4, steps.screen.approximation, Workspace())
        (exact,) = encode_top_k(x, encoder, [Query(4)], Workspace())
        assert torch.equal(best.indices.sort(dim=1).values, exact.indices.sort(dim=1).values)
        checked += 1

    trainer.revival.write_ = write_
    trainer.fit()
    assert trainer.revival.n_revived > 0
    assert checked or not kernels.enabled


def test_the_history_says_how_many():
    trainer = _trainer(optimizer="sparse_adam", logger=LoggingConfig(wandb_log_frequency=4, log_to_wandb=False))
    _kill_(trainer.sae, slice(0, 8))
    trainer.fit()
    counts = [record["revived_features"] for record in trainer.history]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == trainer.revival.n_revived > 0
    off = _trainer(n_steps=20, optimizer="sparse_adam", revive="off")
    off.fit()
    assert "revived_features" not in off.history[-1]
    assert off.revival is None


def _end(trainer: Any) -> dict[str, Tensor]:
    state = {f"optimizer.{i}.{key}": torch.as_tensor(value)
             for i, of in trainer.optimizer.state_dict()["state"].items() for key, value in of.items()}  # fmt: skip
    of_revival = {f"revival.{name}": value for name, value in trainer.revival.state().items()}
    return {**{name: one.clone() for name, one in trainer.sae.state_dict().items()}, **state, **of_revival}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_resume_ends_with_the_same_bits(architecture, optimizer, tmp_path):
    """From checkpoints before, between and right after rounds."""

    def run() -> Any:
        torch.manual_seed(0)
        trainer = _trainer(
            architecture, provider=Batches(), n_steps=60, optimizer=optimizer, resume="latest",
            checkpoint_path=str(tmp_path), n_checkpoints=9,
        )  # fmt: skip
        _kill_(trainer.sae, slice(0, 30))
        trainer.fit()
        return trainer

    whole = run()
    assert whole.revival.n_revived > 0
    expected = _end(whole)
    paths = sorted((path.parent for path in tmp_path.glob(f"*/{MANIFEST}")), key=lambda path: int(path.name))
    assert len(paths) == 9
    for path in paths:
        check_whole(path)
        assert (path / REVIVAL).exists()
    for last in (8, 6, 3):
        for later in paths[last:]:
            shutil.rmtree(later, ignore_errors=True)
        again = _end(run())
        assert again.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(again[name], expected[name])] == []
    assert read_history(tmp_path)[-1]["revived_features"] == whole.revival.n_revived


def test_revival_can_be_switched_on_in_a_run_that_began_without(tmp_path):
    settings = {"provider": Batches(), "optimizer": "sparse_adam", "resume": "latest", "n_steps": 60}
    settings |= {"checkpoint_path": str(tmp_path), "n_checkpoints": 1}
    first = _trainer(revive="off", **settings)
    _kill_(first.sae, slice(0, 30))
    first.fit()
    second = _trainer(**{**settings, "provider": Batches()})
    second.fit()
    assert second.revival.n_revived > 0


def test_off_is_what_it_was():
    """No field in what is saved, and the trainer's bits are those without the setting."""
    ends = []
    for settings in ({}, {"revive": "off"}):
        torch.manual_seed(0)
        trainer = tiny.trainer(n_steps=10, optimizer="sparse_adam", **settings)
        assert "revive" not in trainer.sae.cfg.to_dict()
        trainer.fit()
        ends.append(trainer.sae.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert type(tiny.trainer(revive="off")).__name__ == "SAETrainer"
    assert tiny.sae_config(revive="auto").to_dict()["revive"] == "auto"


def _spread(n_steps: int, settings: dict[str, Any]) -> tuple[Any, int]:
    with pytest.MonkeyPatch.context() as patch:
        _short(patch)
        revived: list[int] = []
        stock = Revival.write_

        def write_(self: Any, found: Any, *args: Any) -> None:
            stock(self, found, *args)
            revived.append(self.n_revived)

        patch.setattr(Revival, "write_", write_)
        torch.manual_seed(0)
        trainer = _trainer(provider=(batch.double() for batch in Batches()), n_steps=n_steps, **settings)
        shard = shard_of(trainer.sae)
        killed = [row - shard.first for row in range(5, 20) if shard.first <= row < shard.stop]
        with torch.no_grad():
            trainer.sae.b_enc[killed] = -1e3
        done = many.watched(trainer)
        return done, revived[-1] if revived else 0


@pytest.mark.parametrize("batch_shards", [1, 2])
def test_many_processes_revive_as_one(batch_shards):
    settings = {"optimizer": "sparse_adam", "dtype": "float64", "batch_shards": batch_shards, "lr": 3e-3}
    expected, n_expected = _spread(40, dict(settings, batch_shards=1))
    assert n_expected > 0
    for found, n in in_processes(2, _spread, 40, settings):
        assert n == n_expected
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-8, atol=1e-8, msg=name)


class WideBatches(Batches):
    def __next__(self) -> Tensor:
        return super().__next__().double()


def _kept(folder: str) -> tuple[dict[str, Tensor], int]:
    """A run that goes on from what its folder holds."""
    with pytest.MonkeyPatch.context() as patch:
        _short(patch)
        torch.manual_seed(0)
        own = {"optimizer": "sparse_adam", "dtype": "float64", "resume": "latest"}
        trainer = _trainer(provider=WideBatches(), n_steps=40, checkpoint_path=folder, n_checkpoints=5, **own)
        _kill_(trainer.sae, slice(0, 10))  # the first of each process
        trainer.fit()
        return many.whole_state(trainer), trainer.revival.n_revived


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    (expected, n_expected), _ = in_processes(2, _kept, str(tmp_path))
    assert n_expected > 0
    paths = sorted((path.parent for path in tmp_path.glob(f"*/{MANIFEST}")), key=lambda path: int(path.name))
    for later in paths[2:]:
        shutil.rmtree(later)
    found, n_found = _kept(str(tmp_path))
    assert n_found == n_expected
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "matching_pursuit"])
def test_other_architectures_are_refused(architecture):
    with pytest.raises(ValueError, match=r"revive='auto' does not suit .*topk.*revive='off'"):
        tiny.trainer(architecture, revive="auto")


def test_other_values_are_refused():
    for value in ("on", True, None, 3):
        with pytest.raises(ValueError, match=r"revive=.* must be one of \('off', 'auto'\)"):
            tiny.sae_config(revive=value)


def test_normalization_by_token_is_refused():
    with pytest.raises(ValueError, match=r"revive='auto' needs .* normalize_activations='layer_norm'.*revive='off'"):
        tiny.trainer(revive="auto", normalize_activations="layer_norm", dead_feature_window=1000)


def test_the_command_line_takes_it():
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    args = ["--architecture", "topk", "--d_in", "16", "--d_sae", "48", "--k", "4", "--model_name", "tiny"]
    assert _parse_cfg_args([*args, "--revive", "auto"]).sae.revive == "auto"
    assert _parse_cfg_args(args).sae.revive == "off"


def _low_rank() -> Iterator[Tensor]:
    basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(3)))[0]
    generator = torch.Generator().manual_seed(5)
    while True:
        codes = torch.rand(BATCH, 8, generator=generator) * (torch.rand(BATCH, 8, generator=generator) < 0.4)
        yield 4 * codes @ basis.T + 2.0 + 0.02 * torch.randn(BATCH, 32, generator=generator)


def _failing(n_steps: int = 60, batches: Iterator[Tensor] | None = None, **settings: Any) -> Any:
    """A start in all dimensions, of which most features never fire."""
    torch.manual_seed(0)
    own = {"d_in": 32, "d_sae": 256, "k": 8, "optimizer": "sparse_adam"}
    return _trainer(provider=_low_rank() if batches is None else batches, n_steps=n_steps, **{**own, **settings})


def test_saelens_own_start_ends_alive_with_revival_alone():
    """On low-rank activations around a mean, where most features of a start in all dimensions never fire."""
    dead, errors = {}, {}
    for revive in ("off", "auto"):
        trainer = _failing(200, revive=revive)
        trainer.fit()
        dead[revive] = float((trainer.n_forward_passes_since_fired > 30).float().mean())
        errors[revive] = trainer.history[-1]["nmse"]
    assert dead["off"] > 0.5
    assert dead["auto"] < 0.3 * dead["off"]
    assert errors["auto"] < errors["off"]


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize("architecture", FAMILY)
def test_a_start_that_failed_is_made_anew(architecture, optimizer, monkeypatch, caplog):
    """Once, with all that a start has, and said: in the log, in the SAE's metadata, in the history."""
    _short(monkeypatch, 0.2)
    trainer = _failing(150, architecture=architecture, optimizer=optimizer, lr=1e-3)
    began: list[int] = []
    stock = trainer.revival.start_anew_

    def start_anew_(*args: Any) -> None:
        stock(*args)
        began.append(args[-1])
        sae = trainer.sae
        assert not trainer.n_forward_passes_since_fired.any()
        assert not trainer.act_freq_scores.any()
        assert not any(trainer.optimizer.state[param]["exp_avg"].any() for param in sae.parameters())
        norms = sae.W_dec.detach().norm(dim=1)
        torch.testing.assert_close(norms, norms[:1].expand_as(norms))
        torch.testing.assert_close(sae.W_enc.detach(), sae.W_dec.detach().T)
        assert not sae.b_enc.any()
        assert float((sae.b_dec.detach() - 2.0).norm()) > 0.1  # the mean of the codes too

    trainer.revival.start_anew_ = start_anew_
    trainer.fit()
    assert len(began) == 1
    assert began[0] <= 0.2 * 150
    record = trainer.sae.cfg.metadata[METADATA_KEY]
    assert record["started_anew_after_steps"] == began[0]
    assert record["d_init"] < 32
    assert trainer.history[-1]["revived_features"] >= 256
    assert "starts anew, by Active Subspace Initialization" in caplog.text
    without = _failing(150, architecture=architecture, optimizer=optimizer, lr=1e-3, revive="off")
    without.fit()
    silent, silent_without = (float((of.n_forward_passes_since_fired > 30).float().mean()) for of in (trainer, without))
    assert silent < 0.6 * silent_without


@pytest.mark.parametrize(
    "settings",
    [
        {"initializer": "active_subspace"},  # has the mean as its centre
        {"batches": (batch - batch.mean(dim=0) for batch in _low_rank())},  # no mean that could be the cause
    ],
    ids=["centred", "no mean"],
)
def test_other_starts_are_left_alone(settings, monkeypatch):
    _short(monkeypatch, 0.2)
    trainer = _failing(60, **settings)
    with torch.no_grad():  # as dead as can be
        trainer.step = _killing(trainer, slice(0, 200))
    trainer.revival.start_anew_ = lambda *_: pytest.fail("started anew")
    trainer.fit()


def _killing(trainer: Any, rows: slice) -> Any:
    stock = trainer.step

    def step(batch: Tensor) -> Any:
        if trainer.steps_done() == 1:
            _kill_(trainer.sae, rows)
        return stock(batch)

    return step


def test_what_was_learned_for_long_is_not_given_up(monkeypatch):
    _short(monkeypatch, 0.2)
    trainer = _failing(150)
    assert trainer.revival._fresh.last_step == 30
    for step in range(31):
        trainer.revival.see(next(_low_rank()), torch.zeros(256), step)
    assert trainer.revival.is_failed_start(30, torch.full((256,), 30))
    assert not trainer.revival.is_failed_start(31, torch.full((256,), 31))
    trainer.revival.see(next(_low_rank()), torch.zeros(256), 31)
    assert trainer.revival._fresh.moments is None  # their memory is free again


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_a_resume_before_and_after_a_new_start_ends_with_the_same_bits(optimizer, tmp_path, monkeypatch):
    _short(monkeypatch, 0.2)
    d_in = 32

    def run() -> Any:
        settings = {"checkpoint_path": str(tmp_path), "n_checkpoints": 29, "resume": "latest"}
        trainer = _failing(90, Resumable(), optimizer=optimizer, d_in=d_in, **settings)
        trainer.fit()
        return trainer

    whole = run()
    assert "started_anew_after_steps" in whole.sae.cfg.metadata[METADATA_KEY]
    expected = _end(whole)
    began = whole.sae.cfg.metadata[METADATA_KEY]["started_anew_after_steps"]
    paths = sorted((path.parent for path in tmp_path.glob(f"*/{MANIFEST}")), key=lambda path: int(path.name))
    before = sum(int(path.name) < began * BATCH for path in paths)
    assert before >= 1
    for last in (before + 2, before):
        for later in paths[last:]:
            shutil.rmtree(later, ignore_errors=True)
        resumed = run()
        again = _end(resumed)
        assert again.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(again[name], expected[name])] == []
        assert resumed.sae.cfg.metadata[METADATA_KEY] == whole.sae.cfg.metadata[METADATA_KEY]


class Resumable(kept_run.Batches):
    """The same low-rank activations, from any place on."""

    def __next__(self) -> Tensor:
        self.n += 1
        generator = torch.Generator().manual_seed(self.n)
        basis = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(3)))[0]
        codes = torch.rand(BATCH, 8, generator=generator) * (torch.rand(BATCH, 8, generator=generator) < 0.4)
        return 4 * codes @ basis.T + 2.0 + 0.02 * torch.randn(BATCH, 32, generator=generator)


def _anew(n_steps: int, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        _short(patch, 0.2)
        trainer = _failing(n_steps, (batch.double() for batch in _low_rank()), **settings)
        done = many.watched(trainer)
        return done, trainer.sae.cfg.metadata[METADATA_KEY]


@pytest.mark.parametrize("batch_shards", [1, 2])
def test_many_processes_start_anew_as_one(batch_shards):
    settings = {"dtype": "float64", "batch_shards": batch_shards}
    expected, record = _anew(60, dict(settings, batch_shards=1))
    for found, of in in_processes(2, _anew, 60, settings):
        assert of["started_anew_after_steps"] == record["started_anew_after_steps"]
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
