"""Plain float64 torch twins of every op: slow, short, independent of the native code. The tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

# --- transforms ---------------------------------------------------------------------------------------------------

# --- attention ----------------------------------------------------------------------------------------------------

# --- linalg -------------------------------------------------------------------------------------------------------
