"""What every benchmark here says about itself."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from typing import Any


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    installed = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **installed}


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that says whose machine it is."""
    import jax

    model = platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "os": platform.system()}
