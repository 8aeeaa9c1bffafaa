r"""From the data of a quadratic program to its solution and the factor of its optimality conditions: the steps around
`interior_point.py`.

1. *Scale* rows and columns by powers of two (in the manner of Ruiz 2001: rows of A and G, then columns, by their largest entry), and the objective.
2. *Eliminate* the equations (`_linear/null_space.py`), so that the iteration works on n - p variables and inequalities only.
3. *Iterate*: the interior-point method.
4. *Polish*: Newton on the optimality conditions themselves with the active set that the iteration ended with, and a change of the
   set where signs are wrong (a primal-dual active set method, Hintermüller, Ito & Kunisch 2002). An interior-point solution is
   right to about the square root of its complementarity where a constraint is nearly weakly active; a polished one to rounding.
"""

# An absent block is None. Which blocks are there is fixed where the program is built; to prove it again at every use would hide the maths.
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._linear.kkt import KKT, AbstractKKT, Reduction, reduction, rows_transposed, soften
from .._linear.norms import largest
from .._linear.null_space import NullSpace, null_space
from .._linear.positive_definite import InverseRoot, factorise, is_semidefinite
from .._linear.scaling import power_of_two
from . import interior_point as ipm

_EQUILIBRATIONS = 2
_POLISH = 8


class Data(eqx.Module):
    """Blocks in natural units. `compliance` (rows) softens the rows of `G`: elastic programs hold their equations there too."""

    Q: Float[Array, "n n"] | Float[Array, " n"]
    q: Float[Array, " n"]
    A: Float[Array, "p n"] | None
    b: Float[Array, " p"] | None
    G: Float[Array, "m n"] | None
    h: Float[Array, " m"] | None
    lower: Float[Array, " n"] | None
    upper: Float[Array, " n"] | None
    # Rows of G that are equations with compliance (the first ones).
    soft_equations: int = eqx.field(static=True, default=0)
    compliance: float = eqx.field(static=True, default=0.0)

    @property
    def bounded(self) -> bool:
        return self.lower is not None or self.upper is not None


class Scaled(eqx.Module):
    """Blocks with entries of about 1, and the scales: z = d z_scaled, rows times e, objective times c."""

    data: Data
    d: Float[Array, " n"]
    e_A: Float[Array, " p"]
    e_G: Float[Array, " m"]
    c: Float[Array, ""]
    finite: Bool[Array, ""]

    def row_scale(self):
        bound = [1 / self.d] if self.data.bounded else []
        return jnp.concatenate([self.c * self.d, self.e_A, self.e_G, *bound])

    def column_scale(self):
        bound = [1 / (self.c * self.d)] if self.data.bounded else []
        return jnp.concatenate([self.d, self.e_A / self.c, self.e_G / self.c, *bound])


