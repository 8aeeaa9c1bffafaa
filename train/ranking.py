"""Learn one score from clinics that only put their own patients in order, through soft ranks; beside five other ways.

    python -m train.ranking                       all six, on 24 splits, and the picture of it
    python -m train.ranking --specialised 0       clinics that see all kinds of patients

Hardware and time: one CPU core, 16 s, compilation included.
Expect, Spearman's correlation with the progression of the 162 test patients, mean of 24 splits, for clinics that are more and more specialised
(± is the standard error of the paired difference to `spearman`):

    --specialised    spearman   pairs            centred          ranks            grades           truth
    0                0.687      0.686 ± 0.001    0.686 ± 0.002    0.686 ± 0.002    0.536 ± 0.025    0.688 ± 0.003
    0.4              0.676      0.680 ± 0.002    0.681 ± 0.003    0.667 ± 0.003    0.531 ± 0.028    0.689 ± 0.003
    0.7 (default)    0.644      0.641 ± 0.004    0.640 ± 0.005    0.555 ± 0.010    0.415 ± 0.054    0.688 ± 0.008
    0.9              0.347      0.324 ± 0.010    0.313 ± 0.012    0.205 ± 0.022    0.428 ± 0.079    0.688 ± 0.046

and with `--seed 1` 0.644, 0.639, 0.636, 0.527, 0.357, 0.693. So orders are to be compared within the clinic that made them, and a soft rank does
that as well as pairs do, with k log k instead of k^2 comparisons, and better than a squared error to the ranks as if those were of one scale. It
is not ahead of the other two that compare within clinics, but where clinics are nearly sorted. From 0.1 to 3 its strength makes no difference that
could be seen (the picture); below, most scores are alone with their rank and have no gradient.

Ten patients each come to twenty clinics (scikit-learn's diabetes data: ten measurements, and the progression of the disease after a year). A clinic
reports that progression as a grade on a scale of its own, so what it says is the order of its patients; and clinics specialise: one sees
mild cases, another severe ones. Wanted is one score for all patients, judged by Spearman's correlation with the progression of patients of no
clinic. The score is linear, and its loss one of:

    spearman   one minus Spearman's correlation in a clinic, with soft ranks: `models.ranking`
    pairs      the logistic loss of all pairs of a clinic (RankNet)
    centred    squared error to the ranks in a clinic, score and ranks less their means there
    ranks      squared error to the ranks in a clinic
    grades     squared error to the grades as reported
    truth      squared error to the true progression, which nobody has: what is lost by orders

Every loss has the same three weights of an l2 penalty to choose from: the best mean Spearman's correlation in eight clinics for validation, which
have orders only, too. A split deals the patients out anew. All settings of all losses on all splits are trained at once, each for itself: the
sum of the losses is minimised, and Adam looks at every weight alone.

Choices. Clinics of ten that are 0.7 specialised were picked for a clear difference to `ranks`, in pilots on other splits of the same patients. The
strength is fixed at 1, the unit of a score: chosen in validation from six of them, beside the penalty, the default's 0.644 becomes 0.632, since
eight clinics are too few to choose from eighteen settings.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from .loop.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

Loss = Literal["spearman", "pairs", "centred", "ranks", "grades", "truth"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
PENALTIES = (1e-3, 1e-2, 1e-1)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Config(RunConfig):
    strength: float = 1.0
    """Of the soft rank in `spearman`, in the unit of a score."""
    splits: int = 24
    """How often the patients are dealt out anew."""
    patients: int = 10
    """Patients of a clinic."""
    clinics: int = 20
    """Clinics to train on."""
    held_out: int = 8
    """Clinics for validation. All other patients are the test part."""
    specialised: float = 0.7
    """How much of what decides where a patient goes is the progression, the rest being chance: from 0 to 1."""
    hidden: int = 0
    """Hidden units of the score; 0 is a linear one."""

    steps: int = 300
    lr: float = 3e-2
    """Peak learning rate: a cosine to zero."""
    seed: int = 0
    """Of the splits and the first weights."""

    eval_every: int = field(default=50, kw_only=True)

    def __post_init__(self):
        self.check_at_least_one("splits clinics held_out steps")
        if self.patients < 2:
            raise ValueError(f"patients must be at least 2, so that there is an order, but is {self.patients}.")
        if (self.clinics + self.held_out) * self.patients > PATIENTS - 40:
            raise ValueError(
                f"(clinics + held_out) * patients must be at most {PATIENTS - 40}, so that 40 patients are left to test on, "
                f"but is {(self.clinics + self.held_out) * self.patients}."
            )
        if not 0 <= self.specialised <= 1:
            raise ValueError(f"specialised must lie between 0 and 1, but is {self.specialised}.")
        if self.hidden < 0:
            raise ValueError(f"hidden must not be negative, but is {self.hidden}.")
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be positive and finite, but is {self.strength}.")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, but is {self.lr}.")

    @property
    def name(self) -> str:
        return f"ranking-{self.seed}"


PATIENTS = 442


def deal(config: Config, seed) -> "dict[str, dict[str, np.ndarray]]":
    """One split: `train` and `validation` of shape (clinics, patients, ...), `test` of (patients, ...).

    Each has `features`, standardised by the training part, and `truth`; clinics have `grades` and `ranks` too.
    """
    import numpy as np
    from scipy.stats import rankdata
    from sklearn.datasets import load_diabetes

    features, progression = load_diabetes(return_X_y=True)
    rng = np.random.default_rng(seed)
    order, k = rng.permutation(PATIENTS), config.patients
    train, validation, test = np.split(order, np.cumsum([config.clinics * k, config.held_out * k]))
    standardise = lambda values: (values - values[train].mean(0)) / values[train].std(0)
    features, truth = standardise(features), standardise(progression)

    def clinics(members):
        way = config.specialised * truth[members] + (1 - config.specialised) * rng.standard_normal(members.size)
        # The clinics come in no order: rows are spread over devices.
        members = rng.permutation(members[np.argsort(way)].reshape(-1, k))
        # A scale: increasing, with an origin, a unit and a bend of its own.
        bend, unit = (np.exp(scale * rng.standard_normal((len(members), 1))) for scale in (0.5, 1.0))
        grades = unit * (progression[members] / 100) ** bend + 3 * rng.standard_normal((len(members), 1))
        return {
            "features": features[members],
            "truth": truth[members],
            "grades": (grades - grades.mean()) / grades.std(),
            "ranks": rankdata(progression[members], axis=1),
        }

    parts = {
        "train": clinics(train),
        "validation": clinics(validation),
        "test": {"features": features[test], "truth": truth[test]},
    }
    return {name: {key: value.astype(np.float32) for key, value in part.items()} for name, part in parts.items()}


def spearman(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
    """Spearman's correlation along the last axis; 0 where one of them is constant."""
    import numpy as np
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in np.broadcast_arrays(a, b))
    size = np.sqrt(np.sum(a**2, -1) * np.sum(b**2, -1))
    return np.sum(a * b, -1) / np.where(size > 0, size, 1)


