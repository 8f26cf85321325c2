"""Active Subspace Initialization: settings, subspace, weights, and the record of it (arXiv 2508.16929)."""

from saelens_asi.initialization.directions import random_directions_, whole_kaiming_rows_
from saelens_asi.initialization.fresh_sae import check_fresh
from saelens_asi.initialization.norm import NORM_SAMPLE
from saelens_asi.initialization.provenance import METADATA_KEY, package_version, write_provenance
from saelens_asi.initialization.settings import AUTO_TOKENS_PER_DIMENSION, INITIALIZER_NAME, ActiveSubspaceInit
from saelens_asi.initialization.subspace import (
    AUTO_VARIANCE_SHARE,
    auto_d_init,
    auto_share,
    choose_d_init,
    subspace_basis,
)
from saelens_asi.initialization.weights import Initialization, initialize_

__all__ = [
    "AUTO_TOKENS_PER_DIMENSION",
    "AUTO_VARIANCE_SHARE",
    "INITIALIZER_NAME",
    "METADATA_KEY",
    "NORM_SAMPLE",
    "ActiveSubspaceInit",
    "Initialization",
    "auto_d_init",
    "auto_share",
    "check_fresh",
    "choose_d_init",
    "initialize_",
    "package_version",
    "random_directions_",
    "subspace_basis",
    "whole_kaiming_rows_",
    "write_provenance",
]
