"""What tests of a GPU share: they run in one process, since a fork cannot use CUDA."""

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def own_accelerator() -> None:
    """accelerate keeps device and precision of a process: each test chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
