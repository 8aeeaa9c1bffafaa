"""The check kit over the table of nodes."""

import jax
import pytest

from declarative.testing import check_node

from .rows import CASES, ROWS, case_id


def _check(row, adjoint, full):
    node = row.node(adjoint=adjoint)
    options = {"y0": row.y0, "reference": row.reference, "feasible": row.feasible, "failures": row.failures}
    return check_node(node, row.x, **options, unrolled=row.unrolled, full=full)


FAST = [pytest.param(row, marks=[pytest.mark.slow] * row.slow, id=str(row)) for row in ROWS if row.fast]


@pytest.mark.parametrize("row", FAST)
def test_node(row):
    """The fast tier: nodes of every kind under their default adjoint; first order, batches, failures. Rows that are like another: below."""
    _check(row, None, full=False)


@pytest.fixture
def forget_each():
    """As `forget_compiled_programs`: the whole table in one process compiles more programs than a process has room for."""
    yield
    jax.clear_caches()


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_node_full(case, forget_each):
    """Every node under each of its adjoints: second order, low precision and exports as well."""
    _check(*case, full=True)
