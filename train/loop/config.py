"""What every run is asked: where it goes, how often it reports, on how many devices. The scripts' own fields come beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that do not change the result, and what follows from them. A script's `Config` adds its own fields and `name`."""

    out: Path | None = None
    """The run's folder, where a run that was interrupted is resumed. Default: in runs/, named after what is trained."""
    resume: bool = True
    """With --no-resume a folder that already holds a run is an error."""
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 500
    tensorboard: bool = True
    plots: bool = True
    devices: int | None = None
    """Devices to spread each batch over (default: all)."""

    free: ClassVar[str] = "out resume log_every eval_every save_every tensorboard plots devices"

    @property
    def name(self) -> str:
        """The folder's name, if none was given."""
        raise NotImplementedError

    @property
    def directory(self) -> Path:
        return self.out if self.out is not None else Path("runs") / self.name

    def identity(self) -> dict[str, Any]:
        """The fields that determine the result: a folder holds one run of these. The others may change when it resumes."""
        kept = {k: v for k, v in asdict(self).items() if k not in self.free.split()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    def check_at_least_one(self, names: str) -> None:
        if getattr(self, "seed", 0) < 0:
            raise ValueError(f"seed must not be negative, but is {self.seed}.")  # pyright: ignore[reportAttributeAccessIssue]  (of the script's)
        for name in [*names.split(), "log_every", "eval_every", "save_every"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
