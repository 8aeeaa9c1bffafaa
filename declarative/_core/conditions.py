r"""The three conditions of the implicit function theorem, looked at where they matter: at a solution.

1. $F(y, x) = 0$. 2. $F$ is continuously differentiable near $(y, x)$. 3. $\partial_y F$ is nonsingular there.

The first and third are measured, the second is declared by the node, with the distance to the nearest kink where it knows one. A
Jacobian counts as singular if its smallest singular value is lost in rounding, or if moving $y$ by its own uncertainty,
$\sqrt\epsilon$, changes the Jacobian by as much: at a double root of $y^2 = x$ it is tiny but not zero wherever a solver stops.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._linear.norms import largest, norm
from .implicit import typical_scale
from .node import AbstractDeclarativeNode, Solution, bound_inputs
from .precision import FullPrecision, full_precision
from .tolerances import tolerances

_DENSE = 500
_LANCZOS = 64


class ConditionsReport(eqx.Module):
    """What `conditions` found. Arrays under `jit` and `vmap`; `print` it, or ask `verdict()`, when they have values.

    - `residual`: |F(y, x)|, and `relative_residual`: in units of what a relative perturbation of y by 1 would cause.
    - `sigma_min`, `sigma_max`, `condition`: singular values of dF/dy and their ratio. `exact=False`: matrix-free estimates, of
      which `sigma_min` is an upper bound.
    - `uncertainty`: how far dF/dy moves when y moves by sqrt(eps): a `sigma_min` below it cannot be told from zero.
    - `smoothness`: as the node declares it; `kink_distance`: to the nearest point of non-differentiability, None if unknown.
    """

    residual: Float[Array, ""]
    relative_residual: Float[Array, ""]
    sigma_min: Float[Array, ""]
    sigma_max: Float[Array, ""]
    condition: Float[Array, ""]
    uncertainty: Float[Array, ""]
    kink_distance: Float[Array, ""] | None
    exact: bool = eqx.field(static=True)
    smoothness: str = eqx.field(static=True)
    unknowns: int = eqx.field(static=True)

    def holds(self) -> tuple[bool, bool | None, bool]:
        """Whether each of the three conditions holds; None where the node declares nothing about the second."""
        tol = tolerances(np.asarray(self.residual).dtype)
        eps = float(jnp.finfo(np.asarray(self.residual).dtype).eps)
        solved = bool(self.relative_residual <= tol.solution)
        smooth = None if self.smoothness == "not declared" else True
        if self.kink_distance is not None:
            smooth = bool(self.kink_distance > tol.solution)
        # Across a kink the Jacobian jumps, which says nothing about either side of it.
        moved = 0.0 if smooth is False else float(self.uncertainty)
        floor = max(moved, self.unknowns * eps * float(self.sigma_max))
        return solved, smooth, bool(self.sigma_min > floor)

    def verdict(self) -> str:
        """In plain words."""
        solved, smooth, regular = self.holds()
        lines = []
        if not solved:
            lines.append("This is not a solution: the derivative would be that of another problem. Solve further.")
        if smooth is False:
            lines.append(
                "The solution sits on a kink: one-sided derivatives differ, and what is returned is the node's convention."
            )
        if not regular:
            lines.append(
                "dF/dy is singular to working accuracy, or jumps: the solution is not a differentiable function of the data here. "
                f"(It changes by {float(self.uncertainty):.1e} within the accuracy of y.) If this is no kink, regularise the problem, "
                "or use ImplicitAdjoint(damping=...) and accept its bias."
            )
        elif float(self.condition) > 1 / tolerances(np.asarray(self.residual).dtype).linear:
            lines.append(
                f"dF/dy is ill-conditioned ({float(self.condition):.1e}): expect to lose half the digits or more."
            )
        if not lines:
            declared = "" if smooth else " (the node declares nothing about smoothness: the second is taken on trust)"
            lines.append(f"The implicit function theorem applies{declared}.")
        return " ".join(lines)

    def __str__(self):
        solved, smooth, regular = self.holds()
        word = {True: "holds", False: "FAILS", None: "not declared"}
        kink = "" if self.kink_distance is None else f"; nearest kink at distance {float(self.kink_distance):.2e}"
        kind = "" if self.exact else " (matrix-free estimates)"
        return (
            f"1. F(y, x) = 0            {word[solved]}: |F| = {float(self.residual):.1e}, relative "
            f"{float(self.relative_residual):.1e}\n"
            f"2. F is C1                {word[smooth]}{'' if smooth is None else ': ' + self.smoothness}{kink}\n"
            f"3. dF/dy is nonsingular   {word[regular]}: singular values {float(self.sigma_min):.2e} to "
            f"{float(self.sigma_max):.2e}, condition {float(self.condition):.2e}{kind}\n"
            f"{self.verdict()}"
        )


@full_precision()
def conditions(node: AbstractDeclarativeNode, solution: Solution, *args: Any, **named: Any) -> ConditionsReport:
    """Checks the conditions of the implicit function theorem for `node` at `solution`, with the data that it was solved for: `x`, or the
    arguments of the call.

    Up to 500 unknowns the singular values are exact; above, estimated from Jacobian products. One example; `jax.vmap` for
    batches. Float32 data are judged by float32's accuracy.
    """
    if not isinstance(solution, Solution):
        raise ValueError(
            f"conditions(node, solution, x): solution must be what `node.solve(x)` returns, got {type(solution).__name__}."
        )
    node, x, y = bound_inputs(node, node.pack(*args, **named), solution.unknown)
    vector, unravel = ravel_pytree(y)
    function = lambda v: ravel_pytree(node.optimality(unravel(v), x))[0]
    eps = float(jnp.finfo(vector.dtype).eps)
    n = vector.size

    size = largest(vector)
    scale = jnp.where(size > 0, size, typical_scale(function, vector)).astype(vector.dtype)
    signs = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], n), vector.dtype)
    value, change = jax.jvp(function, (vector,), (scale * signs,))
    residual, allowed = norm(value), norm(change)
    relative = jnp.where(residual == 0, 0, residual / jnp.where(allowed > 0, allowed, 1))

    jacobian = jax.jacfwd(function)
    at = jacobian(vector) if n <= _DENSE else None
    # Where y may be: within its rounding, and within a few Newton steps (at a double root those do not shrink below y's distance).
    newton = 0.0 if at is None else largest(jnp.linalg.solve(at, value))
    moved = jnp.maximum(eps**0.5 * scale, 4 * jnp.where(jnp.isfinite(newton), newton, 0))
    shift = moved * signs
    if at is not None:
        values = jnp.linalg.svd(at, compute_uv=False)
        sigma_max, sigma_min = values[0], values[-1]
        uncertainty = jnp.linalg.norm(jacobian(vector + shift) - jacobian(vector - shift)) / 2
    else:
        sigma_max, sigma_min = _extreme_singular_values(function, vector)
        product = lambda v: jax.jvp(function, (v,), (signs,))[1]
        uncertainty = norm(product(vector + shift) - product(vector - shift)) / (2 * n**0.5)
    return ConditionsReport(
        residual=residual,
        relative_residual=relative,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        condition=sigma_max / sigma_min,
        uncertainty=uncertainty,
        kink_distance=node.kink_distance(y, x),
        exact=n <= _DENSE,
        smoothness=node.smoothness,
        unknowns=n,
    )


def _extreme_singular_values(function, vector):
    """Golub-Kahan bidiagonalisation from a fixed start, then inverse iteration for the small end (which Lanczos sees last)."""
    _, mv = jax.linearize(function, vector)
    rmv = lambda v: jax.linear_transpose(mv, vector)(v)[0]
    n, k = vector.size, min(_LANCZOS, vector.size)
    start = jnp.asarray(np.random.default_rng(1).standard_normal(n), vector.dtype)

    def body(carry, _):
        v, u_prev, beta, basis, i = carry
        u = mv(v) - beta * u_prev
        alpha = norm(u)
        u = u / jnp.where(alpha > 0, alpha, 1)
        w = rmv(u) - alpha * v
        w = w - basis.T @ (basis @ w)  # full reorthogonalisation, or spurious copies appear
        w = w - basis.T @ (basis @ w)
        beta = norm(w)
        v = w / jnp.where(beta > 0, beta, 1)
        basis = basis.at[jnp.minimum(i + 1, k - 1)].set(jnp.where(i + 1 < k, v, basis[k - 1]))
        return (v, u, beta, basis, i + 1), (alpha, beta)

    v = start / norm(start)
    basis = jnp.zeros((k, n), vector.dtype).at[0].set(v)
    carry = (v, jnp.zeros_like(v), jnp.zeros((), vector.dtype), basis, jnp.zeros((), jnp.int32))
    _, (alphas, betas) = jax.lax.scan(body, carry, None, length=k)
    values = jnp.linalg.svd(jnp.diag(alphas) + jnp.diag(betas[:-1], 1), compute_uv=False)

    struct = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
    # J^T J is positive semidefinite whatever J is.
    normal = lx.FunctionLinearOperator(lambda v: rmv(mv(v)), struct, lx.positive_semidefinite_tag)

    def inverse_iteration(v, _):
        w = lx.linear_solve(normal, v, FullPrecision(lx.CG(rtol=1e-3, atol=0.0, max_steps=4 * n)), throw=False).value
        size = norm(w)
        good = jnp.isfinite(size) & (size > 0)
        v = jnp.where(good, w / jnp.where(good, size, 1), v)
        return v, norm(mv(v))

    _, smallest = jax.lax.scan(inverse_iteration, v, None, length=4)
    return jnp.maximum(values[0], jnp.max(smallest)), jnp.minimum(values[-1], jnp.min(smallest))
