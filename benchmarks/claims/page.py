"""Every claim of the paper beside what was measured here: writes docs/claims.md and its figures.

The table of what brings dead features back, in docs/problems/dead_features.md, is written with it.

    make claims                              # the sweeps behind it (hours on two cores), then the page
    python -m benchmarks.claims.page   # the page alone, from the results in benchmarks/results

Numbers and verdicts come from the result files; nothing on the page is written by hand but the paper's own figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.claims import (
    batchtopk,
    figures,
    of_activations,
    of_deaths,
    of_lorsa,
    of_revival,
    of_training,
    of_universality,
    scaling,
)
from benchmarks.claims.evidence import Claim, ResultFiles
from benchmarks.claims.sections import lost, sections
from benchmarks.claims.statistics import FAILS, HOLDS, PARTLY, UNJUDGED
from saelens_asi.evaluation.tables import markdown_table
from saelens_asi.sweep.results import mean_of

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "claims.md"
FIGURES = ROOT / "docs" / "claims"
DEAD_FEATURES = ROOT / "docs" / "problems" / "dead_features.md"

CLAIMS: tuple[Callable[[ResultFiles], Claim], ...] = (
    of_activations.low_rank,
    of_universality.collapse_everywhere,
    of_activations.decay,
    of_activations.components,
    of_activations.output_weights,
    of_universality.output_weights_everywhere,
    of_activations.dead_follows_rank,
    *of_deaths.CLAIMS,
    *of_training.CLAIMS,
    *of_lorsa.CLAIMS,
)


INTRODUCTION = """# The paper's claims, measured again

