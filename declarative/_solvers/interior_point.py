r"""A primal-dual interior-point method for $\min_w \tfrac12 w^\top P w + g^\top w$ subject to $R w \le f$, certificates included.

The homogeneous embedding: with multipliers $\lambda \ge 0$, slacks $s \ge 0$ and two scalars $\tau, \kappa \ge 0$, find

$$ Pw + R^\top\lambda + g\tau = 0, \quad Rw + s - f\tau - \varepsilon\lambda = 0, \quad
   \kappa + \tfrac1\tau (w^\top P w + \varepsilon\lambda^\top\lambda) + g^\top w + f^\top\lambda = 0, $$
$$ s\circ\lambda = 0, \quad \kappa\tau = 0 \tag{H} $$

which always has a solution other than 0. Where $\tau > 0$, $(w, \lambda)/\tau$ solves the program; where $\tau = 0$, the multipliers prove it
infeasible or $w$ proves it unbounded. $\varepsilon = 0$ is the program itself; $\varepsilon > 0$ replaces $Rw \le f$ by the penalty
$\tfrac1{2\varepsilon}\|(Rw - f)_+\|^2$.

Each step is Mehrotra's predictor and corrector on (H), with equal primal and dual steps, and one factor of
$P + R^\top D R$, $D = \lambda/(s + \varepsilon\lambda)$, for all of its right-hand sides. Under `vmap` the lanes that have ended are frozen.

With `target`, the embedding is switched off ($\tau = 1$, $\kappa = 0$) and the iteration ends on the central path, at
$s\circ\lambda = \mathrm{target}$.

References: Mehrotra 1992; Andersen & Ye 1999 for the quadratic term of (H); Goulart & Chen 2024 (Clarabel, arXiv:2405.12762), whose
starting point and step lengths these are. Differences: dense and condensed, since all of a batch shares one shape; rows without a
finite right-hand side stay, switched off by a mask.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.lanes import where_needed
from .._linear.norms import largest
from .._linear.positive_definite import Gram, InverseRoot, factorise

OPTIMAL, INFEASIBLE, UNBOUNDED, STALLED, OUT_OF_STEPS = range(5)
INDEFINITE, NONFINITE, DEPENDENT = 10, 11, 12  # seen before the iteration

_BACKOFF = 0.99  # of the step to the boundary
_APART = 0.01  # the smaller of a slack and its multiplier, where it is clear that it tends to zero
_STALL = 12  # steps without a new best residual before giving up


class Rows(eqx.Module):
    """The matrix R: general rows, then -B for lower bounds and B for upper ones (B None: the identity, for O(n))."""

    general: Float[Array, "m k"] | None
    basis: Float[Array, "n k"] | None
    lower: bool = eqx.field(static=True)
    upper: bool = eqx.field(static=True)

    def __call__(self, w: Float[Array, " k"]) -> Float[Array, " rows"]:
        parts = [] if self.general is None else [self.general @ w]
        if self.lower or self.upper:
            bounded = w if self.basis is None else self.basis @ w
            parts += [-bounded] * self.lower + [bounded] * self.upper
        return jnp.concatenate(parts) if parts else jnp.zeros(0, w.dtype)

    def transpose(self, v: Float[Array, " rows"], k: int) -> Float[Array, " k"]:
        general, bounded = self._split(v, lambda lower, upper: upper - lower)
        total = jnp.zeros(k, v.dtype)
        if general is not None and self.general is not None:
            total = total + general @ self.general
        if bounded is not None:
            total = total + (bounded if self.basis is None else bounded @ self.basis)
        return total

    def factorise(self, matrix, weights: Float[Array, " rows"], needed=True) -> InverseRoot:
        """The inverse root of `matrix` + R' diag(weights) R, in the lanes that need it; for a diagonal (a vector) a vector where it can."""
        general, bounded = self._split(weights, lambda lower, upper: upper + lower)
        grams, diagonal = [], None
        if general is not None and self.general is not None:
            grams.append(Gram(self.general, general))
        if bounded is not None and self.basis is not None:
            grams.append(Gram(self.basis, bounded))
        elif bounded is not None:
            diagonal = bounded
        return factorise(matrix, diagonal, grams, needed)

    def _split(self, v, join):
        m = 0 if self.general is None else self.general.shape[0]
        general = None if self.general is None else v[:m]
        if not (self.lower or self.upper):
            return general, None
        n = (v.size - m) // (self.lower + self.upper)
        zeros = jnp.zeros(n, v.dtype)
        lower = v[m : m + n] if self.lower else zeros
        upper = v[v.size - n :] if self.upper else zeros
        return general, join(lower, upper)


