r"""Quadratic program as a layer (OptNet), with exact or smoothed gradients, duals and certificates.

**Problem.**     $\min_z \tfrac12 z^\top Q z + q^\top z$ subject to $Az = b$, $Gz \le h$, $l \le z \le u$, any block absent;
                 $Q$ positive semidefinite on the null space of $A$                                                          (P)
**Optimality.**  $Qz + q + A^\top\nu + G^\top\lambda + \mu = 0$ (K1),  $Az - b = 0$ (K2),  $-\min(s, w\circ\lambda) = 0$ with $s = h - Gz$ (K3),
                 $z - \mathrm{clip}(z + w_b\mu, l, u) = 0$ (K4). One signed multiplier $\mu_i$ serves both bounds of $z_i$, so $l_i = u_i$ is
                 allowed. The weights $w_i = \|G_i\|^2/t$, $w_b = 1/t$, $t$ the size of $Q$, only put $\lambda$ and $s$ in the same unit.
**Solver.**      Equilibration by powers of two; elimination of (K2); the interior-point method of `_solvers/interior_point.py`; then
                 Newton on (K1)-(K4) with the active set that it found, which is exact to rounding if the set is right, and
                 changes the set if it is not. Its factor is kept for the gradient.
                 If $Q$, $A$ or $G$ is an operator: the splitting method of `_solvers/splitting.py`, products only, and the same last step.
**Gradient.**    Implicit function theorem on (K1)-(K4): the KKT system of the active set, for every datum and through every output.
                 Not differentiable where a constraint is weakly active ($s_i = \lambda_i = 0$): the derivative returned is then one-sided,
                 with the constraint active exactly if its computed multiplier is positive; `kink_distance` is
                 $\min_i \max(s_i, w_i\lambda_i)$. Where active rows depend on one another, multipliers are those of least norm, and
                 equal rows share equally; in reverse mode a cotangent that tells such multipliers apart is flagged.

| symbol         | code        | shape           | meaning                                   |
|----------------|-------------|-----------------|-------------------------------------------|
| $Q, q$         | `Q`, `q`    | `(n, n)`, `(n,)`| objective; `Q` may be the vector of a diagonal |
| $A, b$         | `A`, `b`    | `(p, n)`, `(p,)`| equations                                 |
| $G, h$         | `G`, `h`    | `(m, n)`, `(m,)`| inequalities; an infinite `h` is no constraint |
| $l, u$         | `lower`, `upper` | `(n,)`     | bounds; infinite entries are no bounds     |
| $\nu, \lambda, \mu$ | `equality`, `inequality`, `bound` | `(p,)`, `(m,)`, `(n,)` | multipliers, $\mu > 0$ at an upper bound |

References: Amos & Kolter 2017, arXiv:1703.00443 (the layer; our (K1)-(K3) give its Eqs. 7-8 with the products in the right places);
Mehrotra 1992; Goulart & Chen 2024, arXiv:2405.12762; Stellato et al. 2020, arXiv:1711.08013 (the polishing step).
"""

# An absent block is None. Which blocks are there is fixed where the program is built; to prove it again at every use would hide the maths.
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.experimental.sparse import JAXSparse
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ..._core.adjoint import lax_loop, refuse_unrolling
from ..._core.arguments import integer, number
from ..._core.implicit import LinearSystem, Run
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.kkt import KKTOperator, KKTSolver
from ..._linear.matrix_free import row_norms
from ..._linear.norms import largest
from ..._linear.operators import Block, as_operator, is_operator, mv, symmetric_mv, vm
from ..._solvers import interior_point as ipm
from ..._solvers import quadratic_program as algorithm
from ..._solvers import splitting

_MAX_STEPS = 100


class QuadraticProgramData(eqx.Module):
    """The data of one quadratic program; a block that is None is absent. Shapes: the table above; checked where they are used."""

    Q: Block
    q: Float[Array, "..."]
    A: Block | None = None
    b: Float[Array, "..."] | None = None
    G: Block | None = None
    h: Float[Array, "..."] | None = None
    lower: Float[Array, "..."] | None = None
    upper: Float[Array, "..."] | None = None


