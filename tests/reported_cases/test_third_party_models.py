"""Models of other libraries are converted exactly. Slow, and installs nothing: what is not there is skipped with the reason."""

import pytest

from benchmarks import third_party

pytestmark = [
    pytest.mark.slow,  # minutes, and libraries that the project does not depend on
    pytest.mark.filterwarnings("default"),  # theirs are not ours
]


@pytest.mark.parametrize("kind", third_party.TYPES)
@pytest.mark.parametrize("entry", third_party.MODELS, ids=lambda entry: entry.key)
def test_a_model_of_another_library_converts_exactly(entry: third_party.Model, kind: str) -> None:
    """All spatial convolutions, outputs compared on other inputs, every convolution in the report, a training step."""
    if why := third_party.missing(entry.library):
        pytest.skip(f"the test converts a network of a library that surgeon itself does not use, and {why}")
    assert third_party.check(entry, kind)["failures"] == []