def scale(data: Data) -> Scaled:
    Q, A, G = data.Q, data.A, data.G
    n, dtype = data.q.size, data.q.dtype
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in (Q, data.q, A, data.b, G) if leaf is not None])
    finite = jnp.all(finite)
    for side, sign in ((data.h, 1), (data.upper, 1), (data.lower, -1)):
        if side is not None:
            finite = finite & jnp.all(sign * side > -jnp.inf)  # False for NaN too
    if data.soft_equations:
        finite = finite & jnp.all(jnp.isfinite(data.h[: data.soft_equations]))
    d = jnp.ones(n, dtype)
    sizes = lambda matrix: 0 if matrix is None else matrix.shape[0]
    e_A, e_G, c = jnp.ones(sizes(A), dtype), jnp.ones(sizes(G), dtype), jnp.ones((), dtype)
    absolute = lambda matrix: None if matrix is None else jnp.abs(matrix)
    Q_abs, A_abs, G_abs = absolute(Q), absolute(A), absolute(G)
    columns_of_Q = lambda d: d**2 * Q_abs if Q.ndim == 1 else d * jnp.max(Q_abs * d[:, None], axis=0)
    rows_of = lambda matrix, d: power_of_two(jnp.max(matrix * d[None, :], axis=1, initial=0))
    for _ in range(_EQUILIBRATIONS):
        from_Q = columns_of_Q(d)
        c = power_of_two(jnp.max(from_Q))
        parts = [jnp.sqrt(c * from_Q)]
        if A is not None:
            e_A = rows_of(A_abs, d)
            parts.append(d * jnp.max(A_abs * e_A[:, None], axis=0, initial=0))
        if G is not None:
            e_G = rows_of(G_abs, d)
            parts.append(d * jnp.max(G_abs * e_G[:, None], axis=0, initial=0))
        column = jnp.max(jnp.stack(parts), axis=0)
        d = d * power_of_two(column)
    c = power_of_two(jnp.max(columns_of_Q(d)))
    e_A = e_A if A is None else rows_of(A_abs, d)
    e_G = e_G if G is None else rows_of(G_abs, d)

    def clean(scaled, leaf, other=0.0):
        # By its own entries only: a block that a batch shares must not become one for each lane.
        return jnp.where(jnp.all(jnp.isfinite(leaf)), scaled, other)

    def clean_side(side, other=0.0):
        return jnp.where(finite, side, other)

    Q = clean(
        c * d**2 * Q if Q.ndim == 1 else (c * d[:, None]) * Q * d[None, :],
        Q,
        1.0 if Q.ndim == 1 else jnp.eye(n, dtype=dtype),
    )
    if Q.ndim == 2:
        Q = (Q + Q.T) / 2
    A = None if A is None else clean(e_A[:, None] * A * d[None, :], A, jnp.eye(*A.shape, dtype=dtype))
    G = None if G is None else clean(e_G[:, None] * G * d[None, :], G)
    scaled = Data(
        Q,
        clean_side(c * d * data.q),
        A,
        None if data.b is None else clean_side(e_A * data.b),
        G,
        None if data.h is None else clean_side(e_G * data.h, 1.0),
        None if data.lower is None else clean_side(data.lower / d, -1.0),
        None if data.upper is None else clean_side(data.upper / d, 1.0),
        data.soft_equations,
        data.compliance,
    )
    return Scaled(scaled, d, e_A, e_G, c, finite)


class Reduced(eqx.Module):
    """The interior-point program of one null space, and the way back."""

    program: ipm.Program
    origin: Float[Array, " n"]
    cost: Float[Array, ""]  # extra scale of the objective
    length: Float[Array, ""]  # scale of the unknown


def reduce(scaled: Scaled, reduced: Reduction) -> Reduced:
    data, space = scaled.data, reduced.space
    P, q, dtype, n = reduced.P, data.q, data.q.dtype, data.q.size
    origin = jnp.zeros(n, dtype) if space is None else space.particular @ data.b
    basis = None if space is None else space.basis
    general, h, softness = data.G, data.h, []
    k = data.soft_equations
    if general is not None:
        compliance = data.compliance * scaled.e_G**2 / scaled.c
        if k:
            # Equations with compliance are a penalty.
            soft, weight = general[:k], 1 / compliance[:k]
            P = ipm.add_matrix(P, soft.T @ (weight[:, None] * soft))
            q = q - (weight * h[:k]) @ soft
            general, h, compliance = general[k:], h[k:], compliance[k:]
        if general.shape[0] == 0:
            general = h = None
        else:
            softness = [compliance]
    f = [] if general is None else [h - general @ origin]
    bounds = 0
    for side, sign in ((data.lower, -1), (data.upper, 1)):
        if side is not None:
            f.append(sign * (side - origin))
            bounds += n
    f = jnp.concatenate(f) if f else jnp.zeros(0, dtype)
    live = jnp.isfinite(f)
    g = q
    if basis is not None:
        g = (q + ipm.multiply(data.Q, origin)) @ basis
        general = None if general is None else reduced.R
    rows = ipm.Rows(general, basis if bounds else None, data.lower is not None, data.upper is not None)
    f_size, g_size, P_size = largest(jnp.where(live, f, 0)), largest(g), largest(P)
    # Multipliers as large as slacks: lower the objective where it would overwhelm the constraints, but never below them.
    ratio = power_of_two(jnp.where(f_size > 0, g_size / jnp.where(f_size > 0, f_size, 1), g_size))
    cost = jnp.where(P_size > 0, jnp.clip(ratio, 1e-4, 1), ratio)
    soft = jnp.concatenate([*softness, jnp.zeros(bounds, dtype)]) / cost if data.compliance else 0.0
    # Centred where the penalty |(Rw - f)|^2/2 leads, which is where the iteration starts: a solution far from the origin is one near
    # it there, and what is left of the data tells how large the unknowns are.
    f = jnp.where(live, f, 0)
    centre = rows.factorise(cost * P, live.astype(dtype)).solve(rows.transpose(f, P.shape[0]) - cost * g)
    g, f = g + ipm.multiply(P, centre), jnp.where(live, f - rows(centre), 0)
    origin = origin + (centre if basis is None else basis @ centre)
    length = 1 / power_of_two(jnp.maximum(largest(f), cost * largest(g)))
    program = ipm.Program(cost * P, cost * g / length, rows, f / length, live, soft)
    return Reduced(program, origin, cost, length)


