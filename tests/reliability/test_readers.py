"""What a stranger's file can do to a reader: give it a value, or an error of ours. Nothing else, and in little memory.

Files that once did something else are kept in corpus/, named KIND-WHAT; each is read again here.
"""

# ruff: noqa: PT017  # an error is one of two outcomes here, not the wanted one

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import number

from zotune.bench.suite import load_suite, shipped
from zotune.errors import InputError
from zotune.options import EvalConfig, TrainConfig, resolve
from zotune.record.trajectory import Header, Record, TrajectoryError, TrajectoryWriter, coefficients, read
from zotune.run.folder import RunFolder
from zotune.tasks.rows import read_file as read_rows

CORPUS = Path(__file__).parent / "corpus"
ALLOWED = 64_000_000  # bytes, beside twice the file's size


def write(path: Path, steps: int, chosen: int | None, pairs: int = 1, groups: int = 1, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    header = Header(noise_version=1, direction="gaussian", method="zo-sgd", seed=seed, planned_steps=steps, pairs=pairs,
                    groups=groups, base={"name": "m"}, versions={"zotune": "0.1.0"})  # fmt: skip
    with TrajectoryWriter.create(path, header, sync_every=1 << 30) as writer:
        for step in range(steps):
            g = tuple(draw.gauss(0, 1) for _ in range(pairs))
            writer.append(Record(step, draw.random(), draw.random(), g, (1e-3,) * groups, (0.0,) * groups))
        if chosen is not None:
            writer.mark_chosen(chosen)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """200 records and an end marker."""
    return write(tmp_path_factory.mktemp("file") / "trajectory.zot", 200, 150)


def start_of(data: bytes) -> int:
    return 20 + int(struct.unpack_from("<I", data, 12)[0])


def test_a_file_of_200_records_cut_at_any_byte_gives_the_records_before_the_cut(whole):
    records = [repr(r) for r in read(whole).records]
    start, refused = start_of(whole), 0
    for size in range(len(whole)):
        try:
            found = read(whole[:size])
        except TrajectoryError as error:
            assert size < start, error
            refused += 1
            continue
        kept = (size - start) // 21
        assert (len(found.records), found.torn_bytes) == (min(kept, 200), (size - start) % 21)
        assert not found.complete
        assert not found.records or repr(found.records[-1]) == records[len(found.records) - 1]
    assert refused == start
    assert read(whole).complete


def test_any_flipped_bit_of_a_file_of_200_records_is_seen(whole):
    """A flip in the last record (the end marker) looks torn and is cut; elsewhere the file is refused."""
    records = [repr(r) for r in read(whole).records]
    start, last = start_of(whole), len(whole) - 21
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        at = (bit // 8 - start) // 21
        try:
            found = read(bytes(data))
        except TrajectoryError as error:
            assert bit // 8 < last
            if bit // 8 >= start:
                assert error.steps == at
                if bit % 61 == 0:
                    assert [repr(r) for r in read(bytes(data), until=at).records] == records[:at]
            continue
        assert bit // 8 >= last
        assert (len(found.records), found.torn_bytes, found.complete) == (200, 21, False)


# Fuzz: trajectories

EDIT = st.tuples(
    st.integers(0, 5), st.integers(0, 1 << 16), st.integers(0, 1 << 16), st.sampled_from([1, 2, 4, 21, 50])
)


def mutated(data: bytes, edits: list[tuple[int, int, int, int]], donor: bytes) -> bytes:
    """data after edits (kind, place, value or place in the donor, length)."""
    out = bytearray(data)
    for kind, place, value, length in edits:
        i, j = place % (len(out) + 1), value % len(donor)
        if kind == 0:
            out[i : i + 1] = bytes([value % 256])
        elif kind == 1:
            out[i : i + 4] = struct.pack("<I", (0, 1, 1 << 16, 1 << 31, (1 << 32) - 1)[value % 5])
        elif kind == 2:
            del out[i : i + length]
        elif kind == 3:
            out[i:i] = donor[j : j + length]
        elif kind == 4:
            out[i : i + length] = donor[j : j + length]
        else:
            del out[i:]
    return bytes(out)


def sealed(data: bytes) -> bytes:
    """The same with lengths and check sums that are right, so that what is behind these checks is reached."""
    if len(data) < 21:
        return data
    length = min(struct.unpack_from("<I", data, 12)[0], len(data) - 20)
    out = data[:12] + struct.pack("<I", length) + data[16 : 16 + length]
    crc = zlib.crc32(out)
    out += struct.pack("<I", crc)
    for i in range(20 + length, len(data) - 20, 21):
        crc = zlib.crc32(data[i : i + 17], crc)
        out += data[i : i + 17] + struct.pack("<I", crc)
    return out


def read_trajectory(data: bytes) -> int:
    """All that is in it; how many records, or −1 where it is refused."""
    try:
        found = read(data)
        for record in found.records:
            coefficients(record, found.header)
        return len(found.records)
    except TrajectoryError as error:
        assert "\n" not in str(error)
        if error.steps is not None:
            assert len(read(data, until=error.steps).records) == error.steps
        return -1


ODD = b'[]{}"":,-1e999NaN0.5nulltrue"\\ud800"[[[[{"a":4294967296,"pairs":65536,"groups":0,"layout":["lr","decay"],"required":["x"]'


def keep(kind: str, data: bytes, error: BaseException) -> None:
    """A find goes into the corpus: commit it with the mend."""
    (CORPUS / f"{kind}-{type(error).__name__}-{zlib.crc32(data):08x}").write_bytes(data)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> tuple[bytes, bytes]:
    """A small file to mutate, and bytes to mix in."""
    folder = tmp_path_factory.mktemp("seeds")
    return write(folder / "a.zot", 4, 2), write(folder / "b.zot", 4, None, 2, 2) + ODD


def try_trajectory(data: bytes) -> bool:
    """Whether it is refused; anything else than that or a value goes into the corpus, and on."""
    try:
        return read_trajectory(data) < 0
    except BaseException as error:
        keep("trajectory", data, error)
        raise


@pytest.mark.slow
def test_10000_mutated_trajectories_raise_nothing_but_our_error(seeds):
    small, donor = seeds
    refused = []

    @settings(max_examples=10_000, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(edits=st.lists(EDIT, min_size=1, max_size=4), seal=st.booleans())
    def once(edits: list[tuple[int, int, int, int]], seal: bool) -> None:
        data = mutated(small, edits, donor)
        refused.append(try_trajectory(sealed(data) if seal else data))

    once()
    assert len(refused) >= 10_000
    assert 1_000 < sum(refused) < 9_900  # neither all from before the checks nor all from behind them


@pytest.mark.soak
def test_soak_trajectories(seeds):
    """The same mutations from a plain generator, which is ten times as quick."""
    small, donor = seeds
    draw, count, refused, began = random.Random(number("SEED", 1)), number("FUZZ", 10_000_000), 0, time.monotonic()
    for n in range(count):
        edits = [(draw.randrange(6), draw.randrange(1 << 16), draw.randrange(1 << 16), draw.choice((1, 2, 4, 21, 50)))
                 for _ in range(draw.randint(1, 4))]  # fmt: skip
        data = mutated(small, edits, donor)
        refused += try_trajectory(sealed(data) if n % 2 else data)
    seconds = time.monotonic() - began
    print(f"\nmutated trajectories: {count:,}, {refused:,} refused, the others read, nothing else; {seconds:.0f} s")


def peak_of(call: Callable[[], Any]) -> int:
    """Python's peak in bytes while it runs."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pairs", [1, 65_536])
def test_reading_takes_less_than_twice_the_file_and_64_mb(tmp_path, pairs):
    data = write(tmp_path / "big.zot", 20_000 if pairs == 1 else 8, 3, pairs)
    assert peak_of(lambda: read_trajectory(data)) < 2 * len(data) + ALLOWED
    assert peak_of(lambda: read_trajectory(sealed_header(data, planned_steps=2**32 - 1))) < 2 * len(data) + ALLOWED


def sealed_header(data: bytes, **changes: Any) -> bytes:
    """A header that promises more than there is."""
    text = json.dumps(
        json.loads(data[16 : start_of(data) - 4]) | changes, sort_keys=True, separators=(",", ":")
    ).encode()
    head = data[:12] + struct.pack("<I", len(text)) + text
    return head + struct.pack("<I", zlib.crc32(head))


# Fuzz: YAML and JSON

CONFIG = {
    "model": "m", "data": "d", "template": "{text} It was", "output": "out", "steps": 10, "lr": 1e-3, "label_words": {"0": "bad"},
    "report_to": [], "groups": "batch", "method": "zo-sgd",
}  # fmt: skip
TOKENS = [b"[", b"{", b"}", b":", b"- ", b"&a ", b"*a", b"!!python/object/apply:os.system ['false']", b"!!int ", b"<<: ", b"? ",
          b"\x00", b"\xff", b"\t", b"'", b'"', b"|\n", b"1e999", b"NaN", b".inf", b"0x", b"2001-01-01", b"null", b"~", b"\n---\n",
          b"%YAML 9.9\n", b"0o7", b"1_0", b"12:30:45", b"[" * 3000, b"{a: " * 300, b"9" * 5000, b"=", b"!!binary a", b"!!set {a}",
          b"!!timestamp x", b"!!float a"]  # fmt: skip
TEXT_EDIT = st.tuples(st.integers(0, 4), st.integers(0, 1 << 12), st.integers(0, 1 << 12), st.integers(1, 20))


def edited(data: bytes, edits: list[tuple[int, int, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, place, value, length in edits:
        i = place % (len(out) + 1)
        if kind <= 1:
            out[i : i + length * kind] = TOKENS[value % len(TOKENS)]
        elif kind == 2:
            del out[i : i + length]
        elif kind == 3:
            out[i : i + 1] = bytes([value % 256])
        else:
            j = value % (len(out) + 1)
            out[i:i] = out[j : j + length]
    return bytes(out)


def as_config(file: Path) -> None:
    resolve(TrainConfig, {}, str(file))


def as_eval(file: Path) -> None:
    resolve(EvalConfig, {"model": "m"}, str(file))


def as_suite(file: Path) -> None:
    list(load_suite(str(file)).cells())


def as_rows(file: Path) -> None:
    read_rows(file)


def as_run(file: Path) -> None:
    """config.yaml, result.json, progress.json and a checkpoint's state of a folder that a stranger gave."""
    folder = RunFolder(file.parent)
    folder.read_json(file.name)
    folder.checkpoints()
    folder.check(CONFIG, resume=True, overwrite=False)


FILES: dict[str, tuple[str, Callable[[Path], None], bytes]] = {
    "config": ("c.yaml", as_config, yaml.safe_dump(CONFIG).encode()),
    "eval": ("e.yaml", as_eval, yaml.safe_dump(CONFIG | {"trajectory": "t.zot"}).encode()),
    "suite": ("s.yaml", as_suite, b""),
    "rows": (
        "rows.jsonl",
        as_rows,
        b'{"text": "a film", "label": 0}\n{"text": "\xce\xb8", "label": [1, {"a": null}]}\n',
    ),
    "run": ("config.yaml", as_run, yaml.safe_dump(CONFIG).encode()),
    "state": (
        "checkpoint-3/trainer_state.json",
        lambda file: as_run(file.parent),
        b'{"global_step": 3, "log_history": []}',
    ),
}


def try_file(kind: str, data: bytes, folder: Path) -> bool:
    """Whether it is refused with our error."""
    name, reader, _ = FILES[kind]
    file = folder / kind / name
    file.parent.mkdir(exist_ok=True, parents=True)
    if kind == "state":
        (folder / kind / "config.yaml").write_bytes(original("run"))
    file.write_bytes(data)
    try:
        reader(file)
    except InputError as error:
        assert str(error)
        return True
    except BaseException as error:
        keep(kind, data, error)
        raise
    return False


def original(kind: str) -> bytes:
    if kind == "suite":
        from importlib.resources import files

        return files("zotune.bench").joinpath("suites", f"{shipped()[0]}.yaml").read_bytes()
    return FILES[kind][2]


@pytest.mark.parametrize("kind", FILES)
def test_what_is_mutated_is_itself_read(kind, tmp_path):
    """Else a fuzzer would never get behind the first check."""
    assert not try_file(kind, original(kind), tmp_path)


@pytest.mark.parametrize("kind", FILES)
@settings(
    max_examples=150, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(edits=st.lists(TEXT_EDIT, min_size=1, max_size=4))
def test_mutated_yaml_and_json_raise_nothing_but_our_error(tmp_path_factory, kind, edits):
    try_file(kind, edited(original(kind), edits), tmp_path_factory.getbasetemp())


@pytest.mark.soak
@pytest.mark.parametrize("kind", FILES)
def test_soak_yaml_and_json(tmp_path, kind):
    draw, count, refused = random.Random(number("SEED", 1)), number("FUZZ", 10_000_000) // 1000, 0
    for _ in range(count):
        edits = [(draw.randrange(5), draw.randrange(1 << 12), draw.randrange(1 << 12), draw.randint(1, 20))
                 for _ in range(draw.randint(1, 4))]  # fmt: skip
        refused += try_file(kind, edited(original(kind), edits), tmp_path)
    print(f"\nmutated files of kind {kind}: {count:,}, {refused:,} refused, nothing else")


@pytest.mark.parametrize("kind", ["config", "suite", "run"])
def test_yaml_that_names_itself_over_and_over_takes_little_memory(tmp_path, kind):
    """A billion items by twelve lines of references."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 11)]
    data = "\n".join([*lines, "label_words: *a10", "name: *a10", "steps: *a10", "method: *a10"]).encode()
    began = time.monotonic()
    assert peak_of(lambda: try_file(kind, data, tmp_path)) < 2 * len(data) + ALLOWED
    assert time.monotonic() - began < 20


def test_no_file_is_code(tmp_path):
    mark = tmp_path / "mark"
    data = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]".encode()
    for kind in FILES:
        try_file(kind, data, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda p: p.name)
def test_the_corpus_raises_nothing_but_our_error(path, tmp_path):
    kind, data = path.name.split("-")[0], path.read_bytes()
    if kind == "trajectory":
        read_trajectory(data)
    else:
        assert try_file(kind, data, tmp_path) in (True, False)
