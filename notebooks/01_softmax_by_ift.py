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
# # Softmax by the implicit function theorem
#
# **Question.** We can differentiate softmax because it has a formula. Suppose there were none: all we know is a *problem* whose solution
# is softmax, and some algorithm that solves it. Can we still differentiate the solution?
#
# **Answer.** Yes, and the algorithm does not matter. Write down the equations that hold *at* the solution, differentiate those, and solve
# one linear system. For softmax this gives $\mathrm{diag}(p) - pp^\top$, as it should. It works while three conditions hold, and the second
# half of this notebook breaks each of them once, to see what happens and what the library says.
#
# You need to know what softmax and a gradient are. You do not need optimisation theory: the little that is used is introduced on the way.
# The notebook follows sections 2 and 3 of Chiu 2021, *Implicit Differentiation* ("the report"), and corrects three slips in it.
# It runs in about a minute on a laptop; with the environment variable `DECLARATIVE_SMALL=1`, the sweeps have fewer points.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import declarative

# Double precision, so that "equal" can mean equal to 15 digits. The library itself never touches this switch.
jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("DECLARATIVE_SMALL") == "1"
np.set_printoptions(precision=4, suppress=True)
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
BLUE, RED, GREY = "#1f4e9c", "#c0392b", "0.55"

# %% [markdown]
# ## 1. The idea, on one number
#
# Let $y$ be the solution of $y^3 + y = x$. There is a formula (Cardano's), but who remembers it? To get $\mathrm dy/\mathrm dx$ we do not
# need it. The equation holds for *every* $x$, so both of its sides change at the same rate when $x$ does:
#
# $$ y^3 + y = x \quad\Longrightarrow\quad (3y^2 + 1)\,\mathrm dy = \mathrm dx
# \quad\Longrightarrow\quad \frac{\mathrm dy}{\mathrm dx} = \frac{1}{3y^2 + 1}. $$
#
# At $x = 2$ the solution is $y = 1$, and the derivative is $\tfrac14$. To find it we had to know $y$, but not how $y$ was found. That is
# the whole trick. In the library, you state the equation as a function that is zero at the solution:

# %%
cubic = declarative.Root(lambda y, x: y**3 + y - x)

x = jnp.array(2.0)
print("y     =", cubic(x, y0=0.0))
print("dy/dx =", jax.grad(lambda x: cubic(x, y0=0.0))(x))

# %% [markdown]
# **The theorem.** Now let $y$ and $x$ be vectors, and $F(y, x) = 0$ a system with as many equations as there are unknowns $y$. If
#
# 1. $(y, x)$ is a solution: $F(y, x) = 0$,
# 2. $F$ is continuously differentiable near that point,
# 3. the square matrix $\partial F/\partial y$ is nonsingular there,
#
# then near this point the solution is a differentiable function of $x$, and
#
# $$ \frac{\partial F}{\partial y}\,\mathrm dy + \frac{\partial F}{\partial x}\,\mathrm dx = 0
# \qquad\text{hence}\qquad
# \frac{\mathrm dy}{\mathrm dx} = -\Big(\frac{\partial F}{\partial y}\Big)^{-1}\frac{\partial F}{\partial x}. \tag{IFT} $$
#
# This is the *implicit function theorem*. The recipe has three steps: write the equations, check the conditions, solve the linear system.

# %% [markdown]
# ## 2. Softmax is the solution of a problem
#
# Given scores $z \in \mathbb R^n$, pick a probability vector $p$ that puts weight on high scores but stays spread out:
#
# $$ \max_p \; p^\top z + H(p) \quad\text{subject to}\quad \mathbf 1^\top p = 1,\; p \ge 0,
# \qquad H(p) = -\sum_i p_i \log p_i \;\text{(entropy)}. \tag{P} $$
#
# Its solution is $p = \mathrm{softmax}(z)$. Do not take that on trust: here are random probability vectors, none of which does better.

# %%
z = jnp.array([1.0, 2.0, 0.5, -1.0])
softmax = declarative.Softmax()
solution = softmax.solve(z)
p = solution.value

objective = lambda p: p @ z - jnp.sum(p * jnp.log(p))
others = jax.random.dirichlet(jax.random.key(0), jnp.ones(z.size), (1000 if SMALL else 100_000,))
print("softmax(z)                        ", p)
print("objective there                   ", objective(p))
print("best of the random points         ", jnp.max(jax.vmap(objective)(others)))

