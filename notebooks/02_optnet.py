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
# # A quadratic program as a layer
#
# **Question.** A layer returns the cheapest point that satisfies a set of constraints. Where are its gradients, if the constraints themselves
# come from a network, or are learnt? What happens when a constraint starts or stops to matter, and when there is no such point at all?
#
# **Answer.** The solution satisfies a set of equations, the KKT conditions. Linearise them at the solution: one linear system gives the gradient
# with respect to *every* number in the problem. The gradient is exact, and it jumps where a constraint starts or stops to matter; a smoothed
# version, of a nearby problem, does not. Data without a solution are recognised, each element of a batch for itself, with a proof. And
# with these gradients, a layer that is told nothing about Sudoku finds its rules from solved boards.
#
# You need to know what a gradient is, and NumPy. Duality is not needed: multipliers are introduced where they appear. The layer is
# that of Amos & Kolter 2017, *OptNet*. The notebook runs in about three minutes on two CPU cores, most of it the training in section 4; with the
# environment variable `DECLARATIVE_SMALL=1`, curves have fewer points and the training stops after a few steps.

# %%
import io
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Image, display
from jax.flatten_util import ravel_pytree
from PIL import Image as Picture

import declarative as dn
from models.sudoku import SudokuConfig, make
from train.loop.puzzles import full_grids, make_puzzles

# Double precision, to compare digits. The library itself never touches this switch, and section 4 computes in single precision.
jax.config.update("jax_enable_x64", True)
SMALL = os.environ.get("DECLARATIVE_SMALL") == "1"
if SMALL:  # nearly all of its time is compilation
    jax.config.update("jax_disable_most_optimizations", True)
np.set_printoptions(precision=4, suppress=True)
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})


