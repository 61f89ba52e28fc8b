"""Sizes of published models, and a naive twin of the cost counter: every matrix product, listed with its shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from capa_probe.flops import Shape, VisionShape

#: CLIP ViT-L/14 at 336 pixels and LLaVA-1.5's two-layer projector.
CLIP_336 = VisionShape(
    n_layers=24,
    d_model=1024,
    d_mlp=4096,
    d_patch=3 * 14 * 14,
    cls_tokens=1,
    grid=(24, 24),
    projector=((1024, 4096), (4096, 4096)),
)
LLAVA_7B = Shape(
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=32,
    d_head=128,
    d_mlp=11008,
    vocab=32064,
    vision=CLIP_336,
)
LLAVA_13B = Shape(n_layers=40, d_model=5120, n_heads=40, n_kv_heads=40, d_head=128, d_mlp=13824, vocab=32064)
#: The decoder of Qwen2.5-VL-7B and of InternVL3-8B.
QWEN_7B = Shape(n_layers=28, d_model=3584, n_heads=28, n_kv_heads=4, d_head=128, d_mlp=18944, vocab=152064)


class Product(NamedTuple):
    """``count`` products of a (rows, inner) with an (inner, cols) matrix."""

    part: str
    rows: int
    inner: int
    cols: int
    count: int = 1

    @property
    def multiplications(self) -> int:
        return self.rows * self.inner * self.cols * self.count


def prefill_products(
    shape: Shape,
    visual: int,
    text: int,
    kept: dict[int, int] | None = None,
    hadamard: tuple[int, ...] = (),
    skip: tuple[int, ...] = (),
) -> Iterator[list[Product]]:
    """The matrix products of each decoder layer, head by head; ``hadamard`` as 1 x 1 products."""
    d, now = shape.d_model, visual
    for layer in range(shape.n_layers):
        now = (kept or {}).get(layer, now)
        n = now + text
        products = [Product("projections", n, d, shape.d_head) for _ in range(shape.n_heads)]
        products += [Product("projections", n, d, shape.d_head) for _ in range(2 * shape.n_kv_heads)]
        for _ in range(shape.n_heads):
            products.append(Product("attention", n, shape.d_head, n))
            products.append(Product("attention", n, n, shape.d_head))
        products.append(Product("projections", n, shape.n_heads * shape.d_head, d))
        through = n
        if layer in hadamard:
            products.append(Product("hadamard", 1, 1, 1, count=now * d))
        if layer in hadamard or layer in skip:
            through -= now
        products += [Product("ffn", through, d, shape.d_mlp) for _ in range(2 if shape.gated else 1)]
        products.append(Product("ffn", through, shape.d_mlp, d))
        yield products


def decode_products(
    shape: Shape, visual: int, text: int, kept: dict[int, int] | None = None
) -> Iterator[list[Product]]:
    """The same for one new token on a KV cache."""
    d, now = shape.d_model, visual
    for layer in range(shape.n_layers):
        now = (kept or {}).get(layer, now)
        keys = now + text + 1
        products = [Product("projections", 1, d, shape.d_head)] * (shape.n_heads + 2 * shape.n_kv_heads)
        products += [Product("attention", 1, shape.d_head, keys)] * shape.n_heads
        products += [Product("attention", 1, keys, shape.d_head)] * shape.n_heads
        products.append(Product("projections", 1, shape.n_heads * shape.d_head, d))
        products += [Product("ffn", 1, d, shape.d_mlp)] * (2 if shape.gated else 1)
        products.append(Product("ffn", 1, shape.d_mlp, d))
        yield products


def by_part(products: list[Product]) -> dict[str, int]:
    """Multiplications of each part of a layer."""
    total = dict.fromkeys(("projections", "attention", "ffn", "hadamard"), 0)
    for product in products:
        total[product.part] += product.multiplications
    return total
