"""Whole models, one file each: an `eqx.Module` and its frozen config. They use the public API of `declarative` only."""