# %% [markdown]
# `declarative.Softmax` is a layer like any other: `softmax(z)` returns $p$. The longer call `softmax.solve(z)` returns a `Solution`,
# with what the solver knows: the value, the status, and (soon) a multiplier.
#
# | here | in the report | in the library | |
# |---|---|---|---|
# | $z$ | $\theta$ | `x` in `optimality(y, x)` | the data: what we differentiate with respect to |
# | $p$ | $x$ | `solution.value` | the solution |
# | $u$ | $u$ | `solution.dual` | the multiplier of the constraint $\mathbf 1^\top p = 1$ |
# | $(p, u)$ | $(x, u, v)$ | `solution.unknown`, `y` in `optimality(y, x)` | everything that is solved for |
#
# ## 3. Step one: the equations
#
# At the top of a hill the gradient is zero. With a constraint, that is too much to ask: we may only move along $\mathbf 1^\top p = 1$, so the
# gradient may still point *across* the constraint, that is, along its normal $\mathbf 1$. The unknown factor is called $u$, the
# *multiplier*, and one forms the Lagrangian $p^\top z + H(p) + u\,(\mathbf 1^\top p - 1)$. Its derivatives with respect to $p$ and $u$ vanish:
#
# $$ \begin{aligned}
# z_i - \log p_i - 1 + u &= 0 \quad\text{for each } i && \text{(stationarity)} \\
# \mathbf 1^\top p - 1 &= 0 && \text{(feasibility)}
# \end{aligned} \tag{K} $$
#
# These are the *KKT conditions*. What about $p \ge 0$? The slope of the entropy is infinite at $p_i = 0$, so a solution never touches
# that bound, and it needs no multiplier. (The report carries one, $v$, and finds $v = 0$.)
#
# As code: $n + 1$ equations for the $n + 1$ unknowns $y = (p, u)$.

# %%
F = lambda y, z: jnp.append(z - jnp.log(y[:-1]) - 1 + y[-1], jnp.sum(y[:-1]) - 1)

u = solution.dual
y = jnp.append(p, u)
print("multiplier u        ", u, " (by hand: 1 - logsumexp(z) =", 1 - jax.nn.logsumexp(z), ")")
print("F at the solution    largest entry", jnp.max(jnp.abs(F(y, z))))

# %% [markdown]
# The library states the same conditions once, as `softmax.optimality`, in a form that stays finite when some $p_i$ underflows to zero
# ($e^{z_i - \theta} - p_i$ with $\theta = 1 - u$, instead of a logarithm). The gradient, the tests and the reports all use that one function.

# %%
print(jax.tree.leaves(softmax.optimality(solution.unknown, declarative.Scores(z))))

# %% [markdown]
# ## 4. Steps two and three: the conditions, and the linear system
#
# Differentiate (K). The matrix of the system is $\partial F/\partial y$, with $p$ first and $u$ last:
#
# $$ \begin{bmatrix} -\mathrm{diag}(1/p) & \mathbf 1 \\ \mathbf 1^\top & 0 \end{bmatrix}
# \begin{bmatrix} \mathrm dp \\ \mathrm du \end{bmatrix} = \begin{bmatrix} -\mathrm dz \\ 0 \end{bmatrix}. $$
#
# **By hand**, three lines. The first row says $\mathrm dp = p \circ (\mathrm dz + \mathrm du\,\mathbf 1)$. Put it into the last row,
# $\mathbf 1^\top \mathrm dp = 0$, and use $\mathbf 1^\top p = 1$: so $\mathrm du = -p^\top \mathrm dz$. Put that back:
#
# $$ \mathrm dp = p \circ \mathrm dz - p\,(p^\top \mathrm dz)
# \qquad\text{that is}\qquad \frac{\mathrm dp}{\mathrm dz} = \mathrm{diag}(p) - pp^\top. $$
#
# The system could be solved whatever $z$ was, so condition 3 always holds. **By machine**, on the same function $F$:

# %%
dF_dy = jax.jacfwd(F, argnums=0)(y, z)
dF_dz = jax.jacfwd(F, argnums=1)(y, z)
print("dF/dy =\n", dF_dy)

