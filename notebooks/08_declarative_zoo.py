# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The zoo: one page a node
#
# **Question.** Which of these layers do I want, what does its gradient look like, and where does it stop to be one?
#
# **Answer.** A page for each: the problem in one equation, when to use it, a picture of the solution and its derivative along a path in the
# data, and the end of that path, where the node fails. [A table](#how-to-choose) at the end helps to choose.
#
# | page | node | its output |
# |---|---|---|
# | 1 | `FixedPoint` | y with y = T(y, x) |
# | 2 | `Root` | y with f(y, x) = 0 |
# | 3 | `Argmin` | the minimiser of an objective |
# | 4 | `ConstrainedArgmin` | the same under constraints |
# | 5 | `QuadraticProgram` | the same, convex: a quadratic objective, linear constraints |
# | 6 | `Softmax`, `Sparsemax`, `Entmax` | probabilities from scores |
# | 7 | `Projection`: simplices and boxes | the nearest point of a set with a total |
# | 8 | `Projection`: balls and cones | the nearest point of a ball, a cone, a set of matrices |
# | 9 | `Lasso`, `ProximalArgmin` | sparse minimisers |
# | 10 | `TotalVariation` | a signal with few jumps |
# | 11 | `Isotonic` | the nearest monotone sequence |
# | 12 | `SoftSort`, `SoftRank` | order, with a gradient |
# | 13 | `EntropicTransport` | a plan that moves masses |
# | 14 | `RobustPool`, `RobustVectorPool` | a mean that outliers do not move |
# | 15 | `WeightedLeastSquares` | the solution of a regression |
# | 16 | `SphereLeastSquares` | the same, of given length |
# | 17 | `Eigendecomposition` | eigenvalues and eigenvectors |
# | 18 | `PerspectiveNPoint` | a camera's pose |
# | 19 | `AnalyticCentre` | the middle of a polytope |
# | 20 | `NeuralODE` | the end of a trajectory |
# | 21 | `ELBOOptimizer` | an approximate posterior |
#
# Nothing here is needed to use a node: they are called like layers. Notebook 01 says why the gradients are right. The notebook runs in
# about two minutes on a CPU core, nearly all of which is compilation; with `DECLARATIVE_SMALL=1`, faster.

# %%
import io
import os

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from PIL import Image as Picture

import declarative as dn

# Double precision, to compare digits. The library itself never touches this switch.
jax.config.update("jax_enable_x64", True)
if os.environ.get("DECLARATIVE_SMALL") == "1":  # nearly all of its time is compilation
    jax.config.update("jax_disable_most_optimizations", True)