class KKTPoint(eqx.Module):
    """The unknown of (K1)-(K4): the primal and one multiplier for each equation, inequality and bounded variable."""

    primal: Float[Array, "*batch n"]
    equality: Float[Array, "*batch p"] | None = None
    inequality: Float[Array, "*batch m"] | None = None
    bound: Float[Array, "*batch n"] | None = None


class Multipliers(eqx.Module):
    """Duals of a quadratic program, and the slack h - Gz; None for an absent block.

    `bound` is positive at an upper bound and negative at a lower one.
    """

    equality: Float[Array, "*batch p"] | None = None
    inequality: Float[Array, "*batch m"] | None = None
    bound: Float[Array, "*batch n"] | None = None
    slack: Float[Array, "*batch m"] | None = None


class QuadraticProgram(AbstractDeclarativeNode):
    r"""A layer that solves a convex quadratic program. One example; batches by `jax.vmap`.

    `qp(Q, q, A=A, b=b, G=G, h=h, lower=l, upper=u)` returns the minimiser z of $\tfrac12 z^\top Q z + q^\top z$ subject to $Az = b$,
    $Gz \le h$, $l \le z \le u$. Blocks may be absent. `qp.solve(...)`, with the same arguments, returns a `Solution`: `value` is z,
    `dual` the `Multipliers`, `objective` the optimal value, `result` the status, `unknown` a warm start for `y0`.

    **Arguments:**

    - `gradient`: `"exact"`, or `"smoothed"`: the solution on the central path, where every product of a slack and its multiplier
      is `smoothing`, and the exact derivative of that. It is differentiable everywhere and biased: its objective lies above the
      optimal one by at most `smoothing` times the number of inequalities and finite bounds. It needs a point strictly inside of all
      of these (no fixed variables), looks for no certificate (a program without one ends with `not_a_solution`), and takes no `y0`.
    - `smoothing`: that product, in units of the objective; a float or an array.
    - `elastic`: None, or a penalty weight $\rho$ in units of the objective per squared unit of constraint: equations and
      inequalities (not bounds) may be violated at a cost of $\tfrac\rho2\|\cdot\|^2$. Always feasible if the bounds are; the larger
      $\rho$, the nearer to the closest feasible problem. True is $\rho = 10^6$.
    - `dependent_equations`: how many rows of `A` may depend on the others (consistently: they are then dropped, with multiplier 0).
      None: a sixteenth of them, and one. Where there are more, the solve ends with `dependent_equations`. Each costs as much as a variable.
    - `adjoint`: how gradients flow; None: `ImplicitAdjoint()`, with the factor of the last Newton step. Adjoints that unroll raise.
    - `throw`, `on_failure`, `max_steps` (of the interior-point method, or rounds of 25 iterations where there are operators; 100):
      see `Policy`.

    **Shapes and dtypes:** `Q` is `(n, n)`, of which the symmetric part counts, or `(n,)`, a diagonal; float32 or float64.
    **Large programs:** `Q`, `A`, `G` may be `lineax` operators from vectors to vectors, or sparse matrices of `jax.experimental.sparse`; if
    one of them is, only products with them are taken, forward and backward. Arrays inside of them have gradients. Q must then be
    positive semidefinite on all of R^n (looked at with a few products, unless it is tagged so), and `gradient` must be `"exact"`.
    Build a `FunctionLinearOperator` under `jit`, or once: each new one is a new function to compile.
    **Failures:** `infeasible`: `dual` then proves it, $A^\top\nu + G^\top\lambda + \mu = 0$ with
    $b^\top\nu + h^\top\lambda + u^\top\mu^+ - l^\top\mu^- = -1$ (bounds that cross need no proof, and get none); `unbounded`: `value` is
    then a ray along which the objective falls for ever, $q^\top z = -1$; `indefinite`: Q is not positive semidefinite on the null
    space of A; `dependent_equations`; `nonfinite_data`; `nonlinear_max_steps_reached`; `not_a_solution`: the accuracy that the dtype
    asks for was not reached.
    **Raises:** `ValueError` for shapes that do not fit, naming the block; `SolveError` at run time with `throw=True`.
    """

    gradient: Literal["exact", "smoothed"] = eqx.field(static=True)
    smoothing: float | Float[Array, ""]
    elastic: float | None = eqx.field(static=True)
    dependent_equations: int | None = eqx.field(static=True)
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "piecewise smooth: not differentiable where a constraint is weakly active"

    def __init__(
        self,
        *,
        gradient: str = "exact",
        smoothing: float | Float[Array, ""] = 1e-3,
        elastic: bool | float | None = None,
        dependent_equations: int | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        if gradient not in ("exact", "smoothed"):
            raise ValueError(f"gradient must be 'exact' or 'smoothed', got {gradient!r}.")
        if elastic is True:
            elastic = 1e6
        elif elastic is False:
            elastic = None
        if elastic is not None and not 0 < elastic < float("inf"):
            raise ValueError(f"elastic must be True, False, None or a positive penalty weight, got {elastic!r}.")
        if dependent_equations is not None:
            dependent_equations = integer(dependent_equations, "dependent_equations", 0, hint=" or None")
        refuse_unrolling(
            adjoint,
            "would differentiate interior-point iterations, whose last ones divide by what tends to zero. The implicit gradient is exact: "
            "use ImplicitAdjoint(), or adjoint=None.",
        )
        self.gradient = gradient  # pyright: ignore[reportAttributeAccessIssue]  (checked above)
        self.dependent_equations = dependent_equations
        self.smoothing = number(smoothing, "smoothing")
        self.elastic = elastic
        self.adjoint = adjoint
        if policy is None and max_steps is None:
            max_steps = _MAX_STEPS
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    # Blocks by name instead of one pytree `x`: hence the marker.
    def __call__(self, Q, q=None, *, A=None, b=None, G=None, h=None, lower=None, upper=None, y0=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(Q, q, A, b, G, h, lower, upper), y0)

    def pack(self, Q, q=None, A=None, b=None, G=None, h=None, lower=None, upper=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return _pack(Q, q, A, b, G, h, lower, upper)

    def check(self, x: QuadraticProgramData):
        _check(x)

    def optimality(self, y: KKTPoint, x: QuadraticProgramData) -> KKTPoint:
        return _Conditions(self, x).residual(y)

    def value(self, y, x):
        return y.primal

    def dual(self, y, x):
        slack = None if x.G is None else x.h - mv(x.G, y.primal)
        return Multipliers(y.equality, y.inequality, y.bound, slack)

    def objective(self, y, x):
        if self.gradient == "smoothed":
            # Not the optimal value of a problem whose multipliers these are: no envelope.
            return _cost(x, y.primal) + self._penalty(y, x)
        return envelope(_lagrangian, y, (x, self._compliance(x)))

    def kink_distance(self, y, x):
        if self.gradient == "smoothed":
            return None
        return _Conditions(self, x).kink_distance(y)

    def guess(self, x, y0):
        if y0 is not None:
            bounded = x.lower is not None or x.upper is not None
            wanted = KKTPoint(x.q, x.b, x.h, x.q if bounded else None)
            if jax.tree.map(jnp.shape, y0) != jax.tree.map(jnp.shape, wanted):
                raise ValueError(
                    "y0 must be the `unknown` of a solution of a program with the same blocks and shapes, or a KKTPoint like it."
                )
        # A guess that is not finite is no guess, and no fault of the data.
        return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), y0)

    def run(self, x, y0, loop):
        return _solve(self, x, y0, loop)

    def linear_system(self, y, x, factor):
        if is_operator(x.Q):
            factor = factor.with_operators(x.Q, *_general(x))
        operator = KKTOperator(factor)
        solver = KKTSolver(lax_loop)
        return LinearSystem(operator, solver, operator)

    def _penalty(self, y, x):
        total = jnp.zeros((), x.q.dtype)
        if y.equality is not None:
            total = total + y.equality @ y.equality
        if y.inequality is not None:
            total = total + jnp.sum(jnp.where(jnp.isfinite(x.h), y.inequality, 0) ** 2)
        return self._compliance(x) / 2 * total

    def _compliance(self, x) -> float:
        return 0.0 if self.elastic is None else 1 / self.elastic


