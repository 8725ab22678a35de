"""A note where few samples judge, of every command that compares networks."""

from surgeon.util.tables import counted

FEW = 20  # judging samples


def few_judge(samples: int, told: str, *, whole: int | None = None, hint: str | None = None) -> str | None:
    """A note that few samples judge, with what follows from that (`told`) and what helps (`hint`, by default a larger val/).

    None if there are enough. `whole`: how many there are, if not all judge.
    """
    if samples >= FEW:
        return None
    of = "" if whole is None else f" of {whole}"
    return f"only {counted(samples, 'sample')}{of} judge{'s' * (samples == 1)}: {told}; {hint or 'a larger val/ tells more'}"