class Found(eqx.Module):
    """A point (or certificate) in scaled coordinates, before polishing."""

    z: Float[Array, " n"]
    nu: Float[Array, " p"]
    lam: Float[Array, " m"]
    mu: Float[Array, " n"] | None
    cost: Float[Array, ""]
    code: Int[Array, ""]
    steps: Int[Array, ""]


def iterate(scaled: Scaled, blocks: Reduction, max_steps: int, loop: Callable, target, skip) -> Found:
    """One run of the interior-point method, taken back to all variables."""
    data, space = scaled.data, blocks.space
    n, dtype = data.q.size, data.q.dtype
    if target is None and (data.G is None or data.G.shape[0] == data.soft_equations):
        if not data.bounded:
            return _without_inequalities(scaled, blocks)
        if data.G is None and blocks.P.ndim == 1:
            return _separable(scaled)
    reduced = reduce(scaled, blocks)
    convex = is_semidefinite(reduced.program.P)
    both = data.lower is not None and data.upper is not None
    crossed = jnp.any(data.lower > data.upper) if both else jnp.zeros((), bool)
    length, cost = reduced.length, reduced.cost
    if target is not None:
        # s lam, in the units of the program.
        target = target * scaled.c * cost / length**2
    out = ipm.interior_point(reduced.program, max_steps, loop, target, skip | ~convex | ~scaled.finite | crossed)
    ray = out.code == ipm.UNBOUNDED
    proof = out.code == ipm.INFEASIBLE
    w = out.w if space is None else space.basis @ out.w
    # A certificate has no origin and no unit: f'lam = -1 becomes h'lam + ... = -1 as it stands.
    z = jnp.where(ray, w * (cost / length), jnp.where(proof, 0, reduced.origin + length * w))
    lam = jnp.where(proof, out.lam / length, out.lam * length / cost)
    m = 0 if data.G is None else data.G.shape[0] - data.soft_equations
    rows, rest = lam[:m], lam[m:]
    lower = rest[:n] if data.lower is not None else jnp.zeros(n, dtype)
    upper = rest[rest.size - n :] if data.upper is not None else jnp.zeros(n, dtype)
    mu = upper - lower if data.bounded else None
    if data.soft_equations:
        k = data.soft_equations
        compliance = data.compliance * scaled.e_G[:k] ** 2 / scaled.c
        rows = jnp.concatenate([(data.G[:k] @ z - data.h[:k]) / compliance, rows])
    nu = jnp.zeros(0, dtype)
    if space is not None:
        force = rows_transposed(data.G, jnp.concatenate([rows] if mu is None else [rows, mu]), n)
        force = jnp.where(proof, 0, ipm.multiply(data.Q, z) + data.q) + force
        nu = -(force @ space.particular)
    z, nu, rows = (jnp.where(crossed, 0, leaf) for leaf in (z, nu, rows))
    mu = None if mu is None else jnp.where(crossed, 0, mu)
    code = jnp.where(crossed, ipm.INFEASIBLE, jnp.where(convex, out.code, ipm.INDEFINITE))
    code = jnp.where(scaled.finite, code, ipm.NONFINITE)
    return Found(z, nu, rows, mu, cost, code, out.steps)


