"""The README's region."""

from __future__ import annotations

from regions.cpu import speed_table
from regions.gpu import gpu_readme
from regions.models import model_readme
from regions.quality import quality, rule_name, run_of, setting
from regions.results import BASE, QUALITY, TASKS, percent, standard_error, table, wrapped

README_LENGTHS = (1024, 2048, 4096, 8000)
README_RUNS = (BASE, {**BASE, "density": 0.1}, {**BASE, "block_size": 128})


def readme_results() -> str:
    """Region: today's rule with dense beside it, then the speed on a GPU and on a CPU."""
    data, rows = quality()
    dense, sparse = rows[0], [run_of(rows, **config) for config in README_RUNS]
    body = [
        [
            rule_name(row["config"]),
            percent(row["block_density"]),
            *(f"{row[task]['accuracy']:.2f} ({dense[task]['accuracy']:.2f})" for task in TASKS),
            f"{row['prose_nll']:.3f} ({dense['prose_nll']:.3f})",
        ]
        for row in sparse
    ]
    needles = (f"one needle in {text}" for text in ("repeated text", "prose"))
    head = ("attention", "blocks read", *needles, "one of four needles", "prose NLL, nats")
    error = standard_error(dense["essay"]["accuracy"], data["samples"])
    text = (
        f"Quality, dense attention of the same run in brackets. {setting(data, QUALITY)} One standard error of the "
        f"prose needles is about {100 * error:.0f} points."
    )
    return "\n\n".join([wrapped(text), table(head, body), gpu_readme(), model_readme(), speed_table(README_LENGTHS)])
