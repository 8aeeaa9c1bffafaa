"""Rows of the table of nodes: polytopes."""

from .row import Row

ROWS: list[Row] = []
