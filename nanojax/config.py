"""What a run is: frozen dataclasses, one per noun, with the checks that cross their fields and the command line over them.

A field that is None is derived; `sizes.resolve` fills it in. Nothing here imports jax, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from nanojax.checks import (
    check_types,
    nearest_divisor,
    parse_mesh,
    require_positive,
    require_share,
    round_up,
)
from nanojax.errors import UserError
from nanojax.formats import FORMATS
from nanojax.narrow import check_blocks, check_four_bit, check_fp8

Attention = Literal["auto", "te", "cudnn", "xla", "reference"]
ComputeDtype = Literal["auto", "fp32", "bf16"]
Precision = Literal["auto", "fp32", "bf16", "fp8", "fp8_head", "int4", "nvfp4", "nvfp4_2d", "mxfp4"]
Kernels = Literal["auto", "plain"]
Recipe = Literal["weights", "full"]
Packing = Literal["best_fit", "concat"]

MAX_DEPTH, MAX_WIDTH = 1024, 2**17  # far beyond any model here; what is larger is a slip of the hand
VOCAB_MULTIPLE = 128  # padding that keeps the head's matrix product on full tiles and divisible by any tensor axis


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; every switch on its own, and depth setting what is left at None."""

    depth: int = 12
    """Layers; the one dial from which width, heads, batch and steps follow."""
    seq_len: int = 2048
    """Tokens in a row, T."""
    vocab_size: int = 32768
    """Tokens in the vocabulary that is trained on the corpus; a named or loaded tokenizer brings its own."""
    d_model: int | None = None
    """Width, D. Derived: 64 a layer, rounded up to whole heads."""
    head_dim: int = 128
    """Size of one attention head, H; even."""
    n_kv_head: int | None = None
    """Key and value heads, K (grouped-query attention). Derived: as many as query heads."""
    ffn: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward: SwiGLU, or squared ReLU."""
    d_ffn: int | None = None
    """Hidden size of the feed-forward, F. Derived: 8D/3 rounded up to 256 for swiglu, 4D for relu2."""
    norm: Literal["learnable", "fixed"] = "learnable"
    """RMSNorm with a gain that learns, or without one; the norm of queries and keys follows it."""
    qk_norm: bool = True
    """Normalise queries and keys before they are rotated."""
    rope_base: float = 100_000.0
    """Base of the rotary position embedding."""
    softcap: float | None = None
    """Bound c on the logits, c * tanh(logits / c)."""
    embed_norm: bool = True
    """Normalise the embedded tokens, without a gain."""
    window: int | None = None
    """Keys that a token sees, itself included. None: all before it."""
    window_pattern: str = "S"
    """Which layers have that window, S, and which see all, L, repeated over the depth: SSSL. With an L in it, the last layer is one."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("depth", "seq_len", "vocab_size", "head_dim"):
            require_positive(name, getattr(self, name))
        for name in ("d_model", "n_kv_head", "d_ffn", "softcap", "window"):
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)
        if self.depth > MAX_DEPTH or self.width > MAX_WIDTH:
            raise UserError(f"depth={self.depth}, d_model={self.width} must be at most {MAX_DEPTH} and {MAX_WIDTH}; choose a smaller model")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even (RoPE rotates its halves); try {self.head_dim + 1}")
        if not (math.isfinite(self.rope_base) and self.rope_base > 1):
            raise UserError(f"rope_base={self.rope_base} must be above 1; try 100000")
        if self.width % self.head_dim:
            raise UserError(
                f"d_model={self.width} must be a multiple of head_dim={self.head_dim}; try --d-model {round_up(self.width, self.head_dim)}"
            )
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise UserError(f"window_pattern={self.window_pattern!r:.40} must be made of S and L; try SSSL")
        if "L" in self.window_pattern and self.window is None:
            raise UserError(f"window_pattern={self.window_pattern} needs a window; add --window {self.seq_len // 4}")
        if self.window is not None and not any(self.windows):
            raise UserError(
                f"window={self.window} is for layers that are S, and window_pattern={self.window_pattern:.40} makes none of "
                f"depth={self.depth}, the last being L where the pattern has one; drop both, or try --window-pattern S"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.kv_heads}; "
                f"try --n-kv-head {nearest_divisor(self.n_head, self.kv_heads)}"
            )

    @property
    def width(self) -> int:
        """D."""
        return self.d_model or round_up(64 * self.depth, self.head_dim)

    @property
    def n_head(self) -> int:
        """N, query heads."""
        return self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        """K, key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        """F."""
        return self.d_ffn or (round_up(8 * self.width / 3, 256) if self.ffn == "swiglu" else 4 * self.width)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, None where it sees all."""
        kinds = (self.window_pattern * self.depth)[: self.depth - 1] + ("L" if "L" in self.window_pattern else "S")
        return tuple(self.window if kind == "S" else None for kind in kinds)

    @property
    def spans(self) -> tuple[int, ...]:
        """Keys that the last token of a row sees, in each layer."""
        return tuple(min(window or self.seq_len, self.seq_len) for window in self.windows)


