"""The trajectory: its bytes are frozen, what was written comes back, and whatever is damaged is seen."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.record.scalars import coefficient, float32, shrinkage
from zotune.record.trajectory import (
    MAGIC,
    MAX_HEADER,
    Header,
    Record,
    Trajectory,
    TrajectoryError,
    TrajectoryWriter,
    coefficients,
    read,
    read_file,
)

# Format version 1, as first written: two steps (the second skipped) and the end marker. Never to be changed.
GOLDEN = bytes.fromhex(
    "895a4f540d0a1a0a01000000410100007b2262617365223a7b226e616d65223a22736d616c6c222c2277656967687473223a22736861"
    "3235363a3030227d2c2263726561746564223a22222c226465636179223a5b5d2c22646972656374696f6e223a22726164656d616368"
    "6572222c226474797065223a22222c22656e67696e65223a22222c2267726f757073223a312c226c61796f7574223a5b226c72222c22"
    "6465636179225d2c226c72223a5b5d2c226d6574686f64223a227a6f2d736764222c226d6574686f645f6f7074696f6e73223a7b7d2c"
    "226e6f6973655f76657273696f6e223a312c226e6f7465223a22ceb8222c227061697273223a322c22706c616e6e65645f7374657073"
    "223a322c227265717569726564223a5b5d2c2273656564223a372c227461736b223a22222c2276657273696f6e73223a7b227a6f7475"
    "6e65223a22302e312e30227d7dcc1380c4240000c03f0000a03f00000040000000bf0000803e0000003e51e15964010000c07f0000a0"
    "3f0000c07f0000803f0000803e0000003e24db44fb02010000000000000000000000000000000000000000000000cf25640c"
)


def make_header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "noise_version": 1,
        "direction": "gaussian",
        "method": "zo-sgd",
        "seed": 7,
        "planned_steps": 60,
    }
    return Header(**(values | changes))


def make_record(step: int, header: Header, salt: int = 0) -> Record:
    rng = random.Random(f"{step} {salt}")
    g = tuple(float32(rng.gauss(0, 9)) for _ in range(header.pairs))
    lr = tuple(float32(1e-5 / (step + 1)) for _ in range(header.groups))
    return Record(step, float32(rng.random()), float32(rng.random()), g, lr, (0.0,) * header.groups, choice=step % 3)


def write(path: Path, header: Header, steps: int = 60, chosen: int | None = None, salt: int = 0) -> bytes:
    path.unlink(missing_ok=True)
    with TrajectoryWriter.create(path, header, sync_every=1000) as writer:
        for step in range(steps):
            writer.append(make_record(step, header, salt))
        if chosen is not None:
            writer.mark_chosen(chosen)
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """60 steps and an end marker."""
    return write(tmp_path / "whole.zot", make_header(), chosen=40)


def start_of(data: bytes) -> int:
    return 20 + struct.unpack_from("<I", data, 12)[0]


def cells(data: bytes, size: int = 21) -> list[bytes]:
    """The records' bytes."""
    return [data[i : i + size] for i in range(start_of(data), len(data), size)]


def sealed(text: bytes, *bodies: bytes) -> bytes:
    """A file of any header text and record bodies whose check sums are right."""
    head = MAGIC + struct.pack("<II", 1, len(text)) + text
    crc = zlib.crc32(head)
    out = head + struct.pack("<I", crc)
    for body in bodies:
        crc = zlib.crc32(body, crc)
        out += body + struct.pack("<I", crc)
    return out


def header_text(**changes: Any) -> bytes:
    data = make_header().encode()
    return json.dumps(json.loads(data[16:-4]) | changes, sort_keys=True, separators=(",", ":")).encode()


# The bytes


def test_version_1_stays_readable() -> None:
    trajectory = read(GOLDEN)
    header = trajectory.header
    assert (header.method, header.seed, header.planned_steps, header.pairs) == ("zo-sgd", 7, 2, 2)
    assert header.base == {"name": "small", "weights": "sha256:00"}
    assert header.extra == {"note": "θ"}
    first, second = trajectory.records
    assert first == Record(0, 1.5, 1.25, (2.0, -0.5), (0.25,), (0.125,), folded=True, choice=2)
    assert second.skipped
    assert math.isnan(second.loss_plus)
    assert (trajectory.chosen_step, trajectory.complete, trajectory.torn_bytes) == (1, True, 0)


