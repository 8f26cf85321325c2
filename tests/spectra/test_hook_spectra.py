"""One pass over a model's activations: any batching, both kinds of model, interrupted or not."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import signal
import warnings

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings

from saelens_asi import RunningMoments, Spectrum, activation_spectra, spectra_from_cache
from saelens_asi.activations import reader
from saelens_asi.resume import load_tensors, save_tensors, tensor_metadata
from saelens_asi.spectra import hook_spectra as module
from saelens_asi.spectra.hook_spectra import load_pass
from tests.helpers import tiny
from tests.helpers.damage import Hostile, assert_survives_kills, damages, hit_in_the_third_batch
from tests.helpers.processes import in_processes
from tests.helpers.reference import two_pass_moments

TOKENS = torch.tensor(tiny.tokens(60)["tokens"])
ALL = ["blocks.*.hook_attn_out", "blocks.*.hook_mlp_out", "blocks.*.hook_resid_post", "blocks.*.attn.hook_z"]
HOOK = "blocks.1.hook_attn_out"


@pytest.fixture(autouse=True)
def _no_warnings_of_small_samples(request: pytest.FixtureRequest):
    with warnings.catch_warnings():
        if "warned_of" not in request.node.name:
            warnings.filterwarnings("ignore", message=".*tokens are few")
        yield


def spectra_of(model, data=TOKENS, names=ALL, *args, **kwargs):
    return activation_spectra(model, data, names, *args, progress=False, **kwargs)


def assert_same(one, other, tolerance):
    """Equal to within ``tolerance`` of the largest entry."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].n_tokens == other[name].n_tokens
        for key in ("mean", "covariance", "variances"):
            a, b = getattr(one[name], key), getattr(other[name], key)
            assert (a - b).abs().max() <= tolerance * b.abs().max(), (name, key)


@pytest.mark.parametrize("kind", ["model", "bridge", "hooked_llama"])
def test_a_pass_equals_two_passes_over_all_activations_at_once(kind, request):
    model = request.getfixturevalue(kind)
    result = spectra_of(model, batch_size=7)
    _, cache = model.run_with_cache(TOKENS)
    assert len(result) == 8
    for name, spectrum in result.items():
        x = cache[name].detach().flatten(0, 1).flatten(1)
        mean, scatter = two_pass_moments(x)
        expected = Spectrum(mean, scatter / (len(x) - 1), len(x))
        assert spectrum.n_tokens == TOKENS.numel()
        assert (spectrum.variances - expected.variances).abs().max() <= 1e-6 * expected.variances[0]
        torch.testing.assert_close(spectrum.mean, mean, rtol=1e-5, atol=1e-6)


def test_both_kinds_of_model_give_the_same_spectra(hooked_llama, bridge):
    assert_same(spectra_of(hooked_llama), spectra_of(bridge), tolerance=1e-5)


def test_the_width_of_z_is_that_of_all_heads_also_with_grouped_queries(model, bridge):
    names = ["blocks.0.attn.hook_z"]
    assert spectra_of(model, names=names)[names[0]].d == tiny.HOOK_Z_WIDTH
    assert bridge.cfg.n_key_value_heads == 2
    assert spectra_of(bridge, names=names)[names[0]].d == 16


def test_z_may_come_in_three_dimensions(model):
    """As some SAEs leave it: heads already side by side."""
    names = ["blocks.0.attn.hook_z"]
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    split, flat = dict(cache.items()), {names[0]: cache[names[0]].flatten(2)}
    assert_same(spectra_from_cache(split, names), spectra_from_cache(flat, names), tolerance=0)


def test_neither_batch_size_nor_order_changes_the_result(model):
    shuffled = TOKENS[torch.randperm(len(TOKENS))]
    assert_same(spectra_of(model, batch_size=1), spectra_of(model, shuffled, batch_size=60), tolerance=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 60])
def test_the_number_of_tokens_is_exact(model, batch_size):
    result = spectra_of(model, TOKENS, [HOOK], 333, batch_size=batch_size)
    assert result[HOOK].n_tokens == 333
    assert_same(result, spectra_of(model, TOKENS, [HOOK], 333, batch_size=9), tolerance=1e-6)