dy_dz = -jnp.linalg.solve(dF_dy, dF_dz)
formula = jnp.diag(p) - jnp.outer(p, p)
print("\ndp/dz from the linear system =\n", dy_dz[:-1])
print("\nlargest difference to diag(p) - pp': ", jnp.max(jnp.abs(dy_dz[:-1] - formula)))
print("last row, du/dz = -p:                ", dy_dz[-1])

# %% [markdown]
# You never have to do this yourself. Every node of the library carries the rule; softmax also has a shortcut (the formula), which is its
# default. Ask for the general route with `adjoint=ImplicitAdjoint()`, where *adjoint* is the library's word for "how gradients flow":

# %%
by_formula = jax.jacrev(declarative.Softmax())(z)
by_theorem = jax.jacrev(declarative.Softmax(adjoint=declarative.ImplicitAdjoint()))(z)
print("formula against theorem:", jnp.max(jnp.abs(by_formula - by_theorem)))

# %% [markdown]
# and ask at any solution whether the three conditions hold there:

# %%
print(declarative.conditions(softmax, solution, z))

# %% [markdown]
# ### The algorithm does not matter
#
# Here is a strange way to compute softmax. By (K), $p_i = e^{z_i - 1 + u}$, and only the number $u$ is unknown: it is the root of
# $\sum_i e^{z_i - 1 + u} - 1$. Find it by *bisection*: guess the middle of an interval, keep the half that contains the root, repeat.
#
# Differentiating through these steps cannot work. Each guess is the midpoint of fixed numbers; the data only decide *which* half is
# kept, and a decision has no slope. Automatic differentiation of the loop returns zero, without complaint. The theorem looks at the
# equation, not at the loop, and is right.

# %%
mass = lambda u, z: jnp.sum(jnp.exp(z - 1 + u)) - 1
bisection = lambda z, adjoint: (
    optx.root_find(
        mass,
        optx.Bisection(rtol=1e-13, atol=1e-13),
        jnp.array(0.0),
        z,
        options={"lower": -10.0, "upper": 10.0},
        adjoint=adjoint,
    ).value
)
unrolled = declarative.UnrolledAdjoint()  # differentiate the iterations themselves
multiplier = declarative.implicit(mass)(lambda z: bisection(z, unrolled))  # differentiate the equation mass = 0 instead

print("u by bisection               ", multiplier(z))
print("du/dz through the iterations ", jax.grad(lambda z: bisection(z, unrolled))(z))
print("du/dz by the theorem         ", jax.grad(multiplier)(z))
print("exact, -p                    ", -p)

# %% [markdown]
# ## 5. Three slips in the report
#
# **The feasibility row.** The report's Eq. (2)-(3) has $u\,(\mathbf 1^\top p - 1) = 0$ where we wrote $\mathbf 1^\top p - 1 = 0$. Multiplying a
# condition by its multiplier is what one does for *inequalities*; for an equality it does harm. Where $u = 0$ the row says nothing, and
# $\partial F/\partial y$ becomes singular. As $u = 1 - \mathrm{logsumexp}(z)$, that happens for innocent data: wherever $\mathrm{logsumexp}(z) = 1$.
# Below we add a constant to all scores, which does not change softmax at all, and watch the smallest singular value of the Jacobian
# with the report's row, and with the plain one. (We leave out $v$, whose block of the matrix, $\mathrm{diag}(p)$, is nonsingular either way.)

# %%
as_printed = lambda y, z: jnp.append(z - jnp.log(y[:-1]) - 1 + y[-1], y[-1] * (jnp.sum(y[:-1]) - 1))
at_solution = lambda z: jnp.append(jax.nn.softmax(z), 1 - jax.nn.logsumexp(z))
sigma_min = lambda F, z: jnp.linalg.svd(jax.jacfwd(F)(at_solution(z), z), compute_uv=False)[-1]

shifts = jnp.linspace(-3, 3, 61 if SMALL else 241) + 1 - jax.nn.logsumexp(z)
level = jax.vmap(lambda c: jax.nn.logsumexp(z + c))(shifts)
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axes.plot(level, jax.vmap(lambda c: sigma_min(as_printed, z + c))(shifts), color=RED)
axes.plot(level, jax.vmap(lambda c: sigma_min(F, z + c))(shifts), color=BLUE)
axes.text(3.0, 0.66, "plain row", color=BLUE)
axes.text(1.25, 0.05, "row as printed: singular at 1", color=RED)
axes.set(xlabel="logsumexp(z)", ylabel=r"smallest singular value of $\partial F/\partial y$", ylim=(0, None))
plt.show()

