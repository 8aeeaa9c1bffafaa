"""Deep declarative networks for JAX and Equinox: layers defined by a problem, differentiated through its optimality conditions."""

from ._core.adjoint import AbstractAdjoint as AbstractAdjoint
from ._core.adjoint import ImplicitAdjoint as ImplicitAdjoint
from ._core.adjoint import NeumannAdjoint as NeumannAdjoint
from ._core.adjoint import OneStepAdjoint as OneStepAdjoint
from ._core.adjoint import UnrolledAdjoint as UnrolledAdjoint
from ._core.adjoint import modes as modes
from ._core.failure import SolveError as SolveError
from ._core.health import Health as Health
from ._core.health import value_and_grad_with_health as value_and_grad_with_health
from ._core.implicit import LinearSystem as LinearSystem
from ._core.implicit import Run as Run
from ._core.node import AbstractDeclarativeNode as AbstractDeclarativeNode
from ._core.node import Policy as Policy
from ._core.node import Solution as Solution
from ._core.node import envelope as envelope
from ._core.results import RESULTS as RESULTS
