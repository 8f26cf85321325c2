"""SAELens's training SAEs whose features are spread over processes: each is an ordinary one, of the features it holds.

What needs all features is collective: every process has to call it, with the same tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, act_times_W_dec
from torch import Tensor, nn

from saelens_asi.activations.sae_state import feature_dim, shard_of
from saelens_asi.initialization import whole_kaiming_rows_
from saelens_asi.plugin.fields import AnyTrainingSAE, asks_for_plugin
from saelens_asi.plugin.launch import processes
from saelens_asi.plugin.sharded_checkpoints import write_whole
from saelens_asi.resume import write_json
from saelens_asi.sparse.rows import Entries
from saelens_asi.sparse.selection import batch_top_k, batch_width, select_top_k
from saelens_asi.sparse.shards import ALONE, Group, Processes, Shard
from saelens_asi.sparse.topk import TopK, top_k


class ShardedSAE(TopKTrainingSAE):
    """Mixed into a class of the TopK family.

    Attributes:
        shard: which features lie here. ``cfg.d_sae`` is their number; ``shard.d_sae`` that of all.
    """

    shard: Shard

    def initialize_weights(self) -> None:
        """Weights as those of one process, of which these are rows: to the bit, where they are made on a CPU."""
        before = torch.get_rng_state()
        super().initialize_weights()
        if self.W_dec.device.type == "meta":
            return
        torch.set_rng_state(before)

        with torch.no_grad():
            rows = torch.empty(self.W_dec.shape, dtype=self.W_dec.dtype)
            whole_kaiming_rows_(rows, self.shard)
            self.W_dec.data = rows.to(self.W_dec.device)
            if self.cfg.decoder_init_norm is not None:
                self.W_dec.data /= self.W_dec.norm(dim=-1, keepdim=True)
                self.W_dec.data *= self.cfg.decoder_init_norm
            self.W_enc.data = self.W_dec.data.T.clone().contiguous()

    def get_activation_fn(self) -> Any:
        """What one process would select, of this one's features."""
        if isinstance(self, BatchTopKTrainingSAE):
            return _BatchTopKOfAll(self.cfg.k, self.shard)
        return TopKOfAll(self.cfg.k, self.shard.features, isinstance(self, AbsTopKTrainingSAE))

    @torch.no_grad()
    def decode(self, feature_acts: Tensor) -> Tensor:
        """Collective: the reconstruction by the features of all processes. No gradient goes through it."""
        here = act_times_W_dec(feature_acts, self.W_dec, self.cfg.rescale_acts_by_decoder_norm)
        decoded = self.hook_sae_recons(self.shard.features.sum_(here.contiguous()) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(decoded), self.d_head)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Collective: SAELens's folder of the whole SAE, written by the first process."""
        state = self.state_dict()
        self.process_state_dict_for_saving(state)
        return self._write(Path(path), state, whole_config(self).to_dict())

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Collective: SAELens's folder of the whole SAE for inference, written by the first process."""
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        return self._write(Path(path), state, whole_config(self).get_inference_sae_cfg_dict())

    def _write(self, folder: Path, state: Mapping[str, Tensor], config: Any) -> tuple[Path, Path]:
        dims = {name: feature_dim(name, tensor, self.shard.n_features) for name, tensor in state.items()}
        write_whole(folder / SAE_WEIGHTS_FILENAME, state, dims, self.shard)
        if self.shard.world.is_first:
            write_json(folder / SAE_CFG_FILENAME, config)
        return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Keep the features that lie here, of weights of the whole SAE."""
        super().process_state_dict_for_loading(state_dict)
        for name, tensor in state_dict.items():
            dim = feature_dim(name, tensor, self.shard.d_sae)
            if dim is not None and tensor.shape[dim] == self.shard.d_sae:
                state_dict[name] = self.shard.own(tensor, dim).clone()

    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """Collective: of all features."""
        here = super().log_histograms()
        return {name: self.shard.of_all(torch.as_tensor(own)).numpy() for name, own in here.items()}


class TopKOfAll(nn.Module):
    """SAELens's TopK or AbsTopK, given the scores of some features of which other processes hold the rest. Collective.

    Args:
        k: features of a token, over all processes.
        group: the processes that hold the other features, and see the same tokens.
        magnitude: rank by absolute value, as AbsTopK does.
    """

    def __init__(self, k: int, group: Group, magnitude: bool = False) -> None:
        super().__init__()
        self.k, self._group, self._magnitude = k, group, magnitude

    @torch.no_grad()
    def forward(self, scores: Tensor) -> Tensor:
        flat = scores.flatten(0, -2)
        best = top_k(flat.abs() if self._magnitude else flat, min(self.k, flat.shape[1]))
        signed = TopK(flat.gather(1, best.indices), best.indices)
        selected = _as_dense(select_top_k(signed, self.k, self._group, self._magnitude), flat)
        return (selected if self._magnitude else selected.relu_()).view(scores.shape)


class _BatchTopKOfAll(nn.Module):
    """SAELens's BatchTopK likewise, over tokens that all processes see, as in an evaluation."""

    def __init__(self, k: float, shard: Shard) -> None:
        super().__init__()
        self.k, self._shard = k, replace(shard, world=shard.features, tokens=ALONE)

    @torch.no_grad()
    def forward(self, scores: Tensor) -> Tensor:
        flat = scores.flatten(0, -2)
        n_entries, n_tokens = int(self.k * len(flat)), len(flat)
        first = top_k(flat, batch_width(n_entries, n_tokens, flat.shape[1]))
        best = batch_top_k(first, n_entries, self._shard, n_tokens, lambda some, k: top_k(flat[some], k))
        return _as_dense(best.entries, flat).relu_().view(scores.shape)


