"""Imported before all that may import Triton: where there is no GPU, kernels are interpreted.

Most of the interpreter's time would go into what tells nothing here: whether integers overflow, which numbers of this
size cannot (GPUs do not ask either), and making the language that a function sees interpretable whenever it is called
by a kernel, after that was done for its module.
"""

import os
from dataclasses import replace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def hurry_interpreter() -> None:
    """Leave both out, if this Triton is one that does them."""
    try:
        from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

        interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
        prepared_call, rewritten = InterpretedFunction.__call__, InterpretedFunction.rewrite
    except (ImportError, AttributeError, TypeError):
        return
    prepared = set[str]()

    def call(self: Any, *given: Any, **named: Any) -> Any:
        if self.fn.__module__ in prepared:
            return rewritten(self)(*given, **named)
        prepared.add(self.fn.__module__)
        return prepared_call(self, *given, **named)

    InterpretedFunction.__call__ = call


hurry_interpreter()
