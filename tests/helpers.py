"""What several test files compare with."""

import jax
import numpy as np
import pytest


def tree_close(a, b, tol):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=tol, atol=tol)


def exhaustive(*values):
    """Parameters that only the exhaustive tier takes."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]
