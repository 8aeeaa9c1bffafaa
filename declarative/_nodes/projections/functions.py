"""Projections as functions, with the names and the order of arguments of JAXopt: to move, change the import.

What is the same for all:

- One example; `jax.vmap` for batches. Forward and reverse mode, any order, with respect to every array argument.
- No status: where a projection fails (an empty set, NaN in the data) its value and its gradient are NaN. `Projection` has a status.
- They differ from JAXopt where that is wrong or slow: no sorts and no bisection; derivatives at zero and at ties are finite and are those
  that the sets document; bounds that cross give NaN; a radius of zero works.
- Those that JAXopt defines for pytrees take pytrees, and arrays of any shape; the others take vectors (or matrices).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from ..transport.entropic import EntropicTransport
from .affine import AffineSet, HalfSpace, Hyperplane, Polyhedron
from .balls import L1Ball, L1Sphere, L2Ball, L2Sphere
from .boxes import Box, NonNegative
from .cones import PositiveSemidefinite, SecondOrderCone, Spectraplex
from .projection import Projection
from .simplices import BoxSection, CappedSimplex, Simplex
from .transport import Birkhoff, TransportPolytope

_Number = Any  # a number or a scalar array, of JAX or NumPy; the sets name what is wrong with it


def projection_simplex(
    x: Float[Array, " n"], value: _Number | None = 1.0, mask: Bool[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """Onto the simplex, y >= 0 and sum(y) = `value`: see `Simplex`."""
    return Simplex(1.0 if value is None else value).project(x, mask)


def projection_sparse_simplex(
    x: Float[Array, " n"], max_nz: int, use_approx_max_nz: bool = False, value: _Number | None = 1.0
) -> Float[Array, " n"]:
    """Onto the points of the simplex with at most `max_nz` nonzero entries (not convex): the projection of the largest entries.

    The set of these is locally constant, so the derivative is that of `projection_simplex` on it. Where several entries are the
    `max_nz`-th largest, the first ones are taken. `use_approx_max_nz` finds the largest with `jax.lax.approx_max_k`. Kyrillidis et
    al. 2013, arXiv:1206.1529.
    """
    x = jnp.asarray(x)
    if x.ndim != 1 or not 1 <= max_nz <= x.size:
        raise ValueError(
            f"max_nz must be between 1 and the {x.size} entries of one vector, got {max_nz} for shape {x.shape}."
        )
    if max_nz == x.size:
        return projection_simplex(x, value)
    fixed = jax.lax.stop_gradient(x)
    largest = jax.lax.approx_max_k(fixed, max_nz) if use_approx_max_nz else jax.lax.top_k(fixed, max_nz)
    kept = jnp.zeros(x.shape, bool).at[largest[1]].set(True)
    # A NaN may be among those left out: it is let in, to be seen.
    return projection_simplex(x, value, kept | jnp.isnan(fixed))


def projection_capped_simplex(
    x: Float[Array, " n"],
    value: _Number = 1.0,
    cap: Any = 1.0,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Onto the capped simplex, 0 <= y <= `cap` and sum(y) = `value`: see `CappedSimplex`."""
    return CappedSimplex(value, cap).project(x, mask)


