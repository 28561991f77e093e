"""What several tests of models need."""

import pytest

from tests.helpers import write_dinov2


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory) -> str:
    """The folder of a DINOv2; do not change it."""
    return str(write_dinov2(tmp_path_factory.mktemp("dinov2")))
