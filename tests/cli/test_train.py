"""SAELens's own command line knows the two fields."""

from __future__ import annotations

import argparse

import pytest
from sae_lens.llm_sae_training_runner import _parse_cfg_args

import saelens_asi
from tests.helpers import tiny

BASE = ["--model_name", "tiny", "--hook_name", tiny.ATTN_OUT, "--dataset_path", "tiny", "--d_in", "16"]


def _parsed(*args: str, architecture: str = "topk"):
    return _parse_cfg_args(["--architecture", architecture, *BASE, *args]).sae


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_both_flags_are_parsed_for_every_architecture(architecture):
    sae = _parsed("--initializer", "active_subspace", "--optimizer", "sparse_adam", architecture=architecture)
    assert sae.architecture() == architecture
    assert (sae.initializer, sae.optimizer) == ("active_subspace", "sparse_adam")


def test_without_the_flags_the_config_is_stock():
    sae = _parsed()
    assert (sae.initializer, sae.optimizer) == ("default", "adam")


def test_settings_are_given_as_json():
    sae = _parsed("--initializer", '{"d_init": 0.2, "n_tokens": 100000, "center": "zeros"}')
    assert sae.initializer == saelens_asi.ActiveSubspaceInit(d_init=0.2, n_tokens=100_000, center="zeros")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--initializer", "activ_subspace"], ["activ_subspace", "active_subspace"]),
        (["--initializer", '{"d_init": 0}'], ["d_init=0", "at least 1"]),
        (["--initializer", '{"dinit": 4}'], ["dinit", "d_init"]),
        (["--initializer", '{"d_init": '], ["initializer", '{"d_init": ', "not JSON"]),
        (["--optimizer", "sgd"], ["sgd", "sparse_adam"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(args, named):
    with pytest.raises(argparse.ArgumentError) as caught:
        _parsed(*args)
    assert all(word in str(caught.value) for word in named), str(caught.value)


def test_d_init_above_d_in_is_named():
    with pytest.raises(ValueError, match="d_init=17 exceeds d_in=16"):
        _parsed("--initializer", '{"d_init": 17}')


def test_help_shows_both_flags(capsys):
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", "topk", "--help"])
    text = capsys.readouterr().out
    assert "--initializer {default,active_subspace,JSON}" in text
    assert "--optimizer {adam,sparse_adam}" in text
