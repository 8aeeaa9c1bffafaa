"""Optimal transport with an entropy: the plan that moves one vector of masses onto another."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from ..._core.adjoint import lax_loop
from ..._core.arguments import number
from ..._core.implicit import Run, detach, detach_tree
from ..._core.node import AbstractDeclarativeNode, Policy, envelope, evaluate, make_policy
from ..._core.results import RESULTS, choose
from ..._linear.bipartite import Bipartite, BipartiteFactor, Components, bipartite_factor, components, inverse
from ..._linear.known_inverse import known_inverse
from ..._linear.norms import largest
from ..._solvers.semi_dual import Evaluation, Optimum, maximise

_Number = float | Float[Array, "..."]  # a scalar; the constructor names what is wrong with others

# Range of costs, in units of epsilon, at which the plan is spread out enough for Newton's method to start anywhere.
_GENTLE = 16.0


class TransportData(eqx.Module):
    """Costs C (n, m), and the masses a (n,) of the rows and b (m,) of the columns; None: all alike (see `EntropicTransport`)."""

    C: Array
    a: Array | None = None
    b: Array | None = None


class ScaledPotentials(eqx.Module):
    r"""The unknown of (K1)-(K2): $\phi$ and $\gamma$, less what the smallest costs of the rows and of the columns make of them.

    Less that, because differences of costs are exact where their sizes are not.
    """

    rows: Float[Array, "..."]
    columns: Float[Array, "..."]


class EntropicTransport(AbstractDeclarativeNode):
    r"""The plan that moves masses a onto masses b at least cost, smoothed by an entropy: Sinkhorn's problem.

    **Problem.**     $P^* = \arg\min_{P \ge 0}\ \langle C, P\rangle + \epsilon\,\mathrm{KL}(P \mid ab^\top)$ subject to $P1 = a$, $P^\top 1 = b$; with
                     `rho`, instead of the constraints, $+\ \rho\,\mathrm{KL}(P1 \mid a) + \rho\,\mathrm{KL}(P^\top 1 \mid b)$,
                     $\mathrm{KL}(p \mid q) = \sum p\log(p/q) - p + q$.                                                          (P)
    **Optimality.**  $\phi_i + \tau \log\sum_j b_j e^{\gamma_j - C_{ij}/\epsilon} = 0$ (K1),
                     $\gamma_j + \tau \log\sum_i a_i e^{\phi_i - C_{ij}/\epsilon} = 0$ (K2),
                     $\tau = \rho / (\rho + \epsilon)$, or 1 without `rho`; then
                     $P_{ij} = a_i b_j e^{\phi_i + \gamma_j - C_{ij}/\epsilon}$. For $\tau = 1$ a constant may move from $\phi$ to $\gamma$:
                     with $t = (a^\top\phi - b^\top\gamma) / (1^\top a + 1^\top b)$, (K1) $+\,t$ and (K2) $-\,t$ vanish together at t = 0 only.
    **Solver.**      Damped Newton on the semi-dual (`semi_dual.py`), with continuation in the cost: tens of steps, not the $O(1/\epsilon)$
                     of Sinkhorn's algorithm. Under `UnrolledAdjoint` Sinkhorn's algorithm, in logarithms.
    **Gradient.**    Implicit function theorem on (K1)-(K2), in C, a, b, `epsilon` and `rho`; all modes, any order. The linear system is that
                     of a bipartite graph, one Cholesky factor of the size of the smaller side.
    **Use instead.** `projection_transport` for a plan with exact zeros; `Softmax` on every row where only the rows have masses.

    | symbol        | code      | shape          | meaning                                                                       |
    |---------------|-----------|----------------|-------------------------------------------------------------------------------|
    | $C$           | `C`       | `(n, m)`       | costs, of either sign; +inf forbids a pair                                      |
    | $a, b$        | `a`, `b`  | `(n,)`, `(m,)` | masses, at least 0. None: the same for all, their total that of the other side, or 1 |
    | $\epsilon$    | `epsilon` | `()`           | positive, in units of the costs; an array is learnable                        |
    | $\rho$        | `rho`     | `()`           | positive, in units of the costs; an array is learnable; None: masses are kept exactly |
    | $\epsilon\phi, \epsilon\gamma$ | `dual` | `(n,)`, `(m,)` | potentials, the pair; without `rho` with $a^\top\phi = b^\top\gamma$       |
    | $P$           | `value`   | `(n, m)`       | the plan                                                                      |
    |               | `objective` | `()`         | the minimum of (P)                                                            |

    **Arguments:** `epsilon`, `rho`. `throw`, `on_failure`, `max_steps`, `adjoint`: see `Policy` and `ImplicitAdjoint`.
    **Call:** `transport(C, a=None, b=None)`, or with one `TransportData`.
    **Returns:** `Float[Array, "n m"]`: rows sum to a within rounding, columns to b within the solver's tolerance.
    **Masses.** Without `rho` the masses must have the same total (within the square root of the dtype's precision; in each part, if forbidden
    pairs cut the problem into parts): both are scaled to the geometric mean of the two totals, and that is the problem
    differentiated. So only changes of a and b that keep the totals equal mean something. A mass may be 0: its row (column) of P is 0, with
    the one-sided derivative. Where a plan falls, at the dtype's precision, into blocks that exchange no mass, a gradient in a and b along the
    relative mass of the blocks has no digits, and nothing says so.
    **Raises:** `ValueError` for shapes that do not fit; with `throw=True` a `SolveError` at run time: `infeasible` if totals differ or a
    row (column) with mass has no allowed pair (with `rho`, its mass is left behind instead), `empty` if there is no mass,
    `nonfinite_data` also for negative masses, or an `epsilon` or `rho` that is not positive; `not_a_solution` where the dtype has too few
    digits: rounding changes an entry of P by about `eps * (max(C) - min(C)) / epsilon` of itself, and more than 3e-3 in float32 (an
    `epsilon` of about 1e-4 of the range of C), 1e-7 in float64, is refused. Where forbidden pairs leave no plan that is positive on all
    others (a triangle of costs) the potentials are infinite: the plan may be found to the dtype's precision all the same; then its gradient
    fails (`inaccurate_backward`).
    **Reference:** Cuturi 2013, arXiv:1306.0895; Chizat et al. 2018, *Scaling algorithms for unbalanced optimal transport problems*
    (`rho`); Peyré & Cuturi 2019, *Computational Optimal Transport*, section 4; Cuturi et al. 2020, arXiv:2006.02572 (implicit gradients).
    """

    epsilon: _Number
    rho: _Number | None
    adjoint: optx.AbstractAdjoint | None
    policy: Policy

    smoothness: ClassVar[str] = "analytic wherever all allowed pairs can be used"

    def __init__(
        self,
        epsilon: _Number,
        *,
        rho: _Number | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        policy: Policy | None = None,
        throw: bool | None = None,
        on_failure: Literal["nan", "zero"] | None = None,
        max_steps: int | None = None,
    ):
        self.epsilon = number(epsilon, "epsilon")
        self.rho = None if rho is None else number(rho, "rho", hint="; None keeps the masses exactly")
        self.adjoint = adjoint
        self.policy = make_policy(policy, throw=throw, on_failure=on_failure, max_steps=max_steps)

    def __call__(self, C, a=None, b=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return evaluate(self, self.pack(C, a, b))

    def pack(self, C, a=None, b=None):  # pyright: ignore[reportIncompatibleMethodOverride]  (the names of a call)
        return _pack(C, a, b)

    def check(self, x):
        _check(x)

    # Problem and optimality

    def optimality(self, y: ScaledPotentials, x: TransportData) -> ScaledPotentials:
        problem = self._problem(x)
        rows, columns = problem.rows(y.columns)[0], problem.columns(y.rows)[0]
        t = problem.drift(y)
        return ScaledPotentials(y.rows - rows + t.rows, y.columns - columns - t.columns)

    def value(self, y, x):
        return _plan(self._problem(x), y)

    def dual(self, y, x):
        problem = self._problem(x)
        potentials = problem.potentials(y)
        t = problem.drift(potentials)
        return potentials.rows - t.rows, potentials.columns + t.columns

    def objective(self, y, x):
        return envelope(_lagrangian, y, (self, x))

    # Solver

    def run(self, x, y0, loop):
        del y0
        problem = self._problem(x)
        if loop is lax_loop:
            found = _newton(problem, self.policy.max_steps)
        else:
            found = _sinkhorn(problem, self.policy.max_steps, loop)
        y, error, steps, converged = found
        eps = float(jnp.finfo(x.C.dtype).eps)
        potentials = largest(jnp.where(problem.live_rows, y.rows, 0)) + largest(
            jnp.where(problem.live_columns, y.columns, 0)
        )
        # Rounding enters P by the exponent, so that the error of a marginal is absolute there: too large, and the plan is not the one asked for.
        accurate = (error <= 10 * eps**0.5) & (2 * eps * potentials <= 10 * eps**0.5)
        result = choose(converged | accurate, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        result = choose(converged & ~accurate, RESULTS.not_a_solution, result)
        if self.rho is None:
            result = choose(problem.feasible, result, RESULTS.infeasible)
            mass = jnp.any(problem.a > 0) | jnp.any(problem.b > 0)
            result = choose(mass, result, RESULTS.empty)
        result = choose(self._in_domain(x), result, RESULTS.nonfinite_data)
        # A change of 1 in phi is a factor e in a row of P.
        one = jnp.ones((), x.C.dtype)
        return Run(y, result, steps, scale=one, unit=one, final=True)

    # Structure of the gradient

    def linear_system(self, y, x, factor):
        del factor
        problem = self._problem(x)
        linear = _linearise(problem, y)
        vector, _ = ravel_pytree(y)
        return known_inverse(vector, jtu.Partial(_solve, linear), jtu.Partial(_solve_transpose, linear))

    def _in_domain(self, x: TransportData) -> Bool[Array, ""]:
        positive = lambda value: (jnp.asarray(value) > 0) & jnp.isfinite(jnp.asarray(value))
        good = positive(self.epsilon) & jnp.all(x.C > -jnp.inf)
        if self.rho is not None:
            good = good & positive(self.rho)
        for mass in (x.a, x.b):
            if mass is not None:
                good = good & jnp.all((mass >= 0) & (mass < jnp.inf))
        return good

    def _problem(self, x: TransportData) -> "_Problem":
        return _Problem.of(x, self.epsilon, self.rho)


def _pack(C, a, b) -> TransportData:
    if isinstance(C, TransportData):
        return C
    array = lambda value: None if value is None else jnp.asarray(value)
    return TransportData(jnp.asarray(C), array(a), array(b))


def _check(x: Any) -> None:
    if not isinstance(x, TransportData):
        raise ValueError(f"EntropicTransport takes a matrix of costs or a `TransportData`, got {type(x).__name__}.")
    if x.C.ndim != 2:
        raise ValueError(
            f"C must be one matrix of costs, shape (n, m), got shape {x.C.shape}: use `jax.vmap` for batches."
        )
    if x.C.size == 0 or not jnp.issubdtype(x.C.dtype, jnp.floating):
        raise ValueError(f"C must be a non-empty floating matrix, got {x.C.dtype}{list(x.C.shape)}.")
    for name, mass, size, side in (("a", x.a, x.C.shape[0], "row"), ("b", x.b, x.C.shape[1], "column")):
        if mass is not None and (mass.shape != (size,) or mass.dtype != x.C.dtype):
            raise ValueError(
                f"{name} must hold one mass for each {side} of C, {x.C.dtype}[{size}]; got {mass.dtype}{list(mass.shape)}."
            )


# The problem in units of epsilon


class _Problem(eqx.Module):
    r"""(P) in units of $\epsilon$, with the smallest costs taken out: $K_{ij} = (C_{ij} - f_i - g_j) / \epsilon \ge 0$.

    In terms of $\phi' = \phi - f / \epsilon$, and $\gamma'$ alike, (K1) is $\phi'_i + \tau\log\sum_j b_j e^{\gamma'_j - K_{ij}} + (1 - \tau) f_i /
    \epsilon = 0$. f and g carry no derivative: where they go does not matter to P.
    """

    K: Float[Array, "n m"]
    allowed: Bool[Array, "n m"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    f: Float[Array, " n"]
    g: Float[Array, " m"]
    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    parts: Components | None
    feasible: Bool[Array, ""]

    @classmethod
    def of(cls, x: TransportData, epsilon, rho) -> "_Problem":
        C = x.C
        allowed = C != jnp.inf
        a, b = _masses(x)
        f = _finite(jnp.min(detach(C), axis=1))
        g = _finite(jnp.min(detach(C) - f[:, None], axis=0))
        epsilon = jnp.asarray(epsilon, C.dtype)
        K = (jnp.where(allowed, C, 0) - jnp.where(allowed, f[:, None] + g[None, :], 0)) / epsilon
        if rho is not None:
            return cls(K, allowed, a, b, f, g, epsilon, jnp.asarray(rho, C.dtype), None, jnp.ones((), bool))
        parts = components(allowed, detach(a) > 0, detach(b) > 0)
        half, feasible = _half_log_ratio(parts, a, b)
        of_rows, of_columns = parts.spread(half)
        return cls(K, allowed, a * jnp.exp(-of_rows), b * jnp.exp(of_columns), f, g, epsilon, None, parts, feasible)

    @property
    def tau(self):
        return 1 if self.rho is None else self.rho / (self.rho + self.epsilon)

    @property
    def open_rows(self) -> Bool[Array, " n"]:
        """Those with somewhere to send mass to."""
        return jnp.any(self.allowed & (self.b > 0)[None, :], axis=1)

    @property
    def open_columns(self) -> Bool[Array, " m"]:
        return jnp.any(self.allowed & (self.a > 0)[:, None], axis=0)

    @property
    def live_rows(self) -> Bool[Array, " n"]:
        """Those that have mass, too."""
        return (self.a > 0) & self.open_rows

    @property
    def live_columns(self) -> Bool[Array, " m"]:
        return (self.b > 0) & self.open_columns

    def rows(self, columns: Float[Array, " m"], scale=1.0) -> tuple[Float[Array, " n"], Float[Array, "n m"]]:
        """What (K1) makes of the rows' potentials, and the shares of the columns in each row; `scale` multiplies all costs."""
        logs, shares = _logs_and_shares(scale * self.K, self.allowed, self.b, columns)
        return _times(self.tau, -logs) - scale * self._offset(self.f), shares

    def columns(self, rows: Float[Array, " n"]) -> tuple[Float[Array, " m"], Float[Array, "m n"]]:
        """(K2) alike."""
        logs, shares = _logs_and_shares(self.K.T, self.allowed.T, self.a, rows)
        return _times(self.tau, -logs) - self._offset(self.g), shares

    def _offset(self, smallest):
        return jnp.zeros_like(smallest) if self.rho is None else smallest / (self.rho + self.epsilon)

    def row_mass(self, rows: Float[Array, " n"], scale=1.0) -> Float[Array, " n"]:
        """P1, at a solution of (K1)."""
        return jnp.where(self.open_rows, self._kept(self.a, rows, scale * self.f), 0)

    def column_mass(self, columns: Float[Array, " m"], scale=1.0) -> Float[Array, " m"]:
        return jnp.where(self.open_columns, self._kept(self.b, columns, scale * self.g), 0)

    def _kept(self, mass, potentials, smallest):
        return mass if self.rho is None else mass * jnp.exp(-(self.epsilon * potentials + smallest) / self.rho)

    def levelled(self, rows: Float[Array, " n"], columns: Float[Array, " m"], scale=1.0):
        """Both, moved by what makes the masses of rows and columns the same in total; (K1) still holds.

        With `rho`, the objective hardly notices a constant that moves from one to the other: iterations would take long to find it.
        """
        if self.rho is None:
            return rows, columns
        log_kept = lambda live, mass, potentials, smallest: jax.nn.logsumexp(
            jnp.where(
                live,
                jnp.log(jnp.where(live, mass, 1)) - (self.epsilon * potentials + scale * smallest) / self.rho,
                -jnp.inf,
            )
        )
        surplus = log_kept(self.live_columns, self.b, columns, self.g) - log_kept(self.live_rows, self.a, rows, self.f)
        constant = self.rho / (self.epsilon * (1 + self.tau)) * surplus
        constant = jnp.where(jnp.isfinite(constant), constant, 0)
        return rows - self.tau * constant, columns + constant

    def potentials(self, y: ScaledPotentials) -> ScaledPotentials:
        return ScaledPotentials(self.epsilon * y.rows + self.f, self.epsilon * y.columns + self.g)

    def plan(self, y: ScaledPotentials) -> Float[Array, "n m"]:
        exponent = y.rows[:, None] + y.columns[None, :] - self.K
        # Pairs of two without mass may be of any size.
        scaling = jnp.exp(jnp.minimum(exponent, _highest(exponent.dtype)))
        return jnp.where(self.allowed, self.a[:, None] * self.b[None, :] * scaling, 0)

    def drift(self, y: ScaledPotentials) -> ScaledPotentials:
        """t of (K1)-(K2), for each part, at its rows and columns."""
        if self.parts is None:
            return ScaledPotentials(jnp.zeros_like(self.a), jnp.zeros_like(self.b))
        gauge = self.gauge
        return ScaledPotentials(*self.parts.spread(self.parts.sums(gauge.rows * y.rows, -gauge.columns * y.columns)))

    @property
    def gauge(self) -> ScaledPotentials:
        assert self.parts is not None
        of_rows, of_columns = self.parts.spread(inverse(self.parts.sums(self.a, self.b)))
        return ScaledPotentials(self.a * of_rows, self.b * of_columns)

    def regauged(self, y: ScaledPotentials) -> ScaledPotentials:
        """The same plan, with t = 0; rows and columns without mass as (K1)-(K2) have them."""
        columns = jnp.where(self.live_columns, y.columns + self.drift(y).columns, 0)
        rows = self.rows(columns)[0]
        columns = jnp.where(self.live_columns, columns, self.columns(rows)[0])
        return ScaledPotentials(self.rows(columns)[0], columns)


