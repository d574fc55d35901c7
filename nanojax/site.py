"""What a config comes to on the devices there are: mesh, attention, formats, microbatch, and which functions multiply and lie between."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanojax import mesh as meshes
from nanojax import vocabulary
from nanojax.checks import parse_mesh
from nanojax.config import Config
from nanojax.errors import UserError
from nanojax.narrow import require_precision
from nanojax.ops import elementwise
from nanojax.ops.attention import KERNELS, AttentionFn, make_attention, resolve
from nanojax.ops.attention_context import key_heads
from nanojax.ops.attention_request import Request
from nanojax.ops.dot import dot
from nanojax.ops.fp4_dot import full_recipe_dot
from nanojax.ops.fp8_dot import Round, fp8_dot, fp8_head, fp8_products
from nanojax.ops.kernels import feed_forward, head
from nanojax.ops.kernels.both_ways import both_ways, both_ways_reference
from nanojax.ops.kernels.loss_gradient import nats_and_gradient
from nanojax.ops.kernels.spread import Spread, alone
from nanojax.ops.products import PLAIN_PRODUCTS, Products
from nanojax.ops.xent import PLAIN_HEAD, Head, total_nats
from nanojax.precision import Rounding
from nanojax.sizes import micro_batch

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Site:
    """What a config comes to on the devices there are."""

    config: Config
    mesh: Mesh
    attention: str
    why: str
    """Why this backend, and why not the faster ones."""
    request: Request
    """What it is asked for."""
    no_kernels: str | None
    """Why elementwise work is XLA's, or None where it is that of kernels."""
    compute: str
    """Format of the activations."""
    precision: str
    """Format that the matrices of the blocks are rounded to, up to config.train.fp4_until."""
    rows: int
    """Rows of a microbatch on all devices together, B."""
    accumulation: int
    """Microbatches a step, A."""

    @property
    def platform(self) -> str:
        """Kind of the devices: cpu, gpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def whole_matrices(self) -> bool:
        """Whether every device has all of each, and gathers none."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] == 1

    @property
    def together(self) -> tuple[str, ...]:
        """Parts of a layer in which kernels multiply what reads the same as one, where matrices are whole."""
        if self.no_kernels:
            return ()
        return ("attention", "ffn") if self.config.model.qk_norm else ("ffn",)

    @property
    def rounding(self) -> Rounding:
        """The format, and the weights that are in it."""
        return Rounding.of(self.config, self.precision)

    @property
    def kernels(self) -> list[str]:
        """What has kernels where any are used. Those of SwiGLU and the loss take whole matrices."""
        model, whole = self.config.model, self.mesh.shape["tensor"] == 1
        swiglu = model.ffn == "swiglu" and products_of(self) is not None and whole
        within = self.hopper and self.precision != "fp8" and feed_forward.serves(self.tokens, model.width, model.hidden)
        name = "SwiGLU (in products)" if within else "SwiGLU"
        loss = "loss (in the head's product)" if self.loss_in_product else "loss"
        known = {"norms": True, "rotation": model.qk_norm, name: swiglu, loss: whole}
        return [name for name, there in known.items() if there]

    @property
    def tokens(self) -> int:
        """Of a microbatch, on one device."""
        return self.request.rows * self.config.model.seq_len // self.mesh.shape["context"]

    @property
    def loss_in_product(self) -> bool:
        """Whether the head's product ends in the gradient of the loss."""
        model, train = self.config.model, self.config.train
        possible = not self.no_kernels and self.hopper and self.mesh.shape["tensor"] == 1 and not train.fp8_head
        return bool(possible) and head.serves(self.tokens // train.loss_blocks, model.width, model.vocab_size, model.softcap)

    @property
    def hopper(self) -> int | None:
        """The devices that rows and tokens are cut over, where they are GPUs of compute capability 9.0, as all are that are only compiled
        for; else None.
        """
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.mesh.shape["context"]
        return parts if self.request.platform in ("gpu", "cuda") and self.request.capability in (None, "9.0") else None

    @property
    def facts(self) -> dict[str, str]:
        """Lines for the header."""
        return {
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind} ({self.platform})",
            "mesh": ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            "attention": f"{self.attention} ({self.why})",
            "elementwise": f"XLA: {self.no_kernels}" if self.no_kernels else f"kernels: {', '.join(self.kernels)}; else XLA",
            "precision": f"activations {self.compute}, block matrices {self.rounding.describe(self.config)}, master weights fp32",
            "batch": f"{self.accumulation} x {self.rows} rows of {self.config.model.seq_len} tokens",
        }

    def require_trainable(self) -> None:
        """Raise UserError on devices that the precision cannot be trained on."""
        require_precision(self.precision, self.request, self.mesh.devices.flat[0].device_kind)


