"""Settings of the whole suite. Imports nothing from `declarative`: the jaxtyping hook must come before the package."""

import os
import pathlib

# Before JAX is imported. A persistent compilation cache makes the second run of the suite much faster; callback-free computations
# only, so it changes no result.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# SciPy's LAPACK, which JAX calls on CPU, spins in its threads: beside other load that costs small matrices a hundredfold.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.random as jr
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(config, items):
    """The slow and the exhaustive tier run only when they are asked for by `-m`."""
    asked = config.option.markexpr or ""
    left_out = [tier for tier in ("full", "slow") if tier not in asked]
    deselected = [item for item in items if any(tier in item.keywords for tier in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """One process holds a limited number of memory maps, and every compiled program takes some."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key each time, from a seed that DECLARATIVE_TEST_SEED varies."""
    key = jr.key(int(os.environ.get("DECLARATIVE_TEST_SEED", "0")))

    def get():
        nonlocal key
        key, new = jr.split(key)
        return new

    return get