def show():
    """`plt.show()` with a palette, which makes a notebook's file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    plt.gcf().savefig(whole)
    plt.close()
    Picture.open(whole).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


BLUE, RED, GREEN, ORANGE, GREY = "#1f4e9c", "#c0392b", "#3a9d5d", "#d9822b", "0.55"

# %% [markdown]
# ## 1. From the conditions to the gradient
#
# The problem is
#
# $$ z^* = \arg\min_z \; f(z) = \tfrac12 z^\top Q z + q^\top z \quad\text{subject to}\quad Az = b,\;\; Gz \le h, \tag{P} $$
#
# with a positive definite $Q$. The objective $f$ is a bowl, and each row of $Gz \le h$ allows one side of a line, a *half-plane*. Here are
# four half-planes in two dimensions, and two bowls. `qp.solve` returns a `Solution` with the minimiser, and much else.
#
# JAX compiles a program anew for every new shape, which takes seconds here, while the solution takes microseconds. So this notebook sends
# all its two-dimensional problems through *one* function, `solve_along`, always with the same number of lanes. For each lane it returns the
# solution and $\mathrm dz^*$, the speed of the solution when $q$ moves with speed $\mathrm dq$.

# %%
LANES = 41 if SMALL else 241


@eqx.filter_jit
def _solve_along(node, *lanes):
    def one(Q, q, G, h, dq):
        solution, tangent = jax.jvp(lambda q: node.solve(Q, q, G=G, h=h), (q,), (dq,))
        return solution, tangent.value

    return jax.vmap(one)(*lanes)


def solve_along(node, Q, q, G, h, dq):
    """A batch of problems; what is shared by the batch is given once."""
    blocks = [jnp.atleast_2d(block) for block in (q, h, dq)] + [Q.reshape(-1, 2, 2), G.reshape(-1, *G.shape[-2:])]
    count = max(len(block) for block in blocks)
    lanes = [jnp.broadcast_to(block, (count, *block.shape[1:])) for block in blocks]
    q, h, dq, Q, G = (jnp.concatenate([lane, jnp.repeat(lane[-1:], LANES - count, axis=0)]) for lane in lanes)
    return jax.tree.map(lambda leaf: leaf[:count], _solve_along(node, Q, q, G, h, dq))


Q = jnp.array([[1.0, 0.4], [0.4, 0.7]])
G = jnp.array([[-1.0, 0.0], [0.0, -1.0], [1.0, 2.0], [2.0, 1.0]])
h = jnp.array([0.0, 0.0, 4.0, 5.0])
bowls = jnp.array(
    [[0.7, 2.4], [2.7, 2.2]]
)  # where f is lowest if nothing is in the way: there Qz + q = 0, so q = -Q bowl

exact = dn.QuadraticProgram(throw=False)
solution, _ = solve_along(exact, Q, -bowls @ Q, G, h, jnp.zeros(2))
for bowl, z, lam, slack in zip(bowls, solution.value, solution.dual.inequality, solution.dual.slack, strict=True):
    print(f"bowl at {bowl}: solution {z}, multipliers {lam}, slack h - Gz {slack}")

# %%
CORNERS = np.array([[0, 0], [2.5, 0], [2, 1], [0, 2]])


def draw_feasible(axes):
    axes.fill(*CORNERS.T, color="#dfe7f3", zorder=0)
    axes.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="black", linewidth=1)
    axes.set(aspect="equal", xlabel="$z_1$", ylabel="$z_2$")


def arrow(axes, start, step, colour, text="", offset=(6, 0), width=2.0):
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", np.asarray(start) + np.asarray(step), start, arrowprops=style)
    axes.annotate(
        text, np.asarray(start) + np.asarray(step), offset, textcoords="offset points", color=colour, va="center"
    )


figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
grid = np.stack(np.meshgrid(np.linspace(-0.5, 4.6, 121), np.linspace(-0.5, 3.4, 121)), axis=-1)
titles = "one constraint touched: two arrows in line", "a corner: the two pushes add up to the pull"
for axes, bowl, z, lam, title in zip(panels, bowls, solution.value, solution.dual.inequality, titles, strict=True):
    draw_feasible(axes)
    away = grid - np.asarray(bowl)
    level = np.einsum("...i,ij,...j->...", away, np.asarray(Q), away)
    at_solution = float((z - bowl) @ Q @ (z - bowl))
    axes.contour(
        *np.moveaxis(grid, -1, 0), level, at_solution * np.array([0.25, 1, 2.5, 5]), colors="0.75", linewidths=0.8
    )
    axes.plot(*bowl, "+", color=GREY, markersize=11)
    axes.annotate("bowl", bowl, (8, 4), textcoords="offset points", color="0.4")
    active = [i for i in range(4) if lam[i] > 0]
    downhill = -(Q @ z - Q @ bowl)
    pushes = [lam[i] * G[i] for i in active]
    arrow(axes, z, downhill, RED, r"$-\nabla f$", (8, 8))
    for i, push in zip(active, pushes, strict=True):
        arrow(axes, z, -push, BLUE, f"$-\\lambda_{i + 1} G_{i + 1}$", (6, -8) if i == 2 else (-38, -10))
        if len(active) > 1:
            axes.plot(*zip(z + downhill, z + downhill - push, strict=True), ":", color=GREY)
            axes.plot(*zip(z, z + push, strict=True), ":", color=GREY)
    axes.plot(*z, "o", color="black", zorder=5)
    axes.set(title=title, xlim=(-0.5, 4.6), ylim=(-0.5, 3.4))
show()

# %% [markdown]
# *What to see.* The feasible set is blue, the grey ovals are contours of $f$, the black dot is the solution. The bowl pulls along
# $-\nabla f(z) = -(Qz + q)$ (red). In free space the point would follow. It stays because the constraints that it touches push back (blue).
# Left, one push balances the pull. Right, in the corner, it takes two; the dotted parallelogram is their sum.
#
# A constraint can push only along its normal $G_i$, only *inwards*, and only where it is touched. The strength of the push,
# $\lambda_i \ge 0$, is called its *multiplier*. An equation may push either way, so the sign of its multiplier $\nu$ is free. In symbols:
#
# $$ \begin{aligned}
# Qz + q + A^\top\nu + G^\top\lambda &= 0 && \text{(the forces balance)} \\
# Az - b &= 0 && \text{(the equations hold)} \\
# \lambda_i\,(G_i z - h_i) &= 0 \quad\text{for each } i && \text{(no push without touch)}
# \end{aligned} \tag{K} $$
#
# together with $\lambda \ge 0$ and $Gz \le h$. These are the *KKT conditions*. The three lines are as many equations as there are
# unknowns $(z, \nu, \lambda)$, so we can do what notebook 01 did: differentiate them. Let the data change by
# $\mathrm dQ, \mathrm dq, \dots$ The changes of the unknowns follow from one linear system, with the matrix
#
# $$ K = \begin{bmatrix} Q & A^\top & G^\top \\ A & 0 & 0 \\ \mathrm{diag}(\lambda)\,G & 0 & \mathrm{diag}(Gz - h) \end{bmatrix},
# \qquad
# K \begin{bmatrix} \mathrm dz \\ \mathrm d\nu \\ \mathrm d\lambda \end{bmatrix}
# = -\begin{bmatrix} \mathrm dQ\,z + \mathrm dq + \mathrm dA^\top\nu + \mathrm dG^\top\lambda \\ \mathrm dA\,z - \mathrm db \\
# \lambda\circ(\mathrm dG\,z - \mathrm dh) \end{bmatrix}. $$
#
# For a loss with slope $v = \partial\ell/\partial z$ we need $v^\top\mathrm dz$ only, and that takes *one* solve, with $K^\top$:
# let $K^\top d = -(v, 0, 0)$. Then $v^\top\mathrm dz$ is $d$ times the bracket on the right, and it remains to sort the terms by block. That is
# the backward pass of OptNet, in a dozen lines:


# %%
def backward(v, data, z, nu, lam, wrong=False):
    """The gradients of v'z with respect to Q, q, A, b, G, h."""
    Q, q, A, b, G, h = data
    n, p, m = q.size, b.size, h.size
    K = jnp.block([
        [Q, A.T, G.T],
        [A, jnp.zeros((p, p + m))],
        [lam[:, None] * G, jnp.zeros((m, p)), jnp.diag(G @ z - h)],
    ])  # fmt: skip
    d = -jnp.linalg.solve(K.T, jnp.concatenate([v, jnp.zeros(p + m)]))
    d_z, d_nu, d_lam = jnp.split(d, [n, n + p])
    dQ = (jnp.outer(d_z, z) + jnp.outer(z, d_z)) / 2  # halves: only the symmetric part of Q matters
    dA = jnp.outer(nu, d_z) + jnp.outer(d_nu, z)
    dG = jnp.outer(lam, d_z) + jnp.outer(lam * d_lam, z)
    if wrong:  # see below
        dG = lam[:, None] * (jnp.outer(lam, d_z) + jnp.outer(d_lam, z))
    return dQ, d_z, dA, -d_nu, dG, -lam * d_lam