def add_matrix(matrix, other):
    return other + jnp.diag(matrix) if matrix.ndim == 1 else matrix + other


def multiply(matrix, vector):
    """Product with a symmetric matrix, or with a diagonal one given as a vector."""
    return matrix * vector if matrix.ndim == 1 else matrix @ vector


class Program(eqx.Module):
    """Data, scaled so that the entries of P, R, g and f are at most about 1. `live`: rows that constrain."""

    P: Float[Array, "k k"] | Float[Array, " k"]
    g: Float[Array, " k"]
    rows: Rows
    f: Float[Array, " rows"]
    live: Bool[Array, " rows"]
    softness: float | Float[Array, " rows"] = 0.0


class Iterate(eqx.Module):
    """A point of (H) and its residuals, which the next step starts from."""

    w: Float[Array, " k"]
    lam: Float[Array, " rows"]
    s: Float[Array, " rows"]
    tau: Float[Array, ""]
    kappa: Float[Array, ""]
    dual_residual: Float[Array, " k"]
    primal_residual: Float[Array, " rows"]
    gap: Float[Array, ""]
    Pw: Float[Array, " k"]


class _State(eqx.Module):
    at: Iterate
    best: tuple[Float[Array, " k"], Float[Array, " rows"], Float[Array, " rows"], Float[Array, ""]]
    code: Int[Array, ""]
    steps: Int[Array, ""]
    error: Float[Array, ""]
    idle: Int[Array, ""]


class Outcome(eqx.Module):
    """`w`, `lam`, `s` of the program, or its certificate: multipliers with f'lam = -1, or a ray w with g'w = -1."""

    w: Float[Array, " k"]
    lam: Float[Array, " rows"]
    s: Float[Array, " rows"]
    code: Int[Array, ""]
    steps: Int[Array, ""]


