"""Rows of the table of nodes: proximal."""

from .row import Row

ROWS: list[Row] = []
