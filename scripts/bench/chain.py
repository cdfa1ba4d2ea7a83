"""The main job on digits over several seeds: is the whole chain worth its price?

    PYTHONPATH=. python scripts/bench/chain.py --output benchmarks/chain.json

Runs `scripts/compress.py` once per seed (weights, shuffles) and compares each
version with the dense model of its own run. Exits 1 where the chain is less than 10
times smaller in bytes, needs more than 40 % of the FLOPs, or loses more than 1.0
point of accuracy, averaged over the seeds.
"""

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxeff.training.cli import main
from jaxeff.training.results import about, write_json
from scripts import compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The main job on digits over several seeds."""

    seeds: int = 5
    """Runs, with the seeds 0, 1, ..."""
    output: Path | None = None
    """File for the results, as JSON."""


def summary(name: str, runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One version over all runs, against the dense model of the same run."""
    accuracies = [run[name]["accuracy"] for run in runs]
    lost = [run["dense"]["accuracy"] - run[name]["accuracy"] for run in runs]
    first, dense = runs[0][name], runs[0]["dense"]
    return {
        "version": name,
        "accuracy": statistics.mean(accuracies),
        "accuracies": accuracies,
        "points_lost": 100 * statistics.mean(lost),
        "times_smaller": dense["bytes"] / first["bytes"],
        "share_of_flops": first["flops"] / dense["flops"],
        "latency_ratio": statistics.median(
            run[name]["latency_s"] / run["dense"]["latency_s"] for run in runs
        ),
    }


def run(config: Config) -> None:
    """Runs, compares, prints, writes, judges."""
    runs = []
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as folder:
            options = compress.Config(output=Path(folder) / "run", seed=seed)
            rows = compress.run(options)["rows"]
        runs.append({row["name"]: row for row in rows})
    versions = [summary(name, runs) for name in runs[0]]
    for v in versions:
        print(
            f"{v['version']:20} accuracy {v['accuracy']:.2%} "
            f"({v['points_lost']:+.2f} points lost), "
            f"{v['times_smaller']:.1f}x smaller, {v['share_of_flops']:.0%} of the "
            f"FLOPs, latency x {v['latency_ratio']:.2f}"
        )
    if config.output is not None:
        write_json(
            config.output, {**about(), "seeds": config.seeds, "versions": versions}
        )
    chain = versions[-1]
    good = (
        chain["times_smaller"] >= 10
        and chain["share_of_flops"] <= 0.4
        and chain["points_lost"] <= 1.0
    )
    print("the chain " + ("holds" if good else "misses") + " its targets")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(run, Config)