at_one = z + 1 - jax.nn.logsumexp(z)
print("at logsumexp(z) = 1: as printed", sigma_min(as_printed, at_one), "  plain", sigma_min(F, at_one))

# %% [markdown]
# **The sign of $u$.** The report says that a feasible point has $u > 0$. But $u = 1 - \mathrm{logsumexp}(z)$ takes either sign; for our $z$ it is
# negative. (The claim is needed only because of the first slip: with the plain row the sign plays no part.)
#
# **The sign of Eq. (5).** With the matrix as printed there, $\mathrm{diag}(1/p)$ and $-\mathbf 1$ in its first row, the right-hand side is
# $+\mathrm dz$. The printed $-\mathrm dz$ gives minus the Jacobian, and so disagrees with the report's own (correct) result.

# %%
for scores in (z, z - 3):
    print("z =", scores, "  u =", softmax.solve(scores).dual)

n = z.size
printed = jnp.block([[jnp.diag(1 / p), -jnp.ones((n, 1))], [jnp.ones((1, n)), jnp.zeros((1, 1))]])
right_hand_side = jnp.concatenate([jnp.eye(n), jnp.zeros((1, n))])
print(
    "\nwith +dz, difference to diag(p) - pp':",
    jnp.max(jnp.abs(jnp.linalg.solve(printed, right_hand_side)[:n] - formula)),
)
print(
    "with -dz, difference to diag(p) - pp':",
    jnp.max(jnp.abs(jnp.linalg.solve(printed, -right_hand_side)[:n] - formula)),
)

# %% [markdown]
# ## 6. Break condition 1: this is not a solution
#
# An iterative solver that is stopped early returns a point with $F(y, x) \ne 0$. The formula (IFT) can still be evaluated there. It returns a
# number, and the number is wrong. How wrong?
#
# Take the iteration $u \leftarrow u + \tfrac12\big(1 - \sum_i e^{z_i - 1 + u}\big)$, which halves the error in each step, and stop it after
# $k$ steps. We use a plain optimistix solver with the library's adjoint, because a node of the library would refuse, as we shall see.

# %%
improve = lambda u, z: u + 0.5 * (1 - jnp.sum(jnp.exp(z - 1 + u)))
stopped = lambda z, k: jnp.exp(
    z
    - 1
    + optx.fixed_point(
        improve,
        optx.FixedPointIteration(rtol=1e-15, atol=1e-15),
        jnp.array(0.0),
        z,
        adjoint=declarative.ImplicitAdjoint(),
        max_steps=k,
        throw=False,
    ).value
)

ks = (1, 4, 16) if SMALL else (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36)
residual = [float(abs(stopped(z, k).sum() - 1)) for k in ks]
error = [float(jnp.linalg.norm(jax.jacfwd(stopped)(z, k) - formula)) for k in ks]

figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axes.loglog(residual, error, "o-", color=BLUE)
for k, r, e in list(zip(ks, residual, error, strict=True))[:: 1 if SMALL else 3]:
    axes.annotate(f"k = {k}", (r, e), (6, 6), textcoords="offset points")
axes.set(xlabel=r"residual $|1^\top p_k - 1|$ of the iterate", ylabel="error of its Jacobian")
axes.invert_xaxis()
plt.show()
print("slope on these log-log axes:", np.polyfit(np.log(residual), np.log(error), 1)[0].round(3))

# %% [markdown]
# **The error of the gradient is proportional to the error of the solution.** A solution with three correct digits has a gradient with
# about three. So nothing dramatic happens if you stop a little early; but nothing tells you, either.
#
# A node does tell. It checks every answer against the optimality conditions, whatever the solver claims, and gives each a status:

# %%
hurried = declarative.FixedPoint(improve, max_steps=5, throw=False)
unfinished = hurried.solve(z, y0=0.0)
print(unfinished.report())
print()
print(declarative.conditions(hurried, unfinished, z))