def interior_point(
    program: Program, max_steps: int, loop: Callable, target: Float[Array, ""] | None = None, skip=False
) -> Outcome:
    """Solves the program from a point that its data suggest; see the module's text. A lane to `skip` takes no step."""
    dtype = program.g.dtype
    eps = float(jnp.finfo(dtype).eps)
    at = _start(program, target)
    running = jnp.full((), -1, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    state = _State(at, (at.w, at.lam, at.s, at.tau), running, zero, jnp.asarray(jnp.inf, dtype), zero)
    state = eqx.tree_at(lambda state: state.code, state, jnp.where(skip, STALLED, running))

    def body(state):
        at, moved = _step(program, state.at, state.code == -1, target, loop)
        state = eqx.tree_at(lambda state: (state.at, state.steps), state, (at, state.steps + 1))
        state = _judge(program, state, eps, target)
        # Near the end rounding takes over and the iterates get worse: the best one is then good enough to be polished.
        close = state.error <= eps**0.4
        # On the way to a certificate (kappa above tau), and before it starts to fall, the error says nothing; otherwise four steps without
        # progress are enough.
        falling = (state.at.kappa < state.at.tau) & (state.error < 0.1)
        patience = jnp.where(close, 2, jnp.where(falling, 4, _STALL))
        stopped = ~moved | (state.idle >= patience)
        code = jnp.where((state.code == -1) & stopped, jnp.where(close, OPTIMAL, STALLED), state.code)
        return eqx.tree_at(lambda state: state.code, state, code)

    state = loop(lambda state: state.code == -1, body, state, max_steps=max_steps)
    return _outcome(program, state, loop)


def _start(program: Program, target) -> Iterate:
    # The program is centred at the minimiser of w'Pw/2 + g'w + |Rw - f|^2/2, so that is w = 0: multipliers and slacks are two signs
    # of one vector there, moved apart into the cone.
    f, live, one = program.f, program.live, jnp.ones((), program.g.dtype)
    w = jnp.zeros_like(program.g)
    s = _into_cone(f, live, one)
    lam = jnp.where(live, _into_cone(-f, live, one), 0)
    if target is not None:
        floor = jnp.sqrt(target)
        s, lam = jnp.where(live, jnp.maximum(s, floor), 1), jnp.where(live, jnp.maximum(lam, floor), 0)
    return _measured(program, w, lam, s, one, one if target is None else 0 * one)


def _into_cone(vector, live, one):
    lowest = jnp.min(jnp.where(live, vector, jnp.inf), initial=jnp.inf)
    shift = jnp.where(lowest < jnp.finfo(vector.dtype).eps ** 0.25, 1 - lowest, 0)
    return jnp.where(live, vector + shift, one)


def _measured(program: Program, w, lam, s, tau, kappa) -> Iterate:
    P, g, rows, f, live = program.P, program.g, program.rows, program.f, program.live
    Pw = multiply(P, w)
    dual = Pw + rows.transpose(lam, g.size) + g * tau
    primal = jnp.where(live, rows(w) + s - f * tau - program.softness * lam, 0)
    gap = kappa + (w @ Pw + jnp.sum(program.softness * lam**2)) / tau + g @ w + f @ lam
    return Iterate(w, lam, s, tau, kappa, dual, primal, gap, Pw)


def _step(program: Program, at: Iterate, needed, target, loop: Callable):
    """(next iterate, whether it moved), where it is `needed`."""
    P, g, rows, f, live, soft = program.P, program.g, program.rows, program.f, program.live, program.softness
    w, lam, s, tau, kappa = at.w, at.lam, at.s, at.tau, at.kappa
    k = g.size
    embedded = target is None
    count = jnp.sum(live).astype(g.dtype) + (1 if embedded else 0)
    safe_lam = jnp.where(live, lam, 1)
    weights = jnp.where(live, safe_lam / (s + soft * safe_lam), 0)
    factor = rows.factorise(P, weights, needed)

    def solve(r, e):
        dw = factor.solve(r - rows.transpose(weights * e, k))
        return dw, weights * (rows(dw) + e)

    mu = (s @ lam + tau * kappa) / jnp.maximum(count, 1)
    w1, lam1, v, curvature = w, lam, g, tau  # of use where there is an embedding
    if embedded:
        w1, lam1 = solve(-g, -f)
        off = w1 - w / tau
        slope = jnp.where(live, s / safe_lam, 0)
        # Positive, term by term: what the embedding's last row leaves of tau after elimination.
        curvature = (
            kappa / tau + off @ multiply(P, off) + lam1 @ (slope * lam1) + jnp.sum(soft * (lam1 - lam / tau) ** 2)
        )
        v = 2 * at.Pw / tau + g

    def direction(keep, complement, kappa_complement):
        """Residuals times `keep`; s lam and tau kappa reduced by the two complements."""
        e = jnp.where(live, keep * at.primal_residual - complement / safe_lam, 0)
        w2, lam2 = solve(-keep * at.dual_residual, e)
        if not embedded:
            ds = jnp.where(live, -(complement + s * lam2) / safe_lam, 0)
            return w2, lam2, ds, jnp.zeros_like(tau), jnp.zeros_like(tau)
        inner = v @ w2 + f @ lam2 + 2 * jnp.sum(soft * lam * lam2) / tau
        dtau = (keep * at.gap - kappa_complement / tau + inner) / curvature
        dw, dlam = w2 + dtau * w1, lam2 + dtau * lam1
        ds = jnp.where(live, -(complement + s * dlam) / safe_lam, 0)
        return dw, dlam, ds, dtau, -(kappa_complement + kappa * dtau) / tau

    def correction(dw, dlam, keep, complement, dtau):
        """One step of refinement: a multiplier of an active row is a difference of large numbers."""
        e = jnp.where(live, keep * at.primal_residual - complement / safe_lam, 0)
        first = -keep * at.dual_residual - g * dtau - multiply(P, dw) - rows.transpose(dlam, k)
        slack = jnp.where(weights > 0, dlam / jnp.where(weights > 0, weights, 1), 0)
        second = jnp.where(live, rows(dw) + e - f * dtau - slack, 0)
        # As `solve`: what `second` leaves of the rows is itself an e.
        return solve(first, second)

    def longest(dlam, ds, dtau, dkappa):
        ratios = [_to_boundary(s, ds), _to_boundary(safe_lam, dlam)]
        if embedded:
            ratios += [_to_boundary(tau[None], dtau[None]), _to_boundary(kappa[None], dkappa[None])]
        return jnp.min(jnp.stack(ratios))

    one = jnp.ones((), g.dtype)
    _, dlam, ds, dtau, dkappa = direction(one, s * lam, tau * kappa)
    reach = jnp.minimum(longest(dlam, ds, dtau, dkappa), 1)
    sigma = (1 - reach) ** 3
    if target is None:
        aim, keep = sigma * mu, 1 - sigma
    else:
        aim, keep = jnp.maximum(sigma * mu, target), one
    complement = s * lam + ds * dlam - aim
    dw, dlam, ds, dtau, dkappa = direction(keep, complement, tau * kappa + dtau * dkappa - aim)
    uneven = needed & (largest(weights) > float(jnp.finfo(g.dtype).eps) ** -0.4)
    compute = lambda one: correction(one * dw, one * dlam, keep, complement, dtau)
    more, more_lam = where_needed(uneven, compute, (jnp.zeros_like(dw), jnp.zeros_like(dlam)), loop)
    dw, dlam = dw + more, dlam + more_lam
    ds = jnp.where(live, -(complement + s * dlam) / safe_lam, 0)
    step = jnp.minimum(_BACKOFF * longest(dlam, ds, dtau, dkappa), 1)
    new = [w + step * dw, lam + step * dlam, s + step * ds, tau + step * dtau, kappa + step * dkappa]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in new]))
    moved = finite & (step > 1e-6)
    new = [jnp.where(finite, leaf, old) for leaf, old in zip(new, (w, lam, s, tau, kappa), strict=True)]
    if embedded:
        # (H) is homogeneous, so its iterates may be scaled: by a power of two, to keep tau and kappa near 1.
        size = jnp.maximum(new[3], new[4])
        factor_of_two = jnp.ldexp(one, -jnp.frexp(size)[1])
        new = [leaf * factor_of_two for leaf in new]
        new[2] = jnp.where(live, new[2], 1)
    return _measured(program, *new), moved


