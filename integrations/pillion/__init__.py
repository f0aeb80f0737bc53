"""Pillion: a process that rides behind an inference engine and holds, moves and finds its KV cache.

The engine shims are in submodules (`pillion.vllm`); importing this package loads nothing else.
"""

__version__ = "0.1.0"
