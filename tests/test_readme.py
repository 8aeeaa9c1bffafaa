"""The README's code runs as it stands, and a user's own node of under 20 lines passes the whole check kit."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_example_gives_the_numbers_beside_it():
    import jax.numpy as jnp
    import numpy as np

    lines = blocks()[0].splitlines()
    scope = {}
    exec("\n".join(lines), scope)
    first = next(line for line in lines if line.startswith("sparsemax("))
    np.testing.assert_allclose(np.asarray(eval(first.split("#")[0], scope)), [0.65, 0.35, 0.0], atol=1e-12)
    last = next(line for line in lines if line.startswith("jax.vmap"))
    np.testing.assert_allclose(np.asarray(eval(last.split("#")[0], scope)), [0.682, 0, 3], atol=1e-3)
    assert jnp.isfinite(eval(next(line for line in lines if line.startswith("jax.grad")).split("#")[0], scope))


@pytest.mark.full
def test_the_readme_node_passes_the_check_kit(capsys):
    (block,) = [block for block in blocks() if "class Ridge" in block]
    body = block[block.index("class Ridge") : block.index("A, b = ")]
    assert len([line for line in body.splitlines() if line.strip()]) < 20
    exec(block, {"__name__": "readme"})
    assert "FAIL" not in capsys.readouterr().out


def test_the_readme_node_passes_the_fast_tier():
    (block,) = [block for block in blocks() if "class Ridge" in block]
    exec(block.replace("jnp.array(0.1)))", "jnp.array(0.1)), full=False)"), {"__name__": "readme"})