np.set_printoptions(precision=3, suppress=True)
plt.rcParams.update({"figure.dpi": 70, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
BLUE, RED, GREEN, ORANGE, GREY = "#1f4e9c", "#c0392b", "#3a9d5d", "#d9822b", "0.55"
COLOURS = [BLUE, RED, GREEN, ORANGE, GREY, "black"]


def show():
    """`plt.show()` with a palette, which makes a notebook's file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    plt.gcf().savefig(whole)
    plt.close()
    Picture.open(whole).convert("RGB").quantize(48).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


# %% [markdown]
# ## How to read a page
#
# Each page moves its data along a path, one number t, and solves for all t at once: `jax.vmap` of `node.solve`, with the derivative from
# `jax.jvp`. The helper **compares every derivative with central differences** and stops the notebook if one is wrong, at all t where the
# status is `successful`. Where it is not, it returns NaN, and the curve has a gap. The thin dotted lines are places to look at: a kink, or the
# end of the domain.

# %%
STEP = 1e-5


def sweep(solve, ts, pick=lambda solution: solution.value):
    """(solutions, values, derivatives) of `solve(t)` for all t; the derivatives are compared with central differences."""

    @eqx.filter_jit
    @jax.vmap
    def along(t):
        def picked(t):
            solution = solve(t)
            return pick(solution), solution

        value, slope, solution = jax.jvp(picked, (t,), (jnp.ones_like(t),), has_aux=True)
        return solution, value, slope

    (here, values, slopes), ahead, behind = along(ts), along(ts + STEP), along(ts - STEP)
    ok = here.result == dn.RESULTS.successful
    compared = ok & (ahead[0].result == dn.RESULTS.successful) & (behind[0].result == dn.RESULTS.successful)
    spread = lambda mask: mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    error = jnp.abs(slopes - (ahead[1] - behind[1]) / (2 * STEP)) / (1 + jnp.abs(slopes))
    assert compared.sum() >= ts.size // 3
    assert jnp.max(jnp.where(spread(compared), error, 0)) < 1e-6
    return here, *(np.asarray(jnp.where(spread(ok), array, jnp.nan)) for array in (values, slopes))


def panels(xlabel="t", left="solution", right="derivative"):
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.5), layout="constrained")
    for axis, title in zip(axes, (left, right), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
    return axes


def curves(axes, ts, *families, labels=None, **style):
    """Each family's columns against t, in the same colours on each axis."""
    for axis, family in zip(axes, families, strict=True):
        for column, line in enumerate(np.reshape(family, (len(ts), -1)).T):
            label = labels[column] if labels and axis is axes[0] else None
            axis.plot(ts, line, **{"color": COLOURS[column % 6], "lw": 1.5, "label": label, **style})
    if labels:
        axes[0].legend(fontsize=8, frameon=False)


def mark(axes, *places):
    for axis in axes:
        for place in places:
            axis.axvline(place, color="black", lw=0.8, ls=":")


# %% [markdown]
# ## 1. `FixedPoint`
#
# $$ y^* = T(y^*, x) $$
#
# An equilibrium layer: one layer, applied until nothing changes. The gradient is $(I - \partial_y T)^{-1}\,\partial_x T$, by products with
# $\partial_y T$, so memory does not grow with the iterations. *Use* `Root` if there is no iteration to speak of, `dn.implicit` if you have a solver.
#
# **Where it fails.** Plain iteration needs $|\partial_y T| < 1$. In $y = \cos(wy)$ that is lost at $w \approx 1.32$; the fixed point is still
# there, and `Anderson` (or `Broyden`) finds it. The derivative also needs that 1 is no eigenvalue of $\partial_y T$.

# %%
T = lambda y, w: jnp.cos(w * y)
picard = dn.FixedPoint(T, max_steps=500)
anderson = dn.FixedPoint(T, dn.Anderson(rtol=1e-12, atol=1e-12))

ws = jnp.linspace(0.0, 2.0, 41)
plain, y, slope = sweep(lambda w: picard.solve(w, y0=0.5), ws)
faster, y_anderson, slope_anderson = sweep(lambda w: anderson.solve(w, y0=0.5), ws)
closed_form = -y_anderson * np.sin(ws * y_anderson) / (1 + ws * np.sin(ws * y_anderson))
assert np.allclose(slope_anderson, closed_form)

axes = panels("w", "fixed point of cos(wy)", "dy/dw")
curves(axes, ws, y_anderson, slope_anderson, color=ORANGE, lw=4, alpha=0.4, labels=["Anderson"])
curves(axes, ws, y, slope, labels=["plain iteration"])
mark(axes, 1.32)
show()
print("plain:   ", plain.report()[:330], "...")
print("Anderson:", faster.report())

# %% [markdown]
# ## 2. `Root`
#
# $$ f(y^*, x) = 0 $$
#
# As many equations as unknowns, solved by Newton's method from a guess; any solver of optimistix can take its place. The gradient is
# $-(\partial_y f)^{-1}\,\partial_x f$: one linear solve, dense up to 512 unknowns.
#
# **Where it fails.** At a fold. $y^3 - 3y = x$ has three roots for $|x| < 2$; the upper one ends at $x = -2$, where its derivative
# $1/(3y^2 - 3)$ is infinite. Left of it Newton arrives at another root. **That is no failure that a status could show**: it is a root. A better
# guess does not help; nothing is there. At the fold itself, `dn.conditions` says what is wrong.

# %%
root = dn.Root(lambda y, x: y**3 - 3 * y - x)
xs = jnp.linspace(-3.0, 3.0, 42)
solutions, y, slope = sweep(lambda x: root.solve(x, y0=2.0), xs)
assert np.allclose(slope, 1 / (3 * y**2 - 3))

axes = panels("x", "root found from y0 = 2", "dy/dx")
grid = np.linspace(-2.2, 2.2, 200)
axes[0].plot(grid**3 - 3 * grid, grid, color=GREY, lw=0.8)
curves(axes, xs, y, slope, lw=0, marker=".")
axes[1].set_ylim(0, 2)
mark(axes, -2.0)
show()
print(solutions.report())
print(dn.conditions(root, root.solve(-2.0, y0=2.0), -2.0))

# %% [markdown]
# ## 3. `Argmin`
#
# $$ y^* = \arg\min_y f(y, x) $$
#
# A smooth objective and a guess. The gradient is $-(\nabla^2_{yy} f)^{-1}\nabla^2_{yx} f$, one solve with the Hessian; that of the optimal
# value, `solution.objective`, is $\partial_x f$ at the solution and costs no solve at all (*the envelope theorem*). Typical use: the gradient of a
# validation loss with respect to a hyperparameter.
#
# **Where it fails.** Where there is no minimum. Logistic regression on data that a line separates needs a penalty $\lambda > 0$; at
# $\lambda = 0$ the weights run off, and below the objective has no lower bound.

# %%
rng, labels = np.random.default_rng(2), np.repeat([1.0, -1.0], 8)
X = rng.normal(size=(16, 2)) + 2.2 * labels[:, None]
held_out = X + 3.0 * rng.normal(size=X.shape)
loss = lambda w, X: jnp.mean(jnp.log1p(jnp.exp(-labels * (X @ w))))
logistic = dn.Argmin(lambda w, lam: loss(w, X) + lam * jnp.sum(w**2) / 2)

lams = jnp.concatenate([jnp.array([-0.02, 0.0]), jnp.geomspace(0.02, 3.0, 28)])
pick = lambda s: jnp.append(s.value, jnp.stack([s.objective, loss(s.value, held_out)]))
solutions, values, slopes = sweep(lambda lam: logistic.solve(lam, y0=jnp.zeros(2)), lams, pick)
assert np.allclose(slopes[2:, 2], np.sum(values[2:, :2] ** 2, axis=1) / 2)  # the envelope theorem

axes = panels(r"penalty $\lambda$", "weights", r"validation loss, and $\lambda \times$ its derivative")
curves(axes[:1], lams[2:], values[2:, :2], labels=["$w_1$", "$w_2$"])
curves(axes[1:], lams[2:], np.stack([values[2:, 3], lams[2:] * slopes[2:, 3]], 1), labels=["loss", "derivative"])
for axis in axes:
    axis.set_xscale("log")
show()
print("lambda = -0.02 and 0:", solutions.report())

# %% [markdown]
# ## 4. `ConstrainedArgmin`
#
# $$ y^* = \arg\min_y f(y, x) \quad\text{subject to}\quad h(y, x) = 0,\; g(y, x) \le 0 $$
#
# The general deep declarative node: any smooth functions, a local minimum, up to about a hundred unknowns. The gradient is one dense solve
# with the KKT matrix. *Use* `QuadraticProgram` or `Projection` where the problem is one: they are faster and global.
#
# **Where it fails.** Here is the nearest point of an ellipse $y_1^2/4 + y_2^2 \le r$ as the ellipse shrinks. At $r \approx 1.36$ its edge reaches
# the point: a kink. Towards $r = 0$ the derivative grows like $1/\sqrt r$, and for $r < 0$ there is no point left: `infeasible`.

# %%
point = jnp.array([1.5, 0.9])
ellipse = lambda y, r: y[0] ** 2 / 4 + y[1] ** 2 - r
nearest = dn.ConstrainedArgmin(lambda y, r: jnp.sum((y - point) ** 2), inequality=ellipse)

rs = jnp.linspace(-0.16, 2.0, 37)
solutions, y, slope = sweep(lambda r: nearest.solve(r, y0=point), rs)
edge = float(ellipse(point, 0.0))
assert np.allclose(slope[rs > edge], 0)
assert np.nanmin(np.abs(slope[rs < edge])) > 0

axes = panels("r", "nearest point of the ellipse", "derivative in r")
curves(axes, rs, y, slope, labels=["$y_1$", "$y_2$"])
mark(axes, 0.0, edge)
show()
print("multipliers at r = 1.04:", solutions.dual.inequality[20].round(3))
print(solutions.report())

# %% [markdown]
# ## 5. `QuadraticProgram`
#
# $$ z^* = \arg\min_z \tfrac12 z^\top Qz + q^\top z \quad\text{subject to}\quad Az = b,\; Gz \le h,\; l \le z \le u $$
#
# Exact to rounding, with multipliers; infeasible and unbounded data come with a proof. The gradient, in every block, is one solve with the KKT
# matrix of the active set, whose factor the solver leaves behind. Notebook 02 is about this node.
#
# **Where it fails.** Two goods are wanted, (2, 1) of them, and the budget is t. The derivative jumps where a constraint starts or stops to
# matter, at t = 1 and t = 3; `gradient="smoothed"` rounds the corners, at the price of a bias. A negative budget is `infeasible`. The multiplier is
# minus the derivative of the optimal cost: what a bit more of budget is worth.

# %%
budgets = jnp.linspace(-0.47, 4.0, 46)
Q, q = jnp.eye(2), jnp.array([-2.0, -1.0])
shop = lambda t: dn.QuadraticProgram().solve(Q, q, G=jnp.ones((1, 2)), h=t[None], lower=0.0)
solutions, z, slope = sweep(shop, budgets, lambda s: jnp.append(s.value, s.objective))
ok = budgets > 0
assert np.allclose(-slope[ok, 2], solutions.dual.inequality[ok, 0])

axes = panels("budget t", "goods bought", "derivative; dotted, that of the optimal cost")
curves(axes, budgets, z[:, :2], slope[:, :2], labels=["$z_1$", "$z_2$"])
curves(axes[1:], budgets, slope[:, 2], color="black", ls=":")
mark(axes, 0, 1, 3)
show()
print(solutions.report())

# %% [markdown]
# ## 6. `Softmax`, `Sparsemax`, `Entmax`
#
# $$ p^* = \arg\max_{p \ge 0,\; 1^\top p = 1} \; p^\top z + H(p) $$
#
# with Shannon's entropy (`Softmax`), $-\tfrac12\|p\|^2$ (`Sparsemax`), or Tsallis' with an exponent between and beyond them (`Entmax(alpha)`;
# an array `alpha` is learnt). Attention with exact zeros. The gradients are in closed form and cost O(n). `jax.nn.softmax` is as good as
# `Softmax`, which adds a multiplier, a status, and a mask with sane gradients. Losses: `dn.softmax_loss`, `dn.sparsemax_loss`, `dn.entmax_loss`.
#
# **Where they fail.** Softmax nowhere, for finite scores. Sparsemax has a kink where an entry reaches zero, `Entmax(1.5)` has not: its slope
# is continuous. Only NaN gives a status.

# %%
scores = lambda t: jnp.stack([t, 0.5 * jnp.ones_like(t), jnp.zeros_like(t)])
ts = jnp.linspace(-1.53, 2.4, 60)
axes = panels("first score (the others: 0.5, 0)", "first probability", "its derivative")
for node, colour in ((dn.Softmax(), BLUE), (dn.Entmax(1.5), GREEN), (dn.Sparsemax(), RED)):
    _, p, slope = sweep(lambda t, node=node: node.solve(scores(t)), ts, lambda s: s.value[0])
    curves(axes, ts, p, slope, color=colour, labels=[type(node).__name__])
mark(axes, -0.25, 1.5)
show()
assert np.allclose(dn.Softmax()(scores(1.0)), jax.nn.softmax(scores(1.0)))
at_kink = dn.Sparsemax().solve(scores(jnp.asarray(-0.25)))
print("at t = -1/4, p =", at_kink.value, " distance to the nearest kink:", at_kink.stats["kink_distance"])
print(dn.Sparsemax().solve(scores(jnp.nan)).report())

# %% [markdown]
# ## 7. `Projection`: simplices, sections, boxes
#
# $$ y^* = \arg\min_{y \in C} \tfrac12\|y - x\|^2, \qquad C: \text{ numbers with bounds and, but for the box, a given total} $$
#
# `Simplex(radius)`, `CappedSimplex(radius, cap)`, `BoxSection(lower, upper, weights, total)`, `Box(lower, upper)`, `NonNegative()`. Radii, caps and
# bounds are data, with gradients. Closed forms: O(n), no sort, no linear solve; `dn.projection_simplex(x)` and its like are the bare functions.
#
# **Where it fails.** `CappedSimplex(k)` is a soft top-k. Fill five glasses of height 1 with the amount r: they fill from the highest score
# on, the derivative is one over the number of glasses that are filling, and there is a kink wherever one starts or is full. Below 0 and
# above 5 the set is empty: `infeasible`.

# %%
scores = jnp.array([1.6, 1.35, 0.7, 0.4, 0.0])
amounts = jnp.linspace(-0.33, 5.3, 80)
solutions, y, slope = sweep(lambda r: dn.Projection(dn.CappedSimplex(r, cap=1.0)).solve(scores), amounts)
filling = np.sum((y > 0) & (y < 1), axis=1, keepdims=True)
assert np.allclose(
    slope, np.where((y > 0) & (y < 1), 1 / np.maximum(filling, 1), np.where(np.isnan(y), np.nan, 0)), equal_nan=True
)

axes = panels("amount r", "glasses", "derivative in r")
curves(axes, amounts, y, slope)
mark(axes, 0.0, 5.0)
show()
print(solutions.report())

# %% [markdown]
# ## 8. `Projection`: balls, spheres, cones, matrices
#
# `L1Ball`, `L2Ball`, `LInfBall` (with `radius`), `L1Sphere`, `L2Sphere`, `HalfSpace`, `Hyperplane`, `AffineSet`, `Polyhedron(A, b, G, h)` (a
# quadratic program), `SecondOrderCone`, `PositiveSemidefinite`, `Spectraplex`. All but the polyhedron in closed form; matrices cost one
# eigendecomposition, whose eigenvectors are never differentiated, so that equal eigenvalues do no harm.
#
# **Where it fails.** On the edges of the set, as ever: kinks. The spheres are not convex: from the centre all points are equally near. And a
# matrix on the boundary of the cone is on a kink; but the identity, all of whose eigenvalues are equal, is not. JAX's own derivative of the
# obvious formula is NaN there.

# %%
ts = jnp.linspace(0.013, 2 * np.pi, 121)
on_circle = lambda t: 1.3 * jnp.stack([jnp.cos(t), jnp.sin(t)])
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.8), layout="constrained", width_ratios=[1, 1.6])
for onto, colour in ((dn.L1Ball(), BLUE), (dn.LInfBall(), GREEN), (dn.SecondOrderCone(), RED)):
    solutions, y, slope = sweep(lambda t, onto=onto: dn.Projection(onto).solve(on_circle(t)), ts)
    axes[0].plot(*y.T, ".-", color=colour, label=type(onto).__name__, markersize=3, lw=1)
    axes[1].plot(ts, np.linalg.norm(slope, axis=1), color=colour)