def _times(tau, logs):
    return logs if isinstance(tau, int) else tau * logs


def _finite(smallest):
    """NaN passes, to be seen."""
    return jnp.where(jnp.isinf(smallest), 0, smallest)


def _masses(x: TransportData):
    n, m = x.C.shape
    total = jnp.sum(x.a) if x.a is not None else jnp.sum(x.b) if x.b is not None else jnp.ones((), x.C.dtype)
    a = jnp.full(n, 1 / n, x.C.dtype) * total if x.a is None else x.a
    return a, jnp.full(m, 1 / m, x.C.dtype) * total if x.b is None else x.b


def _half_log_ratio(parts: Components, a, b) -> tuple[Float[Array, " parts"], Bool[Array, ""]]:
    """Of the totals of each part, and whether all the ratios are 1."""
    A, B = parts.sums(a, jnp.zeros_like(b)), parts.sums(jnp.zeros_like(a), b)
    both = (A > 0) & (B > 0)
    half = jnp.where(both, jnp.log(jnp.where(both, A, 1) / jnp.where(both, B, 1)) / 2, 0)
    stranded = jnp.any((a > 0) & (parts.rows == parts.count)) | jnp.any((A > 0) != (B > 0))
    return half, ~stranded & jnp.all(jnp.abs(half) <= float(jnp.finfo(a.dtype).eps) ** 0.5)


