"""Activations of a model by hook name, for HookedTransformer and TransformerBridge alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from sae_lens.util import get_special_token_ids
from torch import Tensor, nn

Reader = Callable[[Tensor], None]
Writer = Callable[[Tensor], Tensor]


class HookedModel(Protocol):
    """What is used of a HookedTransformer and of a TransformerBridge alike: neither's type fits both."""

    @property
    def cfg(self) -> Any: ...

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    @property
    def blocks(self) -> Any: ...

    def __call__(self, tokens: Tensor, **options: Any) -> Any: ...


# Names that need no layer: what `--hooks` and `layer_hooks` take.
SHORT_NAMES = {
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "hook_z": "attn.hook_z",
    "z": "attn.hook_z",
}


class _AllRead(Exception):
    """Every activation that was asked for has been read: the rest of the forward pass is not needed."""


def layer_hooks(hooks: Iterable[str], layers: Iterable[int]) -> list[str]:
    """Full names of short ones (``attn_out``) in these layers; names with a dot are passed on as they are."""
    names, layers = [], list(layers)
    for hook in hooks:
        if "." in hook:
            names.append(hook)
        elif hook in SHORT_NAMES:
            names += [f"blocks.{layer}.{SHORT_NAMES[hook]}" for layer in layers]
        else:
            raise ValueError(f"hook {hook!r} must be one of {list(SHORT_NAMES)}, or a full name such as 'blocks.0.ln1'")
    return names


def parse_layers(words: Sequence[str], n_layers: int) -> list[int]:
    """Layer numbers from ``all``, numbers and ranges. Raises ValueError for a layer that is not there."""
    if list(words) == ["all"]:
        return list(range(n_layers))
    layers: list[int] = []
    for word in words:
        if not re.fullmatch(r"\d+(-\d+)?", word):
            raise ValueError(f"--layers {word!r} must be all, a number, or a range such as 10-15")
        first, _, last = word.partition("-")
        layers += range(int(first), int(last or first) + 1)
    outside = [layer for layer in layers if layer >= n_layers]
    if outside or not layers:
        raise ValueError(f"--layers {' '.join(words)}: this model has layers 0 to {n_layers - 1}")
    return sorted(set(layers))


def resolve_hook_names(names: str | Iterable[str], known: Iterable[str]) -> list[str]:
    """Expand patterns against the names that exist: ``*`` stands for anything without a dot.

    Returns each name once, in the order asked for, the matches of a pattern in the order of the layers.

    Raises:
        ValueError: for a name or pattern that matches nothing, with the nearest names.
    """
    known = list(known)
    resolved: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if "*" in name:
            expression = re.compile(r"[^.]*".join(map(re.escape, name.split("*"))))
            matches = sorted(filter(expression.fullmatch, known), key=_natural)
        else:
            matches = [name] if name in known else []
        if not matches:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ": see model.hook_dict for its names"
            raise ValueError(f"no hook of this model is called {name!r}{hint}")
        resolved |= dict.fromkeys(matches)
    if not resolved:
        raise ValueError("hook_names is empty: name at least one hook")
    return list(resolved)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def hook_points(model: HookedModel, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """From each resolved name to the model's hook point; aliases of one point lead to the same object."""
    known = getattr(model, "hook_dict", None)
    if known is None:
        raise ValueError(
            f"a {type(model).__name__} has no hook points: pass a HookedTransformer, or a TransformerBridge "
            "(TransformerBridge.boot_transformers(name))"
        )
    return {name: known[name] for name in resolve_hook_names(names, known)}


# Names of modules in transformers, with which SAELens's AutoModel route trains, and what a HookedTransformer calls
# their outputs.
_LAYER = r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)"
_MODULE_OUTPUTS = {
    rf"{_LAYER}\.(?:self_attn|attn|attention)(?:\.(?:o_proj|c_proj|out_proj|dense))?": "hook_attn_out",
    rf"{_LAYER}\.mlp(?:\.(?:down_proj|c_proj|dense_4h_to_h))?": "hook_mlp_out",
    _LAYER: "hook_resid_post",
}


def device_of(model: HookedModel) -> torch.device | str:
    """Where a model's tokens go."""
    return getattr(model.cfg, "device", None) or "cpu"


