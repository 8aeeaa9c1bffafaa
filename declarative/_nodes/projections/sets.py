r"""What a set is to a projection, and what the sets with one scalar multiplier share.

**Problem.**     $y^*(x) = \arg\min_{y \in C} \tfrac12 \|y - x\|^2$                                                            (P)

A set brings its kernel, and the optimality conditions of (P) with the multipliers among the unknowns. For most sets these are a
formula for each entry in one scalar $\tau$, and one scalar equation or inequality:

$$ y_i = e_i(x_i, \tau) \tag{K1} \qquad \phi(y, \tau) = 0 \tag{K2} $$

with the Jacobian $\begin{bmatrix} -I & \partial_\tau e \\ \partial_y \phi^\top & \partial_\tau \phi \end{bmatrix}$, a bordered diagonal. One
rule differentiates them all, in O(n), from (K1) and (K2) as they stand:

$$ \mathrm d\tau = -(\partial_y\phi^\top \partial_\tau e + \partial_\tau\phi)^{-1}
   (\partial_y\phi^\top \partial_x e\,\mathrm dx + \partial_x\phi\,\mathrm dx),
   \qquad \mathrm dy = \partial_x e\,\mathrm dx + \partial_\tau e\,\mathrm d\tau \tag{G} $$

where x stands for the parameters of the set too. The rule calls the kernel for its primal point, so it can be differentiated again.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._core.implicit import LinearSystem, Run, detach, poison
from ..._core.precision import full_precision
from ..._core.results import RESULTS
from ..._linear.bordered import Bordered, BorderedDiagonal

MAX_STEPS = 1000


class ProjectionData(eqx.Module):
    """What is projected, and the entries that take part: `mask` is True where an entry is kept, None keeps all."""

    x: Array
    mask: Array | None = None


class ProjectionPoint(eqx.Module):
    """The unknown of a projection: the point of the set, and the multiplier of its constraint (see the set)."""

    point: Array
    multiplier: PyTree


class AbstractSet(eqx.Module):
    """A set to project onto, for `declarative.Projection`. Its parameters are numbers or (learnable) arrays.

    `project(x)` is the bare function: NaN where it fails, value and gradient; no status.
    """

    takes_mask: ClassVar[bool] = False
    rank: ClassVar[int] = 1  # of what is projected: vectors, or 2 for matrices
    square: ClassVar[bool] = True  # whether these have to be square
    closed_form: ClassVar[bool] = True  # the derivative of `run` is the rule
    fails_as_nan: ClassVar[bool] = True  # by its arithmetic alone, value and gradient

    @abc.abstractmethod
    def run(self, x: ProjectionData, max_steps: int) -> Run:
        """The projection, differentiable if `closed_form`; NaN where the set is empty or the data are NaN."""

    @abc.abstractmethod
    def optimality(self, y: Any, x: ProjectionData) -> Any:
        """The conditions of (P), shaped like the unknown."""

    @abc.abstractmethod
    def kink_distance(self, y: Any, x: ProjectionData) -> Float[Array, ""]:
        """How far x is from where the projection is not differentiable."""

    def linear_system(self, y: Any, x: ProjectionData, factor: PyTree) -> LinearSystem | None:
        del y, x, factor
        return None

    def point(self, y: Any) -> Array:
        return y.point

    def dual(self, y: Any) -> PyTree:
        return y.multiplier

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` if the parameters do not fit what is projected."""
        del shape

    def project(self, x: Array, mask: Array | None = None) -> Array:
        """The projection of one array; NaN where it fails."""
        x = jnp.asarray(x)
        data = pack(ProjectionData(x.astype(jnp.float32) if _is_half(x) else x, mask))
        check(self, data)
        with full_precision():
            run = self.run(data, MAX_STEPS)
            point = self.point(run.unknown)
            if not self.fails_as_nan:
                point = point + poison((self, data), run.result == RESULTS.successful).astype(point.dtype)
            return point.astype(x.dtype)


