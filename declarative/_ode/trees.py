"""Arithmetic of pytrees that have one structure."""

import jax.numpy as jnp
import jax.tree_util as jtu


def add(a, b):
    return jtu.tree_map(jnp.add, a, b)


def subtract(a, b):
    return jtu.tree_map(jnp.subtract, a, b)


def times(factor: float, tree):
    return jtu.tree_map(lambda leaf: factor * leaf, tree)


def precision(tree):
    """The real dtype of the leaf that is kept with fewest digits."""
    kinds = [jnp.finfo(jnp.result_type(leaf)) for leaf in jtu.tree_leaves(tree)]
    return min(kinds, key=lambda kind: kind.bits).dtype if kinds else jnp.result_type(float)
