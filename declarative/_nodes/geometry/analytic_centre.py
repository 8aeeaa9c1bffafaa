"""The analytic centre of a polytope."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.dense import Dense, inverse_where
from ..._linear.norms import largest, norm
from ..._linear.scaling import power_of_two

_MAX_STEPS = 200


class InequalityData(eqx.Module):
    """G y <= h, and equations A y = b or None. Shapes: G (m, n), h (m,), A (p, n), b (p,)."""

    G: Float[Array, "..."]
    h: Float[Array, "..."]
    A: Float[Array, "..."] | None = None
    b: Float[Array, "..."] | None = None


class CentrePoint(eqx.Module):
    """The unknown of (K1)-(K2): y, and the multipliers in a unit that makes them as large as y."""

    primal: Float[Array, "..."]
    equality: Float[Array, "..."] | None = None


class AnalyticCentre(AbstractDeclarativeNode):
    r"""The point of a polytope that is as far inside as the product of its slacks can tell.

    **Problem.**     $y^* = \arg\min_y -\sum_i \log(h_i - g_i^\top y)$ subject to $Ay = b$ (A, b may be absent)                             (P)
    **Optimality.**  $\sum_i g_i / s_i + A^\top\nu = 0$ with $s_i = h_i - g_i^\top y > 0$ (K1),  $Ay - b = 0$ (K2)
    **Solver.**      Needs no feasible start. Until $h - Gy > 0$: primal-dual Newton steps for $s_i\lambda_i = 1$, $Gy + s = h$,
                     $G^\top\lambda + A^\top\nu = 0$, s and $\lambda$ kept positive (Boyd & Vandenberghe 2004, section 11.7). Then Newton for
                     (P), damped by $1/(1 + \delta)$ while the decrement $\delta$ is above 1/4: the barrier being self-concordant, this
                     cannot fail (section 9.6.4).
    **Gradient.**    Implicit function theorem on (K1)-(K2) for every block; smooth wherever the centre exists; all modes, any order.
    **Use instead.** `QuadraticProgram` with an objective of your own.

    | symbol  | code     | shape           | meaning                                               |
    |---------|----------|-----------------|-------------------------------------------------------|
    | $G, h$  | `G`, `h` | `(m, n)`, `(m,)`| inequalities; an infinite `h` is no constraint         |
    | $A, b$  | `A`, `b` | `(p, n)`, `(p,)`| equations, independent of one another                  |
    | $\nu$   | `dual`   | `(p,)`          | their multipliers                                      |

    **Arguments:** `throw`, `on_failure`, `max_steps` (200), `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `centre(G, h, A=None, b=None, y0=None)`, or with one `InequalityData`; `y0` is a point (n,), feasible or not (it gets no gradient).
    **Returns:** `Float[Array, " n"]`, strictly inside.
    **Raises:** `ValueError` for shapes that do not fit; with `throw=True` a `SolveError` at run time: `infeasible` if there is no point
    strictly inside, `unbounded` if the slacks can grow for ever (a ray that never meets a face it does not run along), `not_unique` if
    a direction changes no slack or equations depend on one another, `nonfinite_data`, `nonlinear_max_steps_reached`.
    **Reference:** Boyd & Vandenberghe 2004, *Convex Optimization*, sections 8.5.3 and 9.6.
    """

    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "analytic wherever the centre exists"

    def __init__(
        self,
        *,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.adjoint = adjoint
        if policy is None and max_steps is None:
            max_steps = _MAX_STEPS
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, G, h=None, *, A=None, b=None, y0=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(G, h, A, b), y0)

    def pack(self, G, h=None, A=None, b=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return _pack(G, h, A, b)

    def check(self, x):
        _check(x)

    def guess(self, x, y0):
        if y0 is None:
            return jnp.zeros(x.G.shape[1], x.G.dtype)
        y0 = jnp.asarray(y0)
        if y0.shape != x.G.shape[1:] or not jnp.issubdtype(y0.dtype, jnp.floating):
            raise ValueError(f"y0 must be a floating vector of {x.G.shape[1]} entries, got {y0.dtype}{list(y0.shape)}.")
        return jnp.where(jnp.isfinite(y0), y0, 0).astype(x.G.dtype)

    # Problem and optimality

    def optimality(self, y: CentrePoint, x: InequalityData) -> CentrePoint:
        """(K1) times the square of a length, so that its unit is that of y; infinite outside, where it has no meaning."""
        unit = _unit(x)
        kept = jnp.isfinite(x.h)
        s = jnp.where(kept, x.h, 1) - x.G @ y.primal
        inside = s > 0
        force = jnp.where(kept, jnp.where(inside, 1 / jnp.where(inside, s, 1), jnp.inf), 0)
        first = (unit * unit) * (force @ x.G)
        if x.A is None:
            return CentrePoint(first)
        scale = _row_scale(x.A)
        return CentrePoint(first + y.equality @ (scale[:, None] * x.A), scale * (x.A @ y.primal - x.b))  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]

    def value(self, y, x):
        return y.primal

    def dual(self, y, x):
        return None if x.A is None else y.equality * _row_scale(x.A) / _unit(x) ** 2

    def objective(self, y, x):
        kept = jnp.isfinite(x.h)
        s = jnp.where(kept, jnp.where(kept, x.h, 1) - x.G @ y.primal, 1)
        return -jnp.sum(jnp.log(jnp.where(s > 0, s, jnp.nan)))

    # Solver

    def run(self, x, y0, loop):
        found = _centre(x, y0, self.policy.max_steps, loop)
        unknown = CentrePoint(found.y)
        if x.A is not None:
            unknown = CentrePoint(found.y, found.nu * _unit(x) ** 2 / _row_scale(x.A))
        data = jax.tree.leaves((x.G, jnp.where(x.h == jnp.inf, 0, x.h), x.A, x.b))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in data]))
        result = RESULTS.nonlinear_max_steps_reached
        for number, member in _CODES.items():
            result = choose(found.code == number, member, result)
        result = choose(finite, result, RESULTS.nonfinite_data)
        return Run(unknown, result, found.steps, final=True)

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        del factor
        unit = _unit(x)
        kept = jnp.isfinite(x.h)
        s = jnp.where(kept, x.h, 1) - x.G @ y.primal
        rows = x.G * jnp.where(kept & (s > 0), unit / jnp.where(s > 0, s, 1), 0)[:, None]
        A = None if x.A is None else _row_scale(x.A)[:, None] * x.A
        # The step that the solver takes, and from the same matrix.
        return LinearSystem(_matrix(rows.T @ rows, A), Dense())


class _State(eqx.Module):
    y: Float[Array, " n"]
    s: Float[Array, " m"]
    lam: Float[Array, " m"]
    nu: Float[Array, " p"]
    steps: Int[Array, ""]
    code: Int[Array, ""]


_GOING, _SOLVED, _INFEASIBLE, _UNBOUNDED, _SINGULAR = range(5)
_CODES = {
    _SOLVED: RESULTS.successful,
    _INFEASIBLE: RESULTS.infeasible,
    _UNBOUNDED: RESULTS.unbounded,
    _SINGULAR: RESULTS.not_unique,
}


def _centre(x: InequalityData, y0, max_steps: int, loop: Callable) -> _State:
    """In units in which rows have length 1 and the largest distance of a face from the origin is about 1."""
    x, y0 = jax.lax.stop_gradient((x, y0))
    dtype, n = x.G.dtype, x.G.shape[1]
    eps = float(jnp.finfo(dtype).eps)
    unit = _unit(x)
    kept = jnp.isfinite(x.h)
    scale = jnp.where(kept, _row_scale(x.G), 0)
    G, h = scale[:, None] * x.G, jnp.where(kept, scale * jnp.where(kept, x.h, 0) / unit, 1)
    p = 0 if x.A is None else x.A.shape[0]
    A, b = jnp.zeros((0, n), dtype), jnp.zeros(0, dtype)
    if x.A is not None:
        rows = _row_scale(x.A)
        A, b = rows[:, None] * x.A, rows * x.b / unit  # pyright: ignore[reportOperatorIssue]
    live = kept.astype(dtype)
    finite = jnp.all(jnp.isfinite(G)) & jnp.all(jnp.isfinite(h)) & jnp.all(jnp.isfinite(A)) & jnp.all(jnp.isfinite(b))
    y0 = y0 / unit
    slack = jnp.maximum(h - G @ y0, 1)

    def body(state: _State) -> _State:
        y, nu = state.y, state.nu
        true = h - G @ y
        off = A @ y - b
        level = largest(y) + 1
        inside = jnp.all(true > 8 * eps * level * live) & (largest(off) <= 64 * eps * level)
        s, lam = jnp.where(inside, true, state.s), jnp.where(inside, live / jnp.where(true > 0, true, 1), state.lam)
        s = jnp.where(kept, s, 1)
        gap = jnp.where(inside, 0, true - s)  # what is missing in Gy + s = h
        weight = lam / s
        rows = jnp.sqrt(weight)[:, None] * G
        hessian = rows.T @ rows
        pull = lam @ G + nu @ A
        # ds = gap - G dy; dlam = (1 - lam s - lam ds) / s.
        right = -pull - jnp.where(kept, (1 - lam * s - lam * gap) / s, 0) @ G
        solution, regular = _solve(hessian, A, jnp.concatenate([right, -off]))
        dy, dnu = solution[:n], solution[n:]
        moved = G @ dy
        ds = gap - moved
        dlam = jnp.where(kept, (1 - lam * s - lam * ds) / s, 0)
        decrement = norm(moved * jnp.sqrt(weight))
        damped = jnp.where(decrement > 0.25, 1 / (1 + decrement), 1)
        room = lambda v, dv: jnp.min(jnp.where(kept & (dv < 0), v / jnp.where(dv < 0, -dv, 1), jnp.inf))
        held = jnp.minimum(1, 0.9 * jnp.minimum(room(s, ds), room(lam, dlam)))
        size = jnp.where(inside, damped, held)

        solved = inside & (decrement <= eps**0.75)
        # The unit box of rays: Gd <= 0, Ad = 0 and not Gd = 0 means that slacks grow for ever.
        ray = dy / jnp.maximum(largest(dy), jnp.finfo(dtype).tiny)
        along = G @ ray
        escapes = inside & (decrement > 0.5) & (jnp.max(along) <= eps**0.5) & (jnp.min(along) < -(eps**0.5))
        escapes = escapes & (largest(A @ ray) <= eps**0.5) & (largest(y + dy) > eps**-0.5)
        # Farkas: G'lam + A'nu = 0, lam >= 0 and h'lam + b'nu < 0 exclude every point with Gy <= h, Ay = b.
        new_lam, new_nu = jnp.maximum(lam + size * dlam, 0), nu + size * dnu
        mass = jnp.sum(new_lam) + jnp.sum(jnp.abs(new_nu))
        value = (jnp.where(kept, h, 0) @ new_lam + b @ new_nu) / mass
        drift = largest(new_lam @ G + new_nu @ A) / mass
        refuted = ~inside & (value < -64 * eps) & (drift * (1 + largest(y)) <= 1e-3 * jnp.abs(value))
        code = jnp.where(refuted, _INFEASIBLE, jnp.where(escapes, _UNBOUNDED, jnp.where(solved, _SOLVED, _GOING)))
        code = jnp.where(regular, code, _SINGULAR).astype(jnp.int32)
        take = regular & ~refuted
        return _State(
            jnp.where(take, y + size * dy, y),
            jnp.where(take, s + size * ds, s),
            jnp.where(take, new_lam, lam),
            jnp.where(take, new_nu, nu),
            state.steps + 1,
            code,
        )

    start = jnp.where(finite, _GOING, _SINGULAR).astype(jnp.int32)
    init = _State(y0, slack, live / slack, jnp.zeros(p, dtype), jnp.zeros((), jnp.int32), start)
    end = loop(lambda state: state.code == _GOING, body, init, max_steps=max_steps)
    nu = end.nu / unit if x.A is None else end.nu * _row_scale(x.A) / unit
    return _State(end.y * unit, end.s, end.lam, nu, end.steps, end.code)


def _solve(hessian, A, right) -> tuple[Float[Array, " size"], Bool[Array, ""]]:
    """Newton's system, and whether it determines the step."""
    # The Hessian falls with the square of the slacks, where they grow for ever; the equations follow it, and their multipliers make up for it.
    n, level = hessian.shape[0], 1 / power_of_two(largest(hessian))
    unit = jnp.where(jnp.arange(right.size) < n, 1, level)
    matrix = _matrix(hessian, level * A if A.shape[0] else None).as_matrix()
    right = unit * right
    # Rows and columns of a size: the Hessian's are as the squares of slacks.
    scale = jax.lax.rsqrt(jnp.maximum(jnp.max(jnp.abs(matrix), axis=1), jnp.finfo(right.dtype).tiny))
    scale = power_of_two(1 / scale)
    balanced = scale[:, None] * matrix * scale[None, :]
    inverse = inverse_where(jnp.ones((), bool), balanced)
    solution = inverse @ (scale * right)
    solution = solution + inverse @ (scale * right - balanced @ solution)
    condition = largest(jnp.sum(jnp.abs(inverse), axis=1)) * largest(jnp.sum(jnp.abs(balanced), axis=1))
    regular = condition * float(jnp.finfo(right.dtype).eps) < 0.1
    return unit * scale * solution, regular


def _matrix(hessian, A):
    if A is None:
        return lx.MatrixLinearOperator(hessian)
    p = A.shape[0]
    corner = jnp.zeros((p, p), hessian.dtype)
    return lx.MatrixLinearOperator(jnp.block([[hessian, A.T], [A, corner]]))


def _row_scale(matrix):
    """Powers of two that make the rows about 1 long, without a gradient."""
    return power_of_two(jnp.max(jnp.abs(jax.lax.stop_gradient(matrix)), axis=1))


def _unit(x: InequalityData):
    """The length by which the polytope is measured: the largest distance of a face (or equation) from the origin; no gradient."""
    x = jax.lax.stop_gradient(x)
    far = largest(jnp.where(jnp.isfinite(x.h), x.h, 0) * _row_scale(x.G))
    if x.A is not None:
        far = jnp.maximum(far, largest(x.b * _row_scale(x.A)))  # pyright: ignore[reportOptionalOperand]
    return 1 / power_of_two(far)


def _pack(G, h, A, b) -> InequalityData:
    if isinstance(G, InequalityData):
        if any(block is not None for block in (h, A, b)):
            raise ValueError("Pass either an InequalityData or its blocks, not both.")
        return G
    if h is None:
        raise ValueError("h is missing: centre(G, h, A=None, b=None).")
    array = lambda block: None if block is None else jnp.asarray(block)
    return InequalityData(jnp.asarray(G), jnp.asarray(h), array(A), array(b))


def _check(x):
    if not isinstance(x, InequalityData):
        raise ValueError(f"AnalyticCentre takes G and h, or an `InequalityData`; got {type(x).__name__}.")
    if (x.A is None) != (x.b is None):
        raise ValueError("A and b come together: got one without the other.")
    blocks = {name: block for name, block in vars(x).items() if block is not None}
    listed = ", ".join(f"{name} {block.dtype}{list(block.shape)}" for name, block in blocks.items())
    if x.G.ndim != 2 or x.G.size == 0:
        raise ValueError(f"G must be a non-empty matrix, got {listed}; for a batch use jax.vmap.")
    for name, partner in (("G", "h"), ("A", "b")):
        if name not in blocks:
            continue
        if blocks[name].ndim != 2 or blocks[name].shape[1] != x.G.shape[1] or blocks[name].shape[0] == 0:
            raise ValueError(f"{name} must be a non-empty matrix with {x.G.shape[1]} columns, as G has; got {listed}.")
        if blocks[partner].shape != blocks[name].shape[:1]:
            raise ValueError(f"{partner} must have one entry for each row of {name}, got {listed}.")
    dtypes = {block.dtype for block in blocks.values()}
    if len(dtypes) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(f"all blocks must have one floating dtype, got {listed}. Cast them with .astype.")