def _without_inequalities(scaled: Scaled, blocks: Reduction) -> Found:
    """Nothing to iterate: Newton's first step, which is the polish, solves it. Only a ray has to be looked for."""
    data, space, dtype = scaled.data, blocks.space, scaled.data.q.dtype
    n, P = data.q.size, blocks.P
    m = 0 if data.G is None else data.G.shape[0]
    z = jnp.zeros(n, dtype) if space is None else space.particular @ data.b
    g = data.q + ipm.multiply(data.Q, z)
    if m:
        weight = scaled.c / (data.compliance * scaled.e_G**2)
        P = ipm.add_matrix(P, data.G.T @ (weight[:, None] * data.G))
        g = g - (weight * data.h) @ data.G
    g = g if space is None else g @ space.basis
    # The part of -g that P does not see, if there is one. (Directions that it hardly sees pass too: `solve` looks again.)
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny) ** 0.5
    g = g / jnp.maximum(largest(g), tiny)
    damping = eps**0.4 * largest(blocks.P) + tiny
    root = factorise(ipm.add_constant(P, damping))
    ray = -g
    for _ in range(2):
        ray = damping * root.solve(ray)
    unseen = largest(ipm.multiply(P, ray)) <= damping * largest(ray)
    unbounded = unseen & (largest(ray) > eps**0.4 * largest(g))
    # q'z = -1 along the ray, which is that of all variables.
    ray = ray if space is None else space.basis @ ray
    ray = ray / jnp.where(unbounded, -(data.q @ ray), 1)
    code = jnp.where(unbounded, ipm.UNBOUNDED, ipm.OPTIMAL)
    code = jnp.where(is_semidefinite(P), code, ipm.INDEFINITE)
    code = jnp.where(scaled.finite, code, ipm.NONFINITE).astype(jnp.int32)
    z = jnp.where(unbounded, ray, z)
    nu = jnp.zeros(0 if data.b is None else data.b.size, dtype)
    return Found(z, nu, jnp.zeros(m, dtype), None, jnp.ones((), dtype), code, jnp.zeros((), jnp.int32))


def _separable(scaled: Scaled) -> Found:
    """A diagonal objective between bounds: every variable by itself."""
    data = scaled.data
    Q, q = data.Q, data.q
    infinite = jnp.full_like(q, jnp.inf)
    lower = -infinite if data.lower is None else data.lower
    upper = infinite if data.upper is None else data.upper
    curved = Q > 0
    free = jnp.where(curved, -q / jnp.where(curved, Q, 1), jnp.where(q > 0, -jnp.inf, jnp.where(q < 0, jnp.inf, 0)))
    z = jnp.clip(free, lower, upper)
    escaping = ~jnp.isfinite(z)
    unbounded, crossed = jnp.any(escaping), lower > upper
    infeasible = jnp.any(crossed)
    ray = jnp.where(escaping, -q, 0)
    z = jnp.where(unbounded, ray / jnp.where(unbounded, -(q @ ray), 1), jnp.where(escaping, 0, z))
    # A variable whose bounds cross: two multipliers of opposite sign prove it, which one signed multiplier cannot hold.
    mu = jnp.where(infeasible, 0, -(Q * z + q))
    code = jnp.where(unbounded, ipm.UNBOUNDED, ipm.OPTIMAL)
    code = jnp.where(infeasible, ipm.INFEASIBLE, code)
    code = jnp.where(jnp.all(Q >= 0), code, ipm.INDEFINITE)
    code = jnp.where(scaled.finite, code, ipm.NONFINITE).astype(jnp.int32)
    empty = jnp.zeros(0, q.dtype)
    return Found(z, empty, empty, mu, jnp.ones((), q.dtype), code, jnp.zeros((), jnp.int32))