def _pack(Q, q, A, b, G, h, lower, upper) -> QuadraticProgramData:
    if isinstance(Q, QuadraticProgramData):
        if any(block is not None for block in (q, A, b, G, h, lower, upper)):
            raise ValueError("Pass either a QuadraticProgramData or its blocks, not both.")
        return _pack(**vars(Q))
    for name, block in (("Q", Q), ("q", q)):
        if block is None:
            raise ValueError(f"{name} is missing: qp(Q, q, A=..., b=..., G=..., h=..., lower=..., upper=...).")
    q, b, h = _array("q", q), _array("b", b), _array("h", h)
    sparse = any(is_operator(block) or isinstance(block, JAXSparse) for block in (Q, A, G))

    def matrix(name, block):
        if isinstance(block, JAXSparse) and not jnp.issubdtype(block.dtype, jnp.floating):
            raise ValueError(f"the sparse matrix {name} must hold floating-point numbers, got {block.dtype}.")
        if isinstance(block, JAXSparse) or (sparse and block is not None and not is_operator(block)):
            return as_operator(block if isinstance(block, JAXSparse) else _array(name, block))
        return block if is_operator(block) else _array(name, block)

    def spread(name, bound):
        """A number bounds every variable, and has no dtype of its own."""
        bound = jnp.asarray(bound, q.dtype) if isinstance(bound, (int, float)) else _array(name, bound)
        return bound if bound is None or bound.ndim else jnp.broadcast_to(bound, q.shape)

    lower, upper = spread("lower", lower), spread("upper", upper)
    return QuadraticProgramData(matrix("Q", Q), q, matrix("A", A), b, matrix("G", G), h, lower, upper)


