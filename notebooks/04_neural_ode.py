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
# # The gradient of a neural ODE: four ways, and where each of them is wrong
#
# **Question.** A neural ODE carries its input along $\dot y = f_\theta(t, y)$. Its gradient with respect to $\theta$ needs the whole trajectory.
# It can be stored, or computed again from checkpoints, or found by solving the equation backwards, or by undoing the solver's steps one by one.
# What does each cost, and when can it not be trusted?
#
# **Answer.** Storing and checkpoints are always right; they cost memory, and time. Solving backwards is another computation, whose error is that
# of the solver, and grows without bound where the equation forgets its past. Undoing the steps of a *reversible* solver gives the gradient of
# what was computed, to rounding, in constant memory. Rounding is also what limits it: a contraction by more than $e^{20}$ (float64) between two
# states that are kept cannot be undone. The library measures how well it went, and says so when it went badly.
#
# You need to know what a gradient is, and Euler's method. Chen et al. 2018 introduced the layer; McCallum & Foster 2024 the family of reversible
# solvers that is used here. The notebook runs in under two minutes on two CPU cores; with the environment variable `DECLARATIVE_SMALL=1`, faster and
# coarser.

# %%
import io
import os
import time

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
SMALL = os.environ.get("DECLARATIVE_SMALL") == "1"
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
BLUE, RED, GREEN, ORANGE, GREY = "#1f4e9c", "#c0392b", "#3a9d5d", "#d9822b", "0.55"


