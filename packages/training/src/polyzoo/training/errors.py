"""Why training stopped, as a code to search for and three lines to read: what, why, fix."""

from __future__ import annotations

from polyzoo.core.errors import PolyzooError


class TrainingError(PolyzooError):
    """A failure of a training run that a person can act on.

    Codes: E-CKPT-CORRUPT, E-CKPT-MISMATCH, E-CKPT-NONE, E-CKPT-DATA, E-RUN-EXISTS, E-DISK-FULL,
    E-NAN, E-OOM, E-LOSS, E-METRIC, E-DATA-EMPTY; with several processes or a drive also E-WORLD,
    E-PEER, E-HANG, E-GPU-PLAN, E-RAM-PLAN, E-DS-MISSING, E-DS-VERSION, E-OP-BUILD, E-AIO-LIB,
    E-NVME-PATH, E-NVME-SPACE, E-CONFIG-OPTIMIZER, E-LATE-GRADIENT. Each is explained in the
    package's README.

    Example:
        >>> raise TrainingError("E-NAN", "the loss is nan", "step 12", "lower optim.lr")
        Traceback (most recent call last):
        polyzoo.training.errors.TrainingError: E-NAN: the loss is nan
          why: step 12
          fix: lower optim.lr
    """

    def __init__(self, code: str, what: str, why: str, fix: str) -> None:
        super().__init__(code, what, why, fix)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.code}: {self.what}\n  why: {self.why}\n  fix: {self.fix}"
