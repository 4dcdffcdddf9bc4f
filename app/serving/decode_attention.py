"""Attention of single new tokens on a CPU, in C: decode_attention.c, compiled when it is first wanted.

torch's own kernel is made for many new tokens: for one it packs all cached keys and values again in each pass. In
bfloat16, 16 replies, 4 heads of 64 and 192 positions took it 470 microseconds a layer on two cores, this one 70 on one.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
MAX_HEAD_SIZE = 512
"""As decode_attention.c has it."""
NAMES = {torch.float32: "attend_float", torch.bfloat16: "attend_bfloat16"}
LARGE_WORK = 2**23
"""Products for which the interpreter is given away, some hundred microseconds."""
WORK_OF_A_THREAD = 2**16
"""Products for which a second thread is not woken."""


class DecodeAttention:
    """The compiled function.

    Args:
        library: decode_attention.c as a shared library.
    """

    def __init__(self, library: Path) -> None:
        # A small call takes microseconds: giving the interpreter away and waiting for it would take longer.
        self._functions, self._large = (_functions(make(str(library))) for make in (ctypes.PyDLL, ctypes.CDLL))

    def takes(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether it can do this; shapes as for calling it."""
        return (
            query.dtype in self._functions
            and query.dtype == keys.dtype == values.dtype
            and query.shape[2] == keys.shape[3] == values.shape[3] <= MAX_HEAD_SIZE
            and keys.stride() == values.stride()
            and keys.stride(3) == 1
            and keys.stride(2) == keys.shape[3]
        )

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attend; the result of a token depends on nothing but its own numbers.

        Args:
            query: (tokens, heads, size).
            keys: (rows, heads or fewer, positions, size), each head's positions one after another.
            values: As `keys`.
            rows: (tokens,), int64, of the keys and values that each token attends to.
            lengths: (tokens,), int64, to how many positions of it.
            scale: Of the scores.

        Returns:
            (tokens, heads, size).
        """
        tokens, heads, size = query.shape
        query = query.contiguous()
        output = torch.empty_like(query)
        longest = int(lengths.max()) if tokens else 1
        work = tokens * heads * longest * size
        threads = torch.get_num_threads() if work > WORK_OF_A_THREAD else 1
        scratch = torch.empty(threads * longest, dtype=torch.float32)
        function = (self._large if work > LARGE_WORK else self._functions)[query.dtype]
        function(
            output.data_ptr(), query.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(),
            lengths.data_ptr(), tokens, heads, keys.shape[1], size, keys.stride(0), keys.stride(1),
            scale, scratch.data_ptr(), longest, threads,
        )  # fmt: skip
        return output


def _functions(loaded: ctypes.CDLL) -> dict[torch.dtype, Any]:
    found = {dtype: getattr(loaded, name) for dtype, name in NAMES.items()}
    for function in found.values():
        function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6
        function.argtypes += [ctypes.c_float, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        function.restype = None
    return found


@functools.cache
def decode_attention() -> DecodeAttention | None:
    """The function, compiled now if no process of this machine has done so; none without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.warning("there is no C compiler: attention is torch's own, which is several times as slow")
        return None
    try:
        return DecodeAttention(_library(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr[-500:] if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("decode_attention.c cannot be compiled, attention is torch's own, which is slower: %s", said)
        return None


def _library(compiler: str) -> Path:
    """The shared library; its name tells what it was made of and for which processor."""
    made_of: list[Any] = [SOURCE.read_text(), FLAGS, compiler, platform.machine(), _processor()]
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "rayloop")) / "decode_attention"
    library = folder / f"{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, library.name)
            compiled = made.with_suffix(".o")
            # Linked apart: where a library is linked with -ffast-math, loading it sets the whole process to take
            # numbers that are nearly 0 for 0.
            for command in (
                [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
                [compiler, "-shared", "-fopenmp", str(compiled), "-o", str(made), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            made.rename(library)  # whole, whoever else compiles it at this moment
    return library


def _processor() -> str:
    """What the processor can do, by which `-march=native` decides."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
