"""The registry of pruning methods: what a method is called on the command line, and its class.

A new method is one file beside this one, and one line here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from capa_probe.errors import CapaProbeError
from capa_probe.pruning.base import Pruner
from capa_probe.pruning.capa import CAPA
from capa_probe.pruning.fastv import FastV
from capa_probe.pruning.random_tokens import Random
from capa_probe.pruning.vision_attention import VisionAttention

METHODS: dict[str, type[Pruner]] = {
    "capa": CAPA,
    "fastv": FastV,
    "random": Random,
    "vision-attention": VisionAttention,
}


def method(name: str) -> type[Pruner]:
    """The class of a method.

    Raises:
        CapaProbeError: there is none of that name.
    """
    if name not in METHODS:
        raise CapaProbeError(f"The pruning method {name!r} is not known; give one of {', '.join(METHODS)}.")
    return METHODS[name]


def build(name: str, **settings: Any) -> Pruner:
    """A pruner by the name of its method.

    Args:
        name: of the method.
        **settings: fields of its class.

    Raises:
        CapaProbeError: an unknown name, a field that the method does not have, or a value that it refuses.
    """
    cls = method(name)
    known = {of.name for of in fields(cls)}
    for setting in settings:
        if setting not in known:
            having = [other for other, its in METHODS.items() if setting in {of.name for of in fields(its)}]
            remedy = f"use it with {' or '.join(having)}, or leave it out" if having else "leave it out"
            raise CapaProbeError(f"{setting} was given, which the method {name} does not have; {remedy}.")
    return cls(**settings)
