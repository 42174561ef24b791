"""The CUDA runtime. Importing it, or any of its modules, touches no GPU and none of NVIDIA's packages.

They are loaded when a CudaDevice is opened or a Compiler compiles; see driver.load.
"""

from __future__ import annotations