def test_version_1_is_still_what_is_written(tmp_path: Path) -> None:
    old = read(GOLDEN)
    with TrajectoryWriter.create(tmp_path / "a.zot", old.header) as writer:
        for record in old.records:
            writer.append(record)
        writer.mark_chosen(1)
    assert (tmp_path / "a.zot").read_bytes() == GOLDEN


def test_a_file_decodes_by_the_documented_layout_alone(tmp_path: Path) -> None:
    header = make_header(pairs=3, groups=2, layout=("decay", "lr"))
    data = write(tmp_path / "a.zot", header, steps=5, chosen=4)
    assert data[:8] == bytes.fromhex("895a4f540d0a1a0a")
    version, length = struct.unpack_from("<II", data, 8)
    (crc,) = struct.unpack_from("<I", data, 16 + length)
    assert version == 1
    assert crc == zlib.crc32(data[: 16 + length])
    assert json.loads(data[16 : 16 + length])["pairs"] == 3
    size = 1 + 4 * (2 + 3 + 2 + 2) + 4
    for step, cell in enumerate(cells(data, size)):
        crc = zlib.crc32(cell[:-4], crc)
        assert struct.unpack("<I", cell[-4:]) == (crc,)
        if step == 5:
            assert cell[:-4] == b"\x02\x04" + bytes(size - 6)
        else:
            r = make_record(step, header)
            values = struct.unpack("<B9f", cell[:-4])
            assert values == (r.choice << 4, r.loss_plus, r.loss_minus, *r.g, *r.lr, *r.decay)
    assert len(data) == 20 + length + 6 * size


@pytest.mark.parametrize(("pairs", "limit"), [(1, 500_000), (16, 1_800_000)])
def test_20000_steps_are_small(tmp_path: Path, pairs: int, limit: int) -> None:
    header = make_header(planned_steps=20_000, pairs=pairs, method_options={"queries": pairs}, task="sst2")
    data = write(tmp_path / "a.zot", header, steps=20_000, chosen=20_000)
    assert len(data) <= limit
    assert len(read(data).records) == 20_000


def test_the_module_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, zotune.record.trajectory; print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What was written comes back

f32 = st.floats(width=32)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Header, list[Record], int | None]:
    pairs, groups, steps = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 6))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    layout = draw(st.sets(st.sampled_from(["lr", "decay"])))
    held = {
        name: () if name in layout else draw(st.lists(finite, min_size=groups, max_size=groups).map(tuple))
        for name in ("lr", "decay")
    }
    text = st.text(st.characters(codec="utf-8"), max_size=5)
    tables = st.dictionaries(text, st.none() | st.integers() | text | st.lists(finite, max_size=2), max_size=3)
    header = make_header(
        pairs=pairs, groups=groups, planned_steps=steps, layout=tuple(layout), **held,
        seed=draw(st.integers(-(2**63), 2**64 - 1)), task=draw(text), base=draw(tables),
        extra=draw(tables.map(lambda t: {f"x-{k}": v for k, v in t.items()})),
    )  # fmt: skip
    records = [
        Record(
            step, draw(f32), draw(f32), g=draw(st.tuples(*[f32] * pairs)),
lr=draw(st.tuples(*[f32] * groups)) if "lr" in layout else held["lr"],
            decay=draw(st.tuples(*[f32] * groups)) if "decay" in layout else held["decay"],
            skipped=draw(st.booleans()), folded=draw(st.booleans()), choice=draw(st.integers(0, 2)),
        )
        for step in range(steps)
    ]  # fmt: skip
    return header, records, draw(st.none() | st.integers(0, steps))


@settings(deadline=None, max_examples=80)
@given(run=runs())
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, run: Any) -> None:
    header, records, chosen = run
    path = tmp_path_factory.mktemp("run") / "a.zot"
    with TrajectoryWriter.create(path, header) as writer:
        for record in records:
            writer.append(record)
        if chosen is not None:
            writer.mark_chosen(chosen)
    trajectory = read_file(path)
    assert trajectory.header == header
    assert repr(list(trajectory.records)) == repr(records)  # repr: NaN is no NaN's equal
    assert (trajectory.chosen_step, trajectory.torn_bytes) == (chosen, 0)
    for until in range(len(records) + 1):
        assert repr(list(read_file(path, until=until).records)) == repr(records[:until])


def test_records_are_indexed_from_both_ends(whole: bytes) -> None:
    records = read(whole).records
    assert len(records) == 60
    assert records[-1] == records[59] == make_record(59, make_header())
    with pytest.raises(IndexError):
        records[60]