def _array(name: str, block):
    if block is None:
        return None
    try:
        return jnp.asarray(block)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be an array, got {type(block).__name__}. Sparse matrices of SciPy: "
            "jax.experimental.sparse.BCOO.from_scipy_sparse."
        ) from error


def _shape(block, name: str) -> tuple[int, ...]:
    if not is_operator(block):
        return block.shape
    structures = block.out_structure(), block.in_structure()
    if any(not isinstance(s, jax.ShapeDtypeStruct) or len(s.shape) != 1 for s in structures):
        raise ValueError(f"the operator {name} must map vectors to vectors, got {structures[1]} -> {structures[0]}.")
    return (*structures[0].shape, *structures[1].shape)


def _check(x: QuadraticProgramData):
    def describe(leaf):
        return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"

    if x.q.ndim != 1 or x.q.size == 0:
        raise ValueError(f"q must be a non-empty vector, got {describe(x.q)}; for a batch use jax.vmap.")
    n = x.q.size
    for name, partner in (("A", "b"), ("G", "h")):
        matrix, vector = getattr(x, name), getattr(x, partner)
        if (matrix is None) != (vector is None):
            there, missing = (partner, name) if matrix is None else (name, partner)
            raise ValueError(f"{name} and {partner} come together: got {there} without {missing}.")
        if matrix is None:
            continue
        shape = _shape(matrix, name)
        if len(shape) != 2 or shape[1] != n:
            raise ValueError(f"{name} must be a matrix with {n} columns, one for each entry of q, got {list(shape)}.")
        if vector.shape != shape[:1]:
            raise ValueError(
                f"{partner} must have one entry for each row of {name}, {shape[0]}, got {describe(vector)}."
            )
    if _shape(x.Q, "Q") not in ((n, n), (n,)):
        raise ValueError(
            f"Q must be ({n}, {n}), or ({n},) for a diagonal, since q has {n} entries; got {list(_shape(x.Q, 'Q'))}."
        )
    for name in ("lower", "upper"):
        bound = getattr(x, name)
        if bound is not None and bound.shape != (n,):
            raise ValueError(
                f"{name} must have one entry for each entry of q, {n}, or be a number, got {describe(bound)}."
            )
    dtype_of = lambda block: block.out_structure().dtype if is_operator(block) else block.dtype
    dtypes = {name: dtype_of(block) for name, block in vars(x).items() if block is not None}
    if any(not jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes.values()) or len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {jnp.dtype(dtype).name}" for name, dtype in dtypes.items())
        raise ValueError(f"all blocks must have one floating dtype, got {listed}. Cast them with .astype.")


def _cost(x, z):
    return z @ symmetric_mv(x.Q, z) / 2 + x.q @ z


