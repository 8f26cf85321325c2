"""Everything of SAELens and TransformerLens that the package relies on, checked once at import.

What is private or undocumented there may change in any release. It is named here by its place, so that a change is said
at once and in one message, and not after an hour of training. ``tests/plugin/test_upstream.py`` reads the package's
source for what this page has forgotten.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

REQUIREMENTS = {"torch": ">=2.6", "sae-lens": ">=6.54.9,<7", "transformer-lens": ">=2.16.1,<4"}

_SAE, _TOPK = "sae_lens.saes.sae", "sae_lens.saes.topk_sae"
_TRAINER, _STORE = "sae_lens.training.sae_trainer", "sae_lens.training.activations_store"

# From modules to the names that the package imports from them, at its own import or when a command runs.
IMPORTED = {
    "sae_lens": (
        *("CacheActivationsRunner", "CacheActivationsRunnerConfig", "cache_activations_runner"),
        *("LanguageModelSAERunnerConfig", "LanguageModelSAETrainingRunner", "LoggingConfig"),
        *("MultiSAETrainingRunner", "MultiSAETrainingRunnerConfig", "SAE", "SAEConfig", "SAETrainer", "TrainingSAE"),
        *("AbsTopKTrainingSAEConfig", "BatchTopKTrainingSAEConfig", "GatedTrainingSAEConfig"),
        *("JumpReLUTrainingSAEConfig", "MatchingPursuitTrainingSAEConfig", "MatryoshkaBatchTopKTrainingSAEConfig"),
        *("StandardTrainingSAEConfig", "TopKTrainingSAEConfig", "upload_saes_to_huggingface"),
    ),
    "sae_lens.cache_activations_runner": ("load_model",),
    "sae_lens.config": ("LanguageModelSAERunnerConfig", "SAETrainerConfig"),
    "sae_lens.constants": (
        *("ACTIVATION_SCALER_CFG_FILENAME", "SAE_CFG_FILENAME", "SAE_WEIGHTS_FILENAME", "SPARSITY_FILENAME"),
        "TRAINER_STATE_FILENAME",
    ),
    "sae_lens.llm_sae_training_runner": ("LanguageModelSAETrainingRunner", "_parse_cfg_args"),
    "sae_lens.load_model": ("load_model",),
    "sae_lens.loading.pretrained_saes_directory": ("get_pretrained_saes_directory",),
    "sae_lens.pretokenize_runner": ("get_special_token_from_cfg",),
    "sae_lens.registry": ("get_sae_training_class",),
    "sae_lens.saes.abstopk_sae": ("AbsTopK", "AbsTopKSAE", "AbsTopKTrainingSAE"),
    "sae_lens.saes.batchtopk_sae": ("BatchTopKTrainingSAE",),
    "sae_lens.saes.jumprelu_sae": ("JumpReLUSAE",),
    "sae_lens.saes.matryoshka_batchtopk_sae": ("MatryoshkaBatchTopKTrainingSAE",),
    _SAE: ("TrainStepInput", "TrainStepOutput", "TrainingSAE", "TrainingSAEConfig", "mse_loss"),
    _TOPK: ("TopK", "TopKSAE", "TopKTrainingSAE", "act_times_W_dec"),
    "sae_lens.synthetic": ("SyntheticSAERunnerConfig",),
    "sae_lens.synthetic.training": ("SyntheticActivationIterator",),
    "sae_lens.tokenization_and_batching": ("concat_and_batch_sequences", "_add_tokens_to_batch"),
    "sae_lens.training._interruption": ("InterruptedException",),
    "sae_lens.training.activation_scaler": ("ActivationScaler",),
    _STORE: ("ActivationsStore",),
    "sae_lens.training.mixing_buffer": ("multi_hook_concat_split_iter",),
    "sae_lens.training.multi_sae_trainer": ("MultiSAETrainer",),
    "sae_lens.training.optim": ("get_lr_scheduler",),
    "sae_lens.training.prefetch": ("PrefetchingIterator",),
    _TRAINER: ("Evaluator", "SAETrainer", "SaveCheckpointFn"),
    "sae_lens.training.types": ("DataProvider", "MultiHookDataProvider"),
    "sae_lens.util": ("get_special_token_ids",),
    "transformer_lens.model_bridge": ("TransformerBridge",),
}

# Modules that only newer releases have, and only some commands need.
ONLY_IN_NEWER = frozenset({"transformer_lens.model_bridge"})

# Where newer releases have what stands elsewhere in the oldest; TransformerLens 4 has it nowhere else.
MOVED = {"transformer_lens.hook_points:HookedRootModule": "transformer_lens.HookedRootModule:HookedRootModule"}

# From classes to what they have: methods, class attributes, and what their methods set on an object.
MEMBERS = {
    f"{_TRAINER}:SAETrainer": (
        *("fit", "step", "load_trainer_state", "save_checkpoint", "set_final_sae_metadata", "save_trainer_state"),
        *("maybe_reset_sparsity", "_checkpoint_if_needed", "_update_pbar", "build_train_step_log_dict"),
        *("_train_step", "_is_logging_step", "get_coefficients", "autocast_if_enabled"),
        *("cfg", "sae", "data_provider", "evaluator", "activation_scaler", "checkpoint_thresholds"),
        *("optimizer", "lr_scheduler", "coefficient_schedulers", "n_training_steps", "n_training_samples"),
        *("act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples", "dead_neurons"),
    ),
    "sae_lens.training.multi_sae_trainer:MultiSAETrainer": (
        *("fit", "load_checkpoint", "save_checkpoint", "_estimate_scaling_factors", "_maybe_log_sparsity"),
        *("_checkpoint_if_needed", "_update_pbar", "n_training_steps", "saes", "cfg", "trainers", "hook_names"),
        *("data_provider", "evaluator", "save_checkpoint_fn", "checkpoint_thresholds", "n_training_samples"),
    ),
    f"{_STORE}:ActivationsStore": (
        *("model", "model_kwargs", "dataset", "hook_name", "hook_head_index", "exclude_special_tokens"),
        *("_hook_names", "_hook_head_indices", "_dataloader", "_iterate_tokenized_sequences", "iterable_sequences"),
        *("_iterate_raw_dataset_tokens", "_iterate_filtered_activations", "_iterate_filtered_multi_hook_activations"),
        *("get_data_loader", "get_multi_hook_data_loader", "from_config", "load", "_hook_d_ins"),
        *("n_batches_in_buffer", "training_context_size", "train_batch_size_tokens", "activations_mixing_fraction"),
        *(
            "context_size",
            "disable_concat_sequences",
            "is_dataset_tokenized",
            "sequence_separator_token",
            "prepend_bos",
        ),
        *("n_dataset_processed", "cached_activation_dataset", "current_row_idx", "get_batch_tokens"),
        *("get_activations", "get_multi_hook_activations", "device"),
        *("get_filtered_llm_batch", "_get_filtered_multi_hook_llm_batch"),
    ),
    "sae_lens.training.prefetch:PrefetchingIterator": ("_lock", "_queue", "close"),
    "sae_lens.training.activation_scaler:ActivationScaler": (
        *("scaling_factor", "whitening", "estimate_scaling_factor", "estimate_whitening", "load", "__call__"),
    ),
    "sae_lens.training.activation_scaler:ActivationWhitening": ("mean", "matrix", "inverse_matrix"),
    f"{_SAE}:TrainingSAEConfig": (
        *("to_dict", "get_training_architecture_details", "architecture"),
        *("get_inference_config_class", "get_inference_sae_cfg_dict"),
    ),
    f"{_SAE}:SAE": (
        *("from_dict", "from_pretrained", "load_from_disk", "encode", "decode", "process_sae_in", "reshape_fn_out"),
        *("W_enc", "W_dec", "b_dec", "d_head", "device", "dtype", "activation_fn"),
        *("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out", "ln_mu", "ln_std", "x_norm_coeff"),
        *("hook_z_reshaping_mode", "turn_off_forward_pass_hook_z_reshaping"),
        *("turn_on_forward_pass_hook_z_reshaping", "fold_activation_norm_scaling_factor", "fold_activation_whitening"),
    ),
    f"{_SAE}:TrainingSAE": (
        *("training_forward_pass", "encode_with_hidden_pre", "calculate_aux_loss", "mse_loss_fn"),
        *("process_state_dict_for_saving_inference", "save_inference_model"),
    ),
    f"{_TOPK}:TopK": ("k",),
    f"{_TOPK}:TopKTrainingSAE": ("b_enc", "calculate_topk_aux_loss"),
    "sae_lens.saes.jumprelu_sae:JumpReLUSAE": ("b_enc", "threshold"),
    "sae_lens.saes.batchtopk_sae:BatchTopKTrainingSAE": ("topk_threshold", "update_topk_threshold"),
    "transformer_lens.hook_points:HookedRootModule": ("hook_dict", "run_with_cache"),
    "transformer_lens.hook_points:HookPoint": ("fwd_hooks", "add_hook"),
    "transformer_lens.hook_points:LensHandle": ("hook",),
}

# From dataclasses to the fields that are read.
FIELDS = {
    f"{_SAE}:TrainingSAEConfig": (*("d_in", "d_sae", "normalize_activations", "apply_b_dec_to_input", "metadata"),),
    f"{_TOPK}:TopKTrainingSAEConfig": (
        *("k", "use_sparse_activations", "rescale_acts_by_decoder_norm", "aux_loss_coefficient", "decoder_init_norm"),
    ),
    "sae_lens:MatryoshkaBatchTopKTrainingSAEConfig": ("matryoshka_widths",),
    f"{_SAE}:TrainStepOutput": ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses", "metrics"),
    "sae_lens.config:SAETrainerConfig": (
        *("total_training_samples", "train_batch_size_samples", "dead_feature_window", "device", "logger"),
        *("n_batches_for_norm_estimate", "checkpoint_path", "lr", "lr_end", "lr_scheduler_name"),
        *("lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "adam_beta1", "adam_beta2"),
    ),
    "sae_lens:LanguageModelSAERunnerConfig": (
        *("sae", "from_pretrained_path", "output_path", "use_cached_activations", "cached_activations_path"),
    ),
    "sae_lens:CacheActivationsRunnerConfig": (
        *("dataset_path", "model_name", "model_class_name", "model_batch_size", "hook_name", "d_in", "training_tokens"),
        *("context_size", "new_cached_activations_path", "shuffle", "dtype", "device", "buffer_size_gb"),
        *("model_kwargs", "prepend_bos", "autocast_lm"),
    ),
    "sae_lens:LoggingConfig": ("wandb_log_frequency",),
}

# From functions to the parameters that they are called with: all that have no default, and some that do.
PARAMETERS = {
    "sae_lens:CacheActivationsRunner.__init__": ("cfg", "override_dataset"),
    "sae_lens:CacheActivationsRunnerConfig.__init__": (
        *("dataset_path", "model_name", "model_batch_size", "hook_name", "d_in", "training_tokens"),
    ),
    f"{_TRAINER}:SAETrainer.__init__": ("cfg", "sae", "data_provider", "evaluator", "save_checkpoint_fn"),
    f"{_TRAINER}:SAETrainer._train_step": ("sae", "sae_in"),
    f"{_TRAINER}:SAETrainer._update_pbar": ("step_output", "pbar"),
    f"{_TRAINER}:SAETrainer.build_train_step_log_dict": ("output", "n_training_samples"),
    "sae_lens.training.multi_sae_trainer:MultiSAETrainer._update_pbar": ("step_outputs", "pbar"),
    f"{_SAE}:TrainStepInput": (*("sae_in", "coefficients", "dead_neuron_mask", "n_training_steps", "is_logging_step"),),
    f"{_STORE}:ActivationsStore.get_batch_tokens": ("batch_size",),
    f"{_STORE}:ActivationsStore.get_filtered_llm_batch": ("raise_on_epoch_end",),
    f"{_STORE}:ActivationsStore._get_filtered_multi_hook_llm_batch": ("raise_on_epoch_end",),
    "sae_lens.training.prefetch:PrefetchingIterator.__init__": ("source", "prefetch"),
    "sae_lens.training.activation_scaler:ActivationScaler.estimate_scaling_factor": (
        *("d_in", "data_provider", "n_batches_for_norm_estimate"),
    ),
    "sae_lens.training.activation_scaler:ActivationScaler.estimate_whitening": (
        *("d_in", "data_provider", "n_batches_for_norm_estimate"),
    ),
    "sae_lens.training.optim:get_lr_scheduler": (
        *("scheduler_name", "optimizer", "training_steps", "lr", "warm_up_steps", "decay_steps", "lr_end"),
        "num_cycles",
    ),
    "sae_lens.tokenization_and_batching:concat_and_batch_sequences": (
        *("tokens_iterator", "context_size", "begin_batch_token_id", "sequence_separator_token_id"),
    ),
    "sae_lens.tokenization_and_batching:_add_tokens_to_batch": (
        *("batch", "tokens", "offset", "context_size", "is_start_of_sequence", "begin_batch_token_id"),
        *("begin_sequence_token_id", "sequence_separator_token_id"),
    ),
    "sae_lens.util:get_special_token_ids": ("tokenizer",),
}

_OWN_FIELDS = (
    *("initializer", "optimizer", "silent_moments", "revive", "checkpoint_minutes", "keep_checkpoints"),
    *("checkpoint_buffer", "max_skipped_fraction", "resume", "batch_shards"),
)


def check_upstream() -> None:
    """Raise ImportError when an installed package is not one that this plugin was made for."""
    for package, bounds in REQUIREMENTS.items():
        installed = version(package)
        if not SpecifierSet(bounds).contains(installed, prereleases=True):
            raise ImportError(
                f"saelens_asi needs {package}{bounds}, found {installed}: pip install '{package}{bounds}'"
            )
    moved = [*_missing_imports(), *_missing(MEMBERS, _members), *_missing(FIELDS, _fields)]
    moved += [*_missing(PARAMETERS, _parameters), *_changed_calls()]
    config = _resolve(f"{_SAE}:TrainingSAEConfig")
    own = sorted(_fields(config).intersection(_OWN_FIELDS)) if config is not None else []
    moved += [f"TrainingSAEConfig.{name} (SAELens has this field itself now)" for name in own]
    if moved:
        raise ImportError(
            f"saelens_asi does not fit sae-lens {version('sae-lens')} with transformer-lens "
            f"{version('transformer-lens')}: {', '.join(dict.fromkeys(moved))} changed. Install a newer saelens_asi, "
            "or sae-lens==6.54.12"
        )


def _missing_imports() -> Iterator[str]:
    for module, names in IMPORTED.items():
        if module in ONLY_IN_NEWER and find_spec(module) is None:
            continue
        owner = _module(module)
        if owner is None:
            yield module
        else:
            yield from (f"{module}.{name}" for name in names if not hasattr(owner, name))


def _missing(table: Mapping[str, tuple[str, ...]], names_of: Callable[[Any], Collection[str]]) -> Iterator[str]:
    for place, names in table.items():
        owner = _resolve(place)
        if owner is None:
            yield place.replace(":", ".")
        else:
            there, label = names_of(owner), place.partition(":")[2]
            yield from (f"{label}.{name}" for name in names if name not in there)


def _module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def _resolve(place: str) -> Any:
    """What stands at ``module:name`` or ``module:Class.name``; None where nothing does."""
    newer = MOVED.get(place, "")
    if newer and _module(newer.partition(":")[0]) is not None:
        place = newer
    module, _, path = place.partition(":")
    thing: Any = _module(module)
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing


def _members(cls: type) -> set[str]:
    """What a class has, declares, or sets in its methods, as their code says: no object is there yet to ask."""
    names = set(dir(cls))
    for base in cls.__mro__:
        names.update(inspect.get_annotations(base))
        if base.__module__.startswith(("sae_lens", "transformer_lens")):
            functions = (inspect.unwrap(value) for value in vars(base).values() if inspect.isfunction(value))
            names.update(name for function in functions for name in _stored(function.__code__))
    return names


def _stored(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function within the method
            yield from _stored(constant)


def _fields(cls: type) -> set[str]:
    return set(getattr(cls, "__dataclass_fields__", ()))


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(function).parameters.keys()


def _changed_calls() -> Iterator[str]:
    """Functions that want more than they are called with."""
    for place, names in PARAMETERS.items():
        owner = _resolve(place)
        parameters = inspect.signature(owner).parameters.values() if callable(owner) else ()
        needed = [one for one in parameters if one.default is one.empty and one.kind < one.VAR_POSITIONAL]
        new = [one.name for one in needed if one.name not in (*names, "self")]
        yield from (f"{place.partition(':')[2]}({name}=...)" for name in new)