# %% [markdown]
# Now a problem with all six blocks, of four variables so that no block is trivial: one equation, three inequalities. We compare `backward`, for
# each of the four unit vectors $v$, with `jax.jacrev` of the layer, and both with finite differences, which know nothing of the theory. The
# differences need the solution for each of the 41 data moved up and down a little; these problems are further elements of the same batch.

# %%
keys = jr.split(jr.key(10), 4)
root = jr.normal(keys[0], (4, 4))
data = (
    root @ root.T + jnp.eye(4),
    2 * jr.normal(keys[1], (4,)),
    jr.normal(keys[2], (1, 4)),
    jnp.array([0.5]),
    jr.normal(keys[3], (3, 4)),
    jnp.array([-1.0, 0.8, 2.0]),
)
flat, unravel = ravel_pytree(data)
step = 1e-5
up = step * jnp.eye(flat.size)
batch = jax.vmap(unravel)(flat + jnp.concatenate([jnp.zeros((1, flat.size)), up, -up]))

qp = dn.QuadraticProgram()


def layer(Q, q, A, b, G, h):
    solution = qp.solve(Q, q, A=A, b=b, G=G, h=h)
    return solution.value, solution


blocks = "Q q A b G h".split()
jacobians = jax.jit(jax.vmap(jax.jacrev(layer, argnums=tuple(range(6)), has_aux=True)))
by_library, everything = jacobians(*batch)
by_library = [block[0] for block in by_library]
z, nu, lam = everything.value[0], everything.dual.equality[0], everything.dual.inequality[0]

by_hand = jax.vmap(lambda v: backward(v, data, z, nu, lam))(jnp.eye(4))
moved_up, moved_down = jnp.split(everything.value[1:], 2)
by_differences = jax.vmap(unravel)((moved_up - moved_down).T / (2 * step))

print("z  ", z, "\nnu ", nu, "\nlam", lam)
print("\nblock   entries   largest   by hand - library   differences - library")
far = lambda a, b: float(jnp.max(jnp.abs(a - b)))
for name, ours, hand, differences in zip(blocks, by_library, by_hand, by_differences, strict=True):
    print(f"d/d{name} {ours.size:12} {far(ours, 0):10.4f} {far(hand, ours):16.1e} {far(differences, ours):22.1e}")
print(f"\nfor instance dz1/dG11: by hand     {by_hand[4][0, 0, 0]:.14f}")
print(f"                       library     {by_library[4][0, 0, 0]:.14f}")
print(f"                       differences {by_differences[4][0, 0, 0]:.14f}")

# %% [markdown]
# By hand and by library agree to rounding, and the differences to as many digits as differences have. The third constraint has
# slack, and its multiplier is 0: moving it a little moves nothing, so its entries in d/dG and d/dh are zero.
#
# **A formula not to copy.** For $\mathrm dG$ one finds the variant $\mathrm{diag}(\lambda)\,(d_\lambda z^\top + \lambda\,d_z^\top)$ in
# published code. It multiplies by $\lambda$ once too often in its second term:

# %%
variant = jax.vmap(lambda v: backward(v, data, z, nu, lam, wrong=True))(jnp.eye(4))[4]
print("distance of d/dG to finite differences:  variant", far(variant, by_differences[4]))
print("                                         library", far(by_library[4], by_differences[4]))
print("\nd/dG of z1, finite differences:\n", by_differences[4][0])
print("variant:\n", variant[0])
print("library:\n", by_library[4][0])

# %% [markdown]
# The two agree where every multiplier is 0 or 1. A test with such data passes, and the layer then learns something else than you
# think. So compare every block with finite differences, on data without symmetry.
#
# ## 2. When a constraint starts or stops to matter
#
# If constraint $i$ is touched but does not push, $\lambda_i = 0$ and $G_i z = h_i$. Then the row of $K$ that belongs to it is zero, and
# there is no derivative to compute. Such points are kinks. To meet some, let the bowl of section 1 travel on a straight line, $t$ from
# 0 to 1.
#
# `QuadraticProgram` offers two gradients. `"exact"` is what we have seen. `"smoothed"` solves a slightly different problem: *no push
# without touch*, $\lambda_i s_i = 0$ with the slack $s_i = h_i - G_i z$, becomes $\lambda_i s_i = $ `smoothing`. Now every constraint pushes a
# little from afar, harder the closer the point comes, and never all at once.

# %%
t = jnp.linspace(0, 1, LANES)
start, end = jnp.array([-0.7, 0.9]), jnp.array([3.9, 1.4])
bowl = start + t[:, None] * (end - start)
problem = {"Q": Q, "q": -bowl @ Q, "G": G, "h": h, "dq": -(end - start) @ Q}

smoothings = (0.3, 0.03, 0.003)
smoothed = lambda smoothing: dn.QuadraticProgram(gradient="smoothed", smoothing=jnp.array(smoothing), throw=False)
sharp, sharp_speed = solve_along(exact, **problem)
soft = {mu: solve_along(smoothed(mu), **problem) for mu in smoothings}

active = np.asarray(sharp.dual.inequality > 0)
changes = [0, *(np.flatnonzero(np.any(active[1:] != active[:-1], axis=1)) + 1), LANES]
for first, last in zip(changes[:-1], changes[1:], strict=True):
    pushing = ", ".join(str(i + 1) for i in np.flatnonzero(active[first])) or "none"
    print(f"t from {t[first]:.3f} to {t[last - 1]:.3f}: pushing constraints: {pushing}")