# Coefficients


@given(x=st.floats())
def test_float32_rounds_as_numpy_does(x: float) -> None:
    numpy = pytest.importorskip("numpy")
    with numpy.errstate(over="ignore"):
        assert repr(float32(x)) == repr(float(numpy.float32(x)))


@given(lr=st.floats(0, 1), g=st.floats(-1e30, 1e30), pairs=st.integers(1, 64))
def test_a_recorded_step_has_the_coefficients_of_the_step_itself(lr: float, g: float, pairs: int) -> None:
    header = make_header(pairs=pairs, groups=2)
    data = sealed(header.encode()[16:-4], Record(0, 1, 1, (g,) * pairs, (lr, 2 * lr), (0, 0)).encode(header))
    expected = tuple((coefficient(rate, g, 1 / pairs),) * pairs for rate in (lr, 2 * lr))
    assert coefficients(read(data).records[0], header) == expected


def test_a_coefficient_beyond_float32_is_infinite_and_nan_passes() -> None:
    assert coefficient(1.0, 1e30, 1e10) == -math.inf
    assert coefficient(1.0, -1e300, 1.0) == math.inf
    assert math.isnan(coefficient(1.0, math.nan, 1.0))


def test_a_skipped_step_has_zero_coefficients() -> None:
    record = Record(0, math.nan, 1.0, (math.nan, 1.0), (0.1,), (0.0,), skipped=True)
    assert coefficients(record, make_header(pairs=2)) == ((0.0, 0.0),)


def test_shrinkage_is_that_of_the_recorded_numbers() -> None:
    assert shrinkage(1e-3, 0.1) == shrinkage(float32(1e-3), float32(0.1)) != 1 - 1e-3 * 0.1


# Damage. A cut file gives its whole records; a changed one an error, or, changed in the last record, the others.


def test_a_file_cut_at_any_byte_gives_the_records_before_the_cut(whole: bytes) -> None:
    start, records = start_of(whole), list(read(whole).records)
    for size in range(len(whole)):
        if size < start:
            with pytest.raises(TrajectoryError):
                read(whole[:size])
            continue
        trajectory = read(whole[:size])
        steps, torn = divmod(size - start, 21)
        assert (len(trajectory.records), trajectory.torn_bytes) == (steps, torn)
        assert not trajectory.complete
        if torn == 0:
            assert list(trajectory.records) == records[:steps]


def test_any_flipped_bit_is_seen(whole: bytes) -> None:
    start, records, damaged = start_of(whole), list(read(whole).records), bytearray(whole)
    for offset, bit in itertools.product(range(len(whole)), range(8)):
        damaged[offset] ^= 1 << bit
        data, step = bytes(damaged), (offset - start) // 21
        if step == 60:  # the end marker: taken for a torn record
            trajectory = read(data)
            assert (len(trajectory.records), trajectory.torn_bytes, trajectory.complete) == (60, 21, False)
        else:
            with pytest.raises(TrajectoryError) as caught:
                read(data)
            assert caught.value.steps == (None if offset < start else step)
            if offset >= start and bit == 0:
                assert f"step {step} (byte {start + 21 * step:,})" in str(caught.value)
                assert list(read(data, until=step).records) == records[:step]
                with pytest.raises(TrajectoryError):
                    read(data, until=step + 1)
        damaged[offset] ^= 1 << bit


@pytest.mark.parametrize("step", [0, 1, 30, 58])
@pytest.mark.parametrize("change", ["swapped", "dropped", "doubled", "foreign", "foreign, of an equal header"])
def test_a_record_out_of_its_place_is_seen(tmp_path: Path, whole: bytes, change: str, step: int) -> None:
    parts, seen_at = cells(whole), step
    if change == "swapped":
        parts[step], parts[step + 1] = parts[step + 1], parts[step]
    elif change == "dropped":
        del parts[step]
    elif change == "doubled":
        parts.insert(step, parts[step])
        seen_at = step + 1
    elif change == "foreign":
        parts[step] = cells(write(tmp_path / "b.zot", make_header(seed=8), salt=1))[step]
    else:
        parts[step] = cells(write(tmp_path / "b.zot", make_header(), salt=1))[step]
        seen_at = max(step, 1)  # nothing before the first record tells it from the other run's
    with pytest.raises(TrajectoryError) as caught:
        read(whole[: start_of(whole)] + b"".join(parts))
    assert caught.value.steps == seen_at


