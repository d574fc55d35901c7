"""The folder of an export, which may come from anywhere: everything about it that can be checked without a device."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanojax.checks import LARGEST
from nanojax.config import Config, DataConfig
from nanojax.errors import UserError
from nanojax.export.layout import quantized_config
from nanojax.files import parse_json, printable
from nanojax.formats import FORMATS
from nanojax.tokenizer import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "nanojax_tokenizer.json"
MOST_BYTES = {CONFIG: 2**22, TOKENIZER: 2**28}  # far above any that we write
LONGEST_ROW = 2**20  # tokens; no tensor has this size, and memory for a row of it is taken at once
HASHES = ("tokenizer_sha256", "text_sha256", "weights_sha256")
REMEDY = "give a folder that `nanojax export` wrote, or write it again"


@dataclass(frozen=True)
class Export:
    """An export whose config, tokenizer and hashes hold; its tensors are still to be checked (read.py)."""

    path: Path
    config: Config
    """Of the run, as it was saved there."""
    format: str
    """bf16, or one of formats.FORMATS."""
    int4_group: int | None
    step: int
    quantization_config: Any
    """As found."""
    tokenizer: Tokenizer

    @property
    def plain_config(self) -> Config:
        """What to build its model from: the weights are what they are, so nothing is rounded any more.

        The cache is this machine's own: compiled programs are run from there, and the folder must not say where.
        """
        settings = dict(precision="auto", int4_group=128, fp4_head=False, fp4_skip_first=0, fp4_skip_last=0, fp4_until=1.0)
        train = dataclasses.replace(self.config.train, **settings, fp4_recipe="weights")  # pyright: ignore[reportArgumentType]  # str for Literal
        data = dataclasses.replace(self.config.data, cache=DataConfig().cache, tokenizer=str(self.path / TOKENIZER))
        return dataclasses.replace(self.config, train=train, data=data)


def is_export(folder: Path) -> bool:
    """Whether a folder is meant to be an export, and not a run."""
    return any((folder / name).exists() or (folder / name).is_symlink() for name in (WEIGHTS, TOKENIZER))


def open_export(folder: Path) -> Export:
    """Read and check all of an export but its tensors. Raises UserError naming the file and what is wrong with it."""
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        require_regular(folder, name)
    source = folder / CONFIG
    try:
        record = parse_json(source.read_bytes())
        config = parse(record)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; {REMEDY}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # a UserError is a ValueError
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{source} is not an export's config ({printable(what)}); {REMEDY}") from error
    own = record["nanojax"]
    tokenizer = tokenizer_of(folder, config, own["tokenizer_sha256"])
    found = digest_of(folder / WEIGHTS)
    if found != own["weights_sha256"]:
        raise UserError(f"{folder / WEIGHTS} is damaged: SHA-256 {found[:12]}, expected {own['weights_sha256'][:12]}; {REMEDY}")
    return Export(folder, config, own["format"], own["int4_group"], own["step"], record.get("quantization_config"), tokenizer)


def require_regular(folder: Path, name: str) -> None:
    """Raise UserError unless the folder holds that file: itself and not by a link, and no larger than such files get."""
    path = folder / name
    try:
        status = path.lstat()
    except OSError as error:
        raise UserError(f"an export's folder holds {name}, and {folder} does not ({error.strerror}); {REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} must be a regular file in that folder, and is a link or a device; {REMEDY}")
    if status.st_size > MOST_BYTES.get(name, status.st_size):
        raise UserError(f"{path} has {status.st_size:,} bytes, and at most {MOST_BYTES[name]:,} are read; {REMEDY}")


def parse(record: Any) -> Config:
    """The run's config in config.json's content. Raises UserError, KeyError, TypeError or OverflowError on what is not one of ours."""
    if not isinstance(record, dict) or record.get("model_type") != "nanojax":
        raise UserError("model_type must be nanojax")
    own = record["nanojax"]
    known = {"config", "format", "int4_group", "step", *HASHES}
    if not isinstance(own, dict) or set(own) != known:
        raise UserError(f"nanojax must hold exactly {', '.join(sorted(known))}")
    format, group, step = own["format"], own["int4_group"], own["step"]
    if format not in ("bf16", *FORMATS):
        raise UserError(f"format must be one of bf16, {', '.join(FORMATS)}, given {format!r:.40}")
    if (group is not None) != (format == "int4"):
        raise UserError(f"int4_group goes with int4 and nothing else, given {group!r:.40} with {format}")
    if type(step) is not int or not 0 <= step < LARGEST:
        raise UserError(f"step must be a whole number from 0 to {LARGEST - 1}, given {step!r:.40}")
    for name in HASHES:
        if not isinstance(own[name], str) or not re.fullmatch("[0-9a-f]{64}", own[name]):
            raise UserError(f"{name} must be 64 hexadecimal digits, given {own[name]!r:.40}")
    config = Config.from_dict(own["config"])
    if None in (config.train.steps, config.train.batch_tokens):
        raise UserError("steps and batch_tokens must be numbers")
    if config.model.seq_len > LONGEST_ROW:
        raise UserError(f"seq_len={config.model.seq_len} must be at most {LONGEST_ROW}")
    if format != "bf16":
        quantized_config(config, format, group)  # refuses blocks that do not divide
    return config


def tokenizer_of(folder: Path, config: Config, expected: str) -> Tokenizer:
    """The export's tokenizer. Raises UserError unless it has that SHA-256 and the model has a row for each of its tokens."""
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
    except UserError as error:
        raise UserError(printable(str(error))) from error
    if tokenizer.sha256 != expected:
        raise UserError(
            f"{folder / TOKENIZER} has SHA-256 {tokenizer.sha256[:12]}, and the export was written with {expected[:12]}; "
            f"put the export's own tokenizer back"
        )
    if tokenizer.n_vocab > config.model.vocab_size:
        raise UserError(
            f"{folder / CONFIG} has vocab_size={config.model.vocab_size}, and its tokenizer has {tokenizer.n_vocab} tokens; {REMEDY}"
        )
    return tokenizer


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error


def require_new(out: Path) -> None:
    """Make the folder for an export. Raises UserError when it holds something, or cannot be written."""
    try:
        if out.exists() and (not out.is_dir() or any(not left.name.startswith(".") for left in out.iterdir())):
            raise UserError(f"an export gets a folder of its own, and {out} is not an empty one; give another OUT, or delete it")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"OUT must be a folder that can be written, given {out} ({error.strerror}); give another OUT") from error