failed = sum(int(jnp.sum(s.result != dn.RESULTS.successful)) for s in (sharp, *(s for s, _ in soft.values())))
print("failed solves:", failed, "of", LANES * (1 + len(soft)))

# %%
figure, ((plan, path), (distance, speed)) = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
shades = dict(zip(smoothings, ("#f2b134", ORANGE, RED), strict=True))
kinks = [(t[i - 1] + t[i]) / 2 for i in changes[1:-1]]
draw_feasible(plan)
plan.plot(*bowl.T, ":", color=GREY)
arrow(plan, bowl[-2], bowl[-1] - bowl[-2], GREY, width=1)
plan.annotate("the bowl travels", bowl[-1], (-60, 10), textcoords="offset points", color="0.4")
plan.plot(*sharp.value.T, color=BLUE, linewidth=3)
for mu, (s, _) in soft.items():
    plan.plot(*s.value.T, color=shades[mu])
plan.set(title="where the solution goes", xlim=(-1, 4.2), ylim=(-0.4, 2.6))
for axes in (path, speed):
    curve, pick = (sharp.value, lambda pair: pair[0].value) if axes is path else (sharp_speed, lambda pair: pair[1])
    axes.plot(t, curve[:, 1], "." if axes is speed else "-", markersize=4, color=BLUE, label="exact", linewidth=3)
    for mu, pair in soft.items():
        axes.plot(t, pick(pair)[:, 1], color=shades[mu], label=f"smoothing {mu}", linewidth=1.2)
distance.semilogy(t, jnp.maximum(sharp.stats["kink_distance"], 1e-4), color=BLUE)
for axes in (path, distance, speed):
    for kink in kinks:
        axes.axvline(kink, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="t")
path.set(title="$z_2^*(t)$")
path.legend(frameon=False, fontsize=9)
distance.set(title="kink_distance of the exact solution", ylabel="distance")
speed.set(title=r"its derivative $\mathrm{d}z_2^*/\mathrm{d}t$")
show()

# %% [markdown]
# *What to see.* Top left, the dotted path of the bowl enters the feasible set, and leaves it; the solution (thick blue) follows while
# it can, slides along an edge, waits in the corner and goes on along the next edge. Smoothed solutions (yellow to red) keep away from the edges, the
# farther the larger `smoothing` is. Right, top to bottom: $z_2^*$ is made of straight pieces, and its derivative of steps. In the corner the
# derivative is exactly zero. The smoothed derivatives are continuous, and approach the steps as `smoothing` shrinks. Bottom left,
# `stats["kink_distance"]` says how far the nearest constraint is from changing sides: it dips to zero at each kink (dotted lines).
#
# On the kink itself, the exact gradient is that of one side: a constraint counts as active if its computed multiplier is positive.
#
# **The bias.** A smoothed gradient is the exact gradient of another function. How far is that one away? Its point costs at most
# `smoothing` times the number of constraints (4 here) more than the solution. Its derivative is off near the kinks, in a zone that shrinks:

# %%
cost = lambda z: jnp.sum(z @ Q * z, axis=1) / 2 + jnp.sum(problem["q"] * z, axis=1)
print("smoothing   largest extra cost   bound   largest |z - z*|   mean |dz/dt - dz*/dt|   (mean |dz*/dt|:", end="")
print(f" {jnp.mean(jnp.linalg.norm(sharp_speed, axis=1)):.3f})")
for mu, (s, speed_of) in soft.items():
    extra = jnp.max(cost(s.value) - sharp.objective)
    off = jnp.max(jnp.linalg.norm(s.value - sharp.value, axis=1))
    wrong = jnp.mean(jnp.linalg.norm(speed_of - sharp_speed, axis=1))
    print(f"{mu:9} {extra:20.4f} {4 * mu:7.3f} {off:18.4f} {wrong:23.4f}")

# %% [markdown]
# ### A dead gradient
#
# When does one want that? Take away the bowl: with $Q = 0$ the problem is a *linear program*, and its solution is a corner. It stays that
# corner while $q$ turns, then jumps to the next. Suppose we want to learn the direction $\theta$ of the pull, $-q = (\cos\theta, \sin\theta)$,
# such that the solution is the corner $(2.5, 0)$, with the loss $\tfrac12\|z^* - (2.5, 0)\|^2$. The exact gradient is right, and useless:
# it is zero, up to rounding, at every $\theta$. Gradient descent on the smoothed loss moves. We start it once at each lane's angle, all
# around the circle, and ask every few steps what the *exact* program makes of the angles reached.

# %%
target = jnp.array([2.5, 0.0])
angles = jnp.linspace(-jnp.pi, jnp.pi, LANES, endpoint=False) + 0.01
unit = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


def loss_and_slope(node, angle):
    solution, moved = solve_along(node, jnp.zeros((2, 2)), -unit(angle), G, h, -unit(angle + jnp.pi / 2))
    miss = solution.value - target
    return jnp.sum(miss**2, axis=1) / 2, jnp.sum(miss * moved, axis=1)


def descend(node, steps=60, rate=0.1):
    angle, arrived = angles, []
    for step in range(steps + 1):
        if step % 5 == 0:
            arrived.append(float(jnp.mean(loss_and_slope(exact, angle)[0] < 1e-9)))
        angle = angle - rate * loss_and_slope(node, angle)[1]
    return arrived