axes[0].set(aspect="equal", title="1.3 (cos t, sin t), projected")
axes[1].set(xlabel="t", title="speed of the projection")
axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
show()

turn = jnp.linalg.qr(jr.normal(jr.key(3), (3, 3)))[0]
symmetric = turn @ jnp.diag(jnp.array([1.0, 1.0, -2.0])) @ turn.T
by_eigh = lambda X: (lambda mu, U: (U * jnp.maximum(mu, 0)) @ U.T)(*jnp.linalg.eigh(X))
direction = jnp.array([[0.3, 1.0, 0.0], [1.0, -0.5, 0.2], [0.0, 0.2, 0.1]])
ours = jax.jvp(dn.Projection(dn.PositiveSemidefinite()), (symmetric,), (direction,))[1]
differences = (by_eigh(symmetric + STEP * direction) - by_eigh(symmetric - STEP * direction)) / (2 * STEP)
assert jnp.max(jnp.abs(ours - differences)) < 1e-8
print(
    "eigenvalues 1, 1, -2: first row, ours",
    ours[0],
    " through eigh",
    jax.jvp(by_eigh, (symmetric,), (direction,))[1][0],
)
print("sphere:", dn.Projection(dn.L2Sphere()).solve(jnp.zeros(2)).report()[:150], "...")

