"""The layer between LLM inference engines and the hardware.

>>> import makeready as mr
>>> decided = mr.plan("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", platform="xpu")
>>> decided.block_size
2112
"""

from .config import EngineConfig
from .errors import MakereadyError
from .startup import launch, plan, prepare

__version__ = "0.1.0"

__all__ = ["EngineConfig", "MakereadyError", "__version__", "launch", "plan", "prepare"]