def _logs_and_shares(K, allowed, weights, potentials) -> tuple[Float[Array, " n"], Float[Array, "n m"]]:
    """Row by row log sum_j b_j exp(gamma_j - K_ij) and the terms' shares in the sum; 0 and zeros where nothing takes part."""
    t = potentials[None, :] - K
    live = allowed & (weights > 0)[None, :]
    top = jnp.max(jnp.where(live, detach(t), -jnp.inf), axis=1)
    top = _finite(top)
    # Terms without mass may be of any size. They have a derivative in their mass all the same.
    terms = jnp.where(allowed, weights[None, :] * jnp.exp(jnp.minimum(t - top[:, None], _highest(t.dtype))), 0)
    total = jnp.sum(terms, axis=1)
    some = jnp.any(live, axis=1)
    safe = jnp.where(some, total, 1)
    return jnp.where(some, jnp.log(safe) + top, 0), terms / safe[:, None]


def _highest(dtype) -> float:
    """An exponent that leaves room for sums and products of its exponential."""
    return 60.0 if dtype == jnp.float32 else 600.0


@eqx.filter_custom_jvp
def _plan(problem: _Problem, y: ScaledPotentials) -> Float[Array, "n m"]:
    """P, with rows that sum to their mass within rounding."""
    return problem.row_mass(y.rows)[:, None] * problem.rows(y.columns)[1]


