"""The folder of a run: what lies where, and the checks that need no device."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanojax.config import Config
from nanojax.data.shards import Prepared
from nanojax.errors import StorageError, UserError
from nanojax.tokenizer import Tokenizer

# Fields that may change between a run and its continuation: none of them moves the weights, but `steps`, which moves the schedule.
FREE_ON_RESUME = frozenset(
    {
        "data.cache", "data.path", "data.tokenizer", "train.attn_impl", "train.eval_every", "train.eval_tokens", "train.keep",
        "train.loss_blocks", "train.mesh", "train.micro_batch", "train.remat", "train.save_every",
    }
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """config.json, tokenizer.json, checkpoints/, metrics.jsonl, summary.json, loss.png, tensorboard/, profile/."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(child.name.isdigit() and child.is_dir() for child in self.checkpoints.iterdir())

    def open_for_training(self, resume: bool) -> None:
        """Make the folder, and refuse one that is not writable, has a run that would be overwritten, or has none to resume."""
        if resume:
            self.require_resumable()
        if not resume and self.has_checkpoint:
            raise UserError(f"{self.path} already holds a run; add --resume to go on with it, or give another --out")
        self.make()

    def require_resumable(self) -> None:
        """Refuse a folder that has no checkpoint to go on from."""
        if not self.has_checkpoint:
            raise UserError(f"--resume needs a checkpoint, and {self.path} has none; drop --resume or point --out at the run's folder")

    def require_checkpoint(self) -> None:
        if not self.has_checkpoint:
            raise UserError(f"a run needs a checkpoint to be read, and {self.checkpoints} has none; train it first")

    def make(self) -> None:
        """Make the folder. Raises UserError unless it can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(
                f"--out must be a folder that can be written, given {self.path} ({error.strerror}); try another --out"
            ) from error

    def write(self, config: Config, data: Prepared) -> None:
        """Save the resolved config, the tokenizer, and the hash of the tokens."""
        data.tokenizer.save(self.path / "tokenizer.json")
        record = {"config": config.to_dict(), "tokenizer_sha256": data.tokenizer.sha256, "text_sha256": data.train.text_sha256}
        self.write_json("config.json", record)
        self.metrics.unlink(missing_ok=True)  # of a life that ended before its first checkpoint

    def finished(self, config: Config) -> bool:
        """Whether the newest checkpoint is of the last step and the summary is written."""
        steps = [int(child.name) for child in self.checkpoints.iterdir() if child.name.isdigit()]
        return max(steps, default=0) == config.train.steps and (self.path / "summary.json").is_file()

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        target = self.path / name
        temporary = target.with_name(f".{name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(target)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror}; free space there or choose another --out") from error

    def read(self) -> tuple[Config, dict[str, str]]:
        """(resolved config, the record's hashes) of the run. Raises UserError when the folder is not a run."""
        source = self.path / "config.json"
        try:
            record = json.loads(source.read_text())
            return Config.from_dict(record["config"]), {name: str(record[name]) for name in ("tokenizer_sha256", "text_sha256")}
        except FileNotFoundError:
            raise UserError(f"a run's folder holds config.json, and {self.path} does not; give the --out of a training run") from None
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror}; give the --out of a training run") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} is not a run's config ({error}); restore it or train again") from error

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, checked against the hash in its config."""
        tokenizer, expected = Tokenizer.load(self.path / "tokenizer.json"), self.read()[1]["tokenizer_sha256"]
        if tokenizer.sha256 != expected:
            raise UserError(
                f"{self.path / 'tokenizer.json'} has SHA-256 {tokenizer.sha256[:12]}, and the run was trained with {expected[:12]}; "
                f"put the run's own tokenizer back"
            )
        return tokenizer

    def check_resume(self, config: Config, data: Prepared) -> None:
        """Refuse to resume with another tokenizer, other text, or a config that would not give the same run."""
        saved, record = self.read()
        if record["tokenizer_sha256"] != data.tokenizer.sha256:
            raise UserError(
                f"the run in {self.path} has the tokenizer {record['tokenizer_sha256'][:12]}, and this one is "
                f"{data.tokenizer.sha256[:12]}; add --tokenizer {self.path / 'tokenizer.json'}"
            )
        if record["text_sha256"] != data.train.text_sha256:
            raise UserError(
                f"the run in {self.path} trains on the tokens {record['text_sha256'][:12]}, and the text there now gives "
                f"{data.train.text_sha256[:12]}; put the text back, or give another --out"
            )
        old, new = flatten(saved.to_dict()), flatten(config.to_dict())
        changed = [f"{key} {old[key]} -> {new[key]}" for key in new if key not in FREE_ON_RESUME and listed(old[key]) != listed(new[key])]
        if changed:
            raise UserError(
                f"--resume needs the run's own config, changed are {', '.join(changed)}; drop those flags or give another --out"
            )


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def listed(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return list(value) if isinstance(value, tuple) else value
