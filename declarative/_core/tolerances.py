r"""From the dtype and the scale of a problem to the tolerances of its solver, its checks and its gradient.

One argument fixes them all. Let $\epsilon$ be the spacing of the dtype at 1.

- **Solver.** $\epsilon^{3/4}$, relative: $1.8\cdot10^{-12}$ in float64, $6.4\cdot10^{-6}$ in float32. A quarter of the
  digits is left to rounding inside the user's function; asking for less than $\epsilon$ never stops, so it raises.
- **Solution.** The solver's word is checked: $\|F(y)\|$ may not exceed what a perturbation of $y$ by $\sqrt\epsilon$ (or by
  ten times the solver's own `rtol`, if that is looser) would cause. In units of $y$, hence blind to how $F$ is scaled.
- **Linear solves** of the gradient: relative residual at most $10\sqrt\epsilon$. The gradient error is about the solution error
  plus the linear one (ALGORITHMS: it adds linearly), so half the digits of a gradient that is reported as good are good.
  A backward-stable solve of a well-posed system lands near $\epsilon$; one that misses this had
  $\kappa \gtrsim 10/\sqrt\epsilon$ or a wrong promise about its operator.
"""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np


class Tolerances(eqx.Module):
    """Tolerances for one dtype, as Python floats (static). `solver` <= `solution`; all relative."""

    solver: float = eqx.field(static=True)
    solution: float = eqx.field(static=True)
    linear: float = eqx.field(static=True)
    gradient: float = eqx.field(static=True)


def tolerances(dtype, rtol: float | None = None) -> Tolerances:
    """Tolerances for `dtype` (float32 or float64); `rtol` is that of a solver given by the user, or None."""
    eps = float(jnp.finfo(dtype).eps)
    solver = eps**0.75 if rtol is None else rtol
    return Tolerances(
        solver=solver,
        solution=max(math.sqrt(eps), 10 * solver),
        linear=10 * math.sqrt(eps),
        gradient=10 * max(math.sqrt(eps) ** 1.5, solver),
    )


def zero_tolerance(rtol: float) -> float:
    """The absolute tolerance, in units of the typical scale: only for unknowns that vanish.

    The scale comes from a guess, which may be far larger than the solution, so that no multiple of it near `rtol` is safe: with the
    third power a solution 13 orders of magnitude (float32; 35 in float64) below the guess is still found to full accuracy.
    """
    return rtol**3


def check_rtol(solver, dtype) -> None:
    """Raises `ValueError` if `solver.rtol` cannot be reached in `dtype`."""
    rtol = getattr(solver, "rtol", None)
    if isinstance(rtol, (int, float, np.floating)):
        eps = float(jnp.finfo(dtype).eps)
        if 0 <= rtol < eps:
            raise ValueError(
                f"solver.rtol = {rtol:g} is below the spacing of {np.dtype(dtype).name} ({eps:.1e}): the solver could never "
                f"stop. Use rtol >= {eps:.0e}, pass float64 data, or leave `solver=None` for the default of the dtype."
            )


def solver_rtol(solver) -> float | None:
    """The relative tolerance that a given solver stops at, if it says so as a Python number."""
    rtol = getattr(solver, "rtol", None)
    return float(rtol) if isinstance(rtol, (int, float, np.floating)) else None


def with_tolerances(solver, rtol: Any, atol: Any):
    """The solver, with these if it leaves its own open."""
    if getattr(solver, "rtol", 0) is not None:
        return solver
    return eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (rtol, atol), is_leaf=lambda leaf: leaf is None)