def test_merged_halves_equal_a_single_pass(model):
    first, second = spectra_of(model, TOKENS[:25]), spectra_of(model, TOKENS[25:])
    assert_same({name: first[name].merge(second[name]) for name in first}, spectra_of(model), tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigenvalues_hold_in_models_of_any_dtype_around_a_mean_a_thousand_times_the_deviation(dtype, llama_folder):
    """The mean comes from a bias that a hook of the user adds: what is measured is what the model then computes."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(llama_folder), device="cpu", dtype=dtype)
    deviation = float(spectra_of(model, names=[HOOK])[HOOK].total_variance) ** 0.5
    seen = []

    def far_away(x, hook):
        x = x + 1000 * deviation / 4  # in each of 16 dimensions
        seen.append(x.detach())
        return x

    model.hook_dict[HOOK].add_hook(far_away)
    (spectrum,) = spectra_of(model, names=[HOOK], batch_size=8).values()
    model.reset_hooks()
    x = torch.cat([part.flatten(0, 1) for part in seen])
    assert x.dtype == dtype
    mean, scatter = two_pass_moments(x)
    expected = torch.linalg.eigvalsh(scatter / (len(x) - 1)).flip(0)
    assert float(mean.norm()) == pytest.approx(1000 * deviation, rel=0.01)
    assert (spectrum.variances - expected).abs().max() <= 1e-6 * expected[0]


def test_aliases_of_one_hook_are_measured_once_and_reported_twice(bridge, monkeypatch):
    made = []
    stock = RunningMoments.zeros
    monkeypatch.setattr(RunningMoments, "zeros", lambda *args: made.append(args) or stock(*args))
    names = ["blocks.1.hook_attn_out", "blocks.1.attn.hook_out"]
    result = spectra_of(bridge, names=names)
    assert list(result) == names
    assert len(made) == 1
    assert torch.equal(result[names[0]].covariance, result[names[1]].covariance)


def test_special_tokens_positions_and_padding_are_left_out(model):
    """Against the mean of exactly those activations that count."""
    ids = TOKENS[:6].clone()
    ids[:, 0] = 0  # <bos>
    ids[2, 7] = 1  # <eos>
    mask = torch.ones_like(ids)
    mask[3, 12:] = 0
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    (spectrum,) = spectra_of(model, rows, [HOOK], exclude_positions=[5, -1]).values()
    keep = (ids > 2) & mask.bool()
    keep[:, [5, 15]] = False
    _, cache = model.run_with_cache(ids, attention_mask=mask)
    assert spectrum.n_tokens == int(keep.sum())
    torch.testing.assert_close(spectrum.mean, cache[HOOK][keep].double().mean(dim=0), rtol=1e-5, atol=1e-6)
    (everything,) = spectra_of(model, ids, [HOOK], exclude_special_tokens=False).values()
    assert everything.n_tokens == ids.numel()
    (chosen,) = spectra_of(model, ids, [HOOK], exclude_special_tokens=[0]).values()
    assert chosen.n_tokens == ids.numel() - 6


def test_a_name_that_is_not_there_is_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match=r"no hook of this model is called 'blocks\.9"):
        spectra_of(model, iter([]), ["blocks.9.hook_attn_out"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_tokens": 1}, "n_tokens=1 must be at least 2"),
        ({"names": ["blocks.0.attn.hook_pattern"]}, r"hook_pattern' holds .* not one vector a token"),
        ({"data": TOKENS[:1, :1]}, "holds 1 tokens that count"),
        ({"data": []}, "holds 0 tokens that count"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        spectra_of(model, **kwargs)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_values_that_are_not_finite_are_refused_with_the_name_of_the_hook(model):
    def spoil(x, hook):
        x[3, 2, 1] = float("inf")
        return x

    model.add_hook(HOOK, spoil)
    try:
        with pytest.raises(ValueError, match=rf"{HOOK}: activations 0 to 128 .*NaN or infinity"):
            spectra_of(model, names=["blocks.0.attn.hook_z", HOOK], batch_size=8)
    finally:
        model.reset_hooks()


def test_data_that_ends_early_is_announced(model, caplog):
    with caplog.at_level(logging.WARNING, logger="saelens_asi"):
        result = spectra_of(model, TOKENS, [HOOK], 10_000)
    assert result[HOOK].n_tokens == 960
    assert "ended after 960 of n_tokens=10000" in caplog.text


def test_a_small_sample_is_warned_of_once_with_a_number(model):
    unchecked = inspect.unwrap(activation_spectra)  # what checks annotations would be a caller in between
    with pytest.warns(UserWarning, match=r"and 1 more hooks\): 255 tokens are few for width 16: .*% too low") as record:
        unchecked(model, TOKENS, ["blocks.*.hook_attn_out"], 255, progress=False)
    assert len(record) == 1
    assert record[0].filename == __file__  # the line of the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra_of(model, TOKENS, ["blocks.*.hook_attn_out"], 256)


class Interrupt(Exception):
    pass


def interrupted_after(n, data=TOKENS):
    for i, row in enumerate(data.tolist()):
        if i == n:
            raise Interrupt
        yield {"tokens": row}


def rows(data=TOKENS):
    return [{"tokens": row} for row in data.tolist()]


@pytest.mark.parametrize("n_read", [1, 13, 40])
def test_an_interrupted_pass_continues_to_the_same_bits(model, tmp_path, n_read, monkeypatch):
    monkeypatch.setattr(module, "_CHECKPOINT_PAUSE", 0)
    path = tmp_path / "new" / "pass.safetensors"
    how = {"batch_size": 4, "checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(Interrupt):
        spectra_of(model, interrupted_after(n_read), ALL, 900, **how)
    assert path.exists() == (n_read >= 4)
    read = []
    stock = reader.read_activations

    def counting(model, tokens, *args):
        read.append(len(tokens))
        return stock(model, tokens, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "read_activations", counting)
        continued = spectra_of(model, rows(), ALL, 900, **how)
    assert sum(read) == 60 - 4 * (n_read // 4)  # what was read is not read again
    assert_same(continued, spectra_of(model, rows(), ALL, 900, batch_size=4), tolerance=0)
    assert_same(spectra_of(model, rows(), ALL, 900, **how), continued, tolerance=0)  # finished: nothing is read again
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_checkpoint_is_refused_for_other_settings_data_or_files(model, tmp_path):
    path = tmp_path / "pass.safetensors"
    how = {"batch_size": 4, "checkpoint": path}
    spectra_of(model, rows(), [HOOK], 300, **how)
    with pytest.raises(ValueError, match=r"n_tokens was 300 and is 301.*delete it"):
        spectra_of(model, rows(), [HOOK], 301, **how)
    with pytest.raises(ValueError, match=r"hooks was .* and is"):
        spectra_of(model, rows(), ["blocks.0.hook_attn_out"], 300, **how)
    with pytest.raises(ValueError, match=r"data was '60 rows, checksum .*' and is .*delete the file"):
        spectra_of(model, rows(TOKENS.flip(0)), [HOOK], 300, **how)
    with pytest.raises(ValueError, match="reading other data"):
        spectra_of(model, iter(rows(TOKENS.flip(0))), [HOOK], 300, **how)
    with pytest.raises(ValueError, match=r"model was '.*checksum .*' and is .*delete the file"):
        spectra_of(changed(model), rows(), [HOOK], 300, **how)
    other = Spectrum(torch.zeros(2).double(), torch.eye(2).double(), 3).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not the checkpoint of a pass"):
        load_pass(other, {})


def test_a_failed_write_leaves_the_last_checkpoint(model, tmp_path, monkeypatch):
    path = tmp_path / "pass.safetensors"
    spectra_of(model, rows(), [HOOK], 300, checkpoint=path)
    before = path.read_bytes()

    def disk_full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("saelens_asi.resume.save_file", disk_full)
    with pytest.raises(OSError, match="disk full"):
        spectra_of(model, rows(), [HOOK], 300, checkpoint=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["model", "bridge", "hooked_llama"])
def test_a_cache_gives_the_spectra_of_its_activations(kind, request):
    model = request.getfixturevalue(kind)
    _, cache = model.run_with_cache(TOKENS)
    assert_same(spectra_from_cache(cache, ALL), spectra_of(model), tolerance=1e-6)


def test_a_cache_with_canonical_names_alone_is_found_by_alias(bridge):
    from transformer_lens import ActivationCache

    _, cache = bridge.run_with_cache(TOKENS)
    canonical = ActivationCache({"blocks.1.attn.hook_out": cache["blocks.1.attn.hook_out"]}, bridge)
    (spectrum,) = spectra_from_cache(canonical, ["blocks.1.hook_attn_out"]).values()
    expected = spectra_of(bridge, names=["blocks.1.hook_attn_out"])["blocks.1.hook_attn_out"]
    torch.testing.assert_close(spectrum.covariance, expected.covariance, rtol=1e-5, atol=1e-6)


def test_a_cache_of_one_window_and_a_mask(model):
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    names = [HOOK, "blocks.0.attn.hook_z"]
    whole = spectra_from_cache(cache, names)
    assert [s.n_tokens for s in whole.values()] == [16, 16]
    assert whole["blocks.0.attn.hook_z"].d == tiny.HOOK_Z_WIDTH
    keep = torch.arange(16) > 2
    masked = spectra_from_cache(cache, names, mask=keep)
    torch.testing.assert_close(masked[HOOK].mean, cache[HOOK][keep].double().mean(dim=0))
    with pytest.raises(ValueError, match=r"the mask is \(5,\), but .* 1 windows of 16 tokens"):
        spectra_from_cache(cache, names, mask=torch.ones(5, dtype=torch.bool))


def test_a_cache_refuses_names_and_shapes_that_do_not_fit(model):
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(ValueError, match="no hook of this model is called"):
        spectra_from_cache(cache, ["blocks.7.hook_attn_out"])
    with pytest.raises(ValueError, match="not one vector a token"):
        spectra_from_cache(cache, ["blocks.0.attn.hook_pattern"])


def changed(model):
    """The same model, with one layer tuned a little."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.W_in += 1e-3
    return other


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(model, tmp_path, caplog):
    """Which had neither fingerprints nor a checksum."""
    path = tmp_path / "pass.safetensors"
    how = {"batch_size": 4, "checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(Interrupt):
        spectra_of(model, interrupted_after(40), ALL, 900, **how)
    metadata = tensor_metadata(path)
    state = json.loads(metadata["state"])
    del state["fingerprints"]
    save_tensors(path, load_tensors(path), {"format": module.PASS_FORMAT, "state": json.dumps(state)})
    continued = spectra_of(model, rows(), ALL, 900, **how)
    assert "no fingerprint of the model and the data" in caplog.text
    assert_same(continued, spectra_of(model, rows(), ALL, 900, batch_size=4), tolerance=0)


def test_an_error_within_a_batch_saves_the_batches_before(model, tmp_path, monkeypatch):
    """Of this one the first hook has got its vectors, and the second not."""
    path, seen = tmp_path / "pass.safetensors", []
    how = {"batch_size": 4, "checkpoint": path, "checkpoint_seconds": 0}
    stock = RunningMoments.update_

    def failing(self, x):
        seen.append(x)
        if len(seen) == 2 * 5 + 2:
            raise RuntimeError("out of memory")
        return stock(self, x)

    names = ["blocks.0.hook_attn_out", HOOK]
    monkeypatch.setattr(module, "_CHECKPOINT_PAUSE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(RunningMoments, "update_", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            spectra_of(model, rows(), names, 900, **how)
    assert json.loads(tensor_metadata(path)["state"])["place"]["n_batches"] == 5
    assert_same(spectra_of(model, rows(), names, 900, **how), spectra_of(model, rows(), names, 900, batch_size=4), 0)


def test_a_source_that_fails_between_batches_loses_none(model, tmp_path):
    path = tmp_path / "pass.safetensors"
    how = {"batch_size": 4, "checkpoint": path}  # the first minute has not passed
    with pytest.raises(Interrupt):
        spectra_of(model, interrupted_after(40), [HOOK], 900, **how)
    assert json.loads(tensor_metadata(path)["state"])["place"]["n_batches"] == 10


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_signals_let_the_batch_end_and_save_it(number, times, model, tmp_path):
    path = tmp_path / "pass.safetensors"
    with hit_in_the_third_batch(number, times), pytest.raises(KeyboardInterrupt):
        spectra_of(model, rows(), ALL, 900, batch_size=4, checkpoint=path)
    assert json.loads(tensor_metadata(path)["state"])["place"]["n_batches"] == 3
    continued = spectra_of(model, rows(), ALL, 900, batch_size=4, checkpoint=path)
    assert_same(continued, spectra_of(model, rows(), ALL, 900, batch_size=4), tolerance=0)


def test_a_disk_that_is_full_for_a_while_does_not_end_the_pass(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_CHECKPOINT_PAUSE", 0)
    stock, calls = module.save_tensors, []

    def full(*args):
        calls.append(args)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        stock(*args)

    monkeypatch.setattr(module, "save_tensors", full)
    path = tmp_path / "pass.safetensors"
    found = spectra_of(model, rows(), [HOOK], 900, batch_size=4, checkpoint=path, checkpoint_seconds=0)
    assert caplog.text.count("no space left for checkpoint=") == 2
    assert_same(found, spectra_of(model, rows(), [HOOK], 900, batch_size=4), tolerance=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages())
def test_damaged_checkpoints_are_refused_or_right(damage, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pass") / "pass.safetensors"
    how = {"batch_size": 4, "checkpoint": path}
    with pytest.raises(Interrupt):
        spectra_of(model, interrupted_after(20), [HOOK], 400, **how)
    damage.apply(path)
    refused = str(path)
    try:
        assert_same(
            spectra_of(model, rows(), [HOOK], 400, **how), spectra_of(model, rows(), [HOOK], 400, batch_size=4), 0
        )
    except (ValueError, IsADirectoryError) as error:
        refused = str(error)
    assert str(path) in refused


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(model, tmp_path):
    path = tmp_path / "pass.safetensors"
    torch.save(Hostile(tmp_path / "executed"), path)
    with pytest.raises(ValueError, match=r"pass\.safetensors is not a safetensors file"):
        spectra_of(model, rows(), [HOOK], 400, checkpoint=path)
    assert not (tmp_path / "executed").exists()


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    assert_survives_kills("spectrum", tmp_path)


def _spectra_of_several(n_tokens, batch_size, hook_names):
    spectra = activation_spectra(
        tiny.hooked_transformer(), tiny.tokens(40), hook_names, n_tokens, batch_size=batch_size, progress=False
    )
    return {name: (one.n_tokens, one.mean, one.covariance) for name, one in spectra.items()}


@pytest.mark.parametrize(
    ("n", "n_tokens", "batch_size"),
    [(2, None, 8), (3, 333, 4), (4, 500, 1), (3, 200, 40)],
    ids=["all", "in_the_middle_of_a_batch", "windows", "one_batch_for_three"],
)
def test_processes_share_a_pass_and_return_its_spectra(n, n_tokens, batch_size):
    names = ["blocks.*.hook_attn_out", "blocks.0.attn.hook_z"]
    expected = _spectra_of_several(n_tokens, batch_size, names)
    told = in_processes(n, _spectra_of_several, n_tokens, batch_size, names)
    for spectra in told:
        assert spectra.keys() == expected.keys()
        for name, (n_seen, mean, covariance) in expected.items():
            assert spectra[name][0] == n_seen
            torch.testing.assert_close(spectra[name][1], mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(spectra[name][2], covariance, rtol=1e-6, atol=1e-9)
            assert all(torch.equal(a, b) for a, b in zip(spectra[name][1:], told[0][name][1:], strict=True))


def _windows_read():
    model, seen = tiny.hooked_transformer(), []
    model.add_hook("hook_embed", lambda x, hook: seen.append(len(x)), is_permanent=True)
    activation_spectra(model, tiny.tokens(40), tiny.ATTN_OUT, batch_size=8, progress=False)
    return seen


def test_each_window_is_read_by_one_process():
    assert in_processes(2, _windows_read) == [[8, 8, 8], [8, 8]]


def _with_checkpoint(path):
    with pytest.raises(ValueError, match=r"checkpoint=.*but 2 share this pass"):
        activation_spectra(tiny.hooked_transformer(), tiny.tokens(40), tiny.ATTN_OUT, checkpoint=path, progress=False)


def test_a_checkpoint_of_several_processes_is_refused(tmp_path):
    in_processes(2, _with_checkpoint, str(tmp_path / "pass"))
    assert not list(tmp_path.iterdir())