def hook_of_module(model: HookedModel, name: str) -> str:
    """The hook that holds the output of a transformers module, such as ``model.layers.15.self_attn.o_proj``.

    Names of hooks, and any other, are returned as they are.
    """
    known = getattr(model, "hook_dict", {})
    if name in known:
        return name
    original = getattr(model, "original_model", None)
    if original is not None:  # a TransformerBridge: the module itself knows its hook
        try:
            module = original.get_submodule(name)
        except AttributeError:
            return name
        return getattr(getattr(module, "hook_out", None), "name", None) or name
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        return name  # a norm stands between the module and the hook
    for pattern, hook in _MODULE_OUTPUTS.items():
        layer = re.fullmatch(pattern, name)
        if layer and f"blocks.{layer[1]}.{hook}" in known:
            return f"blocks.{layer[1]}.{hook}"
    return name


@torch.no_grad()
def read_activations(
    model: HookedModel,
    tokens: Tensor,
    points: Mapping[str, nn.Module],
    readers: Mapping[str, Reader],
    is_text: Tensor | None = None,
) -> None:
    """One forward pass that hands the activations of each hook to its reader, and stops after the last of them.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: (n_windows, n_positions) token ids.
        points: of ``hook_points``.
        readers: what to call with the activations (n_windows, n_positions, ...), for names in ``points``.
        is_text: (n_windows, n_positions) bool, False at padding.

    Raises:
        ValueError: when the forward pass does not reach a hook.
    """
    waiting = set(readers)
    padding = {} if is_text is None or bool(is_text.all()) else {"attention_mask": is_text.long()}
    with _attached((points[name], _reading(name, reader, waiting)) for name, reader in readers.items()):
        try:
            model(tokens, return_type=None, **padding)
        except _AllRead:
            return
    raise ValueError(
        f"the forward pass of this model does not reach {sorted(waiting)}: some hooks need a setting, such as "
        "model.set_use_attn_result(True)"
    )


def _reading(name: str, reader: Reader, waiting: set[str]) -> Callable[..., None]:
    def hook(activations: Tensor, hook: Any) -> None:
        reader(activations.detach())
        waiting.discard(name)
        if not waiting:
            raise _AllRead

    return hook


@torch.no_grad()
def logits_with(
    model: HookedModel, tokens: Tensor, point: nn.Module | None = None, write: Writer | None = None
) -> Tensor:
    """(n_windows, n_positions, d_vocab) logits, with the activations at a hook point replaced by ``write`` of them."""
    replaced = [] if point is None or write is None else [(point, _writing(write))]
    with _attached(replaced):
        logits: Tensor = model(tokens, return_type="logits")
    return logits


