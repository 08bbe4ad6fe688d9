"""How near vectors are to others."""

from __future__ import annotations

from typing import Any

import numpy as np


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Fails unless every number is as near as the tolerance."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=tolerance, rtol=0)