def nanochat(depth: int, **changes: Any) -> ModelConfig:
    """karpathy/nanochat's block as of November 2025: no gains, squared ReLU, logits capped at 15, RoPE base 10,000."""
    base: dict[str, Any] = dict(norm="fixed", ffn="relu2", softcap=15.0, rope_base=10_000.0)
    return ModelConfig(depth=depth, **(base | changes))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates and moments of Muon and AdamW, and their schedule."""

    matrix_lr: float = 0.02
    """Muon's learning rate, for the matrices of the blocks."""
    embedding_lr: float = 0.2
    """AdamW's, for the embedding; times (D / 768) ** -0.5."""
    head_lr: float = 0.004
    """AdamW's, for the output head; times (D / 768) ** -0.5."""
    gain_lr: float = 0.004
    """AdamW's, for the gains of the norms, which never decay."""
    betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-10
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of the embedding and the head."""
    momentum: tuple[float, float] = (0.85, 0.95)
    """Muon's momentum at the first step and after `momentum_warmup` steps."""
    momentum_warmup: int = 300
    """Steps over which the momentum rises."""
    ns_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    warmup_steps: int = 40
    """Steps of linear warm-up of the learning rates."""
    warmdown: float = 0.65
    """Last share of the run, over which the learning rates fall linearly."""
    final_lr: float = 0.05
    """Share of the learning rates that the warm-down arrives at when the last step is done."""
    clip: float | None = 1.0
    """Global gradient norm; None turns clipping off."""
    reference_batch: int | None = 2**19
    """Learning rates scale by sqrt(tokens a step / this); None leaves them alone."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("matrix_lr", "embedding_lr", "head_lr", "gain_lr", "eps", "ns_steps"):
            require_positive(f"optim.{name}", getattr(self, name))
        for name in ("weight_decay", "momentum_warmup", "warmup_steps"):
            require_positive(f"optim.{name}", getattr(self, name), zero=True)
        for name in ("clip", "reference_batch"):
            if (value := getattr(self, name)) is not None:
                require_positive(f"optim.{name}", value)
        for name in ("warmdown", "final_lr"):
            require_share(f"optim.{name}", getattr(self, name))
        for name in ("betas", "momentum"):
            if not all(0 <= x < 1 for x in getattr(self, name)):
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1); the default is {getattr(type(self), name)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it is tokenised, and how it is packed into rows."""

    path: str | None = None
    """Folder of .jsonl or .parquet files (column `text`), or with --data.glob of any text. None: Python's own library, on every machine."""
    glob: str | None = None
    """Pattern of files below the path, each a document: '**/*.py'."""
    tokenizer: Annotated[str | None, tyro.conf.arg(name="tokenizer", prefix_name=False)] = None
    """tokenizer.json, or a name that tiktoken knows (gpt2, cl100k_base, o200k_base). None: one is trained on the corpus."""
    cache: str = "~/.cache/nanojax"
    """Folder for tokenizers, token shards, packing plans and compiled programs."""
    packing: Packing = "best_fit"
    """best_fit: every row starts a document and the rest of a cropped one is dropped. concat: nothing is dropped, rows start anywhere."""
    mask_documents: bool = False
    """Hide the documents packed into one row from each other."""
    max_documents: int = 64
    """Most documents in a row, with mask_documents; kernels that mask take time and memory for as many."""
    val_fraction: float = 0.02
    """Share of the documents held out for validation; at least one."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1; try 0.02")
        if self.glob is not None and self.path is None:
            raise UserError(f"data.glob={self.glob!r} needs a folder to search; add --data.path DIR")
        if self.max_documents < 2:
            raise UserError(f"data.max_documents={self.max_documents} must be at least 2, or nothing is packed; the default is 64")
        if self.max_documents != type(self).max_documents and not self.mask_documents:
            raise UserError(f"data.max_documents={self.max_documents} is for documents hidden from each other; add --data.mask-documents")

    @property
    def documents(self) -> int | None:
        """Most documents in a row that are hidden from each other; None where nothing is hidden, and any number packed."""
        return self.max_documents if self.mask_documents else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, numerics and cadence of a run, and the devices it is spread over."""

    steps: int | None = None
    """Optimizer steps. Derived: tokens_per_param times the parameters of blocks and head."""
    tokens_per_param: float = 12.0
    """Length of a derived run, in tokens for each parameter of blocks and head."""
    batch_tokens: int | None = None
    """Tokens a step. Derived: nanochat's power law in the length of the run (2**19 at depth 12)."""
    micro_batch: int | None = None
    """Rows that one device takes at a time; the rest accumulates. Derived: at most 65,536 tokens, in at most 32 rows."""
    compute_dtype: ComputeDtype = "auto"
    """Type of activations. auto: bf16 on GPUs, fp32 elsewhere."""
    precision: Precision = "auto"
    """Format that the matrices of the blocks are rounded to once a step; their gradients pass straight through. auto: that of
    compute_dtype. int4, nvfp4 (blocks of 16), nvfp4_2d (of 16 x 16) and mxfp4 are 4-bit. fp8: activations and gradients as well, in real
    8-bit products, on GPUs of compute capability 9.0 or later; evaluated in bf16. fp8_head: those of the output head too."""
    int4_group: Literal[64, 128, 256] = 128
    """Weights that share a scale in int4."""
    fp4_head: bool = False
    """Round the output head to 4 bits too."""
    fp4_skip_first: int = 0
    """First blocks that a 4-bit precision leaves as they are."""
    fp4_skip_last: int | None = None
    """Last blocks that it leaves. Derived: none; with the full recipe 15 % of them."""
    fp4_until: float = 1.0
    """Share of the steps after which a 4-bit run goes on in the type of its activations."""
    fp4_recipe: Recipe = "weights"
    """full: NVIDIA's NVFP4 pretraining recipe, emulated on any device: activations and gradients in 4 bits too. For research, slower."""
    init_from: str | None = None
    """Folder of a run whose weights, and nothing else, this one starts from."""
    attn_impl: Attention = "auto"
    """Attention backend. auto takes the fastest that can serve and says why."""
    kernels: Kernels = "auto"
    """auto: elementwise work between products by kernels of our own where they can serve. plain: by XLA alone."""
    mesh: str = ""
    """Devices on each axis, 'data=2,fsdp=2'; context cuts rows, tensor matrices. An axis left out is 1. Empty: all devices on data."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    loss_blocks: int = 8
    """Pieces in which head and loss are computed, so that the full logits never exist."""
    seed: int = 0
    """Seeds initialisation and the order of the data."""
    eval_every: int = 250
    """Steps between validations; 0: only before the first and after the last."""
    eval_tokens: int = 2**20
    """Validation tokens, always the same ones."""
    save_every: int = 250
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("tokens_per_param", "loss_blocks", "eval_tokens", "keep"):
            require_positive(name, getattr(self, name))
        for name in ("steps", "batch_tokens", "micro_batch"):
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)
        for name in ("eval_every", "save_every", "seed"):
            require_positive(name, getattr(self, name), zero=True)
        if self.compute_dtype == "bf16" and self.precision == "fp32":
            raise UserError("precision=fp32 needs fp32 activations, given compute_dtype=bf16; drop one of the two")
        parse_mesh(self.mesh)
        check_four_bit(self)

    @property
    def four_bit(self) -> str | None:
        """The 4-bit format of the block matrices, if that is what they are rounded to."""
        if self.fp4_recipe == "full":
            return "nvfp4_2d"
        return self.precision if self.precision in FORMATS else None

    @property
    def fp8(self) -> bool:
        """Whether the block matrices are multiplied in 8 bits."""
        return self.precision in ("fp8", "fp8_head")

    @property
    def fp8_head(self) -> bool:
        """Whether the output head is too."""
        return self.precision == "fp8_head"

    @property
    def fp4_block(self) -> int:
        """Weights along the contraction axis that share a scale in that format."""
        assert self.four_bit is not None, "not a 4-bit run"
        return self.int4_group if self.four_bit == "int4" else FORMATS[self.four_bit].block


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Saved beside its checkpoints; equal configs give equal runs."""

    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.train.batch_tokens is not None and self.train.batch_tokens % self.model.seq_len:
            t = self.model.seq_len
            raise UserError(
                f"batch_tokens={self.train.batch_tokens} must be a multiple of seq_len={t}; "
                f"try --batch-tokens {round_up(self.train.batch_tokens, t)}"
            )
        if self.model.seq_len % self.train.loss_blocks:
            raise UserError(
                f"seq_len={self.model.seq_len} must be a multiple of loss_blocks={self.train.loss_blocks}; "
                f"try --loss-blocks {nearest_divisor(self.model.seq_len, self.train.loss_blocks)}"
            )
        if self.train.four_bit:
            check_blocks(self.model, self.train)
        if self.train.fp8:
            check_fp8(self.model, self.train)

    @property
    def steps(self) -> int:
        """Optimizer steps, of a resolved config."""
        assert self.train.steps is not None, "resolve the config first"
        return self.train.steps

    @property
    def batch_tokens(self) -> int:
        """Tokens a step, of a resolved config."""
        assert self.train.batch_tokens is not None, "resolve the config first"
        return self.train.batch_tokens

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Inverse of `to_dict`, also after a trip through JSON. Raises UserError on fields that do not fit."""
        if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
            raise UserError(f"a saved config is an object of objects, given {values!s:.60}; it is not one of ours")
        parts = {"model": ModelConfig, "train": TrainConfig, "optim": OptimConfig, "data": DataConfig}
        if unknown := set(values) - set(parts):
            raise UserError(f"a saved config has the sections {sorted(parts)}, given also {sorted(unknown)}; it is from another version")
        made = {}
        for name, part in parts.items():
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.get(name, {}).items()}
            try:
                made[name] = part(**given)
            except (TypeError, UserError) as error:
                raise UserError(f"a saved config does not fit this version: section {name}: {error}") from error
        return cls(**made)

    def text(self) -> str:
        """The config as text, a line a field; for `--print-config` and for golden files."""
        lines = []
        for section, values in self.to_dict().items():
            lines += [f"{section}.{name} = {value!r}" for name, value in values.items()]
        return "\n".join(lines) + "\n"