class Polished(eqx.Module):
    """A point in natural units, flat, its error (scaled, relative), and the factor of its optimality conditions."""

    vector: Float[Array, " size"]
    error: Float[Array, ""]
    kkt: KKT
    steps: Int[Array, ""]


class _Polish(eqx.Module):
    vector: Float[Array, " size"]
    side: Int[Array, " rows"]
    best: Float[Array, " size"]
    best_side: Int[Array, " rows"]
    error: Float[Array, ""]
    root: Float[Array, "..."]
    alpha: Float[Array, " rows"]
    beta: Float[Array, " rows"]
    steps: Int[Array, ""]
    going: Bool[Array, ""]


def polish(
    scaled: Scaled,
    blocks: Reduction,
    vector: Float[Array, " size"],
    cost: Float[Array, ""],
    residual: Callable,
    coefficients: Callable,
    exact: bool,
    loop: Callable,
) -> Polished:
    """Newton on the optimality conditions from `vector` (natural units), with its active set.

    `residual(vector)` is F in natural units; `coefficients(vector, side)` are alpha and beta of its linearisation with each row on the
    given side (+1 active or at the upper bound, -1 at the lower bound, 0 neither). `exact` is False on a central path, where `side`
    means nothing and Newton simply converges.
    """
    data = scaled.data
    n, dtype = data.q.size, data.q.dtype
    p = 0 if data.A is None else data.A.shape[0]
    m = 0 if data.G is None else data.G.shape[0]
    eps = float(jnp.finfo(dtype).eps)
    row_scale, column_scale = scaled.row_scale(), scaled.column_scale()

    def error_of(vector):
        v = vector / column_scale
        F = row_scale * residual(vector)
        z = v[:n]
        finite = lambda leaf: 0.0 if leaf is None else jnp.where(jnp.isfinite(leaf), leaf, 0)
        lengths = [z] + [finite(leaf) for leaf in (data.b, data.h, data.lower, data.upper) if leaf is not None]
        # At z = 0 with all sides 0 (the apex of a cone) only the multipliers say how large the program is.
        lengths.append(eps**0.25 * cost * v[n + p :])
        # Qz as it is, not |Q||z|: on the way along a ray everything is small beside that.
        forces = (data.q, ipm.multiply(data.Q, z), v[n:])
        small = jnp.finfo(dtype).tiny ** 0.5
        dual = largest(F[:n]) / jnp.maximum(largest(forces), small)
        primal = largest(F[n:]) / jnp.maximum(largest(lengths), small)
        return jnp.maximum(dual, primal)

    def kkt_of(root, alpha, beta, needed=True):
        # alpha / beta of F in natural units; (J) is scaled.
        rows, columns = row_scale[n + p :], column_scale[n + p :]
        lengths = jnp.concatenate([1 / scaled.e_G, *([scaled.d] if data.bounded else [])])
        alpha = alpha * rows * lengths
        beta = beta * rows * columns
        if root is None:
            root = blocks.factorise(alpha / soften(alpha, beta), needed)
        return KKT(data.Q, data.A, data.G, alpha, beta, row_scale, column_scale, blocks, root)

    def side_of(vector, previous):
        """+1 active or at the upper bound, -1 at the lower; ties, where both sides are noise, stay where they were."""
        v = vector / column_scale
        z, lam = v[:n], cost * v[n + p :]
        near = 50 * eps * jnp.maximum(largest(z), largest(lam))
        parts = []
        if m:
            # Unscaled slack times its scale: h may be infinite.
            s = data.h - data.G @ z + compliance * v[n + p : n + p + m]
            row = lam[:m]
            side = (row > s).astype(jnp.int32)
            tie = (jnp.abs(row) <= near) & (jnp.abs(s) <= near)
            side = jnp.where(tie, previous[:m], side)
            if data.soft_equations:
                side = side.at[: data.soft_equations].set(1)
            parts.append(side)
        if data.bounded:
            mu, before = lam[m:], previous[m:]
            upper = jnp.full(n, jnp.inf, dtype) if data.upper is None else data.upper
            lower = jnp.full(n, -jnp.inf, dtype) if data.lower is None else data.lower
            up, down = (mu > upper - z), (-mu > z - lower)
            side = jnp.where(up, 1, jnp.where(down, -1, 0))
            distance = jnp.minimum(jnp.abs(upper - z), jnp.abs(z - lower))
            tie = (jnp.abs(mu) <= near) & (distance <= near)
            side = jnp.where(lower == upper, 1, jnp.where(tie, before, side))
            parts.append(side.astype(jnp.int32))
        return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.int32)

    compliance = data.compliance * scaled.e_G**2 / scaled.c if m else jnp.zeros(0, dtype)

    def released(vector, side):
        """One row less, for a set of active rows that no point satisfies.

        Refinement of such a set would go on for ever, and change a multiplier in proportion to the slack of its row: the first
        one to reach zero is that of the smallest ratio of the two.
        """
        v = vector / column_scale
        z, lam = v[:n], cost * v[n + p :]
        near = 50 * eps * jnp.maximum(largest(z), largest(lam))
        slack = []
        if m:
            s = data.h - data.G @ z + compliance * v[n + p : n + p + m]
            slack.append(jnp.where(jnp.arange(m) < data.soft_equations, 0, s))
        if data.bounded:
            upper = jnp.full(n, jnp.inf, dtype) if data.upper is None else data.upper
            lower = jnp.full(n, -jnp.inf, dtype) if data.lower is None else data.lower
            slack.append(jnp.where(lower == upper, 0, jnp.where(side[m:] == 1, upper - z, z - lower)))
        slack = jnp.concatenate([*slack, jnp.zeros(0, dtype)])
        loose = (side != 0) & (slack > near)
        ratio = jnp.where(loose, jnp.abs(lam) / jnp.where(loose, slack, 1), jnp.inf)
        first = jnp.arange(side.size) == jnp.argmin(ratio) if side.size else side == 1
        return jnp.where(loose & first, 0, side)

    def body(state):
        side = state.side
        alpha, beta = coefficients(state.vector, side)
        kkt = kkt_of(None, alpha, beta, state.going)
        start = state.vector
        if exact:
            # Multipliers of what is not active are zero, not small.
            start = start.at[n + p :].set(jnp.where(side == 0, 0, start[n + p :]))
        F = residual_on_side(start, side)
        # Nothing to solve where it has ended.
        new = start - kkt.solve(jnp.where(state.going, F, 0), loop, floor=largest(start[:n] / column_scale[:n]))
        if exact:
            new = new.at[n + p :].set(jnp.where(side == 0, 0, new[n + p :]))
        error = error_of(new)
        better = error < state.error
        first = state.steps == 0
        keep = lambda new, old: jnp.where(better | first, new, old)
        going = (error > 4 * eps) & jnp.isfinite(error)
        next_side = side
        if not exact:
            going = going & better
        else:
            next_side = side_of(new, side)
            stuck = jnp.all(next_side == side) & (error > eps**0.8)
            next_side = jnp.where(stuck, released(new, side), next_side)
            going = going & jnp.any(next_side != side)
        return _Polish(
            new,
            next_side,
            jnp.where(better, new, state.best),
            keep(side, state.best_side),
            jnp.minimum(error, state.error),
            keep(kkt.root.root, state.root),
            keep(alpha, state.alpha),
            keep(beta, state.beta),
            state.steps + 1,
            going,
        )

    def residual_on_side(vector, side):
        """F of the equality-constrained program in which every row stays on its side."""
        if not exact:
            return residual(vector)
        v = vector / column_scale
        z, lam = v[:n], v[n + p :]
        first = ipm.multiply(data.Q, z) + data.q + rows_transposed(data.G, lam, n)
        parts = []
        if p:
            first = first + v[n : n + p] @ data.A
            parts.append(data.A @ z - data.b)
        if m:
            h = jnp.where(jnp.isfinite(data.h), data.h, 0)
            parts.append(jnp.where(side[:m] == 1, data.G @ z - h - compliance * lam[:m], 0))
        if data.bounded:
            at = jnp.where(
                side[m:] == 1,
                jnp.inf if data.upper is None else data.upper,
                -jnp.inf if data.lower is None else data.lower,
            )
            parts.append(jnp.where(side[m:] == 0, 0, z - jnp.where(jnp.isfinite(at), at, 0)))
        return jnp.concatenate([first, *parts]) / row_scale

    k = blocks.P.shape[0]
    root_shape = (k,) if blocks.P.ndim == 1 and not m else (k, k)
    none = jnp.zeros(m + (n if data.bounded else 0), jnp.int32)
    zeros = jnp.zeros(none.size, dtype)
    start = _Polish(
        vector,
        side_of(vector, none),
        vector,
        none,
        error_of(vector),
        jnp.zeros(root_shape, dtype),
        zeros,
        zeros,
        jnp.zeros((), jnp.int32),
        jnp.ones((), bool),
    )
    end = loop(lambda state: state.going, body, start, max_steps=_POLISH)
    best, alpha, beta, root = end.best, end.alpha, end.beta, InverseRoot(end.root)
    if not exact:
        # The last step has moved the coefficients as well.
        alpha, beta = coefficients(best, end.best_side)
    if exact:
        # A row is active if and only if its multiplier is not zero: `optimality` reads the set from the point.
        # (Multipliers of a fixed variable, or of an equation with compliance, may have any sign.)
        tiny = jnp.finfo(dtype).tiny ** 0.5 * column_scale[n + p :]
        lam = best[n + p :]
        snapped = jnp.where(end.best_side == -1, jnp.minimum(lam, -tiny), 0)
        snapped = jnp.where(end.best_side == 1, jnp.maximum(lam, tiny), snapped)
        signed = [jnp.arange(m) >= data.soft_equations]
        if data.bounded:
            both = data.lower is not None and data.upper is not None
            signed.append(data.lower != data.upper if both else jnp.ones(n, bool))
        active = jnp.where(jnp.concatenate(signed), snapped, lam)
        solved = end.error <= eps**0.5
        best = best.at[n + p :].set(jnp.where(solved, active, lam))
        if data.bounded:
            # A variable at its bound is at it exactly.
            side, z = end.best_side[m:], best[:n]
            for bound, sign in ((data.lower, -1), (data.upper, 1)):
                if bound is not None:
                    z = jnp.where(solved & (side == sign) & jnp.isfinite(bound), scaled.d * bound, z)
            best = best.at[:n].set(z)
    return Polished(best, end.error, kkt_of(root, alpha, beta), end.steps)