def show():
    """`plt.show()` with a palette, which makes a notebook's file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    plt.gcf().savefig(whole)
    plt.close()
    Picture.open(whole).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


# %% [markdown]
# ## 1. A layer, and the equations that it solves
#
# The field is a small network. `NeuralODE` puts a solver of diffrax around it: here twenty equal steps of Heun's method, made reversible.

# %%
network = eqx.nn.MLP(3, 2, 32, 2, jnp.tanh, key=jr.key(5))


def field(t, y, weights):
    return 3 * weights(jnp.append(y, t))


ode = dn.NeuralODE(field, steps=20)
angle = jnp.linspace(0, 2 * jnp.pi, 24, endpoint=False)
circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
solutions = jax.vmap(lambda y0: ode.solve(dn.InitialValue(y0, network)))(circle)

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
paths = jnp.concatenate([circle[:, None], solutions.unknown.ys], axis=1)
ax.plot(*paths.T, color=GREY, lw=0.8)
ax.plot(*circle.T, "o", color=BLUE, ms=4, label="$y(0)$")
ax.plot(*solutions.value.T, "o", color=RED, ms=4, label="$y(1)$")
ax.set_aspect("equal")
ax.legend(frameon=False)
ax.set_title("A circle, carried along")
show()

# %% [markdown]
# What does the layer *declare*? Not the differential equation, which no solver solves exactly, but its step equations
#
# $$ y_{n+1} - \Phi_n(y_n, s_n) = 0, \qquad n = 0, \dots, N - 1, $$
#
# where $\Phi_n$ is a step of the solver and $s_n$ what it carries besides the state. Their Jacobian is unit lower triangular: never singular,
# and back substitution through it is what everybody calls the discrete adjoint. The implicit function theorem always applies:

# %%
x = dn.InitialValue(circle[3], network)
print(dn.conditions(ode, ode.solve(x), x))

# %% [markdown]
# ## 2. Four ways, and what they cost
#
# One loss, $|y(1)|^2$ over the circle; its gradient with respect to the network's weights; Heun's method, coupled to itself (section 4) for the
# way that undoes its steps. "Difference" is from the gradient of the steps that were taken, found by storing them.

# %%
parameters, static = eqx.partition(network, eqx.is_array)


def loss_of(adjoint, steps, solver):
    ode = dn.NeuralODE(field, solver, adjoint=adjoint, steps=steps, throw=False)
    return lambda parameters: jnp.sum(jax.vmap(lambda y0: ode(y0, eqx.combine(parameters, static)))(circle) ** 2)


HEUN, COUPLED = dfx.Heun(), dn.Reversible(dfx.Heun())
WAYS = {
    "stored": (HEUN, None, GREY),
    "checkpoints": (HEUN, dfx.RecursiveCheckpointAdjoint(), GREEN),
    "solved backwards": (HEUN, dfx.BacksolveAdjoint(solver=HEUN), RED),
    "undone": (COUPLED, dn.ReversibleAdjoint(), BLUE),
}
STEPS = (20, 160) if SMALL else (20, 160, 1280, 5120)


def distance(a, b):
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(b))
    return (
        max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) / size
    )


def compiled(solver, adjoint, steps):
    return jax.jit(jax.grad(loss_of(adjoint, steps, solver))).lower(parameters).compile()


costs = {}
for steps in STEPS:
    store = dfx.RecursiveCheckpointAdjoint(checkpoints=steps)
    exact = {solver: compiled(solver, store, steps) for solver in (HEUN, COUPLED)}
    for name, (solver, adjoint, _) in WAYS.items():
        program = exact[solver] if adjoint is None else compiled(solver, adjoint, steps)
        gradient = jax.block_until_ready(program(parameters))
        began = time.perf_counter()
        jax.block_until_ready(program(parameters))
        seconds = time.perf_counter() - began
        off = distance(gradient, exact[solver](parameters))
        costs[name, steps] = program.memory_analysis().temp_size_in_bytes, off, seconds

print(f"{'steps':>6}  {'':18}{'memory, kB':>12}{'difference':>13}{'time, ms':>10}")
for (name, steps), (size, off, seconds) in costs.items():
    print(f"{steps:6}  {name:18}{size / 1e3:12.0f}{off:13.1e}{1e3 * seconds:10.1f}")

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, (_, _, colour) in WAYS.items():
    axes[0].loglog(STEPS, [costs[name, steps][0] / 1e3 for steps in STEPS], "o-", color=colour, label=name)
    if name != "stored":
        axes[1].loglog(STEPS, [max(costs[name, steps][1], 1e-17) for steps in STEPS], "o-", color=colour)
axes[0].set(xlabel="steps", ylabel="kB", title="memory of one gradient")
axes[1].set(xlabel="steps", title="difference from the gradient of the steps")
axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.4))
show()

# %% [markdown]
# Undoing the steps takes the memory of a few states, however many steps there are, and gives the gradient of the steps to the last digits.
# Solving backwards takes as little, but its gradient differs by the error of the solver, which falls with the square of the step here. One may call
# that accurate enough. The next section shows when it is not.
#
# ## 3. Solving backwards: a contraction forgets
#
# Let the state be drawn to a moving target, $\dot y = -k\,\tanh(y - \sin 3t)$. Forwards this is as harmless as an equation can be: errors die out
# at the rate $k$. Backwards they grow at that rate. We go to $t = 1$, and come back in two ways: with the equation, and with the inverse of
# each step.


# %%
def drawn(t, y, k):
    return -k * jnp.tanh(y - jnp.sin(3 * t))


def there_and_back(k, solver, steps=200):
    """Times, the trajectory, and what both ways back find."""
    start, h = jnp.array([1.0]), 1 / steps
    away = dn.NeuralODE(drawn, solver, steps=steps).solve(dn.InitialValue(start, k)).unknown.ys
    equation = dn.NeuralODE(drawn, dfx.Heun(), steps=steps, t0=1.0, t1=0.0)
    equation = equation.solve(dn.InitialValue(away[-1], k)).unknown.ys[::-1]
    term = dfx.ODETerm(drawn)

    def forwards(carry, n):
        y, state = carry
        y, _, _, state, _ = solver.step(term, n * h, (n + 1) * h, y, k, state, made_jump=False)
        return (y, state), None

    def undo(carry, n):
        y, state = solver.inverse(term, n * h, (n + 1) * h, carry[0], k, carry[1])
        return (y, state), y

    times = jnp.arange(steps, dtype=start.dtype)
    end, _ = jax.lax.scan(forwards, (start, solver.init(term, 0.0, h, start, k)), times)
    _, undone = jax.lax.scan(undo, end, times, reverse=True)
    away = jnp.concatenate([start[None], away])[:-1, 0]
    return times * h, away, equation[:, 0], undone[:, 0]


fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, k in zip(axes, (4.0, 18.0), strict=True):
    times, away, equation, undone = there_and_back(k, dn.Reversible(dfx.Heun(), coupling=float(np.exp(-(k + 3) / 200))))
    ax.plot(times, away, color="0.8", lw=6, label="the way there")
    ax.plot(times, jnp.clip(equation, -3, 3), color=RED, label="back by the equation")
    ax.plot(times, undone, "--", color=BLUE, label="back by undoing")
    ax.set(title=f"k = {k:.0f}", xlabel="t", ylim=(-2, 2))
    print(
        f"k = {k:.0f}: off at t = 0 by {abs(float(equation[0] - 1)):.1e} (equation), {abs(float(undone[0] - 1)):.1e} (undoing)"
    )
axes[0].legend(frameon=False, loc="lower left")
show()

# %% [markdown]
# The equation's way back is lost, and no smaller step would help: the information is not in $y(1)$. Whatever is computed along that way, the
# gradient included, belongs to another trajectory. Where does undoing find what the equation does not? In the *pair* that the solver carries.
#
# ## 4. How a step can be undone, and what it costs in stability
#
# McCallum and Foster couple two solutions $y$ and $z$. With $\Psi_h$ the increment of any explicit Runge-Kutta method,
#
# $$ y_1 = \lambda y_0 + (1 - \lambda) z_0 + \Psi_h(t_0, z_0), \qquad z_1 = z_0 - \Psi_{-h}(t_1, y_1). $$
#
# From $(y_1, z_1)$ the second line gives $z_0$, and the first then $y_0$, with a division by $\lambda$. On the test equation $\dot y = \mu y$
# the pair is multiplied by a matrix, whose spectral radius must not exceed one. Here is where it does not, in the plane of $h\mu$.


# %%
def radius(point, coupling):
    """Spectral radius of a step of the coupled Heun method at h mu, from the two lines above."""
    psi = lambda x: x + x**2 / 2
    up, down = psi(point), psi(-point)
    matrix = [[coupling + 0 * point, 1 - coupling + up], [-down * coupling, 1 - down * (1 - coupling + up)]]
    return np.abs(np.linalg.eigvals(np.moveaxis(np.array(matrix), (0, 1), (-2, -1)))).max(-1)


side = 161 if SMALL else 401
real, imaginary = np.meshgrid(np.linspace(-1.1, 0.4, side), np.linspace(-1.2, 1.2, side))
points = real + 1j * imaginary
fig, ax = plt.subplots(figsize=(6, 4.4), layout="constrained")
for coupling, colour in ((0.3, GREEN), (0.6, ORANGE), (0.9, RED)):
    ax.contour(real, imaginary, radius(points, coupling), [1 + 1e-9], colors=colour)
    ax.plot([], color=colour, label=f"$\\lambda$ = {coupling}")
    on_axis = -np.linspace(0, 2, 4001)[1:]
    end = on_axis[np.argmax(radius(on_axis, coupling) > 1 + 1e-9)]
    print(f"coupling {coupling}: stable on the real axis down to {end:.3f}")
ax.axvline(0, color="0.8", lw=0.8, zorder=0)
ax.axhline(0, color="0.8", lw=0.8, zorder=0)
ax.set(xlabel="Re $h\\mu$", ylabel="Im $h\\mu$", title="Heun's method coupled: stable inside")
ax.legend(frameon=False)
show()


# %% [markdown]
# (The library keeps the pair as $z$ and $d = y - z$. Its step, taken as a matrix, has the same radius.)


# %%
def library_step(pair, point=-0.25, coupling=0.6):
    solver, term = dn.Reversible(dfx.Heun(), coupling), dfx.ODETerm(lambda t, y, args: point * y)
    y, z = pair
    state = solver.init(term, 0.0, 1.0, y, None)
    state = eqx.tree_at(lambda state: (state.z, state.d), state, (z, y - z))
    y, _, _, state, _ = solver.step(term, 0.0, 1.0, y, None, state, made_jump=False)
    return jnp.stack([y, state.z])


eigenvalues = np.linalg.eigvals(jax.jacfwd(library_step)(jnp.ones(2)))
print(
    f"radius of the library's step {np.abs(eigenvalues).max():.12f}, of the matrix {radius(np.array(-0.25), 0.6):.12f}"
)

# %% [markdown]
# On the real axis the coupled method is stable from $-(1 - \lambda)$, or a little further, to $0$. So a contraction of rate $L$ wants
# $1 - \lambda > hL$: a small $\lambda$. But backwards every step divides by it.
#
# ## 5. Where undoing ends
#
# After $N$ steps back, rounding has grown by $\lambda^{-N} \approx e^{N(1 - \lambda)}$, and stability asks for $N(1 - \lambda) > NhL = LT$. Both
# together: **rounding grows by at least $e^{LT}$**. With $\epsilon = 10^{-16}$ and six digits wanted, $LT$ may be about 20; in float32, 9.
#
# The library does two things about it. It keeps nine states on the way (the start and eight anchors), and walks on from the kept one at each:
# so $T$ is a ninth of the horizon. And it compares what it found with what it kept: `on_drift` says what happens if they differ. Left: the law.
# Right: the gradient's error over the horizon, for steps that are stable forwards ($\lambda = 0.9$, $hL = 0.08$), and what the guard says.


# %%
def contracting(t, y, k):
    return -k * jnp.tanh(y - jnp.sin(3 * t) * jnp.arange(1.0, 3.0))


def one(k, adjoint, coupling, t1=1.0, h=1 / 800):
    """(gradient by k, worst round trip)"""

    def loss(k):
        y0, solver = jnp.array([0.5, -1.0]), dn.Reversible(dfx.Heun(), coupling)
        out = dfx.diffeqsolve(dfx.ODETerm(contracting), solver, 0.0, t1, h, y0, k, adjoint=adjoint, max_steps=8000)
        return jnp.sum(out.ys**2), out.stats.get("round_trip", jnp.zeros(1))

    (_, trip), gradient = jax.value_and_grad(loss, has_aux=True)(k)
    return gradient, jnp.max(trip)


def along(horizons, adjoint):
    return jax.jit(jax.vmap(lambda t1: one(8.0, adjoint, 0.9, t1, 0.01)))(horizons)


alone = dn.ReversibleAdjoint(anchors=0, report=True, on_drift="nan", tolerance=float("inf"))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
exponents = np.linspace(1, 32, 6 if SMALL else 12)
trips = [one(1.0, alone, float(np.exp(-e / 800)))[1] for e in exponents]
axes[0].semilogy(exponents, trips, "o", color=BLUE, label="round trip")
axes[0].semilogy(exponents, 2.2e-16 * np.exp(exponents), color=BLUE, lw=0.8, label="$\\epsilon\\,\\lambda^{-N}$")
axes[0].set(xlabel="$N \\ln(1/\\lambda)$", title="state at the start, found again: error", ylim=(1e-17, 1))
axes[0].legend(frameon=False)

horizons = np.geomspace(0.25, 50, 7 if SMALL else 16)
exact, _ = along(horizons, dfx.RecursiveCheckpointAdjoint())
for anchors, colour in ((0, RED), (8, BLUE)):
    told = dn.ReversibleAdjoint(anchors=anchors, report=True, on_drift="nan", tolerance=float("inf"))
    gradients, trips = along(horizons, told)
    off = np.maximum(np.abs(gradients - exact) / np.abs(exact), 1e-17)
    said = np.asarray(~(trips <= 1e-6))
    axes[1].loglog(8 * horizons, off, color=colour, lw=0.8)
    axes[1].loglog((8 * horizons)[~said], off[~said], "o", color=colour, label=f"{anchors} anchors")
    axes[1].loglog(
        (8 * horizons)[said], off[said], "x", color=colour, ms=9, label=f"{anchors} anchors: the guard objects"
    )
    print(
        f"{anchors} anchors: objects to {said.sum()} of {len(horizons)}; largest error where it does not: {off[~said].max():.0e}"
    )
axes[1].set(xlabel="contraction rate times horizon, $LT$", ylim=(1e-17, 1e3), title="relative error of the gradient")
axes[1].legend(frameon=False, fontsize=9)
show()

# %% [markdown]
# The points on the left lie below the line because the library keeps $z$ and the small difference $y - z$, whose rounding is small as well.
# On the right the gradient is far better than the states that the guard looks at: what it depends on is the end of the path, and the start was
# forgotten. The guard cannot know that. It promises the reverse: where it is silent, the gradient is right. Two more things that it cannot
# know: the gradient of a *linear* field with respect to the start does not need the states, and is exact however badly
# they are reconstructed: it objects all the same. And an error may grow on its way back, spoil the gradient, and shrink again before
# the start: the start alone would show nothing. That is why it looks at eight places more.

# %%
decay = lambda t, y, args: jnp.array([[-3.0, 1.0], [0.0, -2.0]]) @ y
options = {"steps": 1600, "throw": False}
for name, adjoint in {
    "stored": dfx.DirectAdjoint(),
    "undone, whatever the guard says": dn.ReversibleAdjoint(on_drift="nan", tolerance=float("inf")),
    "undone, under the guard": dn.ReversibleAdjoint(),
}.items():
    layer = dn.NeuralODE(decay, dn.Reversible(dfx.Heun(), 0.5), adjoint=adjoint, **options)
    print(f"{name:32}", jax.grad(lambda y0, layer=layer: jnp.sum(layer(y0)))(jnp.ones(2)))

# %% [markdown]
# ## 6. Nothing is lost in accuracy
#
# The coupled method keeps the order of what it couples. Error at $t = 3$ of van der Pol's oscillator, against the number of steps.


# %%
def oscillator(t, y, args):
    return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


start, counts = jnp.array([1.0, 0.5]), np.array([320, 400, 500, 640])


def end(solver, steps):
    return dn.NeuralODE(oscillator, solver, steps=steps, t1=3.0)(start)


truth = end(dfx.Dopri8(), 3000)
BASES = {
    "Euler": (dfx.Euler(), 0.5, GREY),
    "midpoint": (dfx.Midpoint(), 0.9, GREEN),
    "Heun": (dfx.Heun(), 0.9, ORANGE),
    "classical RK4": (dn.RungeKutta4(), 0.9, RED),
    "Dopri5": (dfx.Dopri5(), 0.5, BLUE),
    "Tsit5": (dfx.Tsit5(), 0.9, "0.2"),
}
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for name, (base, coupling, colour) in BASES.items():
    errors = [float(jnp.linalg.norm(end(dn.Reversible(base, coupling), int(n)) - truth)) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    ax.loglog(counts, errors, "o-", color=colour, label=f"{name}: {slope:.2f}")
ax.set_xticks(counts, [str(n) for n in counts])
ax.minorticks_off()
ax.set(xlabel="steps", title="error, and the slope of the line")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show()

# %% [markdown]
# ## 7. Which one
#
# | | gradient | memory | when it is wrong |
# |---|---|---|---|
# | `diffrax.DirectAdjoint`, `RecursiveCheckpointAdjoint` | of the steps | grows, slowly | never |
# | `declarative.ReversibleAdjoint` | of the steps | a few states | contraction beyond $LT \approx 20$ (9 in float32) between anchors; it says so |
# | `diffrax.BacksolveAdjoint` | of the equation, approximately | one state | contraction, stiffness, chaos; it does not say so |
#
# `NeuralODE` takes any of them as `adjoint=`, and by default the second where the solver has an inverse. `on_drift="checkpoint"` makes it fall
# back to the first by itself.
#
# **Exercises.** 1. In section 5, more anchors: how far does $LT$ go with 30? 2. The order of Euler's method near $\lambda = 1$: try 0.99, and find
# the parasitic solution that spoils it. 3. `python -m train.ode_digits --adjoint backsolve`: does the accuracy suffer? Why not?
