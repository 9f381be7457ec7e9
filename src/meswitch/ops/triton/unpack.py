"""Codes to bf16 or fp16 levels in registers, for the Triton kernels.

A 16-bit float whose exponent is fixed holds an integer in its mantissa: `(word & mask) | magic` is two such floats, one
in each half of the word, and one fused multiply-add turns both into the exact levels `2 code - top`. A code at mantissa
bit p reads as `one + code * 2^p` (one = 2^7 in bf16, 2^10 in fp16); `2^(1-p) * that - (one * 2^(1-p) + top)` is its
level, and the constant is exact for p >= 1. So one shift brings three 2-bit codes (six 1-bit codes) of each half into
reach: 3 shifts, 8 LOP3 and 8 FMA for 16 weights of 2 bits.
"""

import struct

import triton.language as tl

_MANTISSA = {"bf16": 7, "fp16": 10}
_REACH = 6  # mantissa bits 1-6 hold codes; bf16 has no more, and fp16 keeps the same scheme


def unpack_asm(bits: int, dtype: str) -> str:
    """PTX that turns a pair of words into 32 / bits registers; register d holds both words' levels of code d.

    Args:
        bits: 1 or 2. dtype: `bf16` or `fp16`.
    """
    codes, per_shift, half_codes = 32 // bits, _REACH // bits, 16 // bits
    constants: dict[str, int] = {}
    lines: list[str] = []
    for half, selector in enumerate((0x5410, 0x7632)):  # the low halves of both words, then the high ones
        lines.append(f"prmt.b32 w, ${codes}, ${codes + 1}, {selector:#x};")
        for code in range(half_codes):
            first = code - code % per_shift
            if code == first:
                lines.append(f"shr.u32 s, w, {first * bits - 1};" if first else "shl.b32 s, w, 1;")
            p = 1 + (code - first) * bits
            lines += _level(f"${half * half_codes + code}", p, bits, dtype, constants)
    return _program(lines, constants)


