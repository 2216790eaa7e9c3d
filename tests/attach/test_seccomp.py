"""Filters are run as the kernel runs them."""

from udedup.attach.seccomp import run

ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_LOW, FIRST_HIGH, SECOND_LOW = 0, 4, 16, 20, 24
LOAD, LOAD_IMMEDIATE, LOAD_MEMORY, LOAD_LENGTH, INDEX_IMMEDIATE, STORE = 0x20, 0x00, 0x60, 0x80, 0x01, 0x02
EQUAL, GREATER, AT_LEAST, ANY_BIT, EQUAL_INDEX, JUMP = 0x15, 0x25, 0x35, 0x45, 0x1D, 0x05
ADD, SUBTRACT, MULTIPLY, DIVIDE, OR, AND, LEFT, RIGHT, XOR, NEGATE = (
    4,
    0x14,
    0x24,
    0x34,
    0x44,
    0x54,
    0x64,
    0x74,
    0xA4,
    0x84,
)
TO_INDEX, FROM_INDEX, RETURN, RETURN_IT = 0x07, 0x87, 0x06, 0x16


def result(*instructions: tuple[int, int, int, int], number: int = 9, arguments: tuple[int, ...] = ()) -> int:
    return run(list(instructions), number, arguments)


def test_what_a_filter_sees() -> None:
    for offset, wanted in (
        (NUMBER, 9),
        (ARCHITECTURE, 0xC000003E),
        (FIRST_LOW, 0x89ABCDEF),
        (FIRST_HIGH, 0x01234567),
        (SECOND_LOW, 5),
    ):
        program = ((LOAD, 0, 0, offset), (RETURN_IT, 0, 0, 0))
        assert result(*program, arguments=(0x0123456789ABCDEF, 5)) == wanted
    assert result((LOAD_LENGTH, 0, 0, 0), (RETURN_IT, 0, 0, 0)) == 64


def test_jumps() -> None:
    for condition, constant, taken in (
        (EQUAL, 9, True),
        (EQUAL, 8, False),
        (GREATER, 8, True),
        (GREATER, 9, False),
        (AT_LEAST, 9, True),
        (AT_LEAST, 10, False),
        (ANY_BIT, 12, True),
        (ANY_BIT, 6, False),
    ):
        program = ((LOAD, 0, 0, NUMBER), (condition, 0, 1, constant), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW))
        assert result(*program) == (KILL if taken else ALLOW)
    assert result((JUMP, 0, 0, 1), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)) == ALLOW


def test_arithmetic() -> None:
    for operation, left, right, wanted in (
        (ADD, 0xFFFFFFFF, 2, 1),
        (SUBTRACT, 1, 2, 0xFFFFFFFF),
        (MULTIPLY, 0x10000, 0x10001, 0x10000),
        (DIVIDE, 9, 2, 4),
        (OR, 5, 2, 7),
        (AND, 5, 4, 4),
        (LEFT, 0xC0000000, 1, 0x80000000),
        (RIGHT, 0xC0000000, 31, 1),
        (XOR, 5, 1, 4),
        (NEGATE, 1, 0, 0xFFFFFFFF),
    ):
        assert result((LOAD_IMMEDIATE, 0, 0, left), (operation, 0, 0, right), (RETURN_IT, 0, 0, 0)) == wanted


def test_memory_and_index() -> None:
    program = (
        (LOAD_IMMEDIATE, 0, 0, 7),
        (STORE, 0, 0, 3),
        (INDEX_IMMEDIATE, 0, 0, 7),
        (LOAD_IMMEDIATE, 0, 0, 1),
        (LOAD_MEMORY, 0, 0, 3),
        (EQUAL_INDEX, 1, 0, 0),
        (RETURN, 0, 0, KILL),
        (TO_INDEX, 0, 0, 0),
        (LOAD_IMMEDIATE, 0, 0, 0),
        (FROM_INDEX, 0, 0, 0),
        (RETURN_IT, 0, 0, 0),
    )
    assert result(*program) == 7
