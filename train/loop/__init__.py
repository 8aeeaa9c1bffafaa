"""What the training scripts share, one idea a file.

    config.py       the fields that every run has
    fit.py          the loop: one flat function around one jitted step
    devices.py      the mesh, and how batches and parameters are laid out on it
    data.py         batches as a pure function of (seed, step); readers for IDX and NPZ files
    baselines.py    what a density model has to beat
    checkpoint.py   configuration and state on disk, and exact resumption
    log.py          metrics as JSON lines and TensorBoard events
    plots.py        figures of a finished run

Nothing is imported here, so that a script can parse its command line before JAX starts.
"""
