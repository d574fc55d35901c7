"""The environment in which XLA compiles the programs of tests, each of which runs once, in a fraction of the time."""

from __future__ import annotations

import jax

# One module for LLVM, where XLA would give its threads a part each: tests fill the cores without that.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # 0.11.2 knows this flag no more, and ends the process on one that it does not know
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
XLA_FLAGS = " ".join(_FLAGS)
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