def _lagrangian(y: KKTPoint, bound):
    x, compliance = bound
    z = y.primal
    total = _cost(x, z)
    if x.A is not None:
        total = total + y.equality @ (mv(x.A, z) - x.b) - compliance / 2 * (y.equality @ y.equality)
    if x.G is not None:
        s = jnp.where(jnp.isfinite(x.h), x.h, 0) - mv(x.G, z)
        total = (
            total - jnp.where(jnp.isfinite(x.h), y.inequality, 0) @ s - compliance / 2 * (y.inequality @ y.inequality)
        )
    for side, sign in ((x.lower, -1), (x.upper, 1)):
        if side is not None:
            at = jnp.isfinite(side) & (sign * y.bound > 0)
            total = total + jnp.sum(jnp.where(at, y.bound * (z - jnp.where(at, side, 0)), 0))
    return total


class _Conditions:
    """(K1)-(K4) at a point, and the pairs (alpha, beta) of their linearisation."""

    def __init__(self, node: QuadraticProgram, x: QuadraticProgramData):
        self.x, self.node = x, node
        self.compliance = node._compliance(x)
        dtype = x.q.dtype
        self.barrier = None if node.gradient == "exact" else jnp.asarray(node.smoothing, dtype)
        if is_operator(x.Q):
            diagonal = row_norms(lambda z: symmetric_mv(x.Q, z), x.q.size, dtype)
        else:
            diagonal = jnp.abs(x.Q if x.Q.ndim == 1 else jnp.diagonal(x.Q))
        size = jax.lax.stop_gradient(jnp.max(diagonal))
        self.t = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        if x.G is not None:
            squares = row_norms(x.G.mv, x.q.size, dtype) ** 2 if is_operator(x.G) else jnp.sum(x.G**2, axis=1)
            norms = jax.lax.stop_gradient(squares)
            self.w = jnp.where((norms > 0) & jnp.isfinite(norms), norms, 1) / self.t

    def residual(self, y: KKTPoint) -> KKTPoint:
        x, z = self.x, y.primal
        first = symmetric_mv(x.Q, z) + x.q
        second = third = fourth = None
        if x.A is not None:
            first = first + vm(y.equality, x.A)
            second = mv(x.A, z) - x.b - self.compliance * y.equality
        if x.G is not None:
            first = first + vm(y.inequality, x.G)
            third = -self._pair(self._slack(y), self.w * y.inequality, self._near(y), self.w)
        if y.bound is not None:
            first = first + y.bound
            fourth = self._bound_residual(y)
        return KKTPoint(first, second, third, fourth)

    def _slack(self, y):
        h = self.x.h
        return h - mv(self.x.G, y.primal) + self.compliance * y.inequality

    def _near(self, y):
        # What counts as touching, in units of the slack.
        eps = float(jnp.finfo(y.primal.dtype).eps)
        h = jnp.where(jnp.isfinite(self.x.h), jnp.abs(self.x.h), 0)
        return jax.lax.stop_gradient(eps**0.5 * (h + jnp.sqrt(self.w * self.t) * largest(y.primal)))

    def _pair(self, s, v, near, w):
        """min(s, v) with the derivative of s where active, of v elsewhere; or its smooth version."""
        if self.barrier is not None:
            # (s + v - root)/2 with root^2 = (s - v)^2 + 4 w barrier: zero where s v = w barrier. As a quotient, where that cancels.
            live = jnp.isfinite(s)
            s = jnp.where(live, s, 1)
            target = w * self.barrier
            root = jnp.sqrt((s - v) ** 2 + 4 * target)
            total = s + v
            quotient = 2 * (s * v - target) / (jnp.where(total > 0, total, 1) + root)
            return jnp.where(live, jnp.where(total > 0, quotient, (total - root) / 2), v)
        active = jax.lax.stop_gradient((v > 0) & (v >= s - near))
        picked = jnp.where(active, s, v)
        lowest = jnp.minimum(jnp.where(active, s, jnp.where(jnp.isfinite(s), s, jnp.inf)), v)
        return picked + jax.lax.stop_gradient(jnp.where(jnp.isfinite(lowest), lowest, v) - picked)

    def _bound_residual(self, y):
        """(K4), a min of each side: zero slack where its multiplier has the right sign."""
        z, mu = y.primal, y.bound
        w = 1 / self.t
        near = jax.lax.stop_gradient(float(jnp.finfo(z.dtype).eps) ** 0.5 * largest(z))
        lower, upper = self._bounds(z)
        if self.barrier is not None:
            return self._smooth_bound(z, mu, lower, upper, w)
        fixed = lower == upper
        up = jax.lax.stop_gradient(jnp.isfinite(upper) & (fixed | ((mu > 0) & (w * mu >= upper - z - near))))
        down = jax.lax.stop_gradient(~up & jnp.isfinite(lower) & (mu < 0) & (-w * mu >= z - lower - near))
        finite = lambda side, at: jnp.where(at, side, 0)
        picked = jnp.where(up, z - finite(upper, up), jnp.where(down, z - finite(lower, down), -w * mu))
        natural = z - jnp.clip(z + w * mu, lower, upper)
        return picked + jax.lax.stop_gradient(natural - picked)

    def _smooth_bound(self, z, mu, lower, upper, w):
        """mu = barrier/(u - z) - barrier/(z - l), times a step so that it is in units of z; outside of the bounds, by how much."""
        pull, stiffness = self._barrier_force(z, lower, upper)
        step = jax.lax.stop_gradient(1 / (1 / w + stiffness))
        inside = (z > lower) & (z < upper)
        return jnp.where(inside, step * (pull - mu), z - jnp.clip(z, lower, upper))

    def _barrier_force(self, z, lower, upper):
        """(barrier/(u - z) - barrier/(z - l), its derivative)."""
        force = stiffness = jnp.zeros_like(z)
        for side, sign in ((lower, -1), (upper, 1)):
            gap = jnp.where(jnp.isfinite(side), sign * (side - z), 1)
            gap = jnp.where(gap > 0, gap, 1)
            live = jnp.isfinite(side)
            force = force + jnp.where(live, sign * self.barrier / gap, 0)
            stiffness = stiffness + jnp.where(live, self.barrier / gap**2, 0)
        return force, stiffness

    def coefficients(self, y: KKTPoint, side):
        """alpha and beta of (K3)-(K4) linearised with each row on the given side: see `_linear/kkt.py`."""
        x, alphas, betas = self.x, [], []
        dtype = y.primal.dtype
        if x.A is not None and self.compliance:
            p = x.b.size
            alphas.append(jnp.ones(p, dtype))
            betas.append(jnp.full(p, self.compliance, dtype))
            side = side[p:]
        if x.G is not None:
            m = x.h.size
            if self.barrier is None:
                active = (side[:m] == 1).astype(dtype)
                slack_part, multiplier_part = active, (1 - active) * self.w
            else:
                s, v = self._slack(y), self.w * y.inequality
                live = jnp.isfinite(s)
                s = jnp.where(live, s, 1)
                share = (s - v) / jnp.sqrt((s - v) ** 2 + 4 * self.w * self.barrier)
                slack_part = jnp.where(live, (1 - share) / 2, 0)
                multiplier_part = self.w * jnp.where(live, (1 + share) / 2, 1)
            alphas.append(slack_part)
            betas.append(multiplier_part + self.compliance * slack_part)
            side = side[m:]
        if y.bound is not None:
            w = jnp.broadcast_to(1 / self.t, y.primal.shape)
            if self.barrier is None:
                at = (side != 0).astype(dtype)
                alphas.append(at)
                betas.append((1 - at) * w)
            else:
                _, stiffness = self._barrier_force(y.primal, *self._bounds(y.primal))
                step = 1 / (1 / w + stiffness)
                alphas.append(step * stiffness)
                betas.append(step)
        empty = jnp.zeros(0, dtype)
        return jnp.concatenate([*alphas, empty]), jnp.concatenate([*betas, empty])

    def _bounds(self, z):
        infinite = jnp.full_like(z, jnp.inf)
        return -infinite if self.x.lower is None else self.x.lower, infinite if self.x.upper is None else self.x.upper

    def kink_distance(self, y):
        parts = []
        if self.x.G is not None:
            parts.append(jnp.maximum(self._slack(y), self.w * y.inequality))
        if y.bound is not None:
            z, size = y.primal, jnp.abs(y.bound) / self.t
            lower, upper = self._bounds(z)
            fixed = lower == upper
            for side, sign in ((self.x.lower, -1), (self.x.upper, 1)):
                if side is not None:
                    apart = jnp.maximum(sign * (side - z), jnp.where(sign * y.bound > 0, size, 0))
                    # A fixed variable is an equation, which has no kink.
                    parts.append(jnp.where(fixed, jnp.inf, apart))
        return jnp.min(jnp.concatenate(parts), initial=jnp.inf) if parts else jnp.asarray(jnp.inf, y.primal.dtype)


