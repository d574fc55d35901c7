"""Rounding to 8 bits on a mesh: eight devices agree on the scale of a tensor, and each rounds and turns what it has."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
from eight import answer, measured

from nanojax.mesh import make_mesh, per_device
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.turn_back import TURN_BACK
from nanojax.ops.kernels.work import GIVEN, NORMED
from nanojax.ops.rope import rope_table


def rounding() -> dict[str, list]:
    """Of a tensor whose last device has the one number that no token seen first tells of: the scale on one device and on eight, how many
    numbers differ, and how many of those that are turned, which follow one another by device.
    """
    mesh, found = make_mesh({"data": 2, "fsdp": 2, "context": 2}), {}
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((8, 128, 32)), jax.numpy.bfloat16)
    spread = functools.partial(per_device, mesh=mesh)
    on_eight = jax.jit(lambda x: both_ways(GIVEN, (x,), jax.numpy.float8_e4m3fn, interpret=True, spread=spread))
    for name, value in {"fits": 3.0, "does not fit": 1e6, "is no number": np.nan}.items():
        part = x.at[-1, -1, -1].set(value)
        one = both_ways_reference(GIVEN, (part,), jax.numpy.float8_e4m3fn)
        with jax.set_mesh(mesh):
            eight = on_eight(part)
        values, turned, scale = (np.asarray(y) for y in eight[:3])
        by_device = values.reshape(4, 2, 2, 64, 32).swapaxes(1, 2).reshape(-1, 32).T  # rows over data and fsdp, then tokens over context
        off = [int((a.view(np.uint8) != b.view(np.uint8)).sum()) for a, b in ((values, np.asarray(one[0])), (turned, by_device))]
        found[name] = [str(one[2]), str(scale), *off]
    return found | made_and_rounded(mesh, spread)


def made_and_rounded(mesh, spread) -> dict[str, list]:
    """Of a norm, and of gradients that are turned back by each device's part of the rotation: the scale on one device and on eight, which
    share of the numbers differs, and by how much the sum over tokens at most, of its size.
    """
    jnp, rng = jax.numpy, np.random.default_rng(0)
    q, k, dq, dk, dv = (jnp.asarray(rng.standard_normal((8, 128, heads, 8)), jnp.bfloat16) for heads in (4, 2, 4, 2, 2))
    gains = [jnp.asarray(1 + 0.2 * rng.standard_normal(size), jnp.float32) for size in (8, 8, 32)]
    stream, over = q.reshape(8, 128, 32), jnp.asarray(rng.random((8, 128)), jnp.float32)
    works = {
        "norm": (NORMED, (stream, over, gains[2])),
        "turned back": (TURN_BACK, (q, k, dq, dk, dv, *gains[:2], *rope_table(jnp.arange(128), 8, 1e4))),
    }
    found = {}
    for name, (work, xs) in works.items():
        one = both_ways_reference(work, xs, jnp.float8_e5m2)
        on_eight = jax.jit(functools.partial(both_ways, work, dtype=jnp.float8_e5m2, interpret=True, spread=spread))
        with jax.set_mesh(mesh):
            eight = on_eight(xs)
        off = float((np.asarray(one.values).view(np.uint8) != np.asarray(eight.values).view(np.uint8)).mean())
        sums = [np.asarray(way.sums, np.float64).sum(0) for way in (one, eight) if way.sums is not None]
        away = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in itertools.pairwise(sums)]
        found[name] = [str(one.scale), str(eight.scale), off, *away]
    return found


def test_devices_agree_on_a_scale_and_turn_what_they_have(cache_dir):
    found = measured(__file__, cache_dir)
    assert found["fits"] == [str(4 * 2**-7)] * 2 + [0, 0]  # what is seen first is 1.75 to 3.5 at most
    assert found["does not fit"] == ["4096.0"] * 2 + [0, 0]  # 1e6 / 448 lies between 2048 and 4096
    assert found["is no number"][:2] == ["nan", "nan"]
    for name, sums in {"norm": 0, "turned back": 1}.items():
        one, eight, off, *away = found[name]
        assert one == eight, name
        assert off < 0.005, name  # where a number lies between two in 8 bits, the last bit of float32 decides
        assert len(away) == sums
        assert max(away, default=0) < 0.01, name


if __name__ == "__main__":
    answer(rounding)