losses = {
    name: loss_and_slope(node, angles)
    for name, node in (("exact", exact), (0.3, smoothed(0.3)), (0.03, smoothed(0.03)))
}
arrived = {"exact": descend(exact), 0.3: descend(smoothed(0.3)), 0.03: descend(smoothed(0.03))}
print("largest exact slope at any angle:   ", jnp.max(jnp.abs(losses["exact"][1])))
for mu in (0.3, 0.03):
    print(f"largest slope with smoothing {mu:<5}: ", jnp.max(jnp.abs(losses[mu][1])))
print(
    "share of the starts that end at the wanted corner:", {name: round(share[-1], 2) for name, share in arrived.items()}
)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
shades["exact"] = BLUE
for name in losses:
    label = name if name == "exact" else f"smoothing {name}"
    left.plot(jnp.degrees(angles), losses[name][0], "." if name == "exact" else "-", color=shades[name], label=label)
    right.plot(5 * np.arange(len(arrived[name])), arrived[name], "o-", markersize=3, color=shades[name], label=label)
left.set(xlabel=r"$\theta$ in degrees", title="loss", xticks=range(-180, 181, 90))
right.set(xlabel="step of gradient descent", title="share of starts that are there", ylim=(0, 1.05))
left.legend(frameon=False, fontsize=9)
show()

# %% [markdown]
# *What to see.* Left, the exact loss (blue) is a staircase: flat, hence without a slope. The smoothed losses are slopes; that of 0.3 is far from the
# stairs, that of 0.03 close to them, and nearly as flat. Right, with the exact gradient nobody moves: there are those who started
# there. With `smoothing` 0.3 all arrive; with 0.03 those that start on a flat tread take long.
#
# **Which to choose.** Exact, unless you have a reason: it is the derivative of what the layer returns, and a random point is not on a kink, just
# as with a ReLU. Smoothed, if the exact gradient is zero nearly everywhere (linear programs, solutions in corners), or if the structure of
# your problem puts you on kinks. Begin with a large `smoothing` and shrink it: it may be an array, so nothing is compiled anew.
#
# ## 3. Data without a solution
#
# If a network computes $G$ and $h$, one day they will contradict each other. Six problems in one batch, of which three are ill:

# %%
NONE = jnp.inf  # an infinite h is no constraint
many_h = jnp.array([
    [0.0, 0.0, 4.0, 5.0],    # 0: the problem of section 1
    [0.0, 0.0, 1.0, 5.0],    # 1: smaller, and fine
    [0.0, 0.0, -2.0, NONE],  # 2: z1, z2 >= 0, yet z1 + 2 z2 <= -2
    [0.0, 0.0, 4.0, 5.0],    # 3: fine, but q (below) holds NaN
    [0.0, 0.0, NONE, NONE],  # 4: only z1, z2 >= 0, and (below) no bowl
    [0.0, 0.0, 4.0, 2.0],    # 5: fine
])  # fmt: skip
many_q = jnp.tile(-bowls[1] @ Q, (6, 1)).at[3, 0].set(jnp.nan)
many_Q = jnp.tile(Q, (6, 1, 1)).at[4].set(0.0)

ill, speed_ill = solve_along(exact, many_Q, many_q, G, many_h, jnp.ones(2))
print(ill.report())
print("\nvalue                 d value\n", np.hstack([ill.value, speed_ill]))

healthy, _ = solve_along(exact, Q, -bowls[1] @ Q, G, many_h[jnp.array([0, 1, 0, 0, 0, 5])], jnp.ones(2))
fine = jnp.array([0, 1, 5])
print(
    "lanes 0, 1, 5 are, bit for bit, what they are beside healthy neighbours:",
    bool(jnp.all(ill.value[fine] == healthy.value[fine])),
)

# %% [markdown]
# `solution.result` holds a status for each element, `report()` puts it into words. The derivative of a failed element is NaN, so that nobody takes
# it for one, and its neighbours do not notice.
#
# **No is an answer that can be checked.** How does one know that no point satisfies $Gz \le h$? Add up the inequalities, each with a
# weight $y_i \ge 0$: every feasible $z$ satisfies $(y^\top G)\,z \le y^\top h$. If the weights are such that $y^\top G = 0$ and
# $y^\top h = -1$, this says $0 \le -1$. So there is no feasible $z$, whatever else we know. Such weights are a *Farkas certificate*. For an
# infeasible element they are returned in place of the multipliers; and for an unbounded one `value` is a direction in which one can go for
# ever while the objective falls. The library has checked both before it says so; so can we:

# %%
y, ray = ill.dual.inequality[2], ill.value[4]
print("lane 2: weights y =", y, "  y'G =", y @ G + 0.0, "  y'h =", y[:3] @ many_h[2, :3])
print(
    "lane 4: ray r     =",
    ray,
    "  r >= 0:",
    bool(jnp.all(ray >= 0)),
    "  Qr =",
    many_Q[4] @ ray,
    "  q'r =",
    many_q[4] @ ray,
)

# %% [markdown]
# **What the layer returns** is your decision, the `Policy`. With `throw=True`, the default, the call raises, and names the elements. The
# layer of section 1 was made like that. In two elements of its batch we let the second inequality contradict the first, $G_1 z \le 0$ and
# $G_1 z \ge 1$:

