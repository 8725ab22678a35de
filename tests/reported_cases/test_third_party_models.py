"""Models of other libraries are converted exactly. Slow, and installs nothing: libraries that are not there are skipped by mark."""

import pytest

from benchmarks import third_party

pytestmark = [
    pytest.mark.slow,  # minutes, and libraries that the project does not depend on
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]


ENTRIES = [
    pytest.param(
        entry, id=entry.key, marks=pytest.mark.skipif(why is not None, reason=f"{why}: no dependency of surgeon")
    )
    for entry in third_party.MODELS
    for why in [third_party.missing(entry.library)]
]


@pytest.mark.parametrize("kind", third_party.TYPES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_of_another_library_converts_exactly(entry: third_party.Model, kind: str) -> None:
    """All spatial convolutions, outputs compared on other inputs, every convolution in the report, a training step."""
    assert third_party.check(entry, kind)["failures"] == []