# %% [markdown]
# What the *layer* then returns is your decision. `solve` always hands over the last iterate with its status. The call `node(...)` raises by
# default; with `throw=False` it returns NaN (so that nobody mistakes it for an answer), or, if you ask for it, the last iterate with
# a gradient of exactly zero, so that one bad example cannot spoil a batch.

# %%
try:
    declarative.FixedPoint(improve, max_steps=5)(z, y0=0.0)
except declarative.SolveError as failure:
    print("throw=True:\n ", str(failure).split("(To go on")[0].strip())

for on_failure in ("nan", "zero"):
    node = declarative.FixedPoint(improve, max_steps=5, throw=False, on_failure=on_failure)
    value, gradient = jax.value_and_grad(lambda z, node=node: node(z, y0=0.0))(z)
    print(f"on_failure={on_failure!r}: value {value:.4f}, gradient {gradient}")

# %% [markdown]
# ## 7. Break condition 2: a kink
#
# *Sparsemax* (Martins & Astudillo 2016) returns the probability vector that is closest to $z$. Unlike softmax it can give exact zeros. The
# price is a kink wherever a score is about to enter or leave the support. With the two scores $(t, 0)$ that happens at $t = \pm 1$:

# %%
sparsemax = declarative.Sparsemax()
t = jnp.linspace(-2, 2, 41 if SMALL else 401)
pair = lambda t: jnp.stack([t, jnp.zeros_like(t)])

figure, (above, below) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for node, colour, name in ((softmax, GREY, "softmax"), (sparsemax, BLUE, "sparsemax")):
    first = lambda t, node=node: node(pair(t))[0]
    above.plot(t, jax.vmap(first)(t), color=colour, label=name)
    below.plot(t, jax.vmap(jax.grad(first))(t), ".", color=colour, markersize=3)
above.set(xlabel="t", title="weight of the first score")
below.set(xlabel="t", title="its derivative")
above.legend(frameon=False)
for side in (-1, 1):
    below.axvline(side, color=RED, linewidth=0.8, linestyle=":")
plt.show()

# %% [markdown]
# At $t = 1$ there is no derivative: from the left it is ½, from the right it is 0. *Something* must be returned in code, and the node's
# documentation says what (a score on the threshold counts as outside the support). The report says that you are standing on a kink, so
# that nobody takes the convention for a derivative.

# %%
first = lambda t: sparsemax(pair(t))[0]
one, h = jnp.array(1.0), 1e-6
print("from the left ", (first(one) - first(one - h)) / h)
print("from the right", (first(one + h) - first(one)) / h)
print("returned      ", jax.grad(first)(one))
print()
print(declarative.conditions(sparsemax, sparsemax.solve(pair(one)), pair(one)))

# %% [markdown]
# In training this matters less than it seems. A random score never sits exactly on a threshold; and away from kinks the derivative is exact.
# (A ReLU has a kink too.) It matters when a *structure* of the problem puts you there, as ties between equal scores do.
#
# ## 8. Break condition 3: a singular Jacobian
#
# Where does a horizontal line $y_2 = x$ meet the parabola $y_2 = y_1^2$, to the right of the origin? At $y_1 = \sqrt x$, that is at $y_1^2 = x$. As
# the line sinks towards $x = 0$ it cuts the parabola at an ever smaller angle, and at 0 it only touches it. A little lower, and there is no
# intersection at all. No function $y(x)$ can be differentiable there: its slope, $1/(2\sqrt x)$, grows without bound.

# %%
crossing = declarative.implicit(
    lambda y, x: jnp.stack([y[1] - y[0] ** 2, y[1] - x]),  # on the parabola, on the line
    policy=declarative.Policy(throw=False),
)(lambda x: jnp.stack([jnp.sqrt(x), x]))

heights = jnp.logspace(0, -14, 8 if SMALL else 29)
reports = jax.vmap(lambda x: declarative.conditions(crossing, crossing.solve(x), (x,)))(heights)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
across = jnp.linspace(-1.2, 1.2, 101)
left.plot(across, across**2, color="black")
for height, colour in ((1.0, BLUE), (0.25, BLUE), (0.0, RED)):
    left.axhline(height, color=colour, linewidth=1)
    left.plot(height**0.5, height, "o", color=colour)