@_plan.def_jvp
def _(primals, tangents):
    # Of the exponential formula, the same at a solution. The derivative of shares would be a difference of what it has of both potentials, which for
    # losses like -log P is nothing but rounding: as the right-hand side of a linear solve that has no digits to be judged by.
    return _plan(*primals), eqx.filter_jvp(lambda problem, y: problem.plan(y), primals, tangents)[1]


def _lagrangian(y: ScaledPotentials, bound) -> Float[Array, ""]:
    """The dual objective, stationary in y at the solution."""
    node, x = bound
    problem = node._problem(x)
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    entropy = epsilon * (jnp.sum(a) * jnp.sum(b) - jnp.sum(problem.plan(y)))
    f, g = problem.potentials(y).rows, problem.potentials(y).columns
    if problem.rho is None:
        return a @ f + b @ g + entropy
    # Mass with nowhere to go is left behind: its potential is infinite.
    left = lambda usable, potential: jnp.where(
        usable, -jnp.expm1(jnp.minimum(-potential / problem.rho, _highest(a.dtype))), 1
    )
    return problem.rho * (a @ left(problem.open_rows, f) + b @ left(problem.open_columns, g)) + entropy


# Solvers


def _newton(problem: _Problem, max_steps: int):
    """(unknown, error of the columns' logarithms, steps, converged)."""
    problem = detach_tree(problem)
    eps = float(jnp.finfo(problem.K.dtype).eps)
    rows, columns = problem.live_rows, problem.live_columns
    a, b = jnp.where(rows, problem.a, 0), jnp.where(columns, problem.b, 0)
    softness = 0.0 if problem.rho is None else problem.epsilon / problem.rho

    def semi_dual(scale, gamma, _) -> Evaluation:
        phi, shares = problem.rows(gamma, scale)
        phi, gamma = problem.levelled(phi, gamma, scale)
        mass, wanted = problem.row_mass(phi, scale), problem.column_mass(gamma, scale)
        plan = mass[:, None] * shares
        got = jnp.sum(plan, axis=0)
        both = (got > 0) & (wanted > 0)
        log_ratio = jnp.log(jnp.where(both, wanted, 1) / jnp.where(both, got, 1))
        off = jnp.where(both, jnp.abs(log_ratio), 10)
        if problem.rho is None:
            value = a @ jnp.where(rows, phi, 0) + b @ jnp.where(columns, gamma, 0)
            slack = wanted
        else:
            value = -(jnp.sum(mass) + jnp.sum(wanted)) / softness - jnp.sum(mass)
            # Their logarithmic mean, which is what `wanted` and `got` differ by for a unit of their logarithms: with it, Newton's method solves for
            # the logarithm of the mass that a column wants, in which its potential is linear, where the column's own Hessian has
            # the mass itself.
            apart = both & (off > 1e-3)
            slack = jnp.where(apart, (wanted - got) / jnp.where(apart, log_ratio, 1), jnp.maximum(wanted, got))
        sizes = largest(jnp.where(rows, phi, 0)) + largest(jnp.where(columns, gamma, 0))
        return Evaluation(
            value=value,
            gradient=jnp.where(columns, wanted - got, 0),
            hessian=Bipartite(plan, softness * mass, softness * slack),
            damping=slack,
            error=jnp.max(jnp.where(columns, off, 0)),
            rounding=8 * eps * sizes,
            rows=phi,
            gamma=gamma,
        )

    used = problem.allowed & rows[:, None] & columns[None, :]
    spread = jnp.max(jnp.where(used, problem.K, 0))
    scale = jnp.minimum(1, _GENTLE / jnp.where(spread > 0, spread, 1))
    finite = jnp.isfinite(spread) & jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b)) & problem.feasible
    active = finite & jnp.any(used)
    # Where the plan is spread out, a few matrix-vector products may be all it takes.
    first = _scaled(problem, scale, a, b, active, max_steps)
    there = first.converged & (scale >= 1)
    found = maximise(semi_dual, first.gamma, jnp.zeros_like(a), scale, active & ~there, max_steps)
    found = jtu.tree_map(lambda one, other: jnp.where(there, one, other), first, found)
    y = problem.regauged(ScaledPotentials(found.rows, found.gamma))
    return y, found.error, found.steps, found.converged | (finite & ~jnp.any(used))