@torch.no_grad()
def logits_at(
    model: HookedModel, tokens: Tensor, where: Tensor, point: nn.Module | None = None, write: Writer | None = None
) -> Tensor:
    """(n, d_vocab) logits at n positions, and as in ``logits_with``; a model's unembedding makes no others.

    Args:
        model: a HookedTransformer or TransformerBridge. Where its unembedding cannot be told, it makes all.
        tokens: (n_windows, n_positions) token ids.
        where: (n_windows, n_positions) bool; the logits come in the order of the windows.
        point: as in ``logits_with``.
        write: as in ``logits_with``.
    """
    unembedding = getattr(model, "unembed", None)
    if not isinstance(unembedding, nn.Module) or any(point is module for module in unembedding.modules()):
        return logits_with(model, tokens, point, write)[where]
    chosen: list[int] = []

    def choose(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or inputs[0].shape[:-1] != where.shape:
            return None
        vectors = inputs[0][where.to(inputs[0].device)]
        chosen.append(len(vectors))
        return vectors[None], *inputs[1:]

    handle = unembedding.register_forward_pre_hook(choose)
    try:
        logits = logits_with(model, tokens, point, write)
    finally:
        handle.remove()
    return logits[0] if chosen else logits[where]


def _writing(write: Writer) -> Callable[..., Tensor]:
    return lambda activations, hook: write(activations)


@contextmanager
def _attached(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Hooks on hook points or modules for as long as the block runs. Takes away what it added, and nothing else."""
    with ExitStack() as stack:
        for point, function in hooks:
            _attach(stack, point, function)
        yield


def _attach(stack: ExitStack, point: Any, function: Callable[..., Any]) -> None:
    if not hasattr(point, "fwd_hooks"):  # a module of the model: the first of its outputs
        handle = point.register_forward_hook(
            lambda module, inputs, output: function(output[0] if isinstance(output, tuple) else output, hook=module)
        )
        stack.callback(handle.remove)
        return
    point.add_hook(function)
    own = point.fwd_hooks[-1]

    def remove() -> None:
        own.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not own]

    stack.callback(remove)


def attention_output(model: HookedModel, layer: int) -> nn.Module:
    """Where the attention's own output can be read: before any norm that stands between it and ``hook_attn_out``."""
    own: nn.Module = model.hook_dict.get(f"blocks.{layer}.attn.hook_out", model.blocks[layer].attn)
    return own


def attention_output_weights(model: HookedModel, layer: int) -> tuple[Tensor, Tensor]:
    """W_O (n_heads * d_head, d_model) and b_O (d_model,) of a layer; b_O is 0 where there is none."""
    attention = model.blocks[layer].attn
    weight = attention.W_O.detach()
    weight = weight.reshape(-1, weight.shape[-1])
    bias = getattr(attention, "b_O", None)
    return weight, torch.zeros_like(weight[0]) if bias is None else bias.detach()


def as_vectors(activations: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """(n_windows * n_positions, width) from ``shape`` = (n_windows, n_positions); heads are laid side by side.

    Raises ValueError for activations that are not one vector a token, such as attention patterns.
    """
    if activations.ndim < 3 or tuple(activations.shape[:2]) != tuple(shape):
        raise ValueError(
            f"{name!r} holds {tuple(activations.shape)} for {shape[0]} windows of {shape[1]} tokens, which is not "
            "one vector a token: choose a hook such as 'blocks.0.hook_attn_out'"
        )
    return activations.reshape(shape[0] * shape[1], -1)


def special_token_ids(model: HookedModel, exclude_special_tokens: bool | Sequence[int]) -> Tensor:
    """Ids of BOS, EOS, padding and the like as SAELens's ``exclude_special_tokens`` takes them: True, False or ids."""
    if exclude_special_tokens is False:
        return torch.tensor([], dtype=torch.long)
    if exclude_special_tokens is True:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "exclude_special_tokens=True asks the model's tokenizer, and this model has none: give the ids of the "
                "tokens to leave out, or False"
            )
        return torch.tensor(get_special_token_ids(tokenizer), dtype=torch.long)
    return torch.tensor(list(exclude_special_tokens), dtype=torch.long)


def keep_mask(tokens: Tensor, special_ids: Tensor, exclude_positions: Sequence[int] = ()) -> Tensor:
    """(n_windows, n_positions) bool: which tokens count. Positions may be negative, from the end of the window.

    Raises ValueError for a position outside the window.
    """
    keep = ~torch.isin(tokens, special_ids.to(tokens.device))
    n_positions = tokens.shape[1]
    outside = [position for position in exclude_positions if not -n_positions <= position < n_positions]
    if outside:
        raise ValueError(f"exclude_positions={outside} lie outside windows of {n_positions} tokens")
    keep[:, list(exclude_positions)] = False
    return keep


# Names that only a TransformerBridge has, beside the aliases that it shares with a HookedTransformer.
_CANONICAL_KINDS = {
    "attn.hook_z": "hook_z",
    "attn.o.hook_in": "hook_z",
    "attn.hook_out": "attn_out",
    "attn.o.hook_out": "attn_out",
    "mlp.hook_out": "mlp_out",
    "mlp.out.hook_out": "mlp_out",
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
}


def split_name(hook_name: str) -> tuple[int, str]:
    """Layer (-1 where it has none) and kind of a hook: ``blocks.3.hook_mlp_out`` -> (3, ``mlp_out``)."""
    layer = re.search(r"\.(\d+)\.", hook_name)
    rest = hook_name if layer is None else hook_name[layer.end() :]
    kind = _CANONICAL_KINDS.get(rest) or rest.removeprefix("hook_")
    return (int(layer.group(1)) if layer else -1), kind
