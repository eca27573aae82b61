"""The console over the server of `recipes/demo.yaml`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demonstration import Demo, demonstrating


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demonstrating(tmp_path_factory.mktemp("demo")) as running:
        yield running