def _scaled(problem: _Problem, scale, a, b, active, max_steps: int) -> Optimum:
    """Sinkhorn's algorithm as it was published, on exp(-K), as long as it at least halves the error with every step: `scale` times K is gentle.

    A step is two products of a matrix and a vector, and exponentials and logarithms of vectors only.
    """
    eps = float(jnp.finfo(problem.K.dtype).eps)
    rows, columns, tau = a > 0, b > 0, problem.tau
    kernel = jnp.where(problem.allowed, jnp.exp(-scale * problem.K), 0)
    of_rows, of_columns = scale * problem._offset(problem.f), scale * problem._offset(problem.g)
    log = lambda sums: _times(tau, -jnp.log(jnp.where(sums > 0, sums, 1)))
    sizes = lambda phi, gamma: largest(jnp.where(rows, phi, 0)) + largest(jnp.where(columns, gamma, 0))

    def body(state):
        gamma, _, last, _, steps, _ = state
        phi = jnp.where(rows, log(kernel @ (b * jnp.exp(gamma))) - of_rows, 0)
        phi, gamma = problem.levelled(phi, gamma, scale)
        new = jnp.where(columns, log((a * jnp.exp(phi)) @ kernel) - of_columns, 0)
        error = largest(new - gamma) / tau  # of the logarithms of the masses of the columns
        slow = ~(error < 0.5 * last) & (steps > 0)
        done = error <= eps**0.75 + 8 * eps * sizes(phi, gamma)
        over = slow | (error <= eps)  # not at the tolerance: to the last digit, as Newton's method would
        return jnp.where(over, gamma, new), phi, error, done, steps + 1, over

    infinite, no = jnp.full((), jnp.inf, a.dtype), jnp.zeros((), bool)
    start = (jnp.zeros_like(b), jnp.zeros_like(a), infinite, no, jnp.zeros((), jnp.int32), ~active)
    go_on = lambda state: ~state[5] & (state[4] < max_steps)
    gamma, phi, error, done, steps, _ = jax.lax.while_loop(go_on, body, start)
    return Optimum(jnp.where(jnp.isfinite(gamma), gamma, 0), phi, error, steps, done & active)