# %% [markdown]
# ## 9. `Lasso`, `ProximalArgmin`
#
# $$ \beta^* = \arg\min_\beta \tfrac1{2n}\|y - X\beta\|^2 + \sum_j \lambda_j|\beta_j|, \qquad y^* = \arg\min_y f(y, x) + g(y, x) $$
#
# `Lasso` (with `ridge`, the elastic net) finds the support and solves on it exactly; its gradient costs $n k_{max}^2$, for the columns that are
# in use. `ProximalArgmin(objective, prox)` takes any smooth f and any g whose proximity operator is known (`dn.prox_lasso`,
# `dn.prox_group_lasso`, ..., any projection). On the same problem they agree.
#
# **Where they fail.** At a kink for every $\lambda$ at which a coefficient enters or leaves. With `k_max=4` there is no room for a fifth:
# `support_overflow`, and no gradient, rather than one of part of the support.

# %%
X = jr.normal(jr.key(1), (20, 6)) @ (jnp.eye(6) + 0.5 * jnp.eye(6, k=1))
target = X @ jnp.array([1.5, -1.0, 0.0, 0.6, 0.0, 0.0]) + 0.7 * jr.normal(jr.key(2), (20,))
lams = jnp.linspace(0.011, 2.6, 50)
solutions, beta, slope = sweep(lambda lam: dn.Lasso(k_max=4).solve((X, target, lam)), lams)
smooth = lambda beta, lam: jnp.sum((target - X @ beta) ** 2) / 40
proximal = dn.ProximalArgmin(smooth, dn.prox_lasso, max_steps=5000)
_, same, same_slope = sweep(lambda lam: proximal.solve(lam, y0=jnp.zeros(6)), lams)
ok = ~np.isnan(beta[:, 0])
assert np.allclose(beta[ok], same[ok])
assert np.allclose(slope[ok], same_slope[ok])

axes = panels(r"$\lambda$", "coefficients", r"derivative in $\lambda$")
curves(axes, lams, same, same_slope, lw=0.8, ls=":")
curves(axes, lams, beta, slope)
show()
print(solutions.report())

# %% [markdown]
# ## 10. `TotalVariation`
#
# $$ y^* = \arg\min_y \tfrac12\|y - x\|^2 + \sum_i \lambda_i |y_{i+1} - y_i| $$
#
# A piecewise constant signal, exactly, by about $\log n$ parallel passes; the gradient is an average over each block, O(n). One strength, or
# one for each pair of neighbours; `inf` glues them.
#
# **Where it fails.** As the strength grows, neighbours merge, and each merger is a kink. A negative strength is outside of the domain:
# `nonfinite_data`, whose message says so.

# %%
signal = jnp.repeat(jnp.array([0.0, 2.0, 1.2]), 7) + 0.35 * jr.normal(jr.key(5), (21,))
denoise = dn.TotalVariation()
strengths = jnp.linspace(-0.12, 2.5, 60)
solutions, y, slope = sweep(lambda s: denoise.solve(dn.TotalVariationData(signal, s)), strengths)

