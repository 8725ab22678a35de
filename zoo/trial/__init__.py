"""Does a conversion pay off? Trains original and converted alike and compares them by paired seeds: `try_conversion`."""

from surgeon.zoo.trial.answer import Answer, standard_error, verdict, with_error
from surgeon.zoo.trial.run import try_conversion
from surgeon.zoo.trial.twins import TryConfig

__all__ = ["Answer", "TryConfig", "standard_error", "try_conversion", "verdict", "with_error"]