def _sinkhorn(problem: _Problem, max_steps: int, loop: Callable):
    """(K1) and (K2) in turn; to be differentiated."""
    tol = float(jnp.finfo(problem.K.dtype).eps) ** 0.75
    rows, columns = problem.live_rows, problem.live_columns

    def body(carry):
        y, _, steps = carry
        new = problem.columns(y.rows)[0]
        error = largest(jnp.where(columns, new - y.columns, 0))
        return ScaledPotentials(problem.rows(new)[0], new), detach(error), steps + 1

    start = ScaledPotentials(problem.rows(jnp.zeros_like(problem.b))[0], jnp.zeros_like(problem.b))
    large = jnp.full((), jnp.inf, problem.K.dtype)
    sizes = lambda y: largest(jnp.where(rows, y.rows, 0)) + largest(jnp.where(columns, y.columns, 0))
    go_on = lambda carry: detach(carry[1]) > tol * (1 + detach(sizes(carry[0])))
    y, error, steps = loop(go_on, body, (start, large, jnp.zeros((), jnp.int32)), max_steps=max_steps)
    return problem.regauged(y), error, steps, ~go_on((y, error, steps))


# The linear system of (K1)-(K2)


class _Linear(eqx.Module):
    r"""The Jacobian $J = J_0 + z g^\top$, $J_0 = \begin{bmatrix} I & \tau R \\ \tau S & I \end{bmatrix}$: shares R, S, gauge g, z = (1, -1).

    With masses r and c of rows and columns, $r_i R_{ij} = c_j S_{ji} = P_{ij}$, so that $J_0 = \mathrm{diag}(\tau / r, \tau / c) B$ with the
    symmetric B of `bipartite.py`. For $\tau = 1$, $J_0 z = 0$ and $(r, -c) J_0 = 0$: the gauge decides along these. Rows without mass do not enter
    the others' equations, so they are eliminated first (last, in the transpose).
    """

    R: Float[Array, "n m"]
    S: Float[Array, "m n"]
    r: Float[Array, " n"]
    c: Float[Array, " m"]
    tau: Float[Array, ""]
    live_rows: Bool[Array, " n"]
    live_columns: Bool[Array, " m"]
    gauge: ScaledPotentials | None
    parts: Components | None
    factor: BipartiteFactor
    flipped: bool = eqx.field(static=True)

    def symmetric(self, p, q):
        """B (u, v) = (p, q)."""
        if self.flipped:
            v, u = self.factor.solve(q, p)
            return u, v
        return self.factor.solve(p, q)


