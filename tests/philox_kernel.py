"""The words of masks as Triton itself would draw them; a kernel's source must lie in a file."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seed", "row", "low", "high"])
def words_kernel(words, seed, row, low, high, UNITS: tl.constexpr):
    fours = tl.arange(0, UNITS // 4).to(tl.uint32)
    zeros = fours * 0
    parts = tl.philox(seed, fours, zeros + row.to(tl.uint32), zeros + low.to(tl.uint32), zeros + high.to(tl.uint32))
    for part in tl.static_range(4):
        tl.store(words + 4 * tl.arange(0, UNITS // 4) + part, parts[part].to(tl.int64))