# %%
spoilt = jnp.array([7, 30])
contradicting_G = batch[4].at[spoilt, 1].set(-batch[4][spoilt, 0])
contradicting_h = batch[5].at[spoilt, 0].set(0.0).at[spoilt, 1].set(-1.0)
try:
    jax.block_until_ready(jacobians(*batch[:4], contradicting_G, contradicting_h))
except dn.SolveError as failure:
    print(failure)

# %% [markdown]
# With `throw=False` the program goes on. Under `on_failure="nan"` (the default then) a failed element is NaN, value and gradient, and so
# is every loss that adds it up. Under `"zero"` it keeps its last iterate, and its gradient is exactly zero. Take the mean over the six
# elements, and the gradient with respect to something that they share, here a common shift of all costs $q$.
# `value_and_grad_with_health` returns the statuses along with the gradient:


# %%
@eqx.filter_jit
def mean_loss(node):
    def loss(shift):
        values = jax.vmap(lambda Q, q, h: node(Q, q + shift, G=G, h=h))(many_Q, many_q, many_h)
        return jnp.mean(jnp.sum((values - target) ** 2, axis=1))

    return dn.value_and_grad_with_health(loss)(jnp.zeros(2))


for on_failure in ("zero",) if SMALL else ("nan", "zero"):
    value, gradient, health = mean_loss(dn.QuadraticProgram(throw=False, on_failure=on_failure))
    print(f"on_failure={on_failure!r}: loss {value:.4f}, gradient {gradient}")
print(health.report())
by_lane = jnp.sum(2 * (ill.value - target) * speed_ill, axis=1)
print(
    "\nd loss / d shift along (1, 1), from the healthy lanes alone:",
    jnp.sum(by_lane[fine]) / 6,
    " and above:",
    gradient.sum(),
)

# %% [markdown]
# ### A way out: elastic constraints
#
# Zero keeps a training run alive, but an infeasible element then teaches nothing. With `elastic=rho` constraints may be violated, for a price:
# $\tfrac\rho2\|\text{violation}\|^2$ is added to the objective. Then there is always a solution, and always a gradient. We sweep the price from
# cheap to dear, once for the feasible lane 0 and once for the infeasible lane 2. (`elastic` is fixed when the program is compiled. To draw
# a curve we therefore keep the price at 1 and divide the objective by $\rho$ instead, which is the same problem.)

# %%
prices = jnp.logspace(-2, 5, LANES)
elastic = dn.QuadraticProgram(elastic=1.0, throw=False)
pulled = lambda h: solve_along(
    elastic, Q / prices[:, None, None], -bowls[1] @ Q / prices[:, None], G, h, jnp.ones(2) / prices[:, None]
)
stretched = {"feasible": pulled(many_h[0]), "infeasible": pulled(many_h[2])}
middle = int(jnp.argmin(jnp.abs(prices - 3)))
for name, (s, moved) in stretched.items():
    print(f"{name:10}: {int(jnp.sum(s.result != dn.RESULTS.successful))} failed of {LANES}", end="")
    print(f", at rho = {prices[middle]:.1f} z = {s.value[middle]} and dz along dq = (1, 1) is {moved[middle]}")
    print(" " * 12 + f"at rho = {prices[-1]:.0e} z = {s.value[-1]}")
print("feasible: the solution of the hard problem is          ", ill.value[0])
print("infeasible: least sum of squared violations, by lstsq at", jnp.linalg.lstsq(G[:3], many_h[2, :3])[0])

# %%
figure, (proof, plan, price) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
across = np.array([-5.0, 5.0])
for axes in (proof, plan):
    axes.axvline(0, color="black", linewidth=1)
    axes.axhline(0, color="black", linewidth=1)
    axes.plot(across, (-2 - across) / 2, color="black", linewidth=1)
    axes.fill_between([0, 5], 0, 5, color=BLUE, alpha=0.12, linewidth=0)
    axes.fill_between(across, (-2 - across) / 2, -5, color=ORANGE, alpha=0.2, linewidth=0)
    axes.set(aspect="equal", xlim=(-2.9, 3.4), ylim=(-2.9, 2.6), xlabel="$z_1$", ylabel="$z_2$")
    axes.text(1.2, 2.2, r"$z_1, z_2 \geq 0$", color=BLUE)
    axes.text(-2.8, -2.7, r"$z_1 + 2z_2 \leq -2$", color=ORANGE)
for foot, normal in (((0, 1.3), G[0]), ((1.5, 0), G[1]), ((-1, -0.5), G[2] / 5**0.5)):
    arrow(proof, foot, np.asarray(normal) * 0.5, GREY, width=1)
tip = np.array([-1.7, 1.0])
for i, where, colour in ((2, (6, -6), ORANGE), (0, (-16, 12), BLUE), (1, (-42, 0), BLUE)):
    push = np.asarray(y[i] * G[i])
    arrow(proof, tip, push, colour)
    proof.annotate(f"$y_{i + 1} G_{i + 1}$", tip + push / 2, where, textcoords="offset points", va="center")
    tip = tip + push
proof.set(title="the weighted normals close: $y^T G = 0$")
for name, colour in (("feasible", GREEN), ("infeasible", RED)):
    s = stretched[name][0]
    violation = jnp.linalg.norm(jnp.maximum(s.value @ G.T - many_h[0 if name == "feasible" else 2], 0), axis=1)
    plan.plot(*s.value.T, color=colour, linewidth=2)
    plan.plot(*s.value[-1], "o", color=colour, zorder=5)
    price.loglog(prices, violation, color=colour, label=name)
