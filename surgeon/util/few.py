"""A note where few samples judge, of every command that compares networks."""

from surgeon.util.tables import counted

FEW = 20  # judging samples


def few_judge(samples: int, told: str) -> str | None:
    """A note that few samples judge, with what follows from that (`told`); None if there are enough."""
    if samples >= FEW:
        return None
    return f"only {counted(samples, 'sample')} judge{'s' * (samples == 1)}: {told}; a larger val/ tells more"
