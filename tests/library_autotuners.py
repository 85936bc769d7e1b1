"""Libraries with autotuners in tests: without timing every configuration, and in Triton's interpreter."""

from __future__ import annotations

import builtins
import sys


def take_first_configurations() -> None:
    """Autotuners take their first configuration; timing all of them takes more than a minute."""
    import triton

    triton.runtime.autotuner.Autotuner._bench = lambda self, *args, config=None, **others: [0.0, 0.0, 0.0]


def make_autotuners_work() -> None:
    """Before fla is imported: a driver for the CPU, which autotuners ask for."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return "void*"

        def get_current_target(self):
            return GPUTarget("cpu", 0, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            return lambda call, quantiles=None, **others: [0.0, 0.0, 0.0]

        def get_current_device(self):
            return 0

        def get_device_interface(self):
            return torch.cpu

    triton.runtime.driver.set_active(Driver())


class _Number(int):
    """A loop variable that can be cast, as in compiled kernels."""

    def to(self, *args, **others):
        return self


def _numbers(*bounds):
    for number in builtins.range(*[int(bound) for bound in bounds]):
        yield _Number(number)


def make_loops_work() -> None:
    """After fla is imported: the interpreter's loops give plain numbers, which kernels cast."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and hasattr(module, "triton") and "range" not in vars(module):
            module.range = _numbers