axes = panels("", "strength 1", "every entry, against the strength")
axes[0].plot(signal, ".", color=GREY)
axes[0].step(np.arange(21), y[np.argmin(np.abs(strengths - 1))], where="mid", color=RED)
axes[1].plot(strengths, y, color=BLUE, lw=0.8)
mark(axes[1:], 0.0)
show()
print("blocks at strength 2.5:", 1 + np.sum(np.diff(y[-1]) != 0), " derivatives:", np.unique(slope[-1].round(6)))
print(solutions.report()[:170], "...")

# %% [markdown]
# ## 11. `Isotonic`
#
# $$ y^* = \arg\min_y \tfrac12\sum_i w_i (y_i - x_i)^2 \quad\text{subject to}\quad y_1 \le \dots \le y_n $$
#
# A monotone fit (`increasing=False`: the other way), for calibration, say. Direct, in $\log_2 n$ levels. The gradient is a weighted average
# over blocks of equal values, O(n).
#
# **Where it fails.** Kinks where blocks merge or split. A weight of zero leaves an entry without a unique fit: `nonfinite_data` (give it a
# small one, or leave it out).

# %%
x = jnp.array([0.1, 0.7, 0.4, 1.3, 1.0, 1.1, 2.2, 1.7])
w = lambda t: jnp.ones(8).at[3].set(t)
weights = jnp.linspace(-0.1, 3.0, 40)
solutions, y, slope = sweep(lambda t: dn.Isotonic().solve((x, w(t))), weights)

axes = panels("", "weights 1", "the third block, against the weight of its first point")
axes[0].plot(x, ".", color=GREY)
axes[0].step(np.arange(8), dn.Isotonic()(x), where="mid", color=RED)
axes[1].plot(weights, y[:, 3], color=BLUE, label="its value")
axes[1].plot(weights, slope[:, 3], color=GREEN, label="derivative")
axes[1].legend(fontsize=8, frameon=False)
mark(axes[1:], 0.0)
show()
assert np.allclose(y[-1, 3], (3.0 * 1.3 + 1.0 + 1.1) / 5.0)
print(solutions.report()[:170], "...")

# %% [markdown]
# ## 12. `SoftSort`, `SoftRank`
#
# $$ r^* = \arg\min_r \tfrac12\|r - x/\epsilon\|^2, \quad r \text{ in the convex hull of the permutations of } (1, \dots, n) $$
#
# Ranks, and sorted values, with a gradient; for losses on ranks (Spearman) or quantiles. One sort and one isotonic regression. Hard ranks
# have the derivative zero; `jnp.sort` has one, that of a permutation, and is enough for many a loss.
#
# **Where they fail.** The derivative is zero again for a value that is further than about $\epsilon$ from all others: too small a strength is
# no signal, too large a one is no rank. Kinks where blocks merge. Ties are fine.

# %%
values = lambda t: jnp.stack([t, *(c * jnp.ones_like(t) for c in (0.0, 1.0, 2.5))])
ts = jnp.linspace(-1.51, 4.0, 80)
strengths = jnp.array([0.1, 0.7, 2.0])
rank = lambda t: jax.vmap(lambda strength: dn.SoftRank(strength).solve(values(t)))(strengths)
_, ranks, slope = sweep(rank, ts, lambda s: s.value[:, 0])
axes = panels("t, ranked among 0, 1, 2.5", "its soft rank", "derivative")
curves(axes, ts, ranks, slope, labels=[rf"$\epsilon$ = {strength}" for strength in strengths])
axes[1].set_ylim(-0.1, 3)
show()
x = jnp.array([2.0, 0.3, 1.0, 1.1])
last, slope = jax.value_and_grad(lambda x: dn.soft_sort(x, 1.5)[-1])(x)
print("soft sort: the last entry", last, " its derivative", slope)

# %% [markdown]
# ## 13. `EntropicTransport`
#
# $$ P^* = \arg\min_{P \ge 0} \langle C, P\rangle + \epsilon\,\mathrm{KL}(P \mid ab^\top) \quad\text{subject to}\quad P1 = a,\; P^\top 1 = b $$
#
# Sinkhorn's problem, solved by Newton's method: tens of steps whatever $\epsilon$ is. `objective` is the smoothed distance; its gradient is
# free. That of the plan costs one Cholesky factor of the smaller side. With `rho`, masses may differ.
#
# **Where it fails.** Masses with different totals are `infeasible` without `rho`. And for $\epsilon \to 0$ the plan becomes a corner of a
# polytope, whose derivative is zero almost everywhere: `Projection(TransportPolytope(a, b))` has the exact zeros.

# %%
places = jnp.array([0.0, 1.0, 2.2])
C = (places[:, None] - jnp.array([0.4, 1.9])[None]) ** 2
a, b = jnp.array([0.5, 0.2, 0.3]), jnp.array([0.6, 0.4])
epsilons = jnp.geomspace(0.02, 200.0, 40)
pick = lambda s: jnp.append(s.value[:, 0], s.objective)
solutions, plan, slope = sweep(lambda e: dn.EntropicTransport(e).solve(C, a, b), epsilons, pick)
assert np.allclose(solutions.value.sum(2), a)
assert np.allclose(solutions.value.sum(1), b)
assert np.allclose(plan[-1, :3], a * b[0], atol=0.02)
assert np.all(slope[:, 3] >= 0)

axes = panels(r"$\epsilon$", "what goes to the first place", r"$\epsilon \times$ derivative")
curves(axes, epsilons, plan[:, :3], epsilons[:, None] * slope[:, :3], labels=["from 1", "from 2", "from 3"])
for axis in axes:
    axis.set_xscale("log")
show()
print(solutions.report())
print("too much to move:", dn.EntropicTransport(1.0).solve(C, a, 2 * b).report())

