"""Marks for tests that compile."""

from __future__ import annotations

import pytest
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler


def has_compiler() -> bool:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
