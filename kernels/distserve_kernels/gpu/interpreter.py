"""Runs the kernels without a GPU, in triton's interpreter, for tests and rehearsals."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined"

import os
import sys


def interpret() -> None:
    """Has this process interpret every triton kernel, on CPU tensors. To be called before triton is imported.

    Raises ImportError without triton, RuntimeError if it was imported already: its own library is compiled then.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError("triton is imported already: interpretation has to be chosen before")
        os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # A GPU says nothing when exp overflows to infinity.
    np.seterr(over="ignore", divide="ignore", invalid="ignore")
    patch_tensor = interpreter._patch_lang_tensor  # noqa: SLF001  triton has no public hook

    def patch(tensor, scope):
        # NumPy 2.4 refuses int() of the arrays of one element that triton 3.6 keeps scalars in.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle):
        # triton 3.6 keeps bfloat16 as 16-bit integers, and would multiply those.
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = patch  # noqa: SLF001
    interpreter.InterpreterBuilder.create_dot = create_dot