# %% [markdown]
# ## 14. `RobustPool`, `RobustVectorPool`
#
# $$ y^* = \arg\min_u \sum_i w_i\,\phi(u - x_i; \alpha) $$
#
# A mean whose penalty $\phi$ grows less than quadratically beyond $\alpha$. `RobustPool` pools each channel by itself, in closed-form gradient;
# `RobustVectorPool` uses the distance in space, so that its result turns with the points, at the cost of a c × c solve.
#
# **Where they fail.** The derivative is the *influence* of a point. Welsch and the truncated quadratic let go of an outlier altogether, and
# have several minima: where the best one changes, the value jumps, and **no gradient sees that**. Huber and the truncated quadratic have
# kinks at distance $\alpha$. Pooling nothing is `empty`.

# %%
cloud = jnp.array([-0.6, -0.2, 0.1, 0.5])
ts = jnp.linspace(-0.5, 6.0, 60)
axes = panels("position t of the fifth point", "pooled value", "influence of the fifth point")
for penalty, colour in zip(("quadratic", "pseudo-huber", "huber", "welsch"), COLOURS, strict=False):
    pool = dn.RobustPool(penalty, alpha=1.0)
    _, y, slope = sweep(lambda t, pool=pool: pool.solve(jnp.append(cloud, t)), ts)
    curves(axes, ts, y, slope, color=colour, labels=[penalty])
show()
points, quarter = jr.normal(jr.key(4), (6, 2)).at[0].set(9.0), jnp.array([[0.0, 1.0], [-1.0, 0.0]])
turned = jax.jit(lambda points: dn.RobustVectorPool("welsch", alpha=1.5)(points))
assert jnp.allclose(turned(points @ quarter), turned(points) @ quarter)
print(jax.vmap(dn.RobustPool().solve)(jnp.array([[1.0, 2.0], [1.0, jnp.nan]])).report()[:170], "...")

# %% [markdown]
# ## 15. `WeightedLeastSquares`
#
# $$ y^* = \arg\min_y \tfrac12 \sum_i w_i (a_i^\top y - b_i)^2 + \tfrac\rho2\|y\|^2 $$
#
# By orthogonal factorisation, forward and backward: no normal equations, so no squared condition number. The gradient, in A, b, w and
# $\rho$, uses the factors that are there. For deficient rank `minimum_norm=True`, or a `ridge`.
#
# **Where it fails.** A line through five points, four of which have the weight t. At t = 0 one point is left, through which many lines go:
# `not_unique`. Below, weights are negative: `nonfinite_data`. Towards 0 from above all is well; it is a limit that no t attains.

# %%
A = jnp.stack([jnp.ones(5), jnp.array([0.0, 1.0, 2.0, 3.0, 4.0])], axis=1)
b = jnp.array([1.0, 0.4, 1.7, 1.9, 2.8])
fit = dn.WeightedLeastSquares()
ts = jnp.arange(-3, 31) / 10
solutions, line, slope = sweep(lambda t: fit.solve(A, b, weights=jnp.append(1.0, jnp.full(4, t))), ts)
axes = panels("t", "offset and slope of the line", "derivatives")
curves(axes, ts, line, slope, labels=["offset", "slope"])
mark(axes, 0.0)
show()
assert np.allclose(line[13], np.linalg.lstsq(A, b)[0])
print(solutions.report())

# %% [markdown]
# ## 16. `SphereLeastSquares`
#
# $$ y^* = \arg\min_{\|y\| = \rho} \tfrac12 \sum_i w_i (a_i^\top y - b_i)^2 $$
#
# The *global* minimum over vectors of a given length: directions, normals, homogeneous systems with a right-hand side. One SVD, and one
# equation in one unknown; the gradient is a bordered solve.
#
# **Where it fails.** In the *hard case*, two minima are equally good. Below, the minimum jumps from one side of the circle to the other at
# t = 0, where the status is `not_unique`. On either side the derivative is finite, and right.

# %%
sphere = dn.SphereLeastSquares()
ts = jnp.linspace(-1.0, 1.0, 41)
solutions, y, slope = sweep(lambda t: sphere.solve(jnp.diag(jnp.array([2.0, 1.0])), jnp.append(0.9, t)), ts)
assert np.isclose(np.linalg.norm(y, axis=1), 1).sum() == 40
axes = panels("t", "y on the unit circle", "derivative")
curves(axes, ts, y, slope, labels=["$y_1$", "$y_2$"])
mark(axes, 0.0)
show()
print(solutions.report())

# %% [markdown]
# ## 17. `Eigendecomposition`
#
# $$ Sv_i = \lambda_i v_i, \quad v_i^\top v_i = 1, \quad i = 1 \dots k $$
#
# LAPACK's solver, with a derivative that is finite where eigenvalues coincide. There, a single vector has no derivative; functions of the
# whole group do, such as its projector, and get it exactly. *Use* `jnp.linalg.eigvalsh` for eigenvalues that are known to be apart: it is as good.
#
# **Where it fails.** Two eigenvalues cross at t = 0. The largest one has a kink; its vector turns by a right angle. With `k=1`, where the first
# two are equal, the returned span is arbitrary: `not_unique`. With `k=2` the pair is a function of the matrix, and nothing happens.