class Answer(eqx.Module):
    """`vector`: the flat unknown (z, nu, lam, mu) in natural units; `kkt`: its linearised optimality conditions."""

    vector: Float[Array, " size"]
    kkt: AbstractKKT
    code: Int[Array, ""]
    steps: Int[Array, ""]


def solve(
    data: Data,
    guess: Float[Array, " size"] | None,
    residual: Callable,
    coefficients: Callable,
    target: Float[Array, ""] | None,
    spare: int,
    max_steps: int,
    loop: Callable,
) -> Answer:
    """All four steps.

    `spare`: how many dependent equations to provide for. `target`: the product of slacks and multipliers to stop at (None: the
    solution itself).
    """
    scaled = scale(data)
    inner, dtype = scaled.data, data.q.dtype
    p = 0 if data.A is None else data.A.shape[0]
    eps = float(jnp.finfo(dtype).eps)
    exact = target is None
    space = null_space(inner.A, spare) if p else None
    column_scale = scaled.column_scale()
    flat = lambda found: (
        column_scale * jnp.concatenate([found.z, found.nu, found.lam, *([] if found.mu is None else [found.mu])])
    )
    blocks = reduction(inner.Q, inner.G, space)
    run = lambda blocks, skip: iterate(scaled, blocks, max_steps, loop, target, skip)
    refine = lambda vector, cost: polish(scaled, blocks, vector, cost, residual, coefficients, exact, loop)
    warm = None
    skip = jnp.zeros((), bool)
    if guess is not None and exact:
        # The guess is worth its active set: if that is right, one Newton step is the whole solve.
        warm = refine(jnp.where(jnp.all(jnp.isfinite(guess)), guess, 0), jnp.ones((), dtype))
        skip = warm.error <= 100 * eps
    found = run(blocks, skip)
    if space is not None:
        found = _consistent(inner, space, found)
    vector, certified = flat(found), (found.code == ipm.INFEASIBLE) | (found.code == ipm.UNBOUNDED)
    # A certificate keeps its own scale: h'lam + b'nu = -1, or q'z = -1, in natural units.
    vector = jnp.where(certified, vector * scaled.c, vector)
    polished = refine(jnp.where(certified, 0, vector), found.cost)
    if not data.bounded and (data.G is None or data.G.shape[0] == data.soft_equations):
        # Here a ray is a guess (`_without_inequalities`): a point of moderate size that satisfies the conditions refutes it.
        z = polished.vector[: data.q.size] / scaled.d
        moderate = largest(z) <= eps**-0.6 * jnp.maximum(largest(inner.q), eps)
        refuted = (polished.error <= eps**0.5) & moderate
        certified = certified & ~((found.code == ipm.UNBOUNDED) & refuted)
    failed = certified | (found.code >= ipm.INDEFINITE)
    vector = jnp.where(certified, vector, polished.vector)
    error, kkt = polished.error, polished.kkt
    steps = found.steps + polished.steps
    if warm is not None:
        # A guess that solves the equations of a program that has failed (a saddle, crossed bounds) does not solve it.
        pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(skip & ~failed, a, b), a, b)
        vector = pick(warm.vector, vector)
        parts = lambda kkt: (kkt.alpha, kkt.beta, kkt.root)  # the rest is the same in both
        kkt = eqx.tree_at(parts, kkt, pick(parts(warm.kkt), parts(kkt)))
        error, steps = pick(warm.error, error), pick(warm.steps, steps)
    unfinished = jnp.where(found.code == ipm.OUT_OF_STEPS, ipm.OUT_OF_STEPS, ipm.STALLED)
    code = jnp.where(failed, found.code, jnp.where(error <= eps**0.65, ipm.OPTIMAL, unfinished))
    return Answer(vector, kkt, code, steps)


def _consistent(data: Data, space: NullSpace, found: Found) -> Found:
    """INFEASIBLE where an equation that depends on the others contradicts them, with the proof."""
    assert data.A is not None
    point = space.particular @ data.b
    gap = data.b - data.A @ point
    worst = jnp.argmax(jnp.abs(gap))
    size = jnp.maximum(largest(data.b), largest(point))
    bad = jnp.abs(gap[worst]) > float(jnp.finfo(gap.dtype).eps) ** 0.6 * size
    # Row `worst` is a combination of the others: a' = (a'Y) A.
    unit = jnp.arange(gap.size) == worst
    combination = unit.astype(gap.dtype) - data.A[worst] @ space.particular
    nu = jnp.where(bad, -combination / jnp.where(bad, gap[worst], 1), found.nu)
    zero = lambda leaf: None if leaf is None else jnp.where(bad, 0, leaf)
    code = jnp.where(bad & (found.code != ipm.NONFINITE), ipm.INFEASIBLE, found.code)
    code = jnp.where(space.complete, code, ipm.DEPENDENT)
    return Found(zero(found.z), nu, zero(found.lam), zero(found.mu), found.cost, code, found.steps)
