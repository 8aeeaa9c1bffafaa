r"""Semi-amortised inference, mode by mode: how much of log p(x) is lost, what a step costs, and what its gradient remembers.

    python -m benchmarks.savi            three seeds; about 20 minutes on 2 CPU cores
    python -m benchmarks.savi --quick    one seed, 40 steps; nothing is saved

The setting is that of `train/savi_oracle.py`: a fixed decoder with two latent variables, whose log p(x) a grid gives, and an encoder that each mode
trains in the same number of steps. Every encoder is scored alike on held-out sequences: the gap log p(x) - ELBO at its proposal ("start"), after
K = 20 gradient steps ("refined"), and after 400 ("optimal": what is left is that a Gaussian is not the posterior). `amortised` is a plain VAE's
encoder; its refined gap is what is known as VAE + SVI.

- *Gap*: mean over sequences and seeds, with a 95 % confidence interval over seeds (Student's t) of the difference to `amortised`, seed by seed.
- *Time* of one training step, median over rounds in which the modes take turns, as a multiple of that of `unrolled`.
- *Memory*: temporary buffers of the compiled gradient at 10, 100 and 1000 inner steps.
"""

import argparse
import datetime
import json
import math
import pathlib
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import declarative as dn
from models.oracle import Encoder, OracleConfig, QuadratureELBO, make_oracle

from .shared import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"
MODES = ("amortised", "implicit", "unrolled", "reversible", "proximal", "moreau", "kl")
RATE, MOMENTUM, INNER, BATCH = 0.1, 0.5, 20, 128
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % points, by the number of seeds


def inner(steps: int) -> dn.GradientSteps:
    return dn.GradientSteps(steps, RATE, MOMENTUM)


def loss_of(mode: Any, elbo, steps: int = INNER):
    node = dn.ELBOOptimizer(elbo, mode, solver=None if mode == "amortised" else inner(steps), throw=False)
    return lambda encoder, tokens: jnp.mean(jax.vmap(lambda x: node(x, encoder(x)).loss)(tokens))


def data(decoder, rows: int, held_out: int):
    keys = jr.split(jr.key(1), rows + held_out)
    tokens = jax.jit(jax.vmap(lambda key: decoder.sample(OracleConfig().length, key=key)))(keys)
    test = tokens[rows:]
    return np.asarray(tokens[:rows]), test, jax.jit(lambda x: jax.lax.map(decoder.log_evidence, x, batch_size=8))(test)


def trainer(mode: str, elbo, steps: int):
    """(initial state, a compiled step)."""
    loss = loss_of(mode, elbo)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, max(1, steps // 20), steps))

    @eqx.filter_jit
    def step(encoder, state, tokens):
        value, gradient = eqx.filter_value_and_grad(loss)(encoder, tokens)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(encoder, updates), state, value

    return optimizer, step


def scorer(elbo, tokens, evidence):
    exact = QuadratureELBO(elbo.decoder, 12)
    refine = lambda count: dn.ELBOOptimizer(elbo, "unrolled", solver=inner(count), throw=False)

    def gaps(encoder, tokens, evidence):
        proposal = encoder(tokens)
        points = {"start": proposal} | {
            name: refine(count)(tokens, proposal).parameters for name, count in (("refined", INNER), ("optimal", 400))
        }
        return {name: evidence - exact(point, tokens) for name, point in points.items()}

    @eqx.filter_jit
    def score(encoder):
        each = jax.lax.map(lambda pair: gaps(encoder, *pair), (tokens, evidence), batch_size=250)
        return {name: jnp.mean(values) for name, values in each.items()}

    return lambda encoder: {name: float(value) for name, value in score(encoder).items()}


def memory(mode: str, elbo, steps: int) -> int:
    encoder = Encoder(OracleConfig(), key=jr.key(0))
    arrays, static = eqx.partition(encoder, eqx.is_array)
    loss = loss_of(mode, elbo, steps)
    tokens = jnp.zeros((BATCH, OracleConfig().length), jnp.int32)
    gradient = jax.jit(jax.grad(lambda arrays: loss(eqx.combine(arrays, static), tokens)))
    analysis = gradient.lower(arrays).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 steps; nothing is saved")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="training steps of every mode")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder for savi.jsonl")
    arguments = parser.parse_args()
    seeds, steps = (1, 40) if arguments.quick else (arguments.seeds, arguments.steps)
    if seeds < 1 or steps < 1:
        parser.error("--seeds and --steps must be at least 1")

    decoder = make_oracle(OracleConfig(), key=jr.key(0))
    elbo = QuadratureELBO(decoder)
    train, test, evidence = data(decoder, 5000, 1000)
    score = scorer(elbo, test, evidence)
    rows: dict[str, dict[str, Any]] = {mode: {"mode": mode, "gaps": []} for mode in MODES}
    running = {}
    for mode in MODES:
        optimizer, step = trainer(mode, elbo, steps)
        for seed in range(seeds):
            encoder = Encoder(OracleConfig(), key=jr.key(seed))
            state = optimizer.init(eqx.filter(encoder, eqx.is_array))
            rng = np.random.default_rng(seed)
            for _ in range(steps):
                encoder, state, _ = step(encoder, state, train[rng.integers(0, len(train), BATCH)])
            rows[mode]["gaps"].append(score(encoder))
            running[mode] = (step, encoder, state)
        print(mode, rows[mode]["gaps"], flush=True)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(3 if arguments.quick else 9):
        for mode, (step, encoder, state) in running.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(encoder, state, train[:BATCH])[2])
            times[mode].append(1e3 * (time.perf_counter() - begin))
    for mode in MODES:
        rows[mode]["ms"] = statistics.median(times[mode])
        rows[mode]["bytes"] = {} if mode == "amortised" else {k: memory(mode, elbo, k) for k in (10, 100, 1000)}

    print(
        f"\nlog p(x) {float(jnp.mean(evidence)):.3f} nats; gaps in nats; {seeds} seed(s), {steps} training steps, K = {INNER}"
    )
    print(
        f"{'mode':11}{'start':>8}{'refined':>9}{'optimal':>9}  {'refined - VAE + SVI (95 %)':28}{'time':>6}  KiB at 10, 100, 1000 steps"
    )
    base = [gap["refined"] for gap in rows["amortised"]["gaps"]]
    for mode, row in rows.items():
        mean = lambda name, row=row: statistics.fmean(gap[name] for gap in row["gaps"])
        off = [gap["refined"] - reference for gap, reference in zip(row["gaps"], base, strict=True)]
        half = STUDENT.get(seeds, 2.6) * statistics.stdev(off) / math.sqrt(seeds) if seeds > 1 else math.nan
        kib = ", ".join(f"{size / 1024:.0f}" for size in row["bytes"].values())
        ratio = row["ms"] / rows["unrolled"]["ms"]
        difference = f"{statistics.fmean(off):+.5f} +- {half:.5f}"
        print(
            f"{mode:11}{mean('start'):8.4f}{mean('refined'):9.4f}{mean('optimal'):9.4f}  {difference:28}{ratio:6.2f}  {kib}"
        )
    if not arguments.quick:
        about = {
            "benchmark": "savi",
            "date": datetime.date.today().isoformat(),
            "steps": steps,
            **machine(),
            **versions("jax", "equinox", "optax", "numpyro"),
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open(arguments.out / "savi.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in [about, *rows.values()])


if __name__ == "__main__":
    main()