# %%
base, move = (turn @ jnp.diag(jnp.array(d)) @ turn.T for d in ([1.0, 1.0, -1.0], [1.0, -1.0, 0.0]))
tilt = turn @ jnp.array([[0.0, 0.0, 0.6], [0.0, 0.0, 0.3], [0.6, 0.3, 0.0]]) @ turn.T
S = lambda t: base + t * (move + tilt)
ts = jnp.linspace(-1.0, 1.0, 41)
projector = lambda s: s.value.vectors @ s.value.vectors.T
one, top, _ = sweep(lambda t: dn.Eigendecomposition(1).solve(S(t)), ts, lambda s: s.value.values)
two, P, dP = sweep(lambda t: dn.Eigendecomposition(2).solve(S(t)), ts, projector)
axes = panels("t", "the two largest eigenvalues", "their projector, first row, and its derivative (dashed)")
curves(axes[:1], ts, two.value.values)
curves(axes[1:], ts, P[:, 0])
curves(axes[1:], ts, dP[:, 0], ls="--", lw=1)
mark(axes, 0.0)
show()
naive = lambda S: (lambda V: (V @ V.T)[0, 0])(jnp.linalg.eigh(S)[1][:, 1:])
print("k=1:", one.report()[:150], "...")
print("k=2:", two.report())
print(
    "derivative at t = 0, first entry:",
    dP[20, 0, 0].round(6),
    " through jnp.linalg.eigh:",
    jax.grad(lambda t: naive(S(t)))(0.0),
)

# %% [markdown]
# ## 18. `PerspectiveNPoint`
#
# $$ R^*, t^* = \arg\min_{R \in SO(3),\, t} \tfrac12 \sum_i w_i \|\pi(K(RX_i + t)) - u_i\|^2, \qquad \pi(p) = (p_1, p_2)/p_3 $$
#
# The pose of a camera from points and where they are seen; a search, then Newton's method. Gradients in points, pixels, weights and intrinsics:
# one 7 × 7 solve.
#
# **Where it fails.** Below, the focal length that is assumed goes from 0 to 2; the true one is 1, and the depth that is found follows it. At 0
# there is no camera: `nonfinite_data`. With far too short a lens, 0.2, the answer is `not_unique`, as for points on a line, or fewer than four
# that have a weight. Where the better one of two minima changes, the pose jumps, and no gradient sees that.

# %%
corners = jnp.array(
    [[-1.0, -1.0, 0.0], [1.0, -1.0, 0.3], [1.0, 1.0, 1.0], [-1.0, 1.0, 0.2], [0.0, 0.3, -1.0], [0.4, 0.0, 1.0]]
)
seen = (corners @ turn.T)[:, :2] / ((corners @ turn.T)[:, 2:] + 5.0)
focal = jnp.linspace(0.0, 2.0, 21)
pose = lambda f: dn.PerspectiveNPoint().solve(
    corners, seen, intrinsics=jnp.diag(jnp.array([1.0, 1.0, 1.0]).at[:2].set(f))
)
solutions, t, slope = sweep(pose, focal, lambda s: s.value.translation)
assert np.allclose(t[10], [0.0, 0.0, 5.0])
axes = panels("assumed focal length", "translation", "derivative")
curves(axes, focal, t, slope, labels=["x", "y", "depth"])
show()
print(solutions.report())

# %% [markdown]
# ## 19. `AnalyticCentre`
#
# $$ y^* = \arg\min_y -\sum_i \log(h_i - g_i^\top y) \quad\text{subject to}\quad Ay = b $$
#
# A point well inside of a polytope, as a smooth function of its faces; no feasible start is needed. The gradient is one solve with the Hessian of
# the barrier. *Use* `QuadraticProgram` if you have an objective.
#
# **Where it fails.** Of the unit square only $y_1 + 1.5\,y_2 \le t$ is left. Its centre is smooth until nothing is inside, at t = 0: then it is
# `infeasible`. A polyhedron that is not bounded may have no centre: `unbounded`. Mind that *every* inequality pushes: beyond t = 2.5 the
# new face does not touch the square any more, and still moves the centre. Redundant inequalities are not harmless here.

# %%
G = jnp.concatenate([-jnp.eye(2), jnp.eye(2), jnp.array([[1.0, 1.5]])])
ts = jnp.linspace(-0.31, 5.0, 40)
solutions, y, slope = sweep(lambda t: dn.AnalyticCentre().solve(G, jnp.append(jnp.array([0.0, 0.0, 1.0, 1.0]), t)), ts)
assert np.all(slope[ts > 0] > 0)
axes = panels("t", "centre", "derivative")
curves(axes, ts, y, slope, labels=["$y_1$", "$y_2$"])
mark(axes, 0.0, 2.5)
show()
print(solutions.report())

# %% [markdown]
# ## 20. `NeuralODE`
#
# $$ y(t_1), \quad \dot y = f(t, y, \theta), \quad y(t_0) = y_0 $$
#
# Any diffrax solver and adjoint. By default the steps are undone one by one backwards, so that memory does not grow with their number; that is
# reverse mode only. (The helper of this notebook wants forward mode, so it gets `DirectAdjoint`.) Notebook 04 compares the gradients.
#
# **Where it fails.** $\dot y = y^2$ has $y(1) = y_0/(1 - y_0)$ (dotted) for $y_0 < 1$ only; beyond, it has run off: `ode_nonfinite`. Just before,
# twenty steps are too few, and nothing says so: the gradient is exact for the *steps*, whose error is yours to choose.

# %%
field = lambda t, y, args: y**2
forward = dn.NeuralODE(field, steps=20, adjoint=dfx.DirectAdjoint())
starts = jnp.concatenate([jnp.linspace(-1.0, 1.0, 41), jnp.linspace(1.2, 3.0, 10)])
solutions, end, slope = sweep(forward.solve, starts)
reverse = jax.jit(jax.vmap(jax.grad(dn.NeuralODE(field, steps=20, throw=False))))(starts)
both = ~np.isnan(reverse)  # where a step cannot be undone to enough digits, the default says NaN
assert both.sum() >= 38
assert np.allclose(slope[both], reverse[both])

axes = panels("$y_0$", "y(1)", "derivative")
finite = starts < 0.95
curves(
    axes, starts[finite], starts[finite] / (1 - starts[finite]), 1 / (1 - starts[finite]) ** 2, color="black", ls=":"
)
curves(axes, starts, end, slope)
axes[0].set_ylim(-1, 10)
axes[1].set_ylim(0, 100)
mark(axes, 1.0)
show()
print(solutions.report()[:220], "...")

