"""The check kit: what a declarative node promises, as one call that you can run on your own."""

from .check import CheckReport as CheckReport
from .check import check_node as check_node