left.text(-1.2, 0.05, "only touches", color=RED)
left.set(xlabel="$y_1$", ylabel="$y_2$", title="the line $y_2 = x$ meets the parabola")
right.loglog(heights, reports.condition, "o-", color=BLUE, markersize=4)
right.set(xlabel="x", title=r"condition number of $\partial F/\partial y$")
right.invert_xaxis()
plt.show()

# %% [markdown]
# The *condition number* of $\partial F/\partial y$ is the factor by which solving the linear system may amplify relative errors. It grows
# like $1/\sqrt x$, and at $x = 0$ the matrix is singular. There the linear solve of the gradient fails, and the node reports
# that instead of returning what came out of it. `value_and_grad_with_health` carries the report out of a gradient, which has no room for one:

# %%
for x in (1e-4, 0.0):
    x = jnp.array(x)
    value, gradient, health = declarative.value_and_grad_with_health(lambda x: crossing(x)[0])(x)
    print(f"x = {x}: y1 = {value}, dy1/dx = {gradient}\n{health.report()}\n")

print(declarative.conditions(crossing, crossing.solve(x), (x,)))

# %% [markdown]
# Two things are worth knowing.
#
# **Close to singular is not singular.** An iterative solver never lands on the double root, only near it. There the matrix is merely
# nearly singular, the linear solve succeeds, and the gradient is a large finite number: the right derivative of a problem a hair
# away, and useless. The backward solve has nothing to complain about. The `ConditionsReport` has: it knows how far the Jacobian would move within
# the uncertainty of $y$, and calls a singular value below that zero.

# %%
newton = declarative.Root(lambda y, x: jnp.stack([y[1] - y[0] ** 2, y[1] - x]))
zero, guess = jnp.array(0.0), jnp.array([1.0, 1.0])
nearby = newton.solve(zero, y0=guess)
print("y by Newton's method:", [float(v) for v in nearby.unknown], nearby.report())
print("gradient:            ", jax.grad(lambda x: newton(x, y0=guess)[0])(zero))
print("condition 3 holds:   ", declarative.conditions(newton, nearby, zero).holds()[2])

# %% [markdown]
# **There is a way to go on, at a price.** `ImplicitAdjoint(damping=...)` solves the linear system in a least-squares sense with a penalty
# on large answers. The result is finite everywhere, and biased towards zero where the matrix is poorly conditioned. That can be the right
# choice for a training run that must survive a bad batch. It is not a derivative.

# %%
damped = declarative.Root(newton.fn, adjoint=declarative.ImplicitAdjoint(damping=1e-3), throw=False)
for x in (1.0, 1e-2, 1e-6, 0.0):
    slope = jax.grad(lambda x: damped(x, y0=guess)[0])(jnp.array(x))
    print(f"x = {x:<6}  damped {float(slope):10.4f}   exact {0.5 / x**0.5 if x > 0 else np.inf:10.4f}")

# %% [markdown]
# ## What to remember
#
# | condition | when it breaks | what you would get unchecked | what the library does |
# |---|---|---|---|
# | 1. $F(y, x) = 0$ | the solver stopped early | a gradient as wrong as the solution is | status on every element; raises, or NaN, or zero |
# | 2. $F$ is smooth | a kink | one of the one-sided derivatives | a documented convention; `conditions` measures the distance |
# | 3. $\partial F/\partial y$ nonsingular | solutions merge or vanish | NaN, or a huge number | reports; `conditions` flags near misses |
#
# - The derivative of a solution comes from the equations that it satisfies. How it was found does not matter.
# - It costs one linear solve, and no memory of the iterations.
# - It is exact at a solution, and wrong in proportion elsewhere.
#
# ## Where to go next
#
# - **Read a node.** `declarative/_nodes/maps/softmax.py` is this notebook as 120 lines of library code: problem, conditions, solver, gradient.
# - **Write your own.** `docs/write-a-node.md` builds one, ridge regression, and runs the check kit on it.
# - **Learn what to do about failures** in a real training step: `docs/failure.md`.
# - **See what it costs.** `python -m benchmarks.adjoints` measures memory, time and bias of implicit differentiation against its alternatives.
# - **Go on reading.** Amos & Kolter 2017, *OptNet* (arXiv:1703.00443), does for quadratic programs what we did for softmax; Gould, Hartley &
#   Campbell 2019, *Deep Declarative Networks* (arXiv:1909.04866), for optimisation layers in general.