@contextlib.contextmanager
def attention_told() -> Iterator[None]:
    """Turn what ops say about a backend into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_site(config: Config, devices: list[jax.Device] | None) -> Site:
    """Mesh, attention, formats and microbatch of a resolved config. Raises UserError where they do not fit the devices."""
    mesh = meshes.make_mesh(parse_mesh(config.train.mesh), devices)
    meshes.check_divisible(config, mesh)
    compute, precision = formats(config, mesh.devices.flat[0].platform)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = micro_batch(config, replicas) * replicas
    request = request_of(config, mesh, rows // replicas)
    with attention_told():
        attention, why = resolve(config.train.attn_impl, request)
    refused = "asked for" if config.train.kernels == "plain" else elementwise.refusal(request)
    accumulation = config.batch_tokens // (config.model.seq_len * rows)
    return Site(config, mesh, attention, why, request, refused, compute, precision, rows, accumulation)


def require_devices(config: Config) -> None:
    """Raise UserError where these devices do not have the attention or the precision that the config names, before data is prepared.

    The vocabulary is not known yet, nor how many rows a device takes, which may follow from it: `choose_site` asks once more.
    """
    mesh = meshes.make_mesh(parse_mesh(config.train.mesh))
    meshes.check_divisible(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=mesh.shape["tensor"])), mesh)
    request = request_of(config, mesh, rows=1)
    with attention_told():
        resolve(config.train.attn_impl, request)
    require_precision(config.train.precision, request, mesh.devices.flat[0].device_kind)


def request_of(config: Config, mesh: Mesh, rows: int) -> Request:
    """What a device of the mesh asks of its attention, for so many rows: all their tokens, of its share of the heads."""
    platform, tensor, context = mesh.devices.flat[0].platform, mesh.shape["tensor"], mesh.shape["context"]
    capabilities = [c for device in mesh.devices.flat if (c := getattr(device, "compute_capability", None))]
    return Request(
        platform=platform,
        capability=min(capabilities, key=float, default=None),
        dtype=DTYPES[formats(config, platform)[0]],
        rows=rows,
        tokens=config.model.seq_len,
        heads=config.model.n_head // tensor // context,
        kv_heads=key_heads(config.model.kv_heads // tensor, context) // context,
        head_dim=config.model.head_dim,
        windows=tuple(dict.fromkeys(config.model.windows)),
        documents=config.data.documents,
    )


def attention_of(site: Site) -> AttentionFn:
    """The backend that a site chose, on all of its devices."""
    attend = make_attention(site.attention, site.request.documents)
    # XLA can cut its own products, but would gather all keys on every device along context.
    return meshes.per_shard(attend, site.mesh) if site.attention in KERNELS or site.mesh.shape["context"] > 1 else attend


def elementwise_of(site: Site) -> elementwise.Elementwise:
    """What a site chose to do between products, on all of its devices."""
    if site.no_kernels:
        return elementwise.PLAIN
    return elementwise.kernels(spread_of(site), products_of(site), whole=site.mesh.shape["tensor"] == 1, hopper=site.hopper)


def spread_of(site: Site) -> Spread:
    """How kernels are called on the devices of a site."""
    return functools.partial(meshes.per_device, mesh=site.mesh)


def product_of(site: Site) -> Callable:
    """The matrix product of a site's precision."""
    if site.precision == "fp8":
        return functools.partial(fp8_dot, rounded=rounded_of(site, spread_of(site)))
    return full_recipe_dot if site.config.train.fp4_recipe == "full" else dot


def products_of(site: Site) -> Products | None:
    """Those of several matrices side by side, where a site's precision has them."""
    if site.precision == "fp8":
        return fp8_products(rounded_of(site, spread_of(site)))
    return None if site.config.train.fp4_recipe == "full" else PLAIN_PRODUCTS


def rounded_of(site: Site, spread: Spread) -> Round:
    """How activations are rounded to 8 bits: by a kernel where devices have whole columns."""
    if site.no_kernels or site.mesh.shape["tensor"] > 1:
        return both_ways_reference
    return functools.partial(both_ways, spread=spread)


def total_of(site: Site, between: elementwise.Elementwise) -> Callable:
    """The summed loss of hidden states, on all devices of a site: each takes its own tokens."""
    total = functools.partial(total_nats, blocks=site.config.train.loss_blocks, of_logits=between.nats_and_gradient, head=head_of(site))
    return vocabulary.per_device(total, site.mesh)


def head_of(site: Site) -> Head:
    """The products of a block of a device's tokens with the head."""
    softcap = site.config.model.softcap
    if site.config.train.fp8_head:
        rounded = rounded_of(site, alone)
        return fp8_head(rounded, None if rounded is both_ways_reference else nats_and_gradient)
    return head.loss_head(softcap) if softcap is not None and site.loss_in_product else PLAIN_HEAD


def formats(config: Config, platform: str) -> tuple[str, str]:
    """(format of activations, format that block matrices are rounded to), as configured or by the device."""
    train = config.train
    compute = ("bf16" if platform == "gpu" else "fp32") if train.compute_dtype == "auto" else train.compute_dtype
    precision = train.four_bit or ("fp8" if train.fp8 else compute if train.precision == "auto" else train.precision)
    if (compute, precision) == ("bf16", "fp32"):
        raise UserError(f"precision=fp32 needs fp32 activations, and on a {platform} they are bf16; add --compute-dtype fp32")
    return compute, precision
