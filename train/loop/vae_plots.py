"""Figures of an autoencoder of digits: reconstructions, samples from the prior, and the latent plane if there is one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np


def _grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, 64) beside and below each other, one pixel apart."""
    tiles = np.pad(images.reshape(-1, 8, 8), ((0, 0), (0, 1), (0, 1)), constant_values=0.4)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles.reshape(-1, columns, 9, 9)], axis=0)


def _save(image: np.ndarray, title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 7 * image.shape[0] / image.shape[1] + 0.5))
    axis.imshow(np.clip(image, 0, 1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(title, fontsize=10)
    axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_vae(model: Any, images: np.ndarray, labels: np.ndarray, proposals: Any, folder: Path, *, seed: int) -> None:
    decode = jax.jit(jax.vmap(model.decoder))
    again = np.asarray(decode(proposals.mean[:16]))
    both = np.concatenate([images[:16], again])
    _save(
        _grid(both, 16), "held-out digits, and the mean image of the encoder's proposal", folder / "reconstructions.png"
    )
    z = jr.normal(jr.key(seed), (48, proposals.mean.shape[1]), jnp.float32)
    _save(_grid(np.asarray(decode(z)), 16), "mean images of z from the prior", folder / "samples.png")
    if proposals.mean.shape[1] != 2:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    mean = np.asarray(proposals.mean)
    points = left.scatter(mean[:, 0], mean[:, 1], c=labels, cmap="tab10", s=12)
    figure.colorbar(points, ax=left, label="digit")
    left.set(xlabel="z1", ylabel="z2", title="posterior means of held-out digits", aspect="equal")
    line = np.linspace(-2.5, 2.5, 15, dtype=np.float32)
    plane = np.stack(np.meshgrid(line, line[::-1]), axis=-1).reshape(-1, 2)
    right.imshow(np.clip(_grid(np.asarray(decode(jnp.asarray(plane))), 15), 0, 1), cmap="gray_r", vmin=0, vmax=1)
    right.set_title("mean images over the plane, -2.5 to 2.5")
    right.axis("off")
    figure.tight_layout()
    figure.savefig(folder / "latent.png", dpi=150)
    plt.close(figure)