def _as_dense(entries: Entries, like: Tensor) -> Tensor:
    dense = torch.zeros_like(like)
    dense[entries.tokens, entries.features] = entries.scores.to(like.dtype)
    return dense


def whole_config(sae: AnyTrainingSAE) -> TrainingSAEConfig:
    """The config of an SAE with the number of all its features."""
    config = copy.copy(sae.cfg)
    config.d_sae = shard_of(sae).d_sae
    return config


@cache
def sharded_class(base: Any) -> Any:
    """A class of the TopK family with ``ShardedSAE`` mixed in."""
    return type(base.__name__, (ShardedSAE, base), {"__module__": base.__module__})


def processes_of(cfg: TrainingSAEConfig) -> Processes:
    """The processes that share an SAE with this config."""
    return processes(cfg.batch_shards, cfg.device)  # type: ignore[attr-defined]


def shard_(sae: AnyTrainingSAE) -> None:
    """Keep the features of this process, of an SAE that was made whole. Nothing where the process is alone."""
    together = processes_of(sae.cfg)
    if together.world.size == 1 or isinstance(sae, ShardedSAE):
        return
    shard = together.shard(sae.cfg.d_sae)
    _become_sharded(sae, shard)
    with torch.no_grad():
        for name, param in sae.named_parameters():
            dim = feature_dim(name, param, shard.d_sae)
            if dim is not None:
                param.data = shard.own(param.data, dim).clone()
    sae.cfg = _own_config(sae.cfg, shard)
    sae.activation_fn = sae.get_activation_fn()


def _become_sharded(sae: AnyTrainingSAE, shard: Shard) -> None:
    if not isinstance(sae, TopKTrainingSAE):
        raise ValueError(
            f"{type(sae).__name__} cannot be spread over {shard.world.size} processes: only the TopK family can "
            "(topk, abstopk, batchtopk, matryoshka_batchtopk). Start it without torchrun, or set another architecture"
        )
    sae.__class__ = sharded_class(type(sae))  # type: ignore[arg-type]
    vars(sae)["shard"] = shard


def _own_config(cfg: Any, shard: Shard) -> Any:
    own = copy.copy(cfg)
    own.d_sae = shard.n_features
    return own


def extend_saes() -> None:
    """SAEs of runs with our fields are made as this process's part where there are several; all others as ever."""
    stock = TrainingSAE.__init__

    @functools.wraps(stock)
    def __init__(self: AnyTrainingSAE, cfg: Any, use_error_term: bool = False) -> None:
        # On "meta" to be filled with weights of the whole, which a trainer then takes its part of.
        together = processes_of(cfg) if asks_for_plugin(cfg) and cfg.device != "meta" else Processes()
        if together.world.size > 1:
            _become_sharded(self, together.shard(cfg.d_sae))
            cfg = _own_config(cfg, self.shard)
        stock(self, cfg, use_error_term)

    TrainingSAE.__init__ = __init__  # type: ignore[method-assign]


def check_same_everywhere(shard: Shard, batch: Tensor) -> None:
    """Raise ValueError, in all processes, where they were given other batches."""
    total = batch.double().sum().cpu()
    extremes = shard.world.max_(torch.stack([total, -total]))
    if shard.world.size > 1 and extremes[0] != -extremes[1]:
        raise ValueError(
            "the processes were given different batches: a data provider of your own has to give each of them the same"
        )