def _is_half(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2


def pack(x: Any, mask: Any = None) -> ProjectionData:
    """What the mask takes out may be anything, NaN too: it becomes 0 here."""
    data = x if isinstance(x, ProjectionData) else ProjectionData(jnp.asarray(x), mask)
    if data.mask is None:
        return data
    kept = jnp.asarray(data.mask)
    good = kept.dtype == jnp.bool_ and kept.shape == data.x.shape
    return ProjectionData(jnp.where(kept, data.x, 0) if good else data.x, kept)  # anything else is for `check` to name


def check(onto: AbstractSet, data: ProjectionData) -> None:
    """Shapes and dtypes; nothing that depends on values."""
    name, x, mask = type(onto).__name__, data.x, data.mask
    matrix = "one square matrix, shape (n, n)" if onto.square else "one matrix, shape (n, m)"
    form = "one vector, shape (n,)" if onto.rank == 1 else matrix
    if x.ndim != onto.rank or (onto.square and len(set(x.shape)) != 1):
        raise ValueError(f"the projection onto {name} takes {form}, got shape {x.shape}: use `jax.vmap` for batches.")
    if x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"the projection onto {name} takes non-empty floating arrays, got {x.dtype}{list(x.shape)}.")
    if mask is not None and not onto.takes_mask:
        raise ValueError(f"{name} takes no mask.")
    if mask is not None and (mask.dtype != jnp.bool_ or mask.shape != x.shape):
        raise ValueError(f"mask must be boolean, of shape {x.shape}; got {mask.dtype}{list(mask.shape)}.")
    onto.check_size(x.shape)


# Parameters


