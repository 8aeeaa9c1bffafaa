"""Digits, cut into pieces and shuffled, put together again: a layer that makes a matching, beside one that does not.

    python -m train.jigsaw                      both, their comparison, and a picture
    python -m train.jigsaw --layer transport    one of them
    python -m train.jigsaw --context            pieces are looked at together
    python -m train.jigsaw --grid 4             sixteen pieces instead of four

Hardware and time: 1 CPU core, 20 s for both, compilation included.
Expect (seeds 0, 1, 2; 360 test pictures, one of which is 0.28 points), pictures that are wholly right:

                   every piece in its own best place     rounded by an assignment
    transport           85.0, 86.1, 86.4 %                  85.0, 86.1, 86.4 %
    softmax             57.8, 58.9, 58.3 %                  84.7, 86.7, 85.0 %

A network of the pixels of a piece scores it at every place (`models.jigsaw`). Its plan is an entropic transport plan, whose columns sum to one
as its rows do, or a softmax of every row. Trained through it, the network is asked for the logarithm of what part of each piece is put
where it fits: 0.20, 0.21, 0.20 against 0.32 for the softmax at the end.

What it shows. The softmax often puts two pieces in one place. An assignment (SciPy's, outside of the network) repairs that, in 27 % of all
pictures, and then both are the same: the scores that a softmax learns are as good. The transport layer needs no repair, so the matching is
there for whatever comes next in a network, and for its gradient.

The data are scikit-learn's 1797 digits of 8 x 8 pixels, split 80/20 with a fixed seed. The weights are those of the last step; nothing is
selected on the test pictures. The pieces of a picture that look alike (blank ones) may be exchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from .loop.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

Layer = Literal["transport", "softmax"]
LAYERS: tuple[Layer, ...] = get_args(Layer)


@dataclass(frozen=True)
class Config(RunConfig):
    layer: Literal["both", "transport", "softmax"] = "both"
    """What makes a plan of the scores: see models/jigsaw.py. `both` trains one after the other, and compares them."""
    grid: Literal[2, 4] = 2
    """Pieces along each side: 4 of 4 x 4 pixels, or 16 of 2 x 2."""
    width: int = 96
    context: bool = False
    """Whether a piece's scores depend on what the other pieces look like."""
    epsilon: float = 1.0
    """Weight of the entropy in the plan."""

    steps: int = 500
    batch_size: int = 64
    lr: float = 3e-3
    """Peak learning rate: linear warm-up over a tenth of the steps, then a cosine to zero."""
    weight_decay: float = 0.1
    seed: int = 0

    eval_every: int = field(default=50, kw_only=True)

    def __post_init__(self):
        if self.layer not in ("both", *LAYERS):
            raise ValueError(f"layer must be both, {' or '.join(LAYERS)}; {self.layer!r} is none of them.")
        self.check_at_least_one("width steps batch_size")
        if self.grid not in (2, 4):
            raise ValueError(f"grid must be 2 or 4, which divide 8 pixels into pieces, but is {self.grid}.")
        for name in ("epsilon", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}.")

    @property
    def name(self) -> str:
        return f"jigsaw-{self.grid}x{self.grid}-{self.seed}"


def cut(images: "np.ndarray", grid: int) -> "np.ndarray":
    """(k, 8, 8) to (k, places, pixels): the pieces in order, row by row."""
    side = images.shape[1] // grid
    blocks = images.reshape(-1, grid, side, grid, side).swapaxes(2, 3)
    return blocks.reshape(len(images), grid * grid, side * side)


def shuffled(pieces: "np.ndarray", rng) -> "tuple[np.ndarray, np.ndarray]":
    """The pieces of every picture in a random order, and which piece fits which place: (k, n, n), 1 where a piece looks as the one there did.

    A piece fits several places if the picture has several pieces that are the same: blank ones, mostly.
    """
    import numpy as np

    order = np.argsort(rng.random(pieces.shape[:2]), axis=1)
    mixed = np.take_along_axis(pieces, order[:, :, None], axis=1)
    fits = np.all(mixed[:, :, None, :] == pieces[:, None, :, :], axis=-1)
    return mixed, fits.astype(np.float32)


