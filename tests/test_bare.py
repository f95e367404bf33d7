"""A machine without triton and without the extras, such as a Mac: tests are collected and pass, and who needs one says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
COME_ANYWAY = {"jinja2", "pandas"}  # torch and datasets bring them along
TOOLS = {
    "hypothesis",
    "mypy",
    "pre-commit",
    "pytest",
    "pytest-xdist",
    "ruff",
    "types-PyYAML",
}  # of the tests themselves
# Read by each Python before anything else, the children of a child too.
HIDE = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
def find_spec(cls, name, *where):
    return None if name.partition(".")[0] in {names!r} else real(name, *where)
PathFinder.find_spec = classmethod(find_spec)
"""


def extras() -> set[str]:
    """The modules that pyproject.toml's extras name, those apart that are here in any case."""
    wanted = [line for line in requires("zotune") or () if "extra ==" in line]
    return {re.split(r"[^\w-]", line)[0] for line in wanted} - TOOLS - COME_ANYWAY - {"zotune"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs Python where none of them is found: exit code, and what was said."""
    place = tmp_path_factory.mktemp("bare")
    (place / "sitecustomize.py").write_text(HIDE.format(names=extras()))
    paths = [str(place), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(*arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    return run


SKIPPED = {  # whole modules, and one backend of the last
    *(f"bench/test_{name}.py" for name in ("chosen", "pace", "positions", "report", "runner", "search", "shared")),
    "test_compare.py", "engines/test_between.py", "engines/test_adapters.py", "engines/test_kernels.py",
    "engines/test_pipelines.py", "test_fused.py",
    *(f"decode/test_{name}.py" for name in ("decode_kernels", "products", "launches")),
    "models/test_quantized.py", "noise/test_known_answers.py",
}  # fmt: skip


def test_all_tests_are_collected_and_a_selection_passes(bare):
    chosen = "test_known_answers.py or test_scratch.py or test_updates.py or cost.py"
    code, said = bare("-m", "pytest", "-p", "no:cacheprovider", "--assert=plain", "-q", "-rs", "-k", chosen)
    assert code == 0, said[-4000:]
    assert set(re.findall(r"^SKIPPED \[\d+\] tests/(\S+\.py)", said, re.M)) == SKIPPED


IMPORTS = """
import importlib, pkgutil, sys, zotune
for module in pkgutil.walk_packages(zotune.__path__, "zotune.", onerror=lambda name: None):
    if module.name != "zotune.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, error.name)
"""
ALONE = {  # kernels, and what writes or shows the results of a benchmark
    "triton": {
        "zotune.noise.cuda",
        "zotune.noise.drawing",
        "zotune.engines.kernels",
        "zotune.engines.between",
        "zotune.engines.fold_kernels",
        "zotune.updates.fused",
        "zotune.decode.kernels",
        "zotune.decode.products",
    },
    "sqlalchemy": {"zotune.bench.store", "zotune.bench.runner", "zotune.bench.cluster", "zotune.bench.shared"},
    "matplotlib": {"zotune.bench.figures", "zotune.reports.figures", "zotune.reports.page"},
    "itables": {"zotune.bench.report"},
}


def test_only_kernels_and_the_benchmark_s_results_import_an_extra(bare):
    code, said = bare("-c", IMPORTS)
    assert code == 0, said
    found = {tuple(line.split()) for line in said.splitlines() if line.startswith("zotune.")}
    assert found == {(module, name) for name, modules in ALONE.items() for module in modules}


COMMANDS = {
    "bench run x.yaml --output o": "zotune[bench]",
    "bench run x.yaml --output o --executor ray": "zotune[bench]",
    "bench report o": "zotune[bench]",
    "report o": "zotune[bench]",
    "compare FLAGS --output o": "zotune[bench]",
    "sweep FLAGS --output o": "zotune[bench]",
    "train FLAGS --output o --scheme lora --quantize int8": "zotune[quant]",
    "train FLAGS --output o --scheme lora --quantize nf4": "zotune[quant]",
}
RUN = """
import sys
from zotune.cli.app import run
sys.stdout = sys.stderr  # in one order
for line in sys.argv[1:]:
    print("code", run(line.split("|")), file=sys.stderr, flush=True)
"""


def test_a_command_that_needs_an_extra_says_so_in_a_line_and_the_others_work(bare, tmp_path):
    model = tiny.save_model(tmp_path / "model")
    given = "|".join(tiny.flags(model, tiny.save_data(tmp_path / "data")))
    lines = [line.replace(" ", "|").replace("FLAGS", given) for line in COMMANDS]
    train = f"train|{given}|--method|zo-adam|--output|{tmp_path / 'out'}"
    code, said = bare(
        "-c", RUN, *lines, train, f"estimate|--model|{model}|--card|t4", "list|methods", "env", cwd=tmp_path
    )
    assert code == 0, said
    *blocks, rest = said.split("code 2\n")
    for extra, block in zip(COMMANDS.values(), blocks, strict=True):
        assert re.fullmatch(rf"zotune: .*needs .*pip install '{re.escape(extra)}'\n", block), said
    assert rest.count("code 0\n") == 4, said