def test_records_of_another_run_are_seen_even_if_all_of_them_are_taken(tmp_path: Path, whole: bytes) -> None:
    other = write(tmp_path / "b.zot", make_header(seed=8))
    with pytest.raises(TrajectoryError, match="step 0"):
        read(whole[: start_of(whole)] + b"".join(cells(other)))


def test_a_file_cut_before_its_end_marker_is_not_complete(whole: bytes) -> None:
    trajectory = read(whole[:-21])
    assert (len(trajectory.records), trajectory.torn_bytes, trajectory.complete) == (60, 0, False)
    assert read(whole).complete


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ([bytes([1]) + bytes(16)] * 61, "one more than the 60 steps planned"),
        ([b"\x02" + bytes(16)] * 2, "behind the end marker"),
        ([b"\x02\x01" + bytes(15)], "end marker is malformed"),
        ([b"\x03" + bytes(16)], "end marker is malformed"),
        ([b"\x02" + bytes(15) + b"\x01"], "end marker is malformed"),
        ([b"\x08" + bytes(16)], "flags 0x08"),
        ([b"\x30" + bytes(16)], "flags 0x30"),
        ([b"\x80" + bytes(16)], "flags 0x80"),
    ],
)
def test_records_that_no_writer_makes_are_refused(bodies: list[bytes], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        read(sealed(header_text(), *bodies))


def test_until_beyond_the_file_says_how_far_it_goes(whole: bytes) -> None:
    for until in (61, -1, 2**70):
        with pytest.raises(TrajectoryError, match="try --until 60"):
            read(whole, until=until)


# Headers


HEADERS = {
    "empty": b"",
    "not JSON": b"{",
    "not an object": b"[]",
    "deep": b"[" * 60_000,
    "deep and closed": b"[" * 30_000 + b"]" * 30_000,
    "deep in a field": header_text()[:-1] + b',"x":' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "a number of 50,000 digits": header_text().replace(b'"seed":7', b'"seed":' + b"7" * 50_000),
    "a number of 4,000 digits": header_text().replace(b'"seed":7', b'"seed":' + b"7" * 4_000),
    "a huge lr": header_text(layout=[], lr=[10**400]),
    "infinite by rounding": header_text(layout=[], lr=[1e39]),
    "infinite by exponent": header_text().replace(b'"seed":7', b'"seed":7,"x":1e999'),
    "NaN": header_text(x=math.nan),
    "infinity": header_text(layout=[], lr=[math.inf]),
    "deeper than we write": header_text(x=[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]),
    "a doubled key": header_text()[:-1] + b',"zz":1,"zz":1}',
    "white space": header_text() + b" ",
    "a lone surrogate": header_text(task="\ud800"),
    "an escape": header_text(task="θ"),
    "not UTF-8": header_text(task="?").replace(b"?", b"\xff"),
    "UTF-16": header_text().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + header_text(),
    "a field missing": header_text().replace(b'"seed":7,', b""),
    "an unknown feature": header_text(required=["warp"]),
    "an unknown layout": header_text(layout=["warp"]),
    "a doubled layout": header_text(layout=["lr", "lr"]),
    "lr held twice": header_text(lr=[1.0]),
    "too few lr": header_text(layout=[], lr=[1.0], groups=2),
    "a list in the layout": header_text(layout=[["lr"]]),
    "no pair": header_text(pairs=0),
    "too many pairs": header_text(pairs=2**32 - 1),
    "too many values": header_text(pairs=2**16, groups=2**16),
    "steps beyond u32": header_text(planned_steps=2**32),
    "a bool for a number": header_text(groups=True),
    "a float for a number": header_text(seed=7.0),
    "null": header_text(method=None),
    "a list for a table": header_text(base=[]),
    "a text for a list": header_text(required="warp"),
    "our own name for the rest": header_text(extra={}),
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_no_writer_makes_is_refused(text: bytes) -> None:
    with pytest.raises(TrajectoryError) as caught:
        read(sealed(text))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**32 - 1])
def test_a_long_header_is_refused_before_it_is_read(whole: bytes, length: int) -> None:
    with pytest.raises(TrajectoryError, match="above 65,536"):
        read(whole[:12] + struct.pack("<I", length) + whole[16:])