def _linearise(problem: _Problem, y: ScaledPotentials) -> _Linear:
    R, S = problem.rows(y.columns)[1], problem.columns(y.rows)[1]
    r, c = problem.row_mass(y.rows), problem.column_mass(y.columns)
    live_rows, live_columns = problem.live_rows, problem.live_columns
    # Shares of rows without mass play no part in B.
    plan = jnp.where(live_columns[None, :], r[:, None] * R, 0)
    softness = 0.0 if problem.rho is None else problem.epsilon / problem.rho
    system = Bipartite(plan, softness * r, softness * c)
    flipped = r.size < c.size
    parts = problem.parts
    # Blocks of a plan that exchange less than rounding: no cotangent says anything of the potentials of one against the other's, and
    # solving for them all the same would drown the rest.
    shift = 8 * float(jnp.finfo(r.dtype).eps)
    factor = (
        bipartite_factor(system.flipped, None if parts is None else parts.flipped, shift=shift)
        if flipped
        else bipartite_factor(system, parts, shift=shift)
    )
    tau = jnp.asarray(problem.tau, r.dtype)
    gauge = None if parts is None else problem.gauge
    return _Linear(R, S, r, c, tau, live_rows, live_columns, gauge, parts, factor, flipped)


def _solve(linear: _Linear, vector):
    n = linear.r.size
    p, q = vector[:n], vector[n:]
    r, c, tau = linear.r, linear.c, linear.tau
    live_columns = linear.live_columns
    if linear.parts is None or linear.gauge is None:
        v = linear.symmetric(r * p / tau, c * q / tau)[1]
    else:
        parts, gauge = linear.parts, linear.gauge
        # (r, -c) J = (1'r + 1'c) g: what the gauge has to be.
        t = parts.sums(r * p, -c * q) * inverse(parts.sums(r, c))
        of_rows, of_columns = parts.spread(t)
        p, q = p - of_rows, q + of_columns
        u, v = linear.symmetric(r * p, c * q)
        v = v - parts.spread(t - parts.sums(gauge.rows * u, -gauge.columns * jnp.where(live_columns, v, 0)))[1]
    v = jnp.where(live_columns, v, 0)
    u = p - tau * (linear.R @ v)
    v = jnp.where(live_columns, v, q - tau * (linear.S @ u))
    return jnp.concatenate([p - tau * (linear.R @ v), v])


