"""One file for each way to make H heads from fewer; the place to add another.

A composition is a class with a ``name`` and one or both of::

    keys(heads, statistics, request) -> (Composed, AttentionHeads)
    values(heads, statistics, request) -> (Composed, AttentionHeads)

It gets a layer as heads, the second moments of its inputs (None for ``fit="weights"``), both NumPy arrays in float64,
and what is asked for (a number of component heads, a fit). It returns components and composition of its side, with the
layer whose remaining parts fit them: queries or o_proj may have changed basis. It never sees a file or a model. An
instance in ``COMPOSITIONS`` makes it reachable.
"""

from typing import Any

from mea_compress.compositions.frequency import Frequency
from mea_compress.compositions.head import Head
from mea_compress.compositions.latent import Joint, Latent
from mea_compress.compositions.pool import Pool
from mea_compress.compositions.prune import Prune
from mea_compress.compositions.request import Request
from mea_compress.compositions.share import Share
from mea_compress.heads.composed import Composed

COMPOSITIONS: dict[str, Any] = {
    composition.name: composition for composition in (Head(), Frequency(), Latent(), Joint(), Pool(), Prune(), Share())
}

__all__ = ["COMPOSITIONS", "Composed", "Request"]
