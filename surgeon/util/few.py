"""A note where few samples judge, of every command that compares networks."""

from surgeon.util.tables import counted

FEW = 20  # judging samples
FEW_COUNTED = 100  # of a metric that counts them: each is a point
COUNTS = ("top1",)  # metrics that are shares of the judging samples


def enough(primary: str) -> int:
    """Judging samples of a metric that need no note."""
    return FEW_COUNTED if primary in COUNTS else FEW


def few_judge(
    samples: int, told: str, *, whole: int | None = None, hint: str | None = None, least: int = FEW
) -> str | None:
    """A note that few samples judge, with what follows from that (`told`) and what helps (`hint`, by default a larger val/).

    None if there are `least`. `whole`: how many there are, if not all judge.
    """
    if samples >= least:
        return None
    of = "" if whole is None else f" of {whole}"
    return f"only {counted(samples, 'sample')}{of} judge{'s' * (samples == 1)}: {told}; {hint or 'a larger val/ tells more'}"