def test_other_files_and_other_versions_are_named_for_what_they_are(whole: bytes) -> None:
    with pytest.raises(TrajectoryError, match="not a trajectory"):
        read(b"PK\x03\x04" + bytes(99))
    with pytest.raises(TrajectoryError, match="not a trajectory"):
        read(whole.replace(b"\r\n", b"\n", 1))
    with pytest.raises(TrajectoryError, match="format version 2, this zotune reads 1; update"):
        read(whole[:8] + struct.pack("<I", 2) + whole[12:])


def test_a_key_that_this_version_does_not_know_is_kept() -> None:
    assert read(sealed(header_text(later=[1]))).header.extra == {"later": [1]}


@pytest.mark.parametrize(
    "changes", [{"extra": {"seed": 1}}, {"task": "\ud800"}, {"base": {"a": math.nan}}, {"task": "x" * MAX_HEADER}]
)
def test_a_header_that_could_not_be_read_is_not_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"extra|JSON|header|surrogates"):
        TrajectoryWriter.create(tmp_path / "a.zot", make_header(**changes))
    assert not (tmp_path / "a.zot").exists()


# Fuzz: any bytes give a Trajectory or a TrajectoryError


def mutated(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, j, n = rng.randrange(len(out) + 1), rng.randrange(len(donor)), rng.choice([1, 2, 4, 21, 50])
        kind = rng.randrange(6)
        if kind == 0:
            out[i : i + 1] = rng.randbytes(1)
        elif kind == 1:
            out[i : i + 4] = struct.pack("<I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        elif kind == 2:
            del out[i : i + n]
        elif kind == 3:
            out[i:i] = donor[j : j + n]
        elif kind == 4:
            out[i : i + n] = donor[j : j + n]
        else:
            del out[i:]
    return bytes(out)


def check(data: bytes) -> Trajectory | None:
    """Read it, and everything in it."""
    try:
        trajectory = read(data)
    except TrajectoryError:
        return None
    for record in trajectory.records:
        coefficients(record, trajectory.header)
    return trajectory


def test_4000_mutated_files_raise_nothing_else(tmp_path: Path, whole: bytes) -> None:
    rng = random.Random(0)
    short = write(tmp_path / "b.zot", make_header(layout=("lr", "decay"), groups=2), steps=4, chosen=2)
    original = [repr(r) for r in read(short).records]
    for _ in range(4000):
        trajectory = check(mutated(rng, short, whole))
        if trajectory is not None:
            assert [repr(r) for r in trajectory.records] == original[: len(trajectory.records)]


def test_4000_mutated_files_with_right_check_sums_raise_nothing_else(whole: bytes) -> None:
    rng = random.Random(1)
    text, bodies = whole[16 : start_of(whole) - 4], [cell[:-4] for cell in cells(whole)[:2]]
    bodies.append(b"\x02\x02" + bytes(15))  # the end marker
    odd = b'[]{}"":,-1e999NaN0.5nulltrue"\\ud800"[[[[{"a":4294967296' + text
    accepted = 0
    for n in range(4000):
        new = mutated(rng, text, odd) if n % 2 else text
        if n % 4 == 3:  # a changed value, canonical again
            values = json.loads(text)
            values[rng.choice([*values])] = rng.choice([0, -1, 2**40, 1.5, None, "", "lr", [], ["lr"], [0.5], {}, True])
            new = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        new_bodies = bodies if n % 3 else [mutated(rng, b, odd) for b in bodies]
        accepted += check(sealed(new, *new_bodies)) is not None
    assert accepted > 400


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), prefix=st.sampled_from([b"", MAGIC, MAGIC + b"\1\0\0\0", GOLDEN]))
def test_arbitrary_bytes_raise_nothing_else(data: bytes, prefix: bytes) -> None:
    check(prefix + data)


@pytest.mark.parametrize("header", [make_header(planned_steps=10_000), make_header(pairs=2**16, planned_steps=4)])
def test_reading_takes_less_than_twice_the_file_and_64_mb(header: Header) -> None:
    body = Record(0, 1.0, 1.0, (1.0,) * header.pairs, (1e-5,), (0.0,)).encode(header)
    data = sealed(header.encode()[16:-4], *[body] * header.planned_steps)
    tracemalloc.start()
    check(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) + 64_000_000  # data itself is the other half


# Writing


