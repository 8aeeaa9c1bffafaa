"""What the gradient of an equilibrium costs beside that of depth, and how far cheap gradients point from the exact one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np


def gradient_memory(loss: Callable, model: Any, batch: Any) -> int:
    """Bytes of temporary memory of one compiled gradient of `loss(model, batch)`."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    compiled = jax.jit(jax.grad(lambda arrays: loss(eqx.combine(arrays, static), batch))).lower(arrays).compile()
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def direction(loss: Callable, model: Any, batch: Any) -> np.ndarray:
    """The gradient with respect to all parameters, as one vector."""
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model, batch)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jtu.tree_leaves(gradient)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def plot(
    memory: dict[int, int],
    equilibrium: int,
    factors: list[float],
    cosines: dict[str, list[float]],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Left: memory over depth (`memory`), and that of the equilibrium. Right: `cosines` of each gradient over the contraction factor."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    depths = list(memory)
    left.plot(depths, [memory[depth] / 2**20 for depth in depths], "o-", color="#d62728", label="depth L, weights tied")
    left.axhline(equilibrium / 2**20, color="#1f77b4", label="equilibrium")
    left.set(xscale="log", yscale="log", xlabel="depth", ylabel="temporary memory of one gradient, MiB", title=title)
    left.set_xticks(depths, [str(depth) for depth in depths])
    left.minorticks_off()
    for name, values in cosines.items():
        right.plot(factors, values, "o-", label=name)
    right.axhline(1, color="0.7", lw=0.8)
    right.set(xlabel="spectral radius at the solution, median of the images", title="Cosine with the exact gradient")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(True, color="0.92")
    figure.savefig(path, dpi=110)
    plt.close(figure)
