"""Speed of Hugging Face transformers on the same model as decode.py.   python scripts/bench/decode_transformers.py configs/d20.py"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nanojax.cli import FLAT, parse, split_preset
from nanojax.config import Config, ModelConfig
from nanojax.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    batches: tuple[int, ...] = (1, 8)
    """Rows at once."""
    prompt: int = 128
    """Tokens of each prompt."""
    tokens: int = 512
    """Tokens that each row adds."""
    rounds: int = 2
    """Times that each is run, after a first that is dropped; the median counts."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "reduce-overhead"
    """Mode of torch.compile, for all tokens but the first; reduce-overhead is what transformers takes by itself. CPUs have none only."""
    reuse_cache: bool = False
    """Give all calls one static cache; else each makes its own, for which CUDA graphs may have to be recorded anew."""
    config: Annotated[Config, FLAT] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.rounds < 1 or min(self.batches, default=0) < 1:
            given = f"tokens={self.tokens}, rounds={self.rounds} and batches={self.batches}"
            raise UserError(f"{given} must be at least 2, 1 and 1; leave them out for the defaults")


def main(argv: Sequence[str]) -> None:
    """Print time to the first token, tokens a second after it, and peak memory of greedy generation with random weights in bf16."""
    config, rest = split_preset(argv)
    bench = parse(Bench, rest, prog="decode_transformers.py [PRESET.py]", description=main.__doc__ or "", default=Bench(config=config))
    torch, transformers = libraries()
    cuda = torch.cuda.is_available()
    if bench.compile != "none" and not cuda:
        raise UserError(f"transformers compiles on GPUs, given --compile {bench.compile} and none is there; add --compile none")

    model = random_model(bench.config.model, "cuda" if cuda else "cpu")
    device = torch.cuda.get_device_name() if cuda else "cpu"
    print(
        f"{device}, transformers {transformers.__version__}, torch {torch.__version__}, {model.num_parameters():,} parameters, bf16; "
        f"{model.config._attn_implementation} attention, static cache{', reused' if bench.reuse_cache else ''}, compile {bench.compile}; "
        f"prompts of {bench.prompt} tokens, {bench.tokens} more"
    )
    print("| batch | first token, ms | tokens/s | a row's | ms a step | peak memory, GB |\n|---|---|---|---|---|---|")
    for batch in bench.batches:
        torch.compiler.reset()  # else the second batch size would be compiled for all sizes, and the first one's memory stay in use
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        first, step = timed(generator(model, batch, bench), bench.tokens, bench.rounds)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if cuda else "-"
        print(f"| {batch} | {1e3 * first:.1f} | {batch / step:,.0f} | {1 / step:,.0f} | {1e3 * step:.3f} | {peak} |", flush=True)


@functools.cache
def libraries() -> tuple[Any, Any]:
    """(torch, transformers). Raises UserError where one is missing."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  # not among our dependencies: this file alone wants them
        import transformers  # pyright: ignore[reportMissingImports]  # likewise
    except ImportError as error:
        raise UserError(f"this compares with transformers, and {error.name} is not installed; pip install torch transformers") from error
    return torch, transformers


def random_model(c: ModelConfig, device: str) -> Any:
    """Qwen3ForCausalLM of our sizes in bf16; it lacks only our norm of the embedded tokens. Raises UserError where Qwen3 lacks more."""
    if (c.ffn, c.norm, c.qk_norm, c.softcap, c.window) != ("swiglu", "learnable", True, None, None):
        raise UserError("Qwen3 has swiglu, learnable norms, qk_norm, and no softcap or window; choose a preset that has, such as d20")
    torch, transformers = libraries()
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.depth,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=False,
        eos_token_id=None,  # no token ends a row
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def generator(model: Any, batch: int, bench: Bench) -> Callable[[int], None]:
    """A function that adds so many tokens to `batch` random prompts, and waits for them."""
    torch, transformers = libraries()
    length = bench.prompt + bench.tokens
    prompts = torch.randint(0, 256, (batch, bench.prompt), device=model.device)
    options: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": length}
    if bench.reuse_cache:
        options = {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=length)}
    if bench.compile == "none":
        options["disable_compile"] = True
    else:
        options["compile_config"] = transformers.CompileConfig(mode=bench.compile, fullgraph=True)

    def generate(tokens: int) -> None:
        if bench.reuse_cache:
            options["past_key_values"].reset()
        made = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options
        )
        assert made.shape == (batch, bench.prompt + tokens)
        made.cpu()  # waits

    return generate


def timed(generate: Callable[[int], None], tokens: int, rounds: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for each token after it)."""
    firsts, wholes = [], []
    for turn in range(rounds + 1):
        for times, count in ((firsts, 1), (wholes, tokens)):
            began = time.perf_counter()
            generate(count)
            if turn:
                times.append(time.perf_counter() - began)
    first = statistics.median(firsts)
    return first, (statistics.median(wholes) - first) / (tokens - 1)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
