"""What the kernels take of a GPU of compute capability 9.0, read from code that is compiled without one.

    python -m app.models.cuda.resources [LAYER ...]

prints a table, of all layers in `SHAPES` or of those that are named: registers, spills and shared memory as
ptxas gives them, matrix instructions, the share of bytes that come 16 at a time, and what follows for a
multiprocessor: how many programs run on it at once, and how many bytes of keys and values are on their way to
it at least.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from app.models.cuda.attention import attend, merge
from app.models.cuda.blocks import Blocks, constants, merge_constants, row_blocks, tile_blocks
from app.models.cuda.kv_write import write, write_constants, write_warps
from app.prompt import LayerGeometry

# Of one multiprocessor of an H100 or H200.
REGISTERS = 64 * 1024
SHARED_BYTES = 228 * 1024  # a program can have 227 KB of it, and each takes 1 KB more
MAX_THREADS = 2048
_THREADS_PER_WARP = 32
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TARGET = GPUTarget("cuda", 90, _THREADS_PER_WARP)
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

SHAPES = {
    "Qwen2 0.5B": LayerGeometry(2, 64, 64, queries_per_kv=7),
    "Llama 8B": LayerGeometry(8, 128, 128, queries_per_kv=4),
    "Gemma 2 9B": LayerGeometry(8, 256, 256, queries_per_kv=2, softcap=50.0, window=4096),
    "gpt-oss 20B": LayerGeometry(8, 64, 64, queries_per_kv=8, has_sinks=True, window=128),
    "GPT-2": LayerGeometry(12, 64, 64),
    "Phi 2": LayerGeometry(32, 80, 80),
    "width 96, 3 queries": LayerGeometry(8, 96, 96, queries_per_kv=3),
    "DeepSeek V3": LayerGeometry(128, 192, 128),
    "StarCoder": LayerGeometry(1, 128, 128, queries_per_kv=48),
    "T5 decoder": LayerGeometry(12, 64, 64, has_position_bias=True),
    "T5 encoder": LayerGeometry(12, 64, 64, is_causal=False, has_position_bias=True),
}


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    kernel: str
    sizes: str  # of its blocks
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a program
    matrix: str  # kind of its matrix instructions
    wide: float  # share of bytes that come 16 at a time, of those copied to shared memory or else loaded
    programs: int  # on a multiprocessor at once
    in_flight: int | None  # bytes of keys and values on their way to a multiprocessor, at least


def resources(geometry: LayerGeometry, dtype: torch.dtype) -> Iterator[Resources]:
    """Compile all kernels for layers of one geometry."""
    kinds = (("rows", row_blocks(geometry, dtype)), ("tiles", tile_blocks(geometry, dtype)))
    for kind, blocks in kinds:
        yield attend_resources(geometry, dtype, blocks, is_row=kind == "rows")
    signature = dict.fromkeys(("partial_output", "partial_maximum", "partial_sum"), "*fp32")
    signature |= _given(geometry, dtype) | {"output": f"*{_TYPES[dtype]}", "partial_begin": "*i32"}
    yield _read("merge", merge, signature, merge_constants(geometry), 4, 3)
    signature = dict.fromkeys(("keys", "values", "key_pool", "value_pool"), f"*{_TYPES[dtype]}")
    sides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride")
    signature |= {"slots": "*i64"} | dict.fromkeys(sides, "i32")
    widths = (geometry.num_kv_heads, geometry.key_dim, geometry.value_dim)
    yield _read("write", write, signature, write_constants(*widths), write_warps(*widths), 3)


def attend_resources(
    geometry: LayerGeometry, dtype: torch.dtype, blocks: Blocks, *, is_row: bool
) -> Resources:
    """Compile the attention kernel with these blocks."""
    numbers = f"*{_TYPES[dtype]}"
    signature = dict.fromkeys(("query", "keys", "values", "output"), numbers) | _given(geometry, dtype)
    signature |= dict.fromkeys(("partial_output", "partial_maximum", "partial_sum"), "*fp32")
    signature |= dict.fromkeys(("items", "query_rows", "slots", "partial_begin"), "*i32")
    signature |= dict.fromkeys(("query_head_stride", "query_token_stride", "furthest", "window"), "i32")
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    given = constants(geometry, blocks, is_row=is_row)
    name = "rows" if is_row else "tiles"
    found = _read(name, attend, signature, given, blocks.num_warps, blocks.num_stages)
    block_bytes = blocks.keys * (geometry.key_dim + geometry.value_dim) * dtype.itemsize
    in_flight = found.programs * max(blocks.num_stages - 2, 1) * block_bytes
    sizes = f"{blocks.rows}x{blocks.keys}, {blocks.num_warps} warps, {blocks.num_stages} stages"
    return found._replace(sizes=sizes, in_flight=in_flight)


def _given(geometry: LayerGeometry, dtype: torch.dtype) -> dict[str, str]:
    """Return the types of what not every layer has."""
    return {
        "sinks": f"*{_TYPES[dtype]}" if geometry.has_sinks else "constexpr",
        "position_bias": "*fp32" if geometry.has_position_bias else "constexpr",
    }


def _read(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    given: Mapping[str, int | bool],
    num_warps: int,
    num_stages: int,
) -> Resources:
    signature = {each: "constexpr" if each in given else types[each] for each in kernel.arg_names}
    absent = {each: None for each, kind in signature.items() if kind == "constexpr" and each not in given}
    is_aligned = [kind.startswith("*") or each.endswith("stride") for each, kind in signature.items()]
    aligned = {(place,): [["tt.divisibility", 16]] for place, each in enumerate(is_aligned) if each}
    source = ASTSource(kernel, signature, {**given, **absent}, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled: Any = triton.compile(source, target=_TARGET, options=options)
    registers, stack, local = _usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    threads = num_warps * _THREADS_PER_WARP
    programs = min(
        REGISTERS // (-(-registers // 8) * 8 * threads),
        SHARED_BYTES // (shared + 1024),
        MAX_THREADS // threads,
    )
    ptx = compiled.asm["ptx"]
    return Resources(name, "", registers, stack + local, shared, _matrix(ptx), _wide(ptx), programs, None)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, bytes of stack and of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_BIN / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]), int(found[3])


def _matrix(ptx: str) -> str:
    return next((kind for kind in ("wgmma", "mma.sync") if kind in ptx), "none")


def _wide(ptx: str) -> float:
    """Return the share of bytes that come 16 at a time, of those copied to shared memory or else loaded."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+),", ptx)
    loads = re.findall(r"ld\.global(?:\.[a-z]\w*?)*?(?:\.v(\d))?\.[bfu](\d+) ", ptx)
    sizes = [int(size, 16) for size in copies] or [int(count or 1) * int(bits) // 8 for count, bits in loads]
    return sum(size for size in sizes if size == 16) / sum(sizes)


def table(names: Collection[str]) -> Iterator[str]:
    """Yield the lines of a table: every kernel for each of these shapes."""
    yield (
        f"{'layer':20} {'dtype':9} {'kernel':6} {'blocks':26} reg spill   shared matrix   16 B run in flight"
    )
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            for each in resources(SHAPES[name], dtype):
                in_flight = "" if each.in_flight is None else f"{each.in_flight // 1024} KB"
                yield (
                    f"{name:20} {str(dtype)[6:]:9} {each.kernel:6} {each.sizes:26} {each.registers:3} "
                    f"{each.spilled:5} {each.shared:8} {each.matrix:8} {each.wide:.2f} {each.programs:3} "
                    f"{in_flight:>9}"
                )


def main() -> None:
    """Print the table for the layers that are named, or for all."""
    parser = argparse.ArgumentParser(prog="python -m app.models.cuda.resources", description=__doc__)
    parser.add_argument("layers", nargs="*", metavar="LAYER", help=f"default: all of {', '.join(SHAPES)}")
    names = parser.parse_args().layers
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(SHAPES)}")
    for line in table(names or SHAPES):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