[arXiv 2508.16929](https://arxiv.org/abs/2508.16929) made its measurements on Llama-3.1-8B and others, with up to 2.5
billion tokens a dictionary. Here is what one finds on two CPU cores: the same questions at a thousandth of the scale,
on SmolLM2-135M (d = 576, 30 layers) and Gemma-3 270M (d = 640, 18 layers), the World English Bible, the kernel's
documentation and Python's library. This page is generated (`make claims`); numbers and verdicts come from the result
files in `benchmarks/results`. Where another contender does better than ours stands first.

Unless a line says otherwise: SmolLM2-135M, the Bible, attention output of layer 15, TopK with k = 32, {steps} steps of
{batch:,} activations, errors and dead features on {held_out:,} held-out tokens (dead: fires on none of them; the paper
counts over 10 million). Every method has a learning rate of its own at each size, that of the lowest error ({rates}
were tried, not all at every size). Of ASI's, rates that leave under 5 % of the features dead go first where there are
any, since a high rate can buy a lower error with the lives of features ({trade}); TopK and AuxK are not held back so.
**TopK** and **AuxK** start as the paper's do, evenly in all of d with the norm of the lowest initial error; AuxK's
coefficient is 1/32, and a feature counts as dead for it after {dead_after:,} silent tokens. **ASI** is this package's
initialization with the dimension that was its default when these were trained (active subspace of 90 % of the variance,
106 of 576; least-squares norm, mean as centre), and **SparseAdam** has moments that stay in silence, as they did by
default then; **ASI (paper)** has zeros as centre and 18.75 % of d. What the defaults
are today, and why, stands under "The dimension of the subspace" and "Moments of silent features".
NMSE: E|x - x_hat|^2 / E|x - E x|^2.

**Verdicts.** A claim is a list of pairs and counts. A pair is a difference over shared seeds (or layers) with its 95 %
interval (Student); where a pair has one seed, the deviation of a seed is that of all cells with several, pooled (of
dead features, where both leave under 10 % dead, of cells that do). A
claim *holds* where the interval lies on the claimed side in every pair, *partly* in some, *does not hold* in none. A
single run of something that was never repeated is *not judged*.
"""


TEXTS = {
    "plan": """
Every contender of the comparison gets the same activations in the same order, batches of 1,024, k = 32, the same
schedule, and four tries in a pilot at a tenth of the tokens: learning rates 0.0005, 0.001, 0.002 and 0.004; of AuxK
two rates with two windows (51,200 and 102,400 tokens).
The try of the lowest error goes into the comparison, however many features it leaves
dead. SAELens's own settings are its norm of 0.1, its coefficient of 1 and its window of 1,000 steps. Models run in
bfloat16 over windows of 128 tokens. *Dead* features fire on none of the held-out tokens; *silent* ones on none of
these and of the last 40 % of training either. What is not trained yet stands here as a number; the command goes on
where it stopped.
""",
    "pilot": "SmolLM2-135M, layer 15's attention output, the kernel's documentation, 200k tokens, one seed.",
    "factorial": """
SmolLM2-135M, layer 15's attention output, the kernel's documentation, 2M tokens, three seeds. Fifteen of the
contenders were trained on an H200 that fourteen runs shared, so that their seconds say nothing; the sixteenth, ours, on
a CPU, from activations of the CPU, which differ in the last bits of bfloat16. Dead: on 200,000 held-out tokens; in the
figure on 30,000, but for the last point of each line.
""",
    "ingredients": """
Differences within the table above, paired by seed, with the 95 % interval over seeds (Student): the error in per cent,
features in points. Both sides have the rate that the pilot chose for them.
""",
    "slower": """
The pilot chooses by the error after a tenth of the tokens, and that favours rates at which features die later on. The
same tokens at a rate of 0.001:
""",
    "longer": """
The same, trained on 4M tokens: does the error still fall, do more features die? One seed, beside the mean over those
of 2M tokens.
""",
    "moments": """
SparseAdam from the flag's start, layer 15's attention output (SmolLM2) and layer 9's (Gemma), the kernel's
documentation: `silent_moments="keep"` beside `"decay"`, the default, which is what the code released with the paper
does. *Dead*, and *silent* in the last 40 % of training too; the mean over seeds. Where many features meet few tokens,
moments that decay cost error: up to 6 % with TopK, 7 and 65 % with BatchTopK on SmolLM2 and Gemma, by the lines of
32,768 and 131,072 features under "What brings dead features back".
""",
    "elsewhere": """
Attention outputs of Gemma's layer 9 and of SmolLM2's layer 15, 500k tokens, one seed, and the learning rates that the
pilot chose for SmolLM2 on the kernel's documentation: nothing was tuned here. Dead: on 100,000 held-out tokens.
""",
    "d_init": """
8,192 features, 195 steps, learning rate 0.001, mean as centre, SparseAdam. Error and silent features at what a rule
asks for are interpolated between the dimensions that were tried.
""",
    "d_init_sizes": """
Attention output of layer 15 (SmolLM2) and of layer 9 (Gemma), the kernel's documentation, 195 steps. The best dimension
grows with the number of features, which crowd in a small subspace. So `d_init="auto"` is an eighth of d up to fourteen
features for each dimension of d, grows from there on as the square root of their number, and stops at a quarter; beyond
65,536 features nothing was tried.
""",
    "universality": """
The paper's figure 1: effective rank (Roy and Vetterli 2007) over the width, of every layer; mean and range over
layers. Models run in bfloat16 over windows of 256 tokens, BOS left out. In Gemma-3 a norm with weights of its own
follows the output of attention and of the MLP: attn_out and mlp_out are what it adds to the residual stream, as SAEs
read them; *before the norm* is what W_O and the MLP write.
""",
    "deaths": """
Spearman's rank correlations of dead features with gamma (the length of the mean over the deviation) and with the
effective rank over d, over layers and kinds of hooks: alone, and with the other of the two taken out (*beside*).
*Lead*: by how much gamma's is then larger than the rank's, signs left out. In brackets 95 % of 4,000 bootstrap samples
of the hooks; with so few hooks they are rough. One *explains the other away* where its own lies on one side of zero,
the other's does not, and the lead does.
""",
    "worth": """
Features that live here and not in the baseline are *added*. *Nearest other*: the median over live features of the
largest cosine to another one, among as many features as live in the baseline. *KL*: the share of the
divergence made by zero ablation that comes back with all features, with those added alone, and with as many live ones
at random. *AUC*: of a probe on the one best feature, mean over the tasks that the text gives (book, testament, code or
prose, classes of Python tokens), with the half width of its interval over splits of the documents, and beside it the
difference to the baseline. *SAEBench*: the accuracy of its own sparse probing (arXiv 2503.09532) with one feature, on
the same text.
""",
    "d_init_aside": "A layer of each model, on code, that were set aside before the rule was looked for.",
}


def introduction(e: ResultFiles) -> list[str]:
    """Its lines."""
    text = INTRODUCTION.format(**shared_settings(e), rates=rates_tried(e), trade=trade_off(e))
    paragraphs = [textwrap.fill(paragraph, 120) for paragraph in text.split("\n\n")]
    return ["\n\n".join(paragraphs), ""]


def claims_page(e: ResultFiles) -> str:
    """The whole page, Markdown."""
    claims = [claim(e) for claim in CLAIMS]
    cells = [
        (str(i), claim.claim, claim.paper, claim.ours, claim.seeds, f"**{claim.verdict}**")
        for i, claim in enumerate(claims, start=1)
    ]
    lines = [
        *introduction(e),
        *lost(e),
        "## Claim by claim",
        "",
        markdown_table(["", "claim", "paper", "here", "seeds", "verdict"], cells, align="rlllll"),
    ]
    count = {word: sum(claim.verdict == word for claim in claims) for word in (HOLDS, PARTLY, FAILS, UNJUDGED)}
    lines += [
        "",
        f"{count[HOLDS]} of {len(claims)} hold, {count[PARTLY]} partly, {count[FAILS]} do not at this scale; "
        f"{count[UNJUDGED]} have one seed and are not judged.",
        "",
    ]
    for command in dict.fromkeys(claim.command for claim in claims):
        numbers = ", ".join(str(i + 1) for i, claim in enumerate(claims) if claim.command == command)
        lines.append(f"- `{command}` measures {numbers} again.")
    lines.append("")
    lines += sections(e, {name: textwrap.fill(text.strip(), 120) for name, text in TEXTS.items()})
    lines += of_revival.section(e.parts.get(of_revival.PART, []))
    lines += scaling.section(e.parts.get(scaling.PART, []))
    lines += batchtopk.section(e.parts.get(batchtopk.PART, []))
    return "\n".join(lines)


def rates_tried(e: ResultFiles) -> str:
    rates = sorted({row["lr"] for row in e.sweeps["d_sae"]})
    return ", ".join(f"{rate:g}" for rate in rates)


def trade_off(e: ResultFiles) -> str:
    """What higher rates do to our method, size 8,192."""
    rows = [row for row in e.sweeps["d_sae"] if (row["method"], row["d_sae"]) == ("asi_sparse_adam", 8192)]
    at = {rate: [row for row in rows if row["lr"] == rate] for rate in sorted({row["lr"] for row in rows})}
    results = [
        f"{rate:g}: {mean_of(some, 'nmse'):.3f}, {mean_of(some, 'dead_fraction'):.1%} dead" for rate, some in at.items()
    ]
    return f"ASI + SparseAdam with 8,192 features, {'; '.join(results)}"


def shared_settings(e: ResultFiles) -> dict[str, int]:
    """What the introduction says of the training."""
    shared = e.shared["d_sae"]
    training = shared["training"]
    return {
        "steps": training["training_tokens"] // training["batch_size"],
        "batch": training["batch_size"],
        "held_out": shared["held_out_tokens"],
        "dead_after": training["dead_after_tokens"],
    }


def main() -> None:
    e = ResultFiles()
    PAGE.write_text(claims_page(e))
    of_revival.update(DEAD_FEATURES, e.parts[of_revival.PART])
    print("\n".join(str(path) for path in (PAGE, DEAD_FEATURES, *figures.write(e, FIGURES))))


if __name__ == "__main__":
    main()
