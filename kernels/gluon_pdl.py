"""`wait_for_previous` of pdl.py for kernels in Gluon, which has no such functions of its own."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_for_previous():
    """Wait until the kernels before have ended, and let the next one start.

    Does nothing in a kernel that was not launched early.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
