"""One training run in a process of its own: `python -m tests.train_worker CONFIG_JSON FINAL.npz`. The final state's arrays go to FINAL.npz."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from train.digits import Config, train


def main() -> None:
    warnings.simplefilter("error")
    config = json.loads(sys.argv[1])
    for name in ("out", "data"):
        config[name] = Path(config[name])
    state, _ = train(Config(**config))

    import equinox as eqx
    import jax
    import numpy as np

    if jax.process_index() == 0:
        arrays = jax.tree.map(
            lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
            eqx.filter(state, eqx.is_array),
        )
        leaves: dict[str, Any] = {
            jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(arrays)
        }
        np.savez(sys.argv[2], **leaves)


if __name__ == "__main__":
    main()
