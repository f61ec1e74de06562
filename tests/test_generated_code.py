"""What the compiler made of the kernels: hot loops in registers, wide instructions only where a CPU check guards them.

The first half reads the module that is imported here, the second half objects that it compiles itself.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from numoe import _core

SOURCE = Path(__file__).parents[1]
KERNELS = SOURCE / "csrc" / "numoe" / "kernels"

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 instructions"),
    pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF files"),
    pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("nm")), reason="needs objdump and nm"),
]


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


# ── the module in use


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str

    @property
    def jumps_to(self) -> int | None:
        target = re.match(r"([0-9a-f]+) <", self.operands)
        return int(target[1], 16) if target and self.mnemonic.startswith("j") else None


@dataclass(frozen=True)
class Function:
    name: str  # demangled
    file: str  # the source file if the symbol is local to it, else ""
    code: tuple[Instruction, ...]


def symbols(binary: str) -> Iterator[tuple[int, str, str]]:
    """Address, source file and demangled name of every function.

    An ELF symbol table lists a file's name before the symbols that are local to it.  Symbols that other files could
    have shared - weak ones, merged by the linker, and hidden ones - come after an empty file name.
    """
    file = ""
    for line in output_of("objdump", "-t", "-C", binary).splitlines():
        entry = re.fullmatch(r"([0-9a-f]+) (.{7}) (\S+)\t[0-9a-f]+\s+(?:\.hidden )?(.*)", line)
        if not entry:
            continue
        address, flags, _section, name = entry.groups()
        if flags.endswith("f"):
            file = name
        elif flags.endswith("F"):
            yield int(address, 16), file if flags.startswith("l") else "", name


@functools.cache
def functions() -> tuple[Function, ...]:
    names = {address: (file, name) for address, file, name in symbols(_core.__file__)}
    if not any(file.endswith(".cpp") for file, _ in names.values()):
        pytest.skip("the module is stripped of its symbols")
    if any("__asan_" in name or "__tsan_" in name for name in output_of("nm", "-D", _core.__file__).splitlines()):
        pytest.skip("sanitizers add memory accesses everywhere")
    bodies: dict[int, list[Instruction]] = {}
    for line in output_of("objdump", "-d", "--no-show-raw-insn", _core.__file__).splitlines():
        if start := re.match(r"([0-9a-f]+) <", line):
            body = bodies.setdefault(int(start[1], 16), [])
        elif found := re.match(r"\s+([0-9a-f]+):\t(?:cs )*(\S+) *(.*)", line):  # cs: assemblers pad with it
            body.append(Instruction(int(found[1], 16), found[2], found[3]))
    found_names = [(*names.get(address, ("", hex(address))), code) for address, code in bodies.items()]
    return tuple(Function(name, file, tuple(code)) for file, name, code in found_names)


TILE = re.compile(
    r"numoe::\(anonymous namespace\)::(carrying_|sweeping_|broad_|unpacked_|zipping_)?tile(_bf16)?_of_height<(.*)>\("
)
REGISTERS = {  # and their bytes
    "avx512_bf16": ("zmm", 64),
    "avx512": ("zmm", 64),
    "avx2": ("ymm", 32),
    "portable": ("xmm", 16),
}
ROUTES = (" while carrying", " while carrying through the L1", " while streaming")  # the order of numoe::Route
WAYS = ("", *ROUTES, " while sweeping", " side by side", " on unpacked rows")
NUMBERS = {"Pairs<": "bfloat16 dots", "bfloat16": "bfloat16 rows", "double": "float64"}  # by template arguments
WEIGHTS = (
    "bfloat16",
    "bfloat16 side by side",
    "bfloat16 rows while sweeping",
    *map("".join, itertools.product(("float32", "float64"), WAYS)),
)
ZIPPING = "bfloat16 dots that pair rows themselves"
DOTS = (*("bfloat16 dots" + way for way in ("", ROUTES[1], *WAYS[4:])), ZIPPING)
UNPACKED = tuple(numbers + WAYS[6] for numbers in ("float32", "float64", "bfloat16 dots"))
IN_ROUNDS = ("float32", "float64", "bfloat16 dots", *UNPACKED)  # tiles that multiply several k's before they count
TILES = [*itertools.product(REGISTERS, WEIGHTS), *itertools.product(["avx512_bf16"], DOTS)]


@dataclass(frozen=True)
class Tile:
    weights: str  # with the way it takes: of WEIGHTS or DOTS
    height: int
    panels: int
    function: Function

    @functools.cached_property
    def hot_loops(self) -> list[tuple[Instruction, ...]]:
        """With a line and without; of whole panels and of half ones; or just one."""
        return multiplying_loops(self.function)


def multiplying_loops(function: Function) -> list[tuple[Instruction, ...]]:
    """The innermost loops that multiply."""
    code = function.code
    jumps = [(i.jumps_to, i.address) for i in code if i.jumps_to is not None]
    loops = [(a, b) for a, b in jumps if code[0].address <= a <= b]
    bodies = [tuple(i for i in code if a <= i.address <= b) for a, b in loops]
    multiplying = [body for body in bodies if multiplications(body)]
    return [body for body in multiplying if not any(set(other) < set(body) for other in multiplying)]


def multiplications(code: tuple[Instruction, ...]) -> list[Instruction]:
    return [i for i in code if re.fullmatch(r"vfn?m(add|sub)\d{3}[ps][sd]|v?mul[ps][sd]|v?t?dpbf16ps", i.mnemonic)]


def stack_accesses(function: Function, code: tuple[Instruction, ...]) -> list[str]:
    """Operands in the stack frame; %rbp is a register like any other in functions that do not let it point there."""
    frame = any(i.mnemonic == "mov" and i.operands == "%rsp,%rbp" for i in function.code)
    base = "%r[sb]p" if frame else "%rsp"
    return [f"{i.mnemonic} {i.operands}" for i in code if re.search(rf"\({base}\b", i.operands)]


def shape(target: str, weights: str) -> tuple[int, int]:
    """Rows and columns of the largest tile."""
    facts = next(t for t in _core.targets() if t["name"] == target)
    rows, columns = facts["float64_tile" if weights.startswith("float64") else "float32_tile"]
    return rows, columns


def tile_of(function: Function) -> Tile | None:
    match = TILE.match(function.name.removeprefix("void "))
    if match is None:
        return None
    way, bf16, template = match.groups()
    arguments = template.split(", ")  # the height is the last one, before panels side by side
    panels = int(arguments.pop()) if way == "broad_" else 1
    numbers = "bfloat16" if bf16 else next((kind for mark, kind in NUMBERS.items() if mark in template), "float32")
    ways = {None: WAYS[0], "sweeping_": WAYS[4], "broad_": WAYS[5], "unpacked_": WAYS[6]}
    if route := re.search(r"\(numoe::Route\)(\d)", template):
        ways["carrying_"] = ROUTES[int(route[1])]
    if way == "zipping_":
        return Tile(ZIPPING, int(arguments[-1]), 1, function)
    return Tile(numbers + ways[way], int(arguments[-1]), panels, function)


def tiles(target: str, weights: str) -> list[Tile]:
    found = [tile_of(function) for function in functions() if function.file == f"{target}.cpp"]
    return sorted((tile for tile in found if tile and tile.weights == weights), key=lambda t: (t.panels, t.height))


@pytest.fixture
def _optimised() -> None:
    if _core.build_info()["build_type"] == "Debug":
        pytest.skip("an unoptimised build spills everything")


@pytest.mark.usefixtures("_optimised")
@pytest.mark.parametrize(("target", "weights"), TILES)
def test_every_tile_height_is_there(target: str, weights: str) -> None:
    """The tests below look at what they find; this one says what there must be."""
    rows = shape(target, weights)[0]
    if weights in UNPACKED:
        rows = min(rows, 7)
    if weights == ZIPPING:
        rows = min(rows, 9)
    panels = (2, 3, 4) if weights.endswith("side by side") else (1,)
    heights = [(height, p) for p in panels for height in range(1, rows // p + 1)]
    assert [(tile.height, tile.panels) for tile in tiles(target, weights)] == heights


@pytest.mark.usefixtures("_optimised")
@pytest.mark.parametrize(("target", "weights"), TILES)
def test_hot_loops_multiply_in_whole_registers_and_nothing_twice(target: str, weights: str) -> None:
    register, width = REGISTERS[target]
    double = weights.startswith("float64")
    columns = shape(target, weights)[1] * (8 if double else 4) // width
    steps = 2 if weights in WEIGHTS[:2] else 1  # numbers of k that one load of weights serves
    registers = "[yz]mm" if register == "zmm" and weights in UNPACKED else register
    multiply = rf"{'mul' if target == 'portable' else 'vfmadd...'}p{'d' if double else 's'}"
    if weights in DOTS:
        multiply = "vdpbf16ps"
    for tile in tiles(target, weights):
        name = tile.function.name
        parts = [columns] * (2 if weights.endswith(ROUTES) else 1)
        if weights in UNPACKED:
            parts = [1, 1, 2, 2] if register == "zmm" else [1, 2]  # a half, one, one and a half, two
        if target != "portable" and weights in IN_ROUNDS:
            parts = sorted(parts + [4 * part for part in parts])  # the k's that remain, and four at a time
        loops = sorted(map(multiplications, tile.hot_loops), key=len)
        assert len(loops) == len(parts), name
        for products, vectors in zip(loops, parts, strict=True):  # more often than once if unrolled
            assert len(products) % (steps * tile.height * tile.panels * vectors) == 0, name
            for product in products:
                assert re.fullmatch(multiply, product.mnemonic), (name, product)
                assert re.search(rf"%({registers})\d+$", product.operands), (name, product)


@pytest.mark.usefixtures("_optimised")
@pytest.mark.parametrize(("target", "weights"), TILES)
def test_hot_loops_keep_everything_in_registers(target: str, weights: str) -> None:
    for tile in tiles(target, weights):
        for loop in tile.hot_loops:
            assert stack_accesses(tile.function, loop) == [], tile.function.name


@pytest.mark.usefixtures("_optimised")
def test_tiles_on_the_matrix_unit_keep_everything_in_registers() -> None:
    mine = [f for f in functions() if f.file == "avx512_bf16.cpp" and "Amx>::multiply<" in f.name]
    loops = [(f, loop) for f in mine for loop in multiplying_loops(f)]
    assert sorted(len(multiplications(loop)) for _, loop in loops) == [2, 4]  # up to 16 rows, and more
    for function, loop in loops:
        assert all(i.mnemonic == "tdpbf16ps" for i in multiplications(loop))
        assert stack_accesses(function, loop) == [], function.name


# The loops that measure a CPU: their callers ask for the CPU's features, as those of the targets do.
PROBES = re.compile(
    r"numoe_peak_(avx2|avx512|amx)_b?f(16|32|64)|void numoe::\(anonymous namespace\)::read_avx(2|512)<.*>\(.*"
)
BEYOND_AVX2 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")


def is_wide(instruction: Instruction) -> bool:
    """Whether a CPU without AVX stops here: all names of AVX and AVX-512 begin with v, or with k for masks."""
    of_amx = instruction.mnemonic in ("ldtilecfg", "tilerelease")
    wide = re.search(r"%[yzt]mm|%k[0-7]", instruction.operands) is not None
    return wide or of_amx or instruction.mnemonic.startswith("v")


def test_wide_instructions_are_only_in_functions_of_their_own_target() -> None:
    """A function that two files share - a template, an inline function - is merged into one of its copies.

    If that is the copy of a wide target, every CPU runs it.
    """
    assert sum(any(map(is_wide, f.code)) for f in functions()) > 50  # tiles and activations: the test sees them
    strays = [
        function.name
        for function in functions()
        if any(map(is_wide, function.code))
        and not (
            function.file in ("avx2.cpp", "avx512.cpp", "avx512_bf16.cpp")
            and "numoe::(anonymous namespace)::" in function.name
        )
        and not PROBES.fullmatch(function.name)
    ]
    assert strays == []


def test_avx2_needs_nothing_beyond_avx2() -> None:
    for function in functions():
        if function.file == "avx2.cpp" or re.search("(numoe_peak|read)_avx2", function.name):
            assert not [i for i in function.code if BEYOND_AVX2.search(i.operands)], function.name


# ── objects, compiled here

KERNEL_FILES = sorted(path.stem for path in KERNELS.glob("*.cpp") if path.stem != "target")
LIBRARY = {"syscall", "sqrt", "sqrtf", "memcpy", "memset", "memmove", "erf", "erff", "erfc", "erfcf"}  # of C
COMPILER = {"_GLOBAL_OFFSET_TABLE_", "__cpu_model", "__cpu_features2", "__cpu_indicator_init", "__stack_chk_fail"}


@dataclass(frozen=True)
class Symbol:
    name: str  # demangled
    kind: str  # as nm says it

    @property
    def undefined(self) -> bool:
        return self.kind in "Uvw"

    @property
    def shared(self) -> bool:
        """Whether the linker sees it from other files: global, weak or unique."""
        return not self.undefined and (self.kind.isupper() or self.kind == "u")


def flags_of(stem: str) -> list[str]:
    """What CMakeLists.txt adds for one file."""
    text = (SOURCE / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(rf'kernels/{stem}\.cpp PROPERTIES\s+COMPILE_OPTIONS\s+"(.*)"', text)
    return found[1].split(";") if found else []


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Symbol]]:
    """The symbols of every kernel file, compiled without optimisation: inline functions then show as what they are."""
    if not KERNEL_FILES:
        pytest.skip("the C++ sources are not here")
    compiler = next(filter(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"]), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    symbols = {}
    for stem in KERNEL_FILES:
        target = tmp_path_factory.mktemp("objects") / f"{stem}.o"
        options = ["-std=c++20", "-fPIC", "-fvisibility=hidden", *flags_of(stem), "-O0"]
        output_of(compiler, *options, "-I", SOURCE / "csrc", "-c", KERNELS / f"{stem}.cpp", "-o", target)
        lines = [re.fullmatch(r"[0-9a-f ]{16} (\w) (.*)", line) for line in output_of("nm", "-C", target).splitlines()]
        symbols[stem] = [Symbol(line[2], line[1]) for line in lines if line]
    return symbols


def test_flags_are_found() -> None:
    assert "-mavx512f" in flags_of("avx512") and "-mavx2" in flags_of("avx2")
    assert [flag for flag in flags_of("avx512_bf16") if flag != "-mavx512bf16"] == flags_of("avx512")


@pytest.mark.parametrize("stem", KERNEL_FILES)
def test_a_kernel_file_shares_nothing_but_its_table(objects: dict[str, list[Symbol]], stem: str) -> None:
    shared = {symbol.name for symbol in objects[stem] if symbol.shared}
    assert any(name.endswith("_table") for name in shared)
    strays = {name for name in shared if not re.match(r"numoe::\w+_table(::\{lambda|$)", name)}  # and its lambdas
    assert strays == set()


def test_no_two_kernel_files_define_one_name(objects: dict[str, list[Symbol]]) -> None:
    shared = {stem: {symbol.name for symbol in found if symbol.shared} for stem, found in objects.items()}
    assert len(shared) >= 4
    for a, b in itertools.combinations(shared, 2):
        assert shared[a] & shared[b] == set()


@pytest.mark.parametrize("stem", KERNEL_FILES)
def test_a_kernel_file_calls_only_the_c_library(objects: dict[str, list[Symbol]], stem: str) -> None:
    undefined = {symbol.name for symbol in objects[stem] if symbol.undefined}
    assert undefined <= LIBRARY | COMPILER


@pytest.mark.parametrize("stem", KERNEL_FILES)
def test_a_kernel_file_runs_nothing_when_it_is_loaded(objects: dict[str, list[Symbol]], stem: str) -> None:
    """Initialisers would be compiled for the target, and run on every CPU."""
    assert not [
        symbol.name for symbol in objects[stem] if re.search("_GLOBAL__|static_init|global_var_init", symbol.name)
    ]