def assigned(plans: "np.ndarray", fits: "np.ndarray") -> "np.ndarray":
    """Every plan rounded to the assignment of largest sum: for each piece, whether it fits where it was put (k, n)."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    places = np.stack([linear_sum_assignment(plan, maximize=True)[1] for plan in plans])
    return np.take_along_axis(fits, places[:, :, None], axis=2)[..., 0] > 0


def put_by_choice(plans: "np.ndarray", fits: "np.ndarray") -> "np.ndarray":
    """Every piece in its own best place: for each picture, whether all fit, and no place was taken twice (k,)."""
    import numpy as np

    places = np.argmax(plans, axis=2)
    taken_once = np.all(np.sort(places, axis=1) == np.arange(plans.shape[2]), axis=1)
    return taken_once & np.all(np.take_along_axis(fits, places[:, :, None], axis=2)[..., 0] > 0, axis=1)


def draw(pieces: "np.ndarray", batch_size: int, seed: int) -> "Callable[[int], tuple[np.ndarray, np.ndarray]]":
    """A function from the step to its batch, a pure one (see `fit`)."""
    import numpy as np

    from .loop.data import shuffled_batches

    pictures = shuffled_batches((pieces,), batch_size, seed)
    return lambda step: shuffled(pictures(step)[0], np.random.default_rng((seed, step)))


def train(config: Config) -> "dict[str, dict[str, float]]":
    """The runs, or what is left of them: the figures on the test pictures, by layer."""
    import time

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    from models.jigsaw import Jigsaw, JigsawConfig

    from .loop.data import sklearn_digits
    from .loop.devices import start
    from .loop.fit import fit

    began = time.perf_counter()
    mesh = start(config.devices)
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices, but is {config.batch_size}.")
    (train_images, _), (test_images, _) = sklearn_digits()
    pieces, test_pieces = cut(train_images, config.grid), cut(test_images, config.grid)
    mixed, fits = shuffled(test_pieces, np.random.default_rng(0))
    model_key, train_key = jr.split(jr.key(config.seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, max(1, config.steps // 10), config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))

    def surprise(plan, fits):
        """Minus the mean logarithm of how much of a piece is put where it fits."""
        right = jnp.sum(plan * fits, axis=1)
        return -jnp.mean(jnp.log(jnp.maximum(right, 1e-12)))

    def loss(model, batch, key):
        del key
        plans = jax.vmap(model)(batch[0])
        return jnp.mean(jax.vmap(surprise)(plans, batch[1])), {}

    plans_of = eqx.filter_jit(lambda model: jax.vmap(model)(mixed))

    def evaluate(model):
        plans = plans_of(model)
        right = assigned(np.asarray(plans), fits)
        yield "test/loss", float(jnp.mean(jax.vmap(surprise)(plans, fits)))
        yield "test/pieces", float(np.mean(right))
        yield "test/pictures", float(np.mean(np.all(right, axis=1)))
        yield "test/by choice", float(np.mean(put_by_choice(np.asarray(plans), fits)))

    chosen = LAYERS if config.layer == "both" else (config.layer,)
    results, plans = {}, {}
    for layer in chosen:
        fields = {"width": config.width, "context": config.context, "layer": layer, "epsilon": config.epsilon}
        model = Jigsaw(JigsawConfig(pieces.shape[1], pieces.shape[2], **fields), key=model_key)
        state = fit(
            model,
            optimizer,
            loss,
            draw(pieces, config.batch_size, config.seed),
            steps=config.steps,
            directory=config.directory / layer,
            config=replace(config, layer=layer).identity(),
            mesh=mesh,
            key=train_key,
            evaluate=evaluate,
            log_every=config.log_every,
            eval_every=config.eval_every,
            save_every=config.save_every,
            resume=config.resume,
            tensorboard=config.tensorboard,
        )
        results[layer] = dict(evaluate(state.model))
        plans[layer] = np.asarray(plans_of(state.model))

    files = [f"{layer}/" for layer in chosen]
    if config.plots:
        from .loop.jigsaw_plots import plot_jigsaw

        runs = {layer: config.directory / layer for layer in chosen}
        plot_jigsaw(test_pieces, mixed, plans, fits, runs, config.directory / "jigsaw.png")
        files.append("jigsaw.png")
    print(f"\n{len(mixed)} test pictures   pieces right   pictures right   without assignment   loss")
    for layer, result in results.items():
        shares = f"{result['test/pieces']:<15.1%}{result['test/pictures']:<17.1%}{result['test/by choice']:<21.1%}"
        print(f"{layer:<20}{shares}{result['test/loss']:.3f}")
    seconds = time.perf_counter() - began
    print(f"time         {seconds:.1f} s with compilation, on {mesh.size} {jax.default_backend()} device(s)")
    print(f"files        {config.directory.resolve()}: {', '.join(files)}")
    return results


def main(args: list[str] | None = None) -> None:
    import tyro

    train(tyro.cli(Config, args=args, prog="python -m train.jigsaw", description=__doc__))


if __name__ == "__main__":
    main()