def _to_boundary(x, dx):
    return jnp.min(jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, -1), jnp.inf), initial=jnp.inf)


def _judge(program: Program, state: _State, eps: float, target) -> _State:
    """Whether the iterate is a solution or a certificate, to its tolerances."""
    g, f, live = program.g, program.f, program.live
    at = state.at
    tight, loose = eps**0.65, eps**0.55
    lam_rows = at.dual_residual - at.Pw - g * at.tau  # R' lam
    rows_w = jnp.where(live, at.primal_residual - at.s + f * at.tau + program.softness * at.lam, 0)  # R w
    primal_size = jnp.maximum(largest((rows_w, jnp.where(live, at.s, 0))), largest(f) * at.tau)
    dual_size = jnp.maximum(largest((at.Pw, lam_rows)), largest(g) * at.tau)
    primal = largest(at.primal_residual) / jnp.maximum(primal_size, at.tau)
    dual = largest(at.dual_residual) / jnp.maximum(dual_size, at.tau)
    product = jnp.where(live, at.s * at.lam, 0)
    if target is not None:
        centred = largest(jnp.where(live, product - target, 0)) / target
        feasible = jnp.maximum(primal, dual)
        error = jnp.maximum(feasible, centred)
        solved = (feasible <= loose) & (centred <= eps**0.25)
        code = jnp.where(solved, OPTIMAL, -1)
    else:
        worth = jnp.maximum(jnp.abs(at.w @ at.Pw) / at.tau, jnp.maximum(jnp.abs(g @ at.w), jnp.abs(f @ at.lam)))
        # Complementarity against the size of the objective.
        gap = jnp.sum(product) / at.tau / jnp.maximum(worth, at.tau)
        error = jnp.maximum(jnp.maximum(primal, dual), gap)
        # Rounding sets in soon after; where every pair of slack and multiplier shows which of the two is zero, polishing needs no more.
        small = jnp.max(jnp.where(live, jnp.minimum(at.s, at.lam), 0), initial=0)
        large = jnp.min(jnp.where(live, jnp.maximum(at.s, at.lam), jnp.inf), initial=jnp.inf)
        solved = (gap <= tight) | (gap <= eps**0.4) & (small <= _APART * large)
        solved = solved & (primal <= loose) & (dual <= loose)
        # Certificates; kappa is then the larger of the two scalars.
        towards_infeasible, towards_unbounded = -(f @ at.lam), -(g @ at.w)
        # The further kappa outweighs tau, the less it takes: `_outcome` sharpens a certificate, and looks again.
        strict = jnp.where(at.kappa > eps**-0.25 * at.tau, eps**0.33, eps**0.5)
        infeasible = (at.kappa > at.tau) & (towards_infeasible > 0) & (largest(lam_rows) <= strict * towards_infeasible)
        if not isinstance(program.softness, float):
            infeasible = jnp.zeros((), bool)  # Softened rows can be violated.
        # A softened row holds no one back, but charges for it.
        blocked = jnp.where(live, jnp.maximum(rows_w, 0), 0)
        ray = jnp.maximum(largest(at.Pw), largest(blocked))
        unbounded = (at.kappa > at.tau) & (towards_unbounded > 0) & (ray <= strict * towards_unbounded)
        code = jnp.where(unbounded, UNBOUNDED, -1)
        code = jnp.where(infeasible, INFEASIBLE, code)
        code = jnp.where(solved, OPTIMAL, code)
    code = jnp.where(jnp.isfinite(error), code, STALLED).astype(jnp.int32)
    better = (error < state.error) | (code >= 0)
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (at.w, at.lam, at.s, at.tau), state.best)
    idle = jnp.where(error < 0.9 * state.error, 0, state.idle + 1)
    return _State(at, best, code, state.steps, jnp.minimum(error, state.error), idle)


