"""Sinkhorn's algorithm, run to the end: what the transport nodes are compared with."""

import numpy as np
import scipy.special


def sinkhorn(C, a, b, epsilon, rho=None):
    """The plan: potentials by alternation, in logarithms, and by Newton's method with a dense Jacobian for the last digits."""
    C, a, b = (np.asarray(array, np.float64) for array in (C, a, b))
    n, m = C.shape
    tau = 1.0 if rho is None else rho / (rho + epsilon)
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a)[:, None], np.log(b)[None, :]

    def best(terms, axis):
        """What (K1) or (K2) makes of a potential, 0 where nothing takes part; the shares of the terms."""
        logs = np.asarray(scipy.special.logsumexp(terms, axis=axis, keepdims=True))
        some = np.isfinite(logs)
        shares = np.where(some, np.exp(terms - np.where(some, logs, 0)), 0)
        return np.where(some, -tau * logs, 0).reshape(-1), shares

    rows = lambda gamma: best(log_b + gamma[None, :] - C / epsilon, 1)
    columns = lambda phi: best(log_a + phi[:, None] - C / epsilon, 0)
    phi = np.zeros(n)
    gamma = columns(phi)[0]
    for _ in range(3000):
        gamma = columns(phi)[0]
        new = rows(gamma)[0]
        moved, phi = np.max(np.abs(new - phi)), new
        if moved < 1e-13:
            break
    for _ in range(4):
        (of_rows, R), (of_columns, S) = rows(gamma), columns(phi)
        jacobian = np.block([[np.eye(n), tau * R], [tau * S.T, np.eye(m)]])
        # For tau = 1 a constant is free: the shortest step leaves it alone.
        step = np.linalg.lstsq(jacobian, np.concatenate([of_rows - phi, of_columns - gamma]), rcond=1e-13)[0]
        phi, gamma = phi + step[:n], gamma + step[n:]
    with np.errstate(invalid="ignore"):
        plan = np.exp(log_a + log_b + phi[:, None] + gamma[None, :] - C / epsilon)
    return np.where((a > 0)[:, None] & (b > 0), plan, 0)