def parameter(value: Any, name: str, ndim: tuple[int, ...] = (0,)) -> Any:
    """A parameter of a set: a Python number as it is, anything else as an array of one of these ranks."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 not in ndim:
            raise ValueError(f"{name} must be an array of rank {' or '.join(map(str, ndim))}, got the number {value}.")
        if value != value:
            raise ValueError(f"{name} is NaN.")
        return value
    if value is None or isinstance(value, str):
        raise ValueError(
            f"{name} must be a number or an array, got {value!r} (a bound that does not bind: plus or minus infinity)."
        )
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    if array.ndim not in ndim:
        ranks = " or ".join({0: "a number", 1: "a vector", 2: "a matrix"}[rank] for rank in ndim)
        raise ValueError(f"{name} must be {ranks}, got shape {array.shape}; for batches use `jax.vmap`.")
    return array


def check_length(value: Any, name: str, n: int) -> None:
    if isinstance(value, jax.Array) and value.ndim == 1 and value.shape != (n,):
        raise ValueError(
            f"{name} must have one entry for each of the {n} projected, or be a number; got {value.shape}."
        )


def like(value: Any, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.asarray(value, x.dtype)


def keep(mask: Bool[Array, "..."] | None, values: Float[Array, "..."]) -> Float[Array, "..."]:
    return values if mask is None else jnp.where(mask, values, 0)


def pinned(picked: Float[Array, "..."], natural: Float[Array, "..."]) -> Float[Array, "..."]:
    """The value of `natural` with the derivative of `picked`, which equals it at a solution.

    Which piece of a piecewise smooth condition counts is read from the point, not from the multiplier: beside a large common offset
    the multiplier of float32 data is rounded by more than small entries are.
    """
    return picked + detach(natural - picked)


# One scalar multiplier


class Found(eqx.Module):
    """What a kernel finds. `code`: a member of RESULTS, as a number; where it failed the point and the multiplier are NaN."""

    point: Float[Array, " n"]
    multiplier: Float[Array, ""]
    code: Int[Array, ""]
    steps: Int[Array, ""]


def found(point, multiplier, code, steps=None) -> Found:
    steps = jnp.zeros((), jnp.int32) if steps is None else steps
    ok = code == 0
    return Found(jnp.where(ok, point, jnp.nan), jnp.where(ok, multiplier, jnp.nan), code, steps)


def status(*, finite: Any, feasible: Any = True, converged: Any = True) -> Int[Array, ""]:
    number = lambda member: int(member._value)
    code = jnp.where(jnp.asarray(converged), 0, number(RESULTS.nonlinear_max_steps_reached))
    code = jnp.where(jnp.asarray(feasible), code, number(RESULTS.infeasible))
    return jnp.where(finite, code, number(RESULTS.nonfinite_data)).astype(jnp.int32)


def as_run(unknown: Any, code: Int[Array, ""], steps: Int[Array, ""] | None = None) -> Run:
    return Run(unknown, eqx.tree_at(lambda item: item._value, RESULTS.successful, code), steps)


class AbstractOneMultiplierSet(AbstractSet):
    """A set whose conditions are (K1)-(K2)."""

    @abc.abstractmethod
    def kernel(self, x: Float[Array, " n"], mask: Bool[Array, " n"] | None, max_steps: int) -> Found:
        """The solution by values only; it is not differentiated."""

    @abc.abstractmethod
    def entries(
        self, x: Float[Array, " n"], tau: Float[Array, ""], y: Float[Array, " n"], mask: Bool[Array, " n"] | None
    ) -> Float[Array, " n"]:
        """The right side of (K1); `y` says on which piece each entry is (see `pinned`)."""

    @abc.abstractmethod
    def balance(
        self, y: Float[Array, " n"], tau: Float[Array, ""], x: Float[Array, " n"], mask: Bool[Array, " n"] | None
    ) -> Float[Array, ""]:
        """The left side of (K2)."""

    def run(self, x: ProjectionData, max_steps: int) -> Run:
        out = _found(self, x.x, x.mask, max_steps=max_steps)
        return as_run(ProjectionPoint(out.point, out.multiplier), out.code, out.steps)

    def optimality(self, y: ProjectionPoint, x: ProjectionData) -> ProjectionPoint:
        entries = self.entries(x.x, y.multiplier, y.point, x.mask)
        return ProjectionPoint(entries - y.point, self.balance(y.point, y.multiplier, x.x, x.mask))

    def linear_system(self, y: ProjectionPoint, x: ProjectionData, factor: PyTree) -> LinearSystem:
        del factor
        one = jnp.ones_like(y.multiplier)
        _, column = jax.jvp(lambda tau: self.entries(x.x, tau, y.point, x.mask), (y.multiplier,), (one,))
        row, corner = jax.grad(lambda *y: self.balance(*y, x.x, x.mask), (0, 1))(y.point, y.multiplier)  # pyright: ignore[reportCallIssue]
        return LinearSystem(BorderedDiagonal(-jnp.ones_like(column), column, row, corner), Bordered())


@eqx.filter_custom_jvp
def _found(onto: AbstractOneMultiplierSet, x, mask, *, max_steps: int) -> Found:
    return onto.kernel(x, mask, max_steps)


@_found.def_jvp
@full_precision()
def _(primals, tangents, *, max_steps: int):
    out = _found(*primals, max_steps=max_steps)
    y, tau = out.point, out.multiplier
    moving, still = eqx.partition(primals, jtu.tree_map(lambda t: t is not None, tangents, is_leaf=lambda t: t is None))
    if not jtu.tree_leaves(tangents):
        return out, _moved(out, jnp.zeros_like(y), jnp.zeros_like(tau))

    def entries(moving, tau):
        onto, x, mask = eqx.combine(moving, still)
        return onto.entries(x, tau, y, mask)

    def balance(moving, y, tau):
        onto, x, mask = eqx.combine(moving, still)
        return onto.balance(y, tau, x, mask)

    # (G). The primal values are known: they are not computed again.
    v = jax.jvp(lambda moving: entries(moving, tau), (moving,), (tangents,))[1]
    s = jax.jvp(lambda tau: entries(moving, tau), (tau,), (jnp.ones_like(tau),))[1]
    moved = jax.jvp(lambda moving, y: balance(moving, y, tau), (moving, y), (tangents, v))[1]
    slope = jax.jvp(lambda y, tau: balance(moving, y, tau), (y, tau), (s, jnp.ones_like(tau)))[1]
    # A vertex: no entry depends on tau, and none moves with x.
    free = slope != 0
    d_tau = -jnp.where(free, moved / jnp.where(free, slope, 1), 0)
    # A failed element has no derivative; its multiplier is NaN.
    gate = jnp.where(jnp.isnan(tau), tau, 1)
    return out, _moved(out, gate * (v + s * d_tau), gate * d_tau)


def _moved(out: Found, point, multiplier):
    """A tangent of `out`: its status has none."""
    return jtu.tree_unflatten(jtu.tree_structure(out), [point, multiplier, None, None])