def projection_l1_ball(
    x: Float[Array, " n"], max_value: _Number = 1.0, mask: Bool[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """Onto the ball, sum(|y|) <= `max_value`: see `L1Ball`."""
    return L1Ball(max_value).project(x, mask)


def projection_weighted_l1_ball(
    x: Float[Array, " n"], weights: Any, max_value: _Number = 1.0, mask: Bool[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """Onto the weighted ball, sum(weights |y|) <= `max_value`: see `L1Ball`."""
    return L1Ball(max_value, weights).project(x, mask)


def projection_l1_sphere(
    x: Float[Array, " n"], value: _Number = 1.0, mask: Bool[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """Onto the sphere, sum(|y|) = `value`: see `L1Sphere`, which says what is returned where several points are nearest."""
    return L1Sphere(value).project(x, mask)


def projection_l2_ball(x: PyTree, max_value: _Number = 1.0, mask: Bool[Array, " n"] | None = None) -> PyTree:
    """Onto the ball, |y| <= `max_value`, of a pytree as one vector: see `L2Ball`."""
    return _as_vector(lambda x: L2Ball(max_value).project(x, mask), x)


def projection_l2_sphere(x: PyTree, value: _Number = 1.0, mask: Bool[Array, " n"] | None = None) -> PyTree:
    """Onto the sphere, |y| = `value`, of a pytree as one vector: see `L2Sphere`. At x = 0, the value and the gradient are 0."""
    return _as_vector(lambda x: L2Sphere(value).project(x, mask), x)


def projection_linf_ball(x: PyTree, max_value: PyTree = 1.0) -> PyTree:
    """Onto the ball, max(|y|) <= `max_value`: see `LInfBall`."""
    return projection_box(x, (jtu.tree_map(jnp.negative, max_value), max_value))


def projection_non_negative(x: PyTree, hyperparams: Any = None) -> PyTree:
    """Onto y >= 0: see `NonNegative`."""
    del hyperparams
    return _entrywise(lambda x: NonNegative().project(x), x)


def projection_box(x: PyTree, hyperparams: tuple[PyTree, PyTree]) -> PyTree:
    """Onto the box, `lower <= y <= upper`, for `hyperparams = (lower, upper)`: numbers, arrays, or pytrees like x. See `Box`."""
    lower, upper = hyperparams
    return _entrywise(lambda x, lower, upper: Box(lower, upper).project(x), x, lower, upper)


def projection_hypercube(x: PyTree, unit: PyTree = 1.0) -> PyTree:
    """Onto the cube, 0 <= y <= `unit`: see `Box`."""
    return projection_box(x, (0.0, unit))


def projection_box_section(
    x: Float[Array, " n"],
    hyperparams: tuple[Any, Any, Any, Any],
    check_feasible: bool = False,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Onto the box section, `lower <= y <= upper` and `weights @ y = total`, for `hyperparams = (lower, upper, weights, total)`.

    See `BoxSection`. `check_feasible=True` raises a `SolveError` where it is empty, also under `jit`.
    """
    onto = BoxSection(*hyperparams)
    return Projection(onto)(jnp.asarray(x), mask) if check_feasible else onto.project(x, mask)


def projection_hyperplane(x: PyTree, hyperparams: tuple[PyTree, Any]) -> PyTree:
    """Onto the hyperplane, `a @ y = b`, for `hyperparams = (a, b)`, a and x pytrees as one vector each: see `Hyperplane`."""
    return _as_vector(lambda x: Hyperplane(_vector(hyperparams[0]), hyperparams[1]).project(x), x)


def projection_halfspace(x: PyTree, hyperparams: tuple[PyTree, Any]) -> PyTree:
    """Onto the half-space, `a @ y <= b`, for `hyperparams = (a, b)`, a and x pytrees as one vector each: see `HalfSpace`."""
    return _as_vector(lambda x: HalfSpace(_vector(hyperparams[0]), hyperparams[1]).project(x), x)


def projection_affine_set(x: Float[Array, " n"], hyperparams: tuple[Any, Any]) -> Float[Array, " n"]:
    """Onto the affine set, `A @ y = b`, for `hyperparams = (A, b)`: see `AffineSet`."""
    return AffineSet(*hyperparams).project(x)


def projection_polyhedron(
    x: Float[Array, " n"], hyperparams: tuple[Any, Any, Any, Any], check_feasible: bool = False
) -> Float[Array, " n"]:
    """Onto the polyhedron, `A @ y = b` and `G @ y <= h`, for `hyperparams = (A, b, G, h)`; either pair may be None: see `Polyhedron`.

    `check_feasible=True` raises a `SolveError` where it is empty, also under `jit`. (JAXopt's default is True, which it cannot jit.)
    """
    if not isinstance(hyperparams, tuple | list) or len(hyperparams) != 4:
        got = f"{len(hyperparams)} of them" if isinstance(hyperparams, tuple | list) else type(hyperparams).__name__
        raise ValueError(f"hyperparams must be (A, b, G, h), None for what there is not; got {got}.")
    return Projection(Polyhedron(*hyperparams), throw=check_feasible)(jnp.asarray(x))


def projection_second_order_cone(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Onto the cone |x[1:]| <= x[0]: see `SecondOrderCone`."""
    return SecondOrderCone().project(x)


def projection_positive_semidefinite(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Onto the positive semidefinite matrices: see `PositiveSemidefinite`."""
    return PositiveSemidefinite().project(x)


def projection_spectraplex(x: Float[Array, "n n"], value: _Number = 1.0) -> Float[Array, "n n"]:
    """Onto the positive semidefinite matrices of trace `value`: see `Spectraplex`."""
    return Spectraplex(value).project(x)


def projection_transport(sim_matrix: Float[Array, "n m"], marginals: tuple[Any, Any]) -> Float[Array, "n m"]:
    """Onto the plans P with row sums a and column sums b, `marginals = (a, b)`: see `TransportPolytope`.

    JAXopt's `make_solver` and `use_semi_dual` have no counterpart here or below: there is one solver, and it solves to the last digits.
    """
    return TransportPolytope(*marginals).project(sim_matrix)


def projection_birkhoff(sim_matrix: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Onto the doubly stochastic matrices: see `Birkhoff`."""
    return Birkhoff().project(sim_matrix)


def kl_projection_transport(sim_matrix: Float[Array, "n m"], marginals: tuple[Any, Any]) -> Float[Array, "n m"]:
    """Onto the plans P with row sums a and column sums b, `marginals = (a, b)`, from exp(`sim_matrix`) in the sense of Kullback and Leibler.

    The plan that minimises KL(P | exp(sim_matrix)): see `EntropicTransport`, with costs `-sim_matrix` and epsilon 1. -inf forbids a pair.
    """
    a, b = marginals
    return EntropicTransport(1.0, throw=False)(-jnp.asarray(sim_matrix), jnp.asarray(a), jnp.asarray(b))


def kl_projection_birkhoff(sim_matrix: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Onto the doubly stochastic matrices, from exp(`sim_matrix`) in the sense of Kullback and Leibler: see `kl_projection_transport`."""
    ones = jnp.ones(_size_of_square(sim_matrix), jnp.asarray(sim_matrix).dtype)
    return kl_projection_transport(sim_matrix, (ones, ones))


def _size_of_square(matrix: Any) -> int:
    shape = jnp.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"a doubly stochastic matrix is square: got shape {shape}; for batches use `jax.vmap`.")
    return shape[0]


def _vector(tree: PyTree) -> Float[Array, " n"]:
    return ravel_pytree(tree)[0]


def _as_vector(project: Callable, x: PyTree) -> PyTree:
    if isinstance(x, jax.Array) and x.ndim == 1:
        return project(x)
    vector, unravel = ravel_pytree(x)
    return unravel(project(vector))


def _entrywise(project: Callable, x: PyTree, *parameters: PyTree) -> PyTree:
    """`project` on each leaf as a vector; a parameter is a number, or a tree like x of numbers and of arrays that broadcast to its leaves."""
    structure = jtu.tree_structure(x)

    def spread(parameter):
        if jtu.tree_structure(parameter) == structure:
            return parameter
        return jtu.tree_unflatten(structure, [parameter] * structure.num_leaves)

    def one(leaf, *parameters):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 1:
            return project(leaf, *parameters)
        flat = lambda p: p if jnp.ndim(p) == 0 else jnp.broadcast_to(jnp.asarray(p), leaf.shape).reshape(-1)
        return project(leaf.reshape(-1), *(flat(p) for p in parameters)).reshape(leaf.shape)

    return jtu.tree_map(one, x, *(spread(parameter) for parameter in parameters))