plan.plot(*CORNERS[[1, 2, 3]].T, "--", color=GREEN, linewidth=1)
plan.plot(*bowls[1], "+", color=GREY, markersize=11)
plan.annotate("bowl", bowls[1], (-12, 8), textcoords="offset points", color="0.4")
plan.set(title=r"elastic solutions as $\rho$ grows")
price.set(xlabel=r"$\rho$", title="norm of the violation")
price.legend(frameon=False)
show()

# %% [markdown]
# *What to see.* Left, lane 2: no point is both in the blue quadrant and under the orange line. The normals of the three boundaries (thin), each
# scaled by its weight $y_i$, form a closed triangle: they add up to zero. That is half of the certificate; the other half is $y^\top h = -1$.
# Middle, elastic solutions start near the bowl (+) and follow a path as $\rho$ grows. The green one, for the feasible lane 0, ends at
# the solution of the hard problem (dashed: the edges of its feasible set). The red one, for lane 2, ends at the compromise with the least
# violation, in between. Right, the violation falls like $1/\rho$ if there is a feasible point, and levels out if there is none.
#
# ## 4. The rules of Sudoku, from solved boards
#
# A 4 × 4 Sudoku is a 4 × 4 board of digits 1 to 4, each of which appears once in every row, every column and every 2 × 2 block. With
# one-hot digits a board is 64 numbers, zeros and ones, and the rules are 64 linear equations: "the four numbers that say whether digit 3
# is in cell (1, 1), (1, 2), (1, 3), (1, 4) add up to 1", and so on. The model is one layer and nothing else:
#
# $$ z^*(\text{puzzle}) = \arg\min_z \; \tfrac{0.1}2\|z\|^2 - \text{puzzle}^\top z \quad\text{subject to}\quad Az = Az_0,\;\; z \ge 0, $$
#
# with the given digits as $\text{puzzle}$. The 40 × 64 numbers of $A$ are learnt, and so is $z_0$, thanks to which there always is a feasible
# point. $A$ starts at random. Nothing says what a row, a column or a digit is. We train on puzzles with 4 to 7 clues; there are only 288
# full boards, so we keep 58 of them aside, and test on puzzles of which the model has never seen the solution.

# %%
steps, size = (4, 100) if SMALL else (1200, 100)
grids = full_grids(4)
order = np.random.default_rng(0).permutation(len(grids))
puzzles, solutions = make_puzzles(grids[order[58:]], size if SMALL else 3000, (4, 7), seed=1)
unseen = make_puzzles(grids[order[:58]], 2 * size, (4, 7), seed=2)

model = make(SudokuConfig(side=4, equations=40), key=jr.key(0))
untrained = np.asarray(model.layer.A)
optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))


@eqx.filter_jit
def train_step(model, state, puzzles, solutions):
    def loss(model):
        outputs = jax.vmap(model)(puzzles)
        return jnp.mean((outputs - solutions) ** 2), outputs

    gradients, outputs = eqx.filter_grad(loss, has_aux=True)(model)
    updates, state = optimizer.update(gradients, state)
    return eqx.apply_updates(model, updates), state, outputs


def board_error(outputs, solutions):
    """The share of boards with any wrong cell."""
    return np.mean(np.any(outputs.argmax(-1) != solutions.argmax(-1), axis=(1, 2)))


