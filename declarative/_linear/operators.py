"""A block of a problem is an array, a vector that stands for a diagonal, or a lineax operator: products with either."""

import jax
import jax.numpy as jnp
import lineax as lx
from jax.experimental.sparse import JAXSparse
from jaxtyping import Array, Float

Block = Float[Array, "..."] | lx.AbstractLinearOperator


def is_operator(block) -> bool:
    return isinstance(block, lx.AbstractLinearOperator)


def as_operator(block) -> lx.AbstractLinearOperator:
    """Dense matrices, diagonals given as vectors, JAX's sparse matrices, and operators as they are."""
    if is_operator(block):
        return block
    if isinstance(block, JAXSparse):
        column = jax.ShapeDtypeStruct((block.shape[1],), block.dtype)
        return lx.FunctionLinearOperator(lambda vector: block @ vector, column)
    block = jnp.asarray(block)
    return lx.DiagonalLinearOperator(block) if block.ndim == 1 else lx.MatrixLinearOperator(block)


def mv(block: Block, vector: Float[Array, " n"]) -> Float[Array, " m"]:
    if isinstance(block, lx.AbstractLinearOperator):
        return block.mv(vector)
    return block @ vector


def vm(vector: Float[Array, " m"], block: Block) -> Float[Array, " n"]:
    if isinstance(block, lx.AbstractLinearOperator):
        return block.transpose().mv(vector)
    return vector @ block


def symmetric_mv(block: Block, vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """Product with the symmetric part; a vector is a diagonal."""
    if isinstance(block, lx.AbstractLinearOperator):
        product = block.mv(vector)
        return product if lx.is_symmetric(block) else (product + block.transpose().mv(vector)) / 2
    return block * vector if block.ndim == 1 else (block @ vector + vector @ block) / 2
