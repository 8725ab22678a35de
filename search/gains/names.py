"""The names of the gain methods, and what their gains are. Nothing heavy is imported."""

from pathlib import Path

from surgeon.errors import ConfigError
from surgeon.util.near import did_you_mean

DECREASE = "predicted decrease of the loss"
# The methods that use gradients only, and what their gains are
ESTIMATORS = {
    "gradient": "norm of the gradient",
    "fisher": "squared gradient / Fisher information, summed over parameters",
    "snr": "signal-to-noise ratio of the gradient",
    "nqm": DECREASE,
}
TRAINED = ("probe", "halving", "ablation")  # methods that train
LEAST_BATCHES = 4  # for a standard error over batches
METHODS = (*ESTIMATORS, *TRAINED)
LEAST_SEEDS = 2  # of the methods that train: their standard error is over seeds


def check_method(name: str) -> None:
    """Raise `ConfigError` unless there is a method of this name."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"there is no gain method {name!r}; there are {known}.{did_you_mean(name, METHODS)}")


def check_gains(what: str) -> None:
    """Raise `ConfigError` unless this is a file, "uniform", or a method."""
    known = ("uniform", *METHODS)
    if what not in known and not Path(what).is_file():
        raise ConfigError(
            f"--gains: {what!r} is neither a file nor one of {', '.join(known)}.{did_you_mean(what, known)}"
        )
