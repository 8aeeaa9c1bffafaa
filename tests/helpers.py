"""What several test files compare with."""

import jax
import numpy as np


def tree_close(a, b, tol):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tol, atol=tol)