def merge_asm() -> str:
    """PTX that adds the levels of two words' codes of 2 bits, times their scales, to two weights, all in bf16.

    $1, $2: the words. $3, $4: how far to turn each to the right so that its code is at bits 1 and 2. $5: the weights.
    $6: the scales. $0: the sums, rounded once: a level times a scale is exact inside the last fused multiply-add.
    """
    lines = [
        ".reg .b32 w, v, one;",
        "shf.r.wrap.b32 w, $1, $1, $3;",
        "shf.r.wrap.b32 v, $2, $2, $4;",
        "prmt.b32 w, w, v, 0x5410;",
        f"lop3.b32 w, w, {0x60006:#x}, {_pair(128.0, 'bf16'):#x}, 0xEA;",
        f"mov.b32 v, {_pair(-131.0, 'bf16'):#x};",
        f"mov.b32 one, {_pair(1.0, 'bf16'):#x};",
        "fma.rn.bf16x2 w, w, one, v;",
        "fma.rn.bf16x2 $0, w, $6, $5;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def restore_asm(step: int) -> str:
    """PTX that adds the levels of four codes of a pair of words, times a scale, to four pairs of weights, all in bf16.

    $4, $5: the words, whose codes 4 step to 4 step + 3 are meant. $6 to $9: the weights. $10: the scale, twice.
    $0 to $3: the sums, rounded once: a level times a scale is exact inside the last fused multiply-add.
    """
    constants: dict[str, int] = {}
    lines = [f"prmt.b32 w, $4, $5, {0x5410 if step < 2 else 0x7632:#x};"]
    for out in range(4):
        code = step % 2 * 4 + out  # of eight in a half
        first = code - code % 3
        if code == first or not out:
            lines.append(f"shr.u32 s, w, {first * 2 - 1};" if first else "shl.b32 s, w, 1;")
        p = 1 + (code - first) * 2
        lines += _level(f"${out}", p, 2, "bf16", constants)
        lines.append(f"fma.rn.bf16x2 ${out}, ${out}, $10, ${6 + out};")
    return _program(lines, constants)


def byte_asm(is_float: bool, dtype: str) -> str:
    """PTX that turns four bytes into four exact 16-bit floats: $2 into the pairs $0 and $1.

    A whole number's byte goes into the mantissa of a float that counts ones, below the high byte that makes it one: in
    bf16 as two floats, for its mantissa has no room for the sign bit, in fp16 with the sign bit turned. The bits of an
    FP8 number are moved to their places in the wider float, and a factor corrects its exponent.

    Args:
        is_float: the bytes are FP8 e4m3, none of them NaN; else int8.
        dtype: `bf16` or `fp16`.
    """
    kind, lines = ("bf16x2" if dtype == "bf16" else "f16x2"), list[str]()
    if is_float:
        shift, kept, factor = (4, 0x07F0, 2.0**120) if dtype == "bf16" else (1, 0x3F80, 2.0**8)
        constants = {"f": _pair(factor, dtype), "b": 0}
        for out, selector in enumerate((0x1404, 0x3424)):  # the high bytes of both halves
            lines += [
                f"prmt.b32 w, $2, 0, {selector:#x};",
                f"shr.u32 s, w, {shift};",
                f"and.b32 w, w, {0x80008000:#x};",
                f"lop3.b32 s, s, {kept * 0x10001:#x}, w, 0xEA;",
                f"fma.rn.{kind} ${out}, s, f, b;",
            ]
        return _program(lines, constants)
    if dtype == "fp16":
        constants = {"f": _pair(1.0, dtype), "b": _pair(-1152.0, dtype)}
        lines.append(f"xor.b32 s, $2, {0x80808080:#x};")
        for out, selector in enumerate((0x4140, 0x4342)):
            lines += [f"prmt.b32 w, s, 0x64, {selector:#x};", f"fma.rn.{kind} ${out}, w, f, b;"]
        return _program(lines, constants)
    for out, selector in enumerate((0x4140, 0x4342)):  # 128 + the low bits, less 128 or, where the sign bit is set, 256
        lines += [
            f"prmt.b32 w, $2, 0x43, {selector:#x};",
            f"and.b32 s, w, {0xFF7FFF7F:#x};",
            f"and.b32 w, w, {0xFF80FF80:#x};",
            f"fma.rn.{kind} ${out}, w, f, s;",
        ]
    return _program(lines, {"f": _pair(-1.0, dtype)})


def nibble_asm(is_high: bool, dtype: str) -> str:
    """PTX that turns four bytes into four 16-bit floats: the low or the high four bits of each, less 8; see `byte_asm`.

    Args:
        is_high: which four bits.
        dtype: `bf16` or `fp16`.
    """
    top, one = (0x43, 128.0) if dtype == "bf16" else (0x64, 1024.0)
    lines = [f"shr.u32 s, $2, {4 if is_high else 0};", f"and.b32 s, s, {0x0F0F0F0F:#x};"]
    for out, selector in enumerate((0x4140, 0x4342)):
        lines.append(f"prmt.b32 w, s, {top:#x}, {selector:#x};")
        lines.append(f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} ${out}, w, f, b;")
    return _program(lines, {"f": _pair(1.0, dtype), "b": _pair(-one - 8, dtype)})


def _level(out: str, p: int, bits: int, dtype: str, constants: dict[str, int]) -> list[str]:
    """PTX that puts the exact levels of the codes at mantissa bit p of both halves of `s` into `out`."""
    top, one = 2**bits - 1, 2.0 ** _MANTISSA[dtype]
    constants[f"f{p}"] = _pair(2.0 ** (1 - p), dtype)
    constants[f"b{p}"] = _pair(-(one * 2.0 ** (1 - p) + top), dtype)
    return [
        f"lop3.b32 {out}, s, {(top << p) * 0x10001:#x}, {_pair(one, dtype):#x}, 0xEA;",
        f"fma.rn.{'bf16x2' if dtype == 'bf16' else 'f16x2'} {out}, {out}, f{p}, b{p};",
    ]


def _program(lines: list[str], constants: dict[str, int]) -> str:
    """The lines with the registers and constants that they name."""
    declared = [f".reg .b32 w, s, {', '.join(constants)};"]
    declared += [f"mov.b32 {name}, {value:#x};" for name, value in constants.items()]
    return "{\n" + "\n".join(declared + lines) + "\n}"


def _pair(value: float, dtype: str) -> int:
    """The value in both halves of a word; it must be exact."""
    if dtype == "fp16":
        packed = struct.pack(">e", value)
        exact = struct.unpack(">e", packed)[0] == value
    else:
        packed, rest = struct.pack(">f", value)[:2], struct.pack(">f", value)[2:]
        exact = rest == b"\0\0"
    if not exact:
        raise AssertionError(f"{value} is not exact in {dtype}")
    return int.from_bytes(packed, "big") * 0x10001


def _constraints(bits: int) -> str:
    return ",".join(["=&r"] * (32 // bits) + ["r", "r"])


INT8_BF16 = tl.constexpr(byte_asm(False, "bf16"))
INT8_FP16 = tl.constexpr(byte_asm(False, "fp16"))
LOW_BF16 = tl.constexpr(nibble_asm(False, "bf16"))
LOW_FP16 = tl.constexpr(nibble_asm(False, "fp16"))
HIGH_BF16 = tl.constexpr(nibble_asm(True, "bf16"))
HIGH_FP16 = tl.constexpr(nibble_asm(True, "fp16"))
FP8_BF16 = tl.constexpr(byte_asm(True, "bf16"))
FP8_FP16 = tl.constexpr(byte_asm(True, "fp16"))
ONE_BF16 = tl.constexpr(unpack_asm(1, "bf16"))
ONE_FP16 = tl.constexpr(unpack_asm(1, "fp16"))
TWO_BF16 = tl.constexpr(unpack_asm(2, "bf16"))
TWO_FP16 = tl.constexpr(unpack_asm(2, "fp16"))
ONE_REGISTERS = tl.constexpr(_constraints(1))
TWO_REGISTERS = tl.constexpr(_constraints(2))
MERGE_BF16 = tl.constexpr(merge_asm())
RESTORE_BF16 = tl.constexpr(tuple(restore_asm(step) for step in range(4)))
RESTORE_REGISTERS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 7))