_CODES = {
    ipm.OPTIMAL: RESULTS.successful,
    ipm.INFEASIBLE: RESULTS.infeasible,
    ipm.UNBOUNDED: RESULTS.unbounded,
    ipm.STALLED: RESULTS.not_a_solution,
    ipm.OUT_OF_STEPS: RESULTS.nonlinear_max_steps_reached,
    ipm.INDEFINITE: RESULTS.indefinite,
    ipm.NONFINITE: RESULTS.nonfinite_data,
    ipm.DEPENDENT: RESULTS.dependent_equations,
}


def _general(x: QuadraticProgramData):
    """A and G; a block without rows is an absent one."""
    return (None if x.A is None or x.b.size == 0 else x.A), (None if x.G is None or x.h.size == 0 else x.G)


def _solve(node: QuadraticProgram, x: QuadraticProgramData, y0: KKTPoint | None, loop: Callable) -> Run:
    conditions = _Conditions(node, x)
    elastic = node.elastic is not None
    A, G = _general(x)
    b, h = (None if A is None else x.b), (None if G is None else x.h)
    bounded = x.lower is not None or x.upper is not None
    _, unravel = ravel_pytree(KKTPoint(x.q, x.b, x.h, x.q if bounded else None))
    guess = None if y0 is None else ravel_pytree(y0)[0]
    residual = lambda vector: ravel_pytree(conditions.residual(unravel(vector)))[0]
    coefficients = lambda vector, side: conditions.coefficients(unravel(vector), side)
    if is_operator(x.Q):
        answer = _by_splitting(node, x, A, G, bounded, guess, residual, coefficients, loop)
        return Run(
            unravel(answer.vector),
            _result(answer.code),
            answer.steps,
            factor=answer.kkt.with_operators(None, None, None),
            final=True,
        )
    soft = 0
    if elastic and A is not None:
        soft = b.size
        G, h = (A, b) if G is None else (jnp.concatenate([A, G]), jnp.concatenate([b, h]))
        A = b = None
    data = algorithm.Data(x.Q, x.q, A, b, G, h, x.lower, x.upper, soft, conditions.compliance)
    spare = node.dependent_equations
    if spare is None:
        spare = 0 if A is None else 1 + b.size // 16
    answer = algorithm.solve(
        data, guess, residual, coefficients, conditions.barrier, spare, node.policy.max_steps, loop
    )
    return Run(unravel(answer.vector), _result(answer.code), answer.steps, answer.kkt, final=True)


