"""How a solve can end. Extends optimistix's (which extends lineax's), so any solver's status can be carried unchanged."""

from typing import Any

import optimistix as optx
from jaxtyping import Array, Bool


class RESULTS(optx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]  (an Enumeration is extended by subclassing)
    """Status of one forward solve or of one backward linear solve; compare with `==`, look a message up by `RESULTS[...]`."""

    nonfinite_data = (
        "The data hold NaN, or the parameters lie outside the node's domain (a weight or a mass below 0; a temperature, an `epsilon` or a "
        "`strength` that training has moved to 0 or below: learn its logarithm). Look upstream: which layer or record made them?"
    )
    not_a_solution = (
        "The answer does not satisfy the optimality conditions: the residual is too large. Either the data are too badly scaled or "
        "too nearly degenerate for their dtype (try float64), or the solver ran off or stopped early (a better `y0`, another "
        "`solver`; Picard iteration diverges unless the map is a contraction), or, in a node of your own, the algorithm and "
        "`optimality` do not describe the same problem (a sign, a missing term?)."
    )
    infeasible = (
        "The problem has no feasible point: its constraints contradict one another (bounds that cross, an equation out of reach, masses of "
        "different totals). Loosen them, or penalise them in the objective (`QuadraticProgram(elastic=True)`, `EntropicTransport(rho=...)`). "
        "`ConstrainedArgmin` looks about its `y0` only: try another."
    )
    unbounded = "The objective is unbounded below on the feasible set: bound the unknown, or add a small quadratic term. (A sign?)"
    indefinite = (
        "The problem is not convex where the solver needs it to be: a quadratic term has a negative eigenvalue, or a point found is a saddle "
        "or a maximum. Symmetrise and regularise the term, or give a better `y0`."
    )
    not_unique = (
        "The solution is not unique to working accuracy, so it is not a differentiable function of the data: a matrix of deficient rank, "
        "equal eigenvalues, or measurements that leave a direction free. Regularise the problem, or see the node's options for this case."
    )
    empty = "Nothing takes part: every entry is masked or has weight zero. Give each row (each channel) at least one."
    dependent_equations = "More equations depend on one another than the node provides for. Remove rows of `A`, or raise `dependent_equations`."
    support_overflow = (
        "The solution has more non-zero coefficients than the gradient has room for: raise `k_max` (None always suffices), or the "
        "regularisation."
    )
    ode_unfinished = (
        "The differential equation was not solved up to its end: the steps ran out, or could not be made small enough. Raise "
        "`max_steps` or loosen the controller's tolerances; if the equation is stiff, use an implicit solver; if its solution runs "
        "off to infinity, shorten the time."
    )
    ode_nonfinite = (
        "The solution of the differential equation ran off to infinity or NaN. Take more steps, an adaptive step size controller, or an implicit "
        "solver; or shorten the time, if the equation has no solution for so long; and look whether the field can return NaN."
    )
    bad_times = "`ts` must be in order, lie between t0 and t1, and hold no NaN."
    bad_rho = (
        'The weight `rho` must be positive and finite, and for mode="moreau" at most a hundredth of 1 / eps of the dtype: above that, rho times a '
        'difference of parameters has no digits left (mode="amortised" is the limit).'
    )
    steps_diverged = (
        "The gradient steps ran off to infinity or NaN: lower `learning_rate` in `GradientSteps`, or shorten long gradients with `max_norm`. "
        "(If one step is enough for it, the objective is not finite where they start.)"
    )
    singular_jacobian = (
        "The backward linear solve failed: dF/dy is singular (or nearly so) at the solution, so the solution is not a "
        "differentiable function of the data there. Run `declarative.conditions`, regularise the problem, or use "
        "`ImplicitAdjoint(damping=...)`."
    )
    inaccurate_backward = (
        "The backward linear solve gave a finite answer with too large a residual, so the gradient would be wrong. Use "
        "float64, another `linear_solver`, scale the problem, or `ImplicitAdjoint(damping=...)`."
    )
    nonfinite_backward = (
        "The backward linear solve met NaN or infinity: the optimality function is not differentiable at the solution, "
        "or the incoming cotangent is not finite."
    )


def choose(condition: Bool[Array, ""], one: Any, other: Any) -> Any:
    """`RESULTS.where` of members. (Its annotations ask for items, which members are at run time only.)"""
    return RESULTS.where(condition, one, other)
