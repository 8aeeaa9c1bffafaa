"""Figures of a Sudoku run: what was learnt of the rules, and some boards."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float


def true_rules() -> np.ndarray:
    """The 64 rules of a 4 x 4 board as rows over its 64 unknowns: one digit a cell; each digit once a row, column and block."""
    rules = []
    unknown = np.arange(64).reshape(4, 4, 4)
    for i in range(4):
        for j in range(4):
            rows, columns = 2 * (i // 2) + np.array([0, 0, 1, 1]), 2 * (i % 2) + np.array([0, 1, 0, 1])
            for cells in (unknown[i, j, :], unknown[i, :, j], unknown[:, i, j], unknown[rows, columns, j]):
                rules.append(np.isin(np.arange(64), cells).astype(float))
    return np.array(rules)


def explained(rules: np.ndarray, A: np.ndarray) -> np.ndarray:
    """For each row of `rules`, the share of its length that lies in the row space of A."""
    _, values, right = np.linalg.svd(A, full_matrices=False)
    span = right[values > 1e-3 * values[0]]
    return np.linalg.norm(rules @ span.T, axis=1) / np.linalg.norm(rules, axis=1)


def projector(rows: np.ndarray) -> np.ndarray:
    """The projector on the row space, directions below a hundredth of the largest singular value left out."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    span = right[values > 1e-2 * values[0]]
    return span.T @ span


def plot_rules(A: Float[np.ndarray, "p n"], path: str | Path) -> None:
    """The row space of the learnt equations beside that of the true rules, and how much of each rule was found."""
    rules = true_rules()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for ax, matrix, title in ((axes[0], rules, "True rules"), (axes[1], A, "Learnt equations")):
        image = ax.imshow(projector(matrix), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        rank = round(np.trace(projector(matrix)))
        ax.set(title=f"{title} (rank {rank})", xlabel="unknown: row, column, digit", ylabel="the same")
    figure.colorbar(image, ax=axes[:2], shrink=0.8, label="projector on the row space")
    found = explained(rules, A).reshape(16, 4)
    for i in range(4):
        axes[2].plot(i + np.linspace(-0.3, 0.3, 16), np.sort(found[:, i]), "o", ms=4)
    random = np.sqrt(np.linalg.matrix_rank(A) / A.shape[1])
    axes[2].axhline(random, color="0.6", lw=1)
    axes[2].annotate(
        "a random row space of this rank", (3.4, random), (0, 4), textcoords="offset points", ha="right", color="0.4"
    )
    axes[2].set(
        xticks=range(4),
        xticklabels=("cell", "row", "column", "block"),
        ylim=(0, 1.02),
        title="Share of each true rule that was learnt",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_boards(puzzles, outputs, solutions, path: str | Path) -> None:
    """Puzzles (clues black) with the answers: green where right, red where wrong."""
    figure, axes = plt.subplots(1, len(puzzles), figsize=(2.2 * len(puzzles), 2.5), layout="constrained")
    for ax, puzzle, output, solution in zip(np.atleast_1d(axes), puzzles, outputs, solutions, strict=True):
        answer, truth, given = output.argmax(-1), solution.argmax(-1), puzzle.sum(-1) > 0
        for row in range(4):
            for column in range(4):
                right = answer[row, column] == truth[row, column]
                colour = "black" if given[row, column] else "#3a9d5d" if right else "#d62728"
                weight = "bold" if given[row, column] else "normal"
                text = str(answer[row, column] + 1)
                ax.text(
                    column + 0.5,
                    3.5 - row,
                    text,
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=15,
                    fontweight=weight,
                )
        for line in range(5):
            width = 1.8 if line % 2 == 0 else 0.6
            ax.plot([line, line], [0, 4], color="0.3", lw=width)
            ax.plot([0, 4], [line, line], color="0.3", lw=width)
        ax.set(aspect="equal", title="solved" if np.all(answer == truth) else "wrong")
        ax.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