def train(config: Config) -> "dict[str, np.ndarray]":
    """The run, or what is left of it: test correlation of every split by loss, with the settings that validation chooses."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    from models.ranking import Ranker, RankerConfig, pairwise_loss, spearman_loss

    from .loop.devices import start
    from .loop.fit import fit

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.clinics % mesh.size:
        raise ValueError(f"clinics must be a multiple of the {mesh.size} devices, but is {config.clinics}.")
    dealt = [deal(config, (config.seed, split)) for split in range(config.splits)]
    stacked = lambda part, axis: {key: np.stack([d[part][key] for d in dealt], axis) for key in dealt[0][part]}
    # A step sees all the clinics, on the first axis, of every split, on the second.
    batch, validation, test = stacked("train", 1), stacked("validation", 1), stacked("test", 0)

    model_key, train_key = jr.split(jr.key(config.seed))
    build = lambda key: Ranker(RankerConfig(features=batch["features"].shape[-1], hidden=config.hidden), key=key)
    # Settings on the first axis, splits on the second.
    # The other strengths are for the picture: nothing is chosen among them.
    tried = (config.strength, *STRENGTHS)
    settings = {name: [(p, s) for s in (tried if name == "spearman" else (1.0,)) for p in PENALTIES] for name in LOSSES}
    by_split = eqx.filter_vmap(build)(jr.split(model_key, config.splits))
    model = {
        name: jax.tree.map(
            lambda leaf, rows=len(rows): jnp.broadcast_to(leaf, (rows, *leaf.shape)) if eqx.is_array(leaf) else leaf,
            by_split,
        )
        for name, rows in settings.items()
    }

    def loss_of_clinic(name: Loss, scores, clinic, strength):
        ranks = clinic["ranks"]
        middle, unit = (ranks.size + 1) / 2, ((ranks.size**2 - 1) / 12) ** 0.5
        match name:
            case "spearman":
                return spearman_loss(scores, ranks, strength)
            case "pairs":
                return pairwise_loss(scores, ranks)
            case "centred":
                return jnp.mean((scores - jnp.mean(scores) - (ranks - middle) / unit) ** 2)
            case "ranks":
                return jnp.mean((scores - (ranks - middle) / unit) ** 2)
            case "grades" | "truth":
                return jnp.mean((scores - clinic[name]) ** 2)

    def losses(name: Loss, models, batch):
        """Of every setting and split."""
        penalties, strengths = jnp.asarray(np.array(settings[name], np.float32).T)

        def one(model, clinics, penalty, strength):
            of_clinic = lambda clinic: loss_of_clinic(name, model(clinic["features"]), clinic, strength)
            weights = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
            return jnp.mean(jax.vmap(of_clinic)(clinics)) + penalty / 2 * sum(jnp.sum(w**2) for w in weights)

        over_splits = eqx.filter_vmap(one, in_axes=(eqx.if_array(0), 1, None, None))
        return eqx.filter_vmap(over_splits, in_axes=(eqx.if_array(0), None, 0, 0))(models, batch, penalties, strengths)

    def loss(model, batch, key):
        del key
        found = {name: losses(name, model[name], batch) for name in LOSSES}
        means = {f"train/{name}": jnp.mean(values) for name, values in found.items()}
        # A sum: every setting of every split has its own weights, and none slows another down.
        return jnp.sum(jnp.stack([jnp.sum(values) for values in found.values()])), means

    @eqx.filter_jit
    def scores_of(models):
        """Of every setting and split: the validation clinics' scores, and those of the test patients."""
        one = lambda model, clinics, patients: (jax.vmap(model)(clinics), model(patients))
        over_splits = eqx.filter_vmap(one, in_axes=(eqx.if_array(0), 1, 0))
        over_settings = eqx.filter_vmap(over_splits, in_axes=(eqx.if_array(0), None, None))
        return over_settings(models, validation["features"], test["features"])

    def correlations(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By loss, of every setting and split: in the validation clinics, and over the test patients."""
        found = {}
        for name in LOSSES:
            inside, over = (np.asarray(scores) for scores in scores_of(model[name]))
            ranks = np.moveaxis(validation["ranks"], 1, 0)
            found[name] = spearman(inside, ranks[None]).mean(-1), spearman(over, test["truth"][None])
        return found

    def chosen(found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of every split: the penalty that is best in validation, and the test correlation with it."""
        best = np.argmax(found[0][: len(PENALTIES)], axis=0)
        return best, found[1][best, np.arange(config.splits)]

    def evaluate(model):
        for name, found in correlations(model).items():
            yield f"test/{name}", float(np.mean(chosen(found)[1]))

    state = fit(
        model,
        optax.adam(optax.cosine_decay_schedule(config.lr, config.steps)),
        loss,
        lambda step: batch,
        steps=config.steps,
        directory=config.directory,
        config=config.identity(),
        mesh=mesh,
        key=train_key,
        evaluate=evaluate,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        resume=config.resume,
        tensorboard=config.tensorboard,
    )
    found = correlations(state.model)
    best, result = {}, {}
    for name in LOSSES:
        best[name], result[name] = chosen(found[name])

    error = lambda values: np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    print(f"\nSpearman's correlation over {test['truth'].shape[1]} test patients, mean of {config.splits} splits")
    print(f"{'':<11}{'± standard error':<18}{'less than spearman':<22}penalties chosen")
    for name in LOSSES:
        less = result["spearman"] - result[name]
        picked = ", ".join(f"{PENALTIES[i]:g} ({np.sum(best[name] == i)})" for i in np.unique(best[name]))
        gap = "" if name == "spearman" else f"{np.mean(less):+.3f} ± {error(less):.3f}"
        print(f"{name:<11}{np.mean(result[name]):.3f} ± {error(result[name]):.3f}     {gap:<22}{picked}")
    files = ["metrics.jsonl", "checkpoints/"]
    if config.plots:
        from .loop.ranking_plots import plot_ranking

        shape = (len(tried), len(PENALTIES), config.splits)
        inside, over = (values.reshape(shape)[1:] for values in found["spearman"])
        by_strength = np.take_along_axis(over, np.argmax(inside, 1, keepdims=True), 1)[:, 0]
        plot_ranking(result, STRENGTHS, by_strength, config.directory / "ranking.png")
        files.append("ranking.png")
    seconds = time.perf_counter() - began
    print(f"time       {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files      {config.directory.resolve()}: {', '.join(files)}")
    return result


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.ranking", description=__doc__))


if __name__ == "__main__":
    main()