def _outcome(program: Program, state: _State, loop: Callable) -> Outcome:
    code = jnp.where(state.code == -1, OUT_OF_STEPS, state.code)
    w, lam, s, tau = state.best
    certified = (code == INFEASIBLE) | (code == UNBOUNDED)
    w, lam = where_needed(certified, lambda one: _sharpened(program, one * w, one * lam, code), (w, lam), loop)
    P, g, rows, f = program.P, program.g, program.rows, program.f
    pull, value, progress = largest(rows.transpose(lam, g.size)), -(f @ lam), -(g @ w)
    ray = largest((multiply(P, w), jnp.where(program.live, jnp.maximum(rows(w), 0), 0)))
    sharp = float(jnp.finfo(w.dtype).eps) ** 0.4
    proved = jnp.where(code == INFEASIBLE, pull <= sharp * value, ray <= sharp * progress)
    code = jnp.where(certified & ~proved, STALLED, code)
    positive = lambda x: jnp.where(x > 0, x, 1)
    scale = 1 / tau
    scale = jnp.where(code == INFEASIBLE, 1 / positive(value), scale)
    scale = jnp.where(code == UNBOUNDED, 1 / positive(progress), scale)
    live = program.live
    return Outcome(w * scale, jnp.where(live, lam * scale, 0), jnp.where(live, s * scale, 0), code, state.steps)


def _sharpened(program: Program, w, lam, code):
    """A certificate to more digits: the part of R'lam, or of Pw, that should not be there is projected away."""
    P, rows, k = program.P, program.rows, program.g.size
    # Weighted by lam^2, so that a multiplier moves in proportion to its size and keeps its sign.
    damping = float(jnp.finfo(w.dtype).eps) ** 0.4
    lam = lam / jnp.maximum(largest(lam), jnp.finfo(lam.dtype).tiny ** 0.5)
    whole, lam = lam, jnp.where(lam > damping, lam, 0)
    proof = code == INFEASIBLE
    factor = rows.factorise(jnp.where(proof, 0, add_constant(P, damping)), jnp.where(proof, lam**2, 0))
    new_w, new_lam = w, lam
    for _ in range(2):
        new_lam = jnp.maximum(new_lam - lam**2 * rows(factor.solve(rows.transpose(new_lam, k))), 0)
        new_w = damping * factor.solve(new_w)
    pull = lambda lam: largest(rows.transpose(lam, k)) / -(program.f @ lam)
    return new_w, jnp.where(pull(new_lam) < jnp.abs(pull(whole)), new_lam, whole)


def add_constant(matrix, constant):
    """The matrix plus a multiple of the identity."""
    return matrix + constant if matrix.ndim == 1 else matrix + constant * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
