"""Placeholder."""
from __future__ import annotations
import torch
from .report import Site
from .settings import PassSettings

def rewrite_indexers(graph: torch.fx.Graph, settings: PassSettings) -> list[Site]:
    raise NotImplementedError