# %% [markdown]
# ## 21. `ELBOOptimizer`
#
# $$ \lambda^* = \arg\min_\lambda \; -\mathrm{ELBO}(\lambda; \theta, x) \;[\, + \rho\,D(\lambda, \lambda_0) \,] $$
#
# Improves the variational parameters $\lambda_0$ that an encoder proposes. Eight modes say what the encoder learns from that; the default,
# `"moreau"`, needs no linear solve. Notebook 05 explains why `"implicit"` teaches it nothing.
#
# **Where it fails.** A weight $\rho \le 0$ of the proximal term is `bad_rho`. Decoders with kinks (ReLU) may end in `not_a_solution`.

# %%
bound = lambda q, x: jnp.sum(q.log_scale - (x - q.mean) ** 2 / 2 - q.mean**2 / 2 - jnp.exp(2 * q.log_scale))
start = lambda mean: dn.GaussianParameters(mean=jnp.asarray(mean)[None], log_scale=jnp.zeros(1))
moreau = lambda rho: dn.ELBOOptimizer(bound, "moreau", rho=rho, family=dn.DiagonalGaussian())
rhos = jnp.linspace(-0.4, 6.0, 33)
pick = lambda s: jnp.append(s.value.loss, s.value.parameters.mean)
solutions, values, slopes = sweep(lambda rho: moreau(rho).solve(dn.Evidence(jnp.ones(1), start(-1.0))), rhos, pick)
assert np.allclose(
    values[3:, 1], (1 - rhos[3:]) / (2 + rhos[3:])
)  # between the posterior's mean, 1/2, and the guess, -1

axes = panels(r"$\rho$", "loss, and mean", r"derivative in $\rho$: never negative for the loss")
curves(axes, rhos, values, slopes, labels=["loss", "mean"])
mark(axes, 0.0)
show()
for mode, exact in (("implicit", 0.0), ("moreau", -1.0)):
    learn = dn.ELBOOptimizer(bound, mode, family=dn.DiagonalGaussian())
    slope = jax.jit(jax.grad(lambda mean, learn=learn: learn(jnp.ones(1), start(mean)).loss))(-1.0)
    print(f"{mode:9}: the encoder's gradient is {slope:.6f}")
    assert abs(slope - exact) < 1e-8
print(solutions.report()[:220], "...")

# %% [markdown]
# ## How to choose
#
# *Cost of the gradient*: beyond a few passes over the data, for n unknowns. A "linear solve" is dense up to 512 unknowns, and by products above.
#
# | I have | I want | node | its gradient costs | it fails |
# |---|---|---|---|---|
# | an iteration that contracts | its limit | `FixedPoint` | products with the Jacobian | where it does not contract (`Anderson`, `Broyden` may) |
# | n equations | a root | `Root` | a linear solve | at folds; with several roots, silently at another one |
# | a smooth objective | a minimiser | `Argmin` | a linear solve; none for the optimal value | where there is no minimum; several |
# | the same, and constraints | a local minimiser | `ConstrainedArgmin` | a dense solve, n up to 100 | `infeasible`, `indefinite`; kinks |
# | a quadratic objective, linear constraints | minimiser, multipliers | `QuadraticProgram` | the factor is there | `infeasible`, `unbounded`; kinks |
# | a loss, and a penalty with a prox | a sparse minimiser | `ProximalArgmin` | a linear solve on the support | kinks |
# | a linear model with many columns | few coefficients | `Lasso` | $n k_{max}^2$ | `support_overflow`; kinks |
# | scores | probabilities | `Softmax` (or `jax.nn.softmax`) | O(n) | never |
# | scores | probabilities with zeros | `Sparsemax`, `Entmax` | O(n) | kinks (sparsemax) |
# | scores | the k best, softly | `Projection(CappedSimplex(k))` | O(n) | `infeasible` for k > n; kinks |
# | a point, a set | the nearest point | `Projection` | O(n), or an eigendecomposition | `infeasible`; kinks; centres of spheres |
# | a noisy signal | few jumps | `TotalVariation` | O(n) | kinks |
# | noisy values in order | a monotone fit | `Isotonic` | O(n) | weights of 0; kinks |
# | values | ranks, order | `SoftRank`, `SoftSort` (or `jnp.sort`) | O(n) | no signal where values are far apart |
# | two sets of masses, costs | a plan, a distance | `EntropicTransport` | a Cholesky factor, or none (distance) | totals differ; tiny $\epsilon$ |
# | features with outliers | their centre | `RobustPool`, `RobustVectorPool` | O(n); and c × c | jumps, unseen (Welsch, truncated) |
# | a regression | its solution | `WeightedLeastSquares` | the factor is there | `not_unique` |
# | the same | a direction | `SphereLeastSquares` | a bordered solve | `not_unique`: the hard case |
# | a symmetric matrix | its eigenvectors | `Eigendecomposition` | products | single vectors of equal eigenvalues |
# | points and their images | the camera's pose | `PerspectiveNPoint` | a 7 × 7 solve | `not_unique`; jumps, unseen |
# | inequalities | a point well inside | `AnalyticCentre` | a linear solve | `infeasible`, `unbounded` |
# | a vector field | the flow | `NeuralODE` | the solver's time again; constant memory | stiff fields, blow-up; too few steps, unseen |
# | an encoder, a decoder | better posteriors | `ELBOOptimizer` | nothing (`moreau`) | no minimum; kinks in the decoder |
# | a solver of my own | its gradient | `dn.implicit(optimality)(solve)` | a linear solve | where `optimality` is not zero: `not_a_solution` |
#
# Three things that no status can say: that another root or minimum was the one you meant, that the best minimum is about to change, and that
# a discretisation is too coarse. Everything else, a node says: read `solution.result`, print `solution.report()`, and, where a gradient looks odd,
# `dn.conditions(node, solution, x)`. What happens to the gradient of a failed element is yours to decide: `throw`, `on_failure`.