def _solve_transpose(linear: _Linear, vector):
    n = linear.r.size
    p, q = vector[:n], vector[n:]
    r, c, tau = linear.r, linear.c, linear.tau
    live = lambda u, v: (jnp.where(linear.live_rows, u, 0), jnp.where(linear.live_columns, v, 0))
    rest = lambda u, v: (jnp.where(linear.live_rows, 0, u), jnp.where(linear.live_columns, 0, v))
    # Those without mass have no column in R or S, those with nowhere to go no row: what is left of the equations of either is p or q.
    other_p, other_q = rest(p, q)
    p, q = p - tau * (other_q @ linear.S), q - tau * (other_p @ linear.R)
    if linear.parts is None or linear.gauge is None:
        u, v = linear.symmetric(*live(p, q))
        (u, v), (other_p, other_q) = live(r * u / tau, c * v / tau), rest(p, q)
        return jnp.concatenate([u + other_p, v + other_q])
    parts, gauge = linear.parts, linear.gauge
    # J z = z (g'z): what z'w has to be.
    other_p, other_q = rest(p, q)
    p, q = live(p, q)
    t = parts.sums(p, -q)
    of_rows, of_columns = parts.spread(t)
    u, v = linear.symmetric(p - gauge.rows * of_rows, q + gauge.columns * of_columns)
    u, v = live(r * u, c * v)
    u, v = u + other_p, v + other_q
    of_rows, of_columns = parts.spread((t - parts.sums(u, -v)) * inverse(parts.sums(r, c)))
    return jnp.concatenate([u + of_rows * r, v - of_columns * c])