def _by_splitting(node, x, A, G, bounded: bool, guess, residual, coefficients, loop) -> algorithm.Answer:
    if node.gradient == "smoothed":
        raise ValueError("gradient='smoothed' follows the central path, which needs arrays: Q, A or G is an operator.")
    dtype, n = x.q.dtype, x.q.size
    p, m = (0 if A is None else x.b.size), (0 if G is None else x.h.size)
    infinite = jnp.full(max(n, m), jnp.inf, dtype)
    low, up = ([x.b], [x.b]) if p else ([], [])
    if m:
        low, up = [*low, -infinite[:m]], [*up, x.h]
    if bounded:
        low.append(-infinite[:n] if x.lower is None else x.lower)
        up.append(infinite[:n] if x.upper is None else x.upper)
    empty = jnp.zeros(0, dtype)

    def all_coefficients(vector, side):
        if node.elastic is not None:
            return coefficients(vector, side)
        # Without compliance the node counts equations apart: always active.
        alpha, beta = coefficients(vector, side[p:])
        return jnp.concatenate([jnp.ones(p, dtype), alpha]), jnp.concatenate([jnp.zeros(p, dtype), beta])

    return splitting.solve(
        x.Q,
        x.q,
        A,
        G,
        jnp.concatenate([*low, empty]),
        jnp.concatenate([*up, empty]),
        bounded,
        node._compliance(x),
        guess,
        residual,
        all_coefficients,
        node.policy.max_steps,
        loop,
    )


def _result(code):
    result: Any = RESULTS.successful
    for value, member in _CODES.items():
        result = choose(code == value, member, result)
    return result
