"""A TopK step on an accelerator: how many kernels it starts, that it waits for none, that it is the step of a CPU."""

from __future__ import annotations

import json
import logging
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from saelens_asi.plugin import pace, sparse_steps
from saelens_asi.plugin.fused_steps import DeadWatch, takes_fused
from saelens_asi.plugin.pace import PACE, Pace
from saelens_asi.sparse.operators import OPERATORS
from tests.helpers import tiny

# Fake tensors have no address: it is zero, and always the same.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

MAX_LAUNCHES = 40
D_SAE = 300
CUDA = torch.device("cuda:0")


class _Launches(TorchDispatchMode):
    """Every operation but views and allocations starts a kernel; those of ours as many as they say."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        space, short = name.split("::")
        if space == "saelens_asi":
            self.names += [name] * OPERATORS[short].n_launches(*args)
        elif not (
            space in ("prim", "profiler")
            or func.is_view
            or "empty" in short
            or "sparse_coo_tensor" in short
            or short == "_indices"
        ):
            self.names.append(name)
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [one for one in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(one, torch.Tensor)]
            known = {id(arg) for arg in args}
            self.sizes[name] = max(one.numel() * (id(one) not in known) for one in made) if made else 0
        return out


@pytest.fixture
def on_cuda() -> FakeTensorMode:
    """Tensors with a device of type cuda; reading a number of theirs, or a shape that depends on numbers, raises."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _trainer(architecture: str = "topk", **settings: Any) -> Any:
    return tiny.trainer(architecture, optimizer="sparse_adam", **{"d_sae": D_SAE, **settings})


def _on_device(trainer: Any, d_sae: int = D_SAE, d_in: int = tiny.D_MODEL, batch: int = tiny.BATCH) -> torch.Tensor:
    """Weights and counts of a trainer go to a device that is not there, and it makes a step; returns the next batch."""
    sae = trainer.sae
    sae.device, sae.cfg.d_sae, sae.cfg.d_in = CUDA, d_sae, d_in
    # W_enc is laid out as the first step would, whose way of doing it fake tensors refuse.
    made = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in made.items():
        param = torch.empty(shape, device=CUDA)
        setattr(sae, name, torch.nn.Parameter(param.t() if name == "W_enc" else param))
    trainer._use_sparse_adam()
    for param in sae.parameters():
        moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        trainer.optimizer.state[param] = {"step": 0.0, **moments}
    trainer.act_freq_scores = torch.zeros(d_sae, device=CUDA)
    trainer.n_forward_passes_since_fired = torch.zeros(d_sae, device=CUDA)
    trainer.pace.settle()
    trainer.step(torch.empty(batch, d_in, device=CUDA))  # what is made in the first step is there
    return torch.empty(batch, d_in, device=CUDA)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_activations": "expected_average_only_in"},
        {"aux_loss_coefficient": 0.0},
        {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
        {"lr_warm_up_steps": 5, "lr_decay_steps": 3},
        {"silent_moments": "keep"},
    ],
    ids=lambda settings: ", ".join(settings) or "defaults",
)
def test_a_step_starts_few_kernels_and_waits_for_none(architecture, settings, on_cuda):
    trainer = _trainer(architecture, **settings)
    trainer.activation_scaler.scaling_factor = 1.5 if "normalize_activations" in settings else None
    with on_cuda:
        batch = _on_device(trainer)
        with _Launches() as launches:
            output = trainer.step(batch)
    assert "saelens_asi::move_rows_" in launches.names
    assert len(launches.names) <= MAX_LAUNCHES, launches.names
    # No gradient of a table, and nothing else of its size.
    products = {"aten::_sparse_coo_tensor_with_dims_and_tensors"}
    sizes = {name: size for name, size in launches.sizes.items() if name not in products}
    assert max(sizes.values()) < D_SAE * tiny.D_MODEL, sizes
    assert output.feature_acts.shape == (tiny.BATCH, D_SAE)
    assert output.sae_out.device.type == "cuda"


def test_a_step_in_bfloat16_starts_few_kernels_and_waits_for_none(on_cuda, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: True)
    trainer = _trainer()
    with on_cuda:
        batch = _on_device(trainer)
        with _Launches() as launches:
            trainer.step(batch)
    assert "saelens_asi::move_rows_" in launches.names
    assert len(launches.names) <= MAX_LAUNCHES, launches.names


class _LiveBytes(TorchDispatchMode):
    """The peak of all memory that operations have given, and that is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in torch.utils._pytree.arg_tree_leaves(*args):
            if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                self._known.setdefault(one.untyped_storage(), True)  # what was there before
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                self._count(one.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


SIZES = [(32_768, 576), (131_072, 576), (1_048_576, 576), (32_768, 4096), (131_072, 4096), (1_048_576, 4096)]


@pytest.mark.parametrize(("d_sae", "d_in"), SIZES)
@pytest.mark.parametrize("autocast", [False, True])
def test_launches_and_memory_of_ordinary_sizes(d_sae, d_in, autocast, on_cuda, monkeypatch):
    """Launches do not grow with the size, and 0.6 GiB is enough beside weights and moments."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: autocast)
    trainer = _trainer(k=32, n_steps=10**6)
    with on_cuda:
        batch = _on_device(trainer, d_sae, d_in, batch=4096)
        with _Launches() as launches:
            trainer.step(batch)
        with _LiveBytes() as memory:
            trainer.step(batch)
    assert len(launches.names) <= MAX_LAUNCHES, launches.names
    assert "aten::mm" not in launches.names
    assert memory.peak <= 0.6 * 2**30


