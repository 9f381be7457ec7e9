"""The inline assembly cannot run without a GPU: run its few instructions here, on all codes."""

import random
import re
import struct

import pytest
import torch

from meswitch.ops.triton.unpack import byte_asm, merge_asm, nibble_asm, restore_asm, unpack_asm


def halves(word, dtype):
    def value(half):
        if dtype == "fp16":
            return struct.unpack(">e", half.to_bytes(2, "big"))[0]
        return struct.unpack(">f", half.to_bytes(2, "big") + b"\0\0")[0]

    return value(word & 0xFFFF), value(word >> 16)


def execute(asm, words, outputs, dtype):
    registers = {f"${outputs + i}": word for i, word in enumerate(words)}

    def read(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    def pair(operand):
        found = read(operand)
        return found if isinstance(found, list) else halves(found, dtype)

    results = {}
    for line in asm.strip("{}\n").splitlines():
        instruction, *operands = re.split(r",?\s+", line.rstrip(";"))
        if instruction == ".reg":
            continue
        out, values = operands[0], operands[1:]
        if instruction.startswith("fma"):
            v, f, b = (pair(o) for o in values)
            results[out] = registers[out] = [v[i] * f[i] + b[i] for i in (0, 1)]
            continue
        a, b, *rest = [read(o) for o in values] + [0]
        if instruction == "mov.b32":
            registers[out] = a
        elif instruction == "prmt.b32":
            data = (a | b << 32).to_bytes(8, "little")
            registers[out] = int.from_bytes(bytes(data[rest[0] >> (4 * i) & 7] for i in range(4)), "little")
        elif instruction == "shl.b32":
            registers[out] = a << b & 0xFFFFFFFF
        elif instruction == "shf.r.wrap.b32":
            assert a == b  # a rotation
            registers[out] = (a >> rest[0] | a << 32 - rest[0]) & 0xFFFFFFFF
        elif instruction == "and.b32":
            registers[out] = a & b
        elif instruction == "xor.b32":
            registers[out] = a ^ b
        elif instruction == "shr.u32":
            registers[out] = a >> b
        elif instruction == "lop3.b32":
            assert rest[1] == 0xEA
            registers[out] = a & b | rest[0]
        else:
            raise AssertionError(instruction)
    return results


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", [1, 2])
def test_every_code_becomes_its_exact_level(bits, dtype):
    codes, draw = 32 // bits, random.Random(bits)
    for _ in range(50):
        words = [draw.getrandbits(32), draw.getrandbits(32)]
        results = execute(unpack_asm(bits, dtype), words, codes, dtype)
        for d in range(codes):
            level = [2 * (word >> (bits * d) & 2**bits - 1) - (2**bits - 1) for word in words]
            assert results[f"${d}"] == level


def test_merging_adds_each_codes_level_times_its_scale():
    draw = random.Random(0)
    for d in range(16):
        words = [draw.getrandbits(32), draw.getrandbits(32)]
        weights, scales = [1.5, -0.375], [0.25, 0.0078125]
        arguments = [*words, *[(2 * d + 31) % 32] * 2, bf16(weights), bf16(scales)]
        results = execute(merge_asm(), arguments, 1, "bf16")
        levels = [2 * (word >> (2 * d) & 3) - 3 for word in words]
        assert results["$0"] == [weights[i] + levels[i] * scales[i] for i in (0, 1)]


def test_restoring_adds_four_codes_levels_times_one_scale():
    draw = random.Random(0)
    for step in (0, 1, 2, 3):
        words = [draw.getrandbits(32), draw.getrandbits(32)]
        weights, scales = [[1.5, -0.375], [0.0, 2.0], [-1.0, 0.5], [3.0, -2.5]], [0.25, 0.0078125]
        arguments = [*words, *(bf16(pair) for pair in weights), bf16(scales)]
        results = execute(restore_asm(step), arguments, 4, "bf16")
        for place, pair in enumerate(weights):
            levels = [2 * (word >> (2 * (4 * step + place)) & 3) - 3 for word in words]
            assert results[f"${place}"] == [pair[i] + levels[i] * scales[i] for i in (0, 1)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("is_float", [False, True])
def test_every_byte_becomes_the_number_that_it_is(is_float, dtype):
    for first in range(0, 256, 4):
        whole = torch.arange(first, first + 4, dtype=torch.uint8)
        wanted = whole.view(torch.float8_e4m3fn if is_float else torch.int8).double().tolist()
        results = execute(byte_asm(is_float, dtype), [int.from_bytes(bytes(whole.tolist()), "little")], 2, dtype)
        found = [*results["$0"], *results["$1"]]
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b == b]  # NaN is never held as a code
        assert [a for a, _ in pairs] == [b for _, b in pairs]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("is_high", [False, True])
def test_every_half_of_a_byte_becomes_its_number_less_8(is_high, dtype):
    for first in range(0, 256, 4):
        word = int.from_bytes(bytes(range(first, first + 4)), "little")
        results = execute(nibble_asm(is_high, dtype), [word], 2, dtype)
        wanted = [(byte >> 4 if is_high else byte & 15) - 8 for byte in range(first, first + 4)]
        assert [*results["$0"], *results["$1"]] == wanted


def bf16(values):
    return sum(int.from_bytes(struct.pack(">f", value)[:2], "big") << (16 * i) for i, value in enumerate(values))
