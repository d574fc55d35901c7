"""What every test starts from: a platform, strict shapes, and tiny models whose every parameter matters."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; `JAX_PLATFORMS=cuda pytest -m gpu` on a GPU host

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import XLA_FLAGS

CHECKED = importlib.util.find_spec("beartype") is not None
if CHECKED:  # here, before anything imports the ops; jaxtyping's flag in addopts would demand beartype, which GPU hosts may lack
    from jaxtyping import install_import_hook

    install_import_hook("nanojax.ops", "beartype.beartype")
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("nanojax", deadline=None)  # the first example compiles
    hypothesis.settings.load_profile("nanojax")
jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    # XLA reads its flags once, so they are taken back at once: what tests start in a subprocess compiles as it does for a user.
    jax.config.update("jax_disable_most_optimizations", True)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {XLA_FLAGS}"
    jax.devices()
    os.environ["XLA_FLAGS"] = flags

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ with what the tests see now; read the diff")


def pytest_collection_finish() -> None:
    """What is imported by now stays: jax traces into so many objects that looking through them all takes a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_report_header() -> str:
    return "shapes in nanojax.ops: " + ("checked by beartype" if CHECKED else "not checked, beartype is not installed")


@pytest.fixture
def golden(request):
    """golden(name, text): text must equal tests/golden/<name>, which `--update-golden` writes."""

    def check(name: str, text: str) -> None:
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} moved; if it should, run pytest --update-golden and read the diff"

    return check


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """A cache folder for tokenizers, shards, plans and compiled programs, shared by the tests of one session, in all its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "nanojax-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def mesh():
    """All four axes, on one device."""
    from nanojax.mesh import make_mesh

    return make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(**changes): a ModelConfig small enough to compile in a second; 2 query heads of 16 share 1 key head."""
    from nanojax.config import ModelConfig

    def make(**changes):
        sizes = dict(depth=2, d_model=32, head_dim=16, n_kv_head=1, d_ffn=48, seq_len=12, vocab_size=64)
        return ModelConfig(**(sizes | changes))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """tiny_model(seed=0, attention=..., compute_dtype=..., remat=..., elementwise=..., dot=..., **config): (graph, params).

    Parameters are random instead of initialised: real models start with head, o and down at zero, which would hide most mistakes.
    """
    from flax import nnx

    from nanojax.model import GPT, split
    from nanojax.ops.attention import reference_attention
    from nanojax.ops.dot import dot as plain_dot
    from nanojax.ops.elementwise import PLAIN

    def make(seed=0, *, attention=reference_attention, compute_dtype=jnp.float32, remat=False, elementwise=PLAIN, dot=plain_dot, **config):
        c = tiny_config(**config)
        with nnx.use_eager_sharding(False):  # no mesh here
            key = jax.random.key(0)
            how = dict(attention=attention, compute_dtype=compute_dtype, remat=remat, elementwise=elementwise, dot=dot)
            graph, shapes, _ = split(lambda: GPT(c, key=key, **how))
        rng = np.random.default_rng(seed)
        params = {}
        for name, leaf in sorted(shapes.items()):
            draw = rng.standard_normal(leaf.shape)
            # Gains around 1, matrices of std 1 / sqrt(in): activations stay of order 1.
            params[name] = jnp.asarray(1 + 0.3 * draw if leaf.ndim == 1 else draw / leaf.shape[0] ** 0.5, jnp.float32)
        return graph, params

    return make