@pytest.mark.parametrize("kept", [0, 1, 30, 60])
@pytest.mark.parametrize("behind", ["nothing", "a torn record", "damage", "an end marker"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path, whole: bytes, kept: int, behind: str) -> None:
    path, header, size = tmp_path / "a.zot", make_header(), 21
    data = whole[: start_of(whole) + size * kept]
    tails = {
        "nothing": b"",
        "a torn record": whole[len(data) : len(data) + 9],
        "damage": bytes(100),
        "an end marker": whole[len(data) :],
    }
    path.write_bytes(data + tails[behind])
    with TrajectoryWriter.resume(path, kept) as writer:
        assert (writer.header, writer.steps) == (header, kept)
        assert path.read_bytes() == data
        for step in range(kept, 60):
            writer.append(make_record(step, header))
        writer.mark_chosen(40)
    assert path.read_bytes() == whole


def test_resume_refuses_what_it_cannot_go_on_from_and_changes_nothing(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.zot"
    with pytest.raises(TrajectoryError, match=r"a\.zot: cannot be read"):
        TrajectoryWriter.resume(path, 0)
    damaged = bytearray(whole)
    damaged[start_of(whole) + 21 * 10] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(TrajectoryError, match=r"a\.zot: step 10"):
        TrajectoryWriter.resume(path, 11)
    assert path.read_bytes() == damaged


def test_create_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.zot"
    path.write_bytes(b"mine")
    with pytest.raises(TrajectoryError, match="exists"):
        TrajectoryWriter.create(path, make_header())
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, "must be 1, the next one"),
        ({"g": (1.0, 2.0)}, "1 numbers, one per pair"),
        ({"lr": ()}, "1 numbers, one per group"),
        ({"decay": (0.1,)}, "named in its layout"),
        ({"choice": 3}, "0, 1 or 2"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_and_not_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path, header = tmp_path / "a.zot", make_header()
    with TrajectoryWriter.create(path, header) as writer:
        writer.append(make_record(0, header))
        before = path.read_bytes()
        values: dict[str, Any] = {
            "step": 1,
            "loss_plus": 1.0,
            "loss_minus": 1.0,
            "g": (1.0,),
            "lr": (0.1,),
            "decay": (0.0,),
        }
        with pytest.raises(ValueError, match=message):
            writer.append(Record(**(values | changes)))
        assert path.read_bytes() == before
        writer.append(make_record(1, header))


def test_nothing_is_written_beyond_the_plan_or_the_end_marker(tmp_path: Path) -> None:
    header = make_header(planned_steps=1)
    with TrajectoryWriter.create(tmp_path / "a.zot", header) as writer:
        writer.append(make_record(0, header))
        with pytest.raises(ValueError, match="one of the 1 planned"):
            writer.append(make_record(1, header))
        with pytest.raises(ValueError, match="from 0 to 1"):
            writer.mark_chosen(2)
        writer.mark_chosen(1)
        for late in (lambda: writer.mark_chosen(1), lambda: writer.append(make_record(1, header))):
            with pytest.raises(ValueError, match="ended"):
                late()


def test_each_record_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    path, header = tmp_path / "a.zot", make_header()
    writer = TrajectoryWriter.create(path, header)
    for step in range(3):
        writer.append(make_record(step, header))
        assert len(read_file(path).records) == step + 1
    writer.close()
    writer.close()


def test_records_go_to_the_disk_every_sync_every(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, synced = make_header(), list[int]()
    with TrajectoryWriter.create(tmp_path / "a.zot", header, sync_every=4) as writer:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(writer.steps))
        for step in range(9):
            writer.append(make_record(step, header))
        assert synced == [4, 8]
        writer.mark_chosen(9)
        assert synced == [4, 8, 9]


def test_a_full_disk_leaves_a_torn_record_that_the_next_append_overwrites(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header, pwrite, room = tmp_path / "a.zot", make_header(), os.pwrite, itertools.cycle([5, 3, 0])

    def full(fd: int, data: bytes, offset: int) -> int:
        n = next(room)
        if n == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[:n], offset)

    with TrajectoryWriter.create(path, header) as writer:
        for step in range(60):
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", full)
                with pytest.raises(OSError, match="No space"):
                    writer.append(make_record(step, header))
            trajectory = read_file(path)
            assert (len(trajectory.records), trajectory.torn_bytes) == (step, 8)
            writer.append(make_record(step, header))
        writer.mark_chosen(40)
    assert path.read_bytes() == whole


def test_a_file_that_cannot_be_begun_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        TrajectoryWriter.create(tmp_path / "a.zot", make_header())
    assert not list(tmp_path.iterdir())
