"""How a prompt is to be continued; no jax, so that a wrong call is refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from nanojax.checks import check_types
from nanojax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Of one prompt. The filters apply in the order of the fields, each to what the one before left."""

    temperature: float = 0.8
    """0 takes the likeliest token each time; 1 samples the model's own distribution."""
    top_k: int = 50
    """Sample among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this probability together; 1: among all."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest; 0: among all."""
    seed: int = 0
    """Draws depend on it and on the number of the token, and on nothing else in a batch."""
    tokens: int = 200
    """Most tokens to add."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:  # what float32 logits bear
            raise UserError(f"temperature={self.temperature} must be 0 or from 0.01 to 100; try 0.8")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1, which is all tokens; try 0.95")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p={self.min_p} must be at least 0, which is all tokens, and below 1; try 0.05")
        for name in ("tokens", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0; try {getattr(type(self), name)}, the default")

    @property
    def filters(self) -> bool:
        """Whether tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