def test_reading_a_number_of_the_device_is_seen(on_cuda):
    """What the two tests above would see: a mask that somebody has to look at."""
    trainer = _trainer()
    with on_cuda:
        batch = _on_device(trainer)
        trainer._dead_watch._first = 0
        with pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent|item|not linked"):
            trainer.step(batch)


@pytest.fixture
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a GPU, by the twins of its kernels."""
    monkeypatch.setattr(sparse_steps, "takes_fused", lambda sae, optimizer, made: True)


def _train(architecture: str, n_steps: int, **settings: Any) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    trainer = _trainer(architecture, n_steps=n_steps, aux_loss_coefficient=0.0, **settings)
    supply, selected = tiny.batches(), []
    for _ in range(n_steps):
        selected.append(trainer.step(next(supply)).feature_acts.to_dense() != 0)
        trainer.n_training_steps += 1
    return trainer, selected


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"apply_b_dec_to_input": True}, {"apply_b_dec_to_input": False}, {"silent_moments": "keep"}],
    ids=lambda settings: ", ".join(f"{name} {value}" for name, value in settings.items()),
)
def test_steps_are_those_of_a_cpu(architecture, rescale, settings, request):
    settings = {"rescale_acts_by_decoder_norm": rescale, "lr_warm_up_steps": 3, **settings}
    expected, selected_there = _train(architecture, 8, **settings)
    request.getfixturevalue("fused_on_a_cpu")
    found, selected = _train(architecture, 8, **settings)
    assert all(torch.equal(*both) for both in zip(selected, selected_there, strict=True))
    # Rows that never fired have the bits they began with on both paths.
    assert (expected.act_freq_scores == 0).any()
    silent = expected.act_freq_scores == 0
    assert torch.equal(found.sae.W_dec[silent], expected.sae.W_dec[silent])
    assert torch.equal(found.act_freq_scores, expected.act_freq_scores)
    assert torch.equal(found.n_forward_passes_since_fired, expected.n_forward_passes_since_fired)
    for name, param in expected.sae.named_parameters():
        other = found.sae.get_parameter(name)
        torch.testing.assert_close(other, param, rtol=1e-5, atol=1e-6, msg=name)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found.optimizer.state[other][key], expected.optimizer.state[param][key])
        last_steps = [trainer.optimizer.state[p].get("last_step") for trainer, p in ((found, other), (expected, param))]
        assert (last_steps[0] is None) == ("silent_moments" in settings or name == "b_dec")
        assert last_steps[0] is last_steps[1] or torch.equal(*last_steps)


def test_outputs_are_those_of_a_cpu(request):
    batch = next(tiny.batches())
    outputs = []
    for fused in (False, True):
        if fused:
            request.getfixturevalue("fused_on_a_cpu")
        torch.manual_seed(0)
        outputs.append(_trainer(aux_loss_coefficient=0.0).step(batch))
    expected, found = outputs
    for name in ("loss", "sae_out"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for name in ("feature_acts", "hidden_pre"):
        torch.testing.assert_close(getattr(found, name).to_dense(), getattr(expected, name).to_dense())
    assert found.losses.keys() == expected.losses.keys()


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_autocast_selects_what_saelens_selects(architecture, fused_on_a_cpu):
    """The product is rounded to bfloat16, bias and norms are not: as SAELens has it."""
    trainer = _trainer(architecture, aux_loss_coefficient=0.0, autocast=True)
    batch = next(tiny.batches())
    with torch.autocast("cpu", torch.bfloat16):
        expected = trainer.sae.training_forward_pass(trainer._step_input(batch)).feature_acts
    found = trainer.step(batch).feature_acts.to_dense()
    assert torch.equal(found != 0, expected != 0)


def test_a_token_that_is_not_a_number_shows_in_the_loss(fused_on_a_cpu):
    trainer = _trainer(aux_loss_coefficient=0.0)
    batch = next(tiny.batches())
    with torch.no_grad():
        trainer.sae.W_enc[:, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="loss or its gradient is not finite"):
        trainer.step(batch)


def test_a_decoder_that_somebody_wrote_to_is_ranked_by_its_new_norms(fused_on_a_cpu):
    trainer = _trainer(aux_loss_coefficient=0.0)
    supply = tiny.batches()
    trainer.step(next(supply))
    steps = trainer._sparse_steps._fused
    with torch.no_grad():
        trainer.sae.W_dec.mul_(3)
    trainer.step(next(supply))
    torch.testing.assert_close(steps.norms, trainer.sae.W_dec.detach().norm(dim=1))
    trainer.sae.W_dec.data.mul_(3)  # shows nowhere
    for _ in range(32):
        trainer.step(next(supply))
    torch.testing.assert_close(steps.norms, trainer.sae.W_dec.detach().norm(dim=1))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("batchtopk", {}),
        ("matryoshka_batchtopk", {}),
        ("topk", {"normalize_activations": "layer_norm"}),
        ("topk", {"dtype": "float64"}),
    ],
)
def test_other_steps_keep_the_path_they_have(architecture, settings, monkeypatch):
    trainer = tiny.trainer(architecture, **{"optimizer": "sparse_adam", **settings})
    made = trainer._step_input(next(tiny.batches()))
    made.dead_neuron_mask = None
    monkeypatch.setattr("saelens_asi.plugin.fused_steps._DEVICE", "cpu")
    assert not takes_fused(trainer.sae, trainer.optimizer, made)
    usual = tiny.trainer(optimizer="sparse_adam")
    assert takes_fused(usual.sae, usual.optimizer, made)
    assert not takes_fused(usual.sae, torch.optim.Adam(usual.sae.parameters()), made)
    made.dead_neuron_mask = torch.ones(48, dtype=torch.bool)
    assert not takes_fused(usual.sae, usual.optimizer, made)
    for option, value in (("bias_correction", "per_row"), ("silent_moments", "keep"), ("lr", 0.5)):
        other = tiny.trainer(optimizer="sparse_adam", aux_loss_coefficient=0.0)
        other.optimizer.param_groups[0][option] = value
        assert not takes_fused(other.sae, other.optimizer, made)
    usual.optimizer.state[usual.sae.W_dec] = {"step": torch.tensor(3.0)}
    made.dead_neuron_mask = None
    assert not takes_fused(usual.sae, usual.optimizer, made)


def test_no_feature_is_dead_before_it_could_be():
    """Features that never fire: the answer is that of the mask in every step, and the silence is read rarely."""
    watch, window, silent, n_reads = DeadWatch(), 5, torch.zeros(3), 0
    for step in range(20):
        if step == 3:
            silent[0] = 0
        if watch._first is not None and step >= watch._first:
            n_reads += 1
        assert watch.none_is_dead(silent, window, step) == (not (silent > window).any())
        silent += 1
        silent[1:] *= step % 4 != 0
        silent[0] *= step < 10
    assert n_reads < 15


class _Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, device: torch.device) -> float:
        return self.now


def _measured(ours: float, stock: float, n_steps: int = 20) -> tuple[Pace, list[bool]]:
    clock = _Clock()
    pace, taken = Pace(clock), []
    for i in range(n_steps):
        with pace.of_step(CUDA, lambda: True) as sparse:
            taken.append(sparse)
            clock.now += (ours if sparse else stock) if i > 3 else 100 * (ours + stock)  # a compiler is slow at first
    return pace, taken


@pytest.mark.parametrize(("ours", "stock"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_quicker_step_is_taken_and_said_once(ours, stock, caplog):
    caplog.set_level(logging.INFO)
    pace, taken = _measured(ours, stock)
    assert pace.sparse_is_quicker == (ours < stock)
    assert taken[:10] == [True, False] * 5
    assert taken[10:] == [ours < stock] * 10
    assert caplog.text.count("training steps take") == 1


def test_a_step_that_fits_no_memory_is_not_tried(caplog):
    pace = Pace(_Clock())
    for _ in range(3):
        with pace.of_step(CUDA, lambda: False) as sparse:
            assert sparse
    assert pace.sparse_is_quicker
    assert not caplog.text


def test_nothing_is_measured_on_a_cpu_and_nothing_kept(tmp_path):
    def clock(device: torch.device) -> float:
        raise AssertionError("looked at")

    pace = Pace(clock)
    for _ in range(20):
        with pace.of_step(torch.device("cpu"), lambda: True) as sparse:
            assert sparse
    pace.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice", [True, False])
def test_a_resumed_run_goes_the_same_way(choice, tmp_path):
    trainer = tiny.trainer(optimizer="sparse_adam", checkpoint_path=str(tmp_path))
    trainer.pace.sparse_is_quicker = choice
    trainer.save_checkpoint("half")
    assert json.loads((tmp_path / "half" / PACE).read_text()) == {"sparse_is_quicker": choice}
    resumed = tiny.trainer(optimizer="sparse_adam")
    resumed.load_trainer_state(tmp_path / "half")
    assert resumed.pace.sparse_is_quicker is choice


def test_the_slower_step_is_not_taken(monkeypatch):
    """A trainer whose sparse steps are slow takes SAELens's own, with the same optimizer."""
    trainer = tiny.trainer(optimizer="sparse_adam", d_sae=D_SAE)
    trainer.pace = _measured(2.0, 1.0)[0]
    monkeypatch.setattr(pace.Pace, "of_step", _of_step_on_cuda(pace.Pace.of_step))
    monkeypatch.setattr(sparse_steps.SparseSteps, "take", lambda *args, **named: pytest.fail("a sparse step"))
    output = trainer.step(next(tiny.batches()))
    assert not output.feature_acts.is_sparse


def _of_step_on_cuda(stock: Any) -> Any:
    return lambda self, device, other_fits: stock(self, CUDA, other_fits)