# %%
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
rng, seen_error, unseen_error = np.random.default_rng(0), [], {}
for step in range(steps + 1):
    if step % max(steps // 20, 1) == 0:
        # The outputs on unseen puzzles, by the program that is compiled already: its step is thrown away.
        outputs = [train_step(model, state, *(part[i::2] for part in unseen))[2] for i in (0, 1)]
        unseen_error[step] = np.mean([board_error(out, unseen[1][i::2]) for i, out in enumerate(outputs)])
    if step < steps:
        chosen = rng.choice(len(puzzles), size, replace=False)
        model, state, outputs = train_step(model, state, puzzles[chosen], solutions[chosen])
        seen_error.append(board_error(outputs, solutions[chosen]))

A = np.asarray(model.layer.A)
print(f"{A.size + model.layer.point.size} parameters, {A.dtype}, {steps} steps of {size} puzzles")
print(
    "boards with an error, held-out grids:", {step: round(float(e), 3) for step, e in list(unseen_error.items())[::5]}
)
print("the last 20 training batches:        ", np.mean(seen_error[-20:]).round(4))

# %% [markdown]
# What has it learnt? Not the equations as we would write them: multiplying $A$ and $b$ by any invertible matrix gives other rows and the same
# constraint. What can be compared is the *row space* of $A$, all combinations of its rows, with that of the true rules. The 64
# true rules depend on one another; only 40 are independent, which is why 40 rows suffice. The *projector* on a row space does not
# depend on the rows that span it, so we draw that.

# %%
index = np.arange(64).reshape(4, 4, 4)  # row, column, digit
rules = {
    "cell": [index[i, j] for i in range(4) for j in range(4)],
    "row": [index[i, :, j] for i in range(4) for j in range(4)],
    "column": [index[:, i, j] for i in range(4) for j in range(4)],
    "block": [index[r : r + 2, c : c + 2, j] for r in (0, 2) for c in (0, 2) for j in range(4)],
}
truth = {kind: np.array([np.isin(np.arange(64), cells) * 0.5 for cells in group]) for kind, group in rules.items()}
every_rule = np.concatenate(list(truth.values()))


def projector(rows):
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    span = right[values > 1e-2 * values[0]]
    return span.T @ span


def learnt_share(rows, rule):
    """The length of a rule's shadow on the row space; the rules have length 1."""
    return np.linalg.norm(rule @ projector(rows), axis=1)


print("rank: true rules", np.trace(projector(every_rule)).round(), "  learnt", np.trace(projector(A)).round())
print("mean share of a rule that was learnt: before", learnt_share(untrained, every_rule).mean().round(3), end="")
print("   after", learnt_share(A, every_rule).mean().round(3))

figure, (curve, true, learnt, share) = plt.subplots(
    1, 4, figsize=(17, 4.0), layout="constrained", width_ratios=(1.1, 1, 1, 1.2)
)
curve.plot(seen_error, ".", color="0.8", markersize=2, label="training batches")
curve.plot(list(unseen_error), list(unseen_error.values()), "o-", color=BLUE, markersize=3, label="held-out grids")
curve.set(xlabel="step", title="share of boards with an error", ylim=(0, 1.03))
curve.legend(frameon=False)
for axes, rows, title in ((true, every_rule, "true row space"), (learnt, A, "learnt row space")):
    axes.imshow(projector(rows), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    axes.set(title=title, xticks=range(0, 64, 16), yticks=range(0, 64, 16), xlabel="row, column, digit")
for place, group in enumerate(truth.values()):
    spread = place + np.linspace(-0.3, 0.3, 16)
    share.plot(spread, np.sort(learnt_share(untrained, group)), "o", color="0.75", markersize=4)
    share.plot(spread, np.sort(learnt_share(A, group)), "o", color=BLUE, markersize=4)
share.set(xticks=range(4), xticklabels=truth, ylim=(0.5, 1.02), title="share of each true rule in the row space")
share.text(3.4, 0.62, "before training", color="0.5", ha="right")
show()

# %% [markdown]
# *What to see.* First panel, the error on held-out grids falls with that on training batches: what was learnt holds for boards never seen,
# as rules do. Second and third, the projectors of the true and the learnt row space show the same pattern. Last, each blue dot is one of
# the 64 rules, and its height says how much of it lies in the learnt row space: 1 is all of it. Grey, the same for the random $A$ of the
# start.
#
# Here is one of them, "digit 1 appears once in the first row", as a board of weights for each digit, and what the learnt row space
# holds of it:

# %%
rule = truth["row"][0]
figure, rows = plt.subplots(3, 4, figsize=(6.4, 4.6), layout="constrained")
versions = {"the rule": rule, "before": rule @ projector(untrained), "after": rule @ projector(A)}
for (name, weights), line in zip(versions.items(), rows, strict=True):
    line[0].set_ylabel(name)
    for digit, axes in enumerate(line):
        axes.imshow(2 * weights.reshape(4, 4, 4)[:, :, digit], cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        if name == "the rule":
            axes.set_title(f"digit {digit + 1}")
show()

# %% [markdown]
# `python -m train.sudoku` is the longer run, with checkpoints and logs, and the comparison with a network that has as many parameters and
# learns the boards by heart.
#
# ## What to remember
#
# - A quadratic program is differentiated through its KKT conditions: one linear system, and one solve with its transpose gives the
#   gradients with respect to all data.
# - Multipliers are forces. A constraint without a force has no gradient; on the border between force and no force there is a kink.
# - `gradient="exact"` is the derivative of what the layer returns. `gradient="smoothed"` is that of a nearby problem, without kinks, and
#   alive where the exact one is zero.
# - Failure is a status of each element, with a proof for *infeasible* and *unbounded*. Your policy decides what happens to its
#   gradient. With `elastic` an infeasible element still has something to say.
# - Test gradients block by block against finite differences, on data whose multipliers are not 0 or 1.
#
# ## Exercises
#
# 1. *The value of a constraint.* The optimal value `solution.objective` is differentiable too. Show from (K) that its derivative with respect to
#    $h_i$ is $-\lambda_i$, then check with `jax.grad`. Why do the derivatives of $z^*$ not appear?
# 2. *Two equal rows.* Give the problem with the bowl at (0.7, 2.4) a fifth constraint that equals the third. $K$ is then singular. What are the
#    two multipliers, and $\partial z^*/\partial h$? Move one of the two rows outwards by $10^{-3}$: what did the gradient predict, and what
#    happens?
# 3. *Shrink the smoothing.* In section 2, let `smoothing` fall from 0.3 to 0.003 over the 60 steps of the descent (it may be an array: nothing is
#    compiled anew). Do more starts arrive than with 0.03 throughout? With 0.3 throughout all do: what does shrinking gain then?
#
# ## References
#
# - Amos & Kolter 2017, *OptNet: Differentiable Optimization as a Layer in Neural Networks*, arXiv:1703.00443. The layer, its backward pass
#   (Eqs. 7-8), and Sudoku.
# - Boyd & Vandenberghe 2004, *Convex Optimization*, chapter 5: duality, KKT conditions, certificates.
# - Goulart & Chen 2024, *Clarabel*, arXiv:2405.12762: the homogeneous interior-point method that ours follows.
# - `docs/quadratic-programs.md` has the interface in full, `declarative/_nodes/programs/quadratic_program.py` the equations as code.
