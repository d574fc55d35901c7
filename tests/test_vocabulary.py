"""Embedding and head over devices, on one; tests/test_mesh.py has eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nanojax.vocabulary import look_up, per_device


def test_rows_are_those_of_the_table_and_their_gradient_is_summed_in_fp32(mesh):
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.standard_normal((7, 4)), jnp.float32)
    tokens_BT = jnp.asarray(rng.integers(7, size=(64, 8)))  # each row some 70 times
    cotangent_BTD = jnp.asarray(rng.standard_normal((64, 8, 4)), jnp.bfloat16)

    def gradient(f):
        rows_BTD, vjp = jax.vjp(f, table_VD)
        return rows_BTD, *vjp(cotangent_BTD)

    want_BTD, want_VD = gradient(lambda table_VD: table_VD[tokens_BT].astype(jnp.bfloat16))
    with jax.set_mesh(mesh):
        got_BTD, got_VD = jax.jit(lambda: gradient(lambda table_VD: look_up(table_VD, tokens_BT, jnp.bfloat16)))()
    assert got_BTD.dtype == jnp.bfloat16
    assert got_VD.dtype == jnp.float32
    np.testing.assert_array_equal(got_BTD, want_BTD)
    np.testing.assert_allclose(got_VD, want_VD, atol=1e-5)  # sums of some 70 numbers in float32; in bf16 they would be 0.1 off


def test_on_one_device_the_loss_is_taken_as_it_is(mesh):
    def total(*arguments):
        raise AssertionError("not called here")

    assert per_device(total, mesh) is total
