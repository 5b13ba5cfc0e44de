"""Draws docs/speed.png, the README's plot, from the tables of docs/performance.md.

python docs/plot_speed.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
TABLES = {"## Greedy": "temperature 0", "## Sampled": "temperature 1"}
STYLES = {"AR": "C7:o", "draft_model": "C1--s", "SSD": "C0-o"}


def best_speeds(section: str) -> dict[str, dict[int, float]]:
    """By method and batch size the tokens per second with the K that is best there, of a section's table."""
    speeds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit() and "ratio" not in cells[1]:
            method, batch = cells[1].split(" ")[0].rstrip(","), int(cells[0])
            speeds[method][batch] = max(speeds[method][batch], float(cells[2]))
    return speeds


def main() -> None:
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    figure, axes = plt.subplots(1, len(TABLES), figsize=(8, 3.2), sharey=True)
    for axis, (heading, title) in zip(axes, TABLES.items(), strict=True):
        section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
        for method, by_batch in best_speeds(section).items():
            axis.plot(list(by_batch), list(by_batch.values()), STYLES[method], label=method)
        axis.set(title=title, xlabel="batch size", xticks=[1, 4, 8])
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="tokens per second", ylim=(0, None))
    axes[0].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(DOCS / "speed.png", dpi=100)


if __name__ == "__main__":
    main()
