"""The folder of a run: what lies where, and the checks that need no device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanojax import manifest
from nanojax.config import Attention, Config
from nanojax.data.shards import Prepared
from nanojax.errors import StorageError, UserError
from nanojax.files import FAILING, parse_json, printable, read_regular, require_plain_folder, require_regular
from nanojax.lock import NAME as LOCK
from nanojax.lock import Lock
from nanojax.sizes import resolve
from nanojax.tokenizer import Tokenizer, write_atomically

# Fields that may change between a run and its continuation: none of them moves the weights beyond rounding, and what the full 4-bit
# recipe draws for a microbatch.
FREE_ON_RESUME = frozenset(
    {
        "data.cache", "data.path", "data.tokenizer", "train.attn_impl", "train.eval_every", "train.eval_tokens", "train.init_from",
        "train.keep", "train.kernels", "train.loss_blocks", "train.mesh", "train.micro_batch", "train.remat", "train.save_every",
    }
)  # fmt: skip

PRECISION = frozenset(
    f"train.{name}" for name in ("precision", "int4_group", "fp4_head", "fp4_skip_first", "fp4_skip_last", "fp4_until", "fp4_recipe")
)
FOLDERS = ("checkpoints", "logs", "progress", "tensorboard", "profile")
FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "loss.png")
LARGEST_CONFIG = 2**22  # bytes; far above any that we write
# Fields that decide which parameters there are.
SHAPES = ("depth", "vocab_size", "d_model", "head_dim", "n_kv_head", "ffn", "d_ffn", "norm", "qk_norm")


@dataclass(frozen=True)
class RunFolder:
    """config.json, tokenizer.json, checkpoints/, metrics.jsonl, summary.json, loss.png, progress/, logs/, tensorboard/, profile/, .lock."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def progress(self, process: int) -> Path:
        """How far that process is."""
        return self.path / "progress" / str(process)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order; found without importing jax."""
        return manifest.complete_steps(self.checkpoints)

    @property
    def has_checkpoint(self) -> bool:
        return bool(self.steps)

    @contextlib.contextmanager
    def open_for_training(self, resume: bool) -> Iterator[None]:
        """Make the folder and lock it.

        Refuses a folder that is not writable, that another process trains in, whose run would be overwritten, or that has none to resume.
        """
        if resume:
            self.require_resumable()
        self.make()
        with Lock(self.path):  # and only then look: another run may just have ended there
            self.require_plain()
            if resume:
                self.require_resumable()
            elif self.has_checkpoint:
                raise UserError(f"{self.path} already holds a run; add --resume to go on with it, or give another --out")
            yield

    def require_seen(self) -> None:
        """Refuse a folder that process 0 has opened and this process does not see."""
        if not (self.path / LOCK).exists():
            raise UserError(
                f"all processes need the run's folder, and {self.path} is not on this host; give --out on storage that all share"
            )

    def require_resumable(self) -> None:
        """Refuse a folder that has no checkpoint to go on from."""
        if not self.has_checkpoint:
            raise UserError(f"--resume needs a checkpoint, and {self.path} has none; drop --resume or point --out at the run's folder")

    def require_plain(self) -> None:
        """Refuse a folder, which may come from anywhere, with links, pipes or devices where a run has files: they would be written to."""
        for name in FOLDERS:
            require_plain_folder(self.path / name)
        for name in FILES:
            require_regular(self.path / name)

    def require_cache_elsewhere(self, config: Config) -> None:
        """Refuse a cache in the run's own folder: compiled programs are run from a cache, and the folder may come from anywhere."""
        cache, own = Path(config.data.cache).expanduser().resolve(), self.path.resolve()
        if cache.is_relative_to(own):
            raise UserError(f"data.cache must not lie in the run's own folder, given {cache}; give one elsewhere")

    def require_checkpoint(self) -> None:
        if not self.has_checkpoint:
            raise UserError(f"a run needs a checkpoint to be read, and {self.checkpoints} has none; train it first")

    def make(self) -> None:
        """Make the folder. Raises UserError unless it, and those in it that a run writes to, can be written."""
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError:  # orbax would fail at the first save
            raise UserError(
                f"this locale cannot spell the folder {str(self.path)!a}; set PYTHONUTF8=1 or a UTF-8 locale, or give another --out"
            ) from None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for each in (self.path, *filter(Path.is_dir, (self.path / name for name in FOLDERS))):
                with tempfile.TemporaryFile(dir=each):
                    pass
        except OSError as error:
            if error.errno in FAILING:
                raise StorageError(f"cannot write to {self.path}: {error.strerror}; free space there, or give another --out") from error
            raise UserError(
                f"--out must be a folder that can be written, given {self.path} ({error.strerror}); try another --out"
            ) from error

    def write(self, config: Config, data: Prepared) -> None:
        """Save the resolved config, the tokenizer, and the hash of the tokens."""
        data.tokenizer.save(self.path / "tokenizer.json")
        record = {"config": config.to_dict(), "tokenizer_sha256": data.tokenizer.sha256, "text_sha256": data.train.text_sha256}
        self.write_json("config.json", record)

    def finished(self, config: Config) -> bool:
        """Whether the newest checkpoint is of the last step and what was saved, and the summary is written."""
        if self.steps[-1:] != [config.steps] or not (self.path / "summary.json").is_file():
            return False
        place = self.checkpoints / str(config.steps)
        try:
            manifest.read(place).check_files(place)
        except (manifest.Damaged, OSError):
            return False  # going on says what is wrong with it, and goes back
        return True

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        write_atomically(self.path / name, json.dumps(record, indent=2) + "\n")

    def read(self) -> tuple[Config, dict[str, str]]:
        """(resolved config, the record's hashes) of the run. Raises UserError when the folder is not a run."""
        source = self.path / "config.json"
        self.require_plain()
        try:
            record = parse_json(read_regular(source, LARGEST_CONFIG))
            if isinstance(record, dict) and "nanojax" in record:
                raise UserError("it is that of an export: give the run that it was made from")
            config = Config.from_dict(record["config"])
            if None in (config.train.steps, config.train.batch_tokens):
                raise UserError("steps and batch_tokens must be numbers")
            self.require_cache_elsewhere(config)
            return config, {name: str(record[name]) for name in ("tokenizer_sha256", "text_sha256")}
        except FileNotFoundError:
            raise UserError(f"a run's folder holds config.json, and {self.path} does not; give the folder of a training run") from None
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror}; give the folder of a training run") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{source} is not a run's config ({printable(str(error))}); restore it or train again") from error

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, checked against the hash in its config."""
        config, hashes = self.read()
        if not (self.path / "tokenizer.json").is_file():
            raise UserError(f"a run's folder holds its tokenizer.json, and {self.path} does not; put the run's own back")
        tokenizer, expected = Tokenizer.load(self.path / "tokenizer.json"), hashes["tokenizer_sha256"]
        if tokenizer.n_vocab > config.model.vocab_size:
            raise UserError(
                f"{self.path / 'config.json'} has vocab_size={config.model.vocab_size}, fewer than the {tokenizer.n_vocab} tokens of "
                f"the run's tokenizer; put the run's own config back"
            )
        if tokenizer.sha256 != expected:
            raise UserError(
                f"{self.path / 'tokenizer.json'} has SHA-256 {tokenizer.sha256[:12]}, and the run was trained with {expected[:12]}; "
                f"put the run's own tokenizer back"
            )
        return tokenizer

    def check_resume(self, config: Config, data: Prepared, allow: str | None = None) -> None:
        """Refuse to resume with another tokenizer, other text, or a config that would not give the same run, what is allowed aside."""
        saved, record = self.read()
        self._check_tokenizer(record, data)
        if record["text_sha256"] != data.train.text_sha256:
            raise UserError(
                f"the run in {self.path} trains on the tokens {record['text_sha256'][:12]}, and the text there now gives "
                f"{data.train.text_sha256[:12]}; put the text back, or give another --out"
            )
        # A config that was saved before a field came has it filled in as it is now.
        old, new = flatten(resolve(saved, saved.model.vocab_size).to_dict()), flatten(config.to_dict())
        free = FREE_ON_RESUME | (PRECISION if allow == "precision" else frozenset())
        changed = [key for key in new if key not in free and listed(old[key]) != listed(new[key])]
        if changed:
            words = ", ".join(f"{key} {old[key]} -> {new[key]}" for key in changed)
            remedy = "add --allow precision" if PRECISION.issuperset(changed) else "drop those flags or give another --out"
            raise UserError(f"--resume needs the run's own config, changed are {words}; {remedy}")

    def check_weights_for(self, config: Config, data: Prepared) -> None:
        """Refuse to start a run of that config from this one's weights when they do not fit, or mean other tokens."""
        saved, record = self.read()
        self.require_checkpoint()
        self._check_tokenizer(record, data)
        for name in SHAPES:
            own, wanted = getattr(saved.model, name), getattr(config.model, name)
            if own != wanted:
                flag = name.replace("_", "-")
                raise UserError(f"--init-from {self.path} has {name}={own}, and this run has {wanted}; give --{flag} {own}")

    def _check_tokenizer(self, record: dict[str, str], data: Prepared) -> None:
        if record["tokenizer_sha256"] != data.tokenizer.sha256:
            raise UserError(
                f"the run in {self.path} has the tokenizer {record['tokenizer_sha256'][:12]}, and this one is "
                f"{data.tokenizer.sha256[:12]}; add --tokenizer {self.path / 'tokenizer.json'}"
            )

    def check_checkpoint(self, saved: dict[str, Any], data: Prepared) -> None:
        """Refuse a checkpoint that another run left in this folder: `saved` is its meta."""
        if saved["tokenizer_sha256"] != data.tokenizer.sha256:
            raise UserError(
                f"the newest checkpoint in {self.checkpoints} has the tokenizer {saved['tokenizer_sha256'][:12]}, and the run has "
                f"{data.tokenizer.sha256[:12]}; move that checkpoint away"
            )


def unplaced(config: Config, attn_impl: Attention = "auto") -> Config:
    """The config without what ties it to the devices that it was trained on: they may be others now."""
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, mesh="", micro_batch=None, attn_impl=attn_impl, kernels="plain")
    )


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def listed(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return list(value) if isinstance(value, tuple) else value
