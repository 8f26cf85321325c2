"""A feature that is rare is never called dead of a cause: silence is evidence from three expected firings on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelens_asi import Autopsy, autopsy
from tests.helpers import planted, tiny

CAUSES = {"outside", "mean", "norm", "bias", "several", "unexplained"}
ONE_IN = 20_000


def rare_sae() -> tuple[Any, Tensor, Tensor]:
    """An SAE with rows outside the active subspace: 12 whose direction is seldom there, and 3 of the noise alone."""
    sae, where = planted.sae("topk", ["outside"])
    rows = torch.linalg.qr(planted.directions(15, 5, slice(planted.D_ACTIVE + 1, planted.D_IN)).T)[0]
    sae.W_enc.data[:, where["outside"][:15]] = rows
    return sae, where["outside"][:12], where["outside"][12:15]


def activations(sae: Any, rare: Tensor, n: int, seed: int) -> Tensor:
    """Each rare feature's direction is added to one token in 20,000, as a concept that is seldom spoken of."""
    x, generator = planted.activations(n, seed), torch.Generator().manual_seed(seed + 999)
    hit = (torch.rand(n, generator=generator) < len(rare) / ONE_IN).nonzero().squeeze(1)
    of = rare[torch.randint(len(rare), (len(hit),), generator=generator)]
    x[hit] += 12 * sae.W_enc.data[:, of].T
    return x


def look(sae: Any, x: Any, **settings: Any) -> tuple[Autopsy, dict[int, str]]:
    found = autopsy(sae, x, progress=False, **settings)
    return found, dict(zip(found.dead.tolist(), found.verdicts, strict=True))


@torch.no_grad()
def firings(sae: Any, rare: Tensor, n: int, seed: int) -> Tensor:
    parts = [activations(sae, rare, 20_000, seed + i) for i in range(n // 20_000)]
    return torch.stack([(sae.encode(x) != 0).sum(dim=0) for x in parts]).sum(dim=0)


def test_what_fires_on_more_tokens_is_not_called_outside() -> None:
    sae, rare, gone = rare_sae()
    assert bool((firings(sae, rare, 400_000, 50)[rare] > 0).all())
    found, verdicts = look(sae, activations(sae, rare, 4000, 0))
    silent = [i for i in rare.tolist() if i in verdicts]
    assert len(silent) >= 6
    assert not {verdicts[i] for i in silent} & CAUSES
    assert {verdicts[i] for i in gone.tolist()} == {"undecided"}
    assert {found.if_dead[found.dead.tolist().index(i)] for i in gone.tolist()} == {"outside"}
    assert set(found.evidence.tokens_missing.tolist()) == {300_000 - 4000}
    assert "296,000 more silent tokens" in found.summary()
    assert "if they are dead, then: outside the active subspace" in found.summary()


def test_enough_tokens_decide() -> None:
    """At a rate of one in 20,000, three firings are expected on 60,000 tokens."""
    sae, rare, gone = rare_sae()
    x = torch.cat([activations(sae, rare, 20_000, 50 + i) for i in range(6)])
    found, verdicts = look(sae, x, dead_rate=1 / 40_000)
    assert {verdicts[i] for i in gone.tolist()} == {"outside"}
    assert not [i for i in rare.tolist() if verdicts.get(i) in CAUSES]
    assert "undecided" not in found.counts


@pytest.mark.parametrize("written_by", ["tensor", "saelens"])
def test_the_rates_of_training_tell_rare_from_dead(written_by: str, tmp_path: Path) -> None:
    sae, rare, gone = rare_sae()
    counted = firings(sae, rare, 400_000, 50)
    rates: Any = counted.double() / 400_000
    if written_by == "saelens":
        save_file({"sparsity": torch.log10(rates.float() + 1e-10)}, tmp_path / "sparsity.safetensors")
        rates = tmp_path
    found, verdicts = look(sae, activations(sae, rare, 4000, 0), firing_rates=rates, dead_rate=1e-4)
    silent = [i for i in rare.tolist() if i in verdicts]
    assert {verdicts[i] for i in silent} == {"starved"}
    assert {verdicts[i] for i in gone.tolist()} == {"outside"}
    at = torch.isin(found.dead, rare)
    expected = 3 * 400_000 / counted[found.dead[at]].double()
    torch.testing.assert_close(found.evidence.tokens_needed[at], expected, rtol=1e-4, atol=0)
    assert "fired in training, so seldom that these tokens may miss them" in found.summary()


def test_the_silence_counted_by_a_checkpoint_is_evidence(tmp_path: Path) -> None:
    """Also where SAELens's window has just begun: its count of steps goes on."""
    trainer = tiny.trainer("topk", n_steps=40, feature_sampling_window=39, save_final_checkpoint=False)
    trainer.fit()
    trainer.save_checkpoint("end", base_path=tmp_path)
    found, _ = look(trainer.sae, tiny.activations(500), optimizer_state=tmp_path / "end")
    steps = trainer.n_forward_passes_since_fired[found.dead].double()
    assert int((steps > 0).sum()) >= 3
    silent = found.evidence.silent_tokens
    never_in_window = trainer.act_freq_scores[found.dead] == 0
    assert torch.equal(silent[never_in_window], steps[never_in_window] * tiny.BATCH)


def test_species_that_were_seen_once_tell_of_those_not_seen() -> None:
    sae, rare, _ = rare_sae()
    found, _ = look(sae, activations(sae, rare, 20_000, 3))
    once, twice = (int((found.features.fires == n).sum()) for n in (1, 2))
    assert once >= 2
    assert found.merely_rare == min(len(found.dead), once * (once - 1) / (2 * (twice + 1)))
    assert found.to_dict()["merely_rare"] == pytest.approx(found.merely_rare, rel=1e-5)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_damaged_rates_are_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "sparsity.safetensors"
    if content is None:
        save_file({"other": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"firing_rates: .*sparsity.safetensors is damaged"):
        look(tiny.training_sae(), tiny.activations(50), firing_rates=tmp_path)
