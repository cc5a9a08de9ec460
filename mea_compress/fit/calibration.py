"""Calibration: run text through a layer and accumulate the statistics that fits are made from, in float64."""

from typing import Any

import torch

from mea_compress.errors import RequestError
from mea_compress.fit.scores import OriginalScores
from mea_compress.heads.statistics import LayerStatistics
from mea_compress.layers.runner import CapturedAttention
from mea_compress.modeling.attention_mea import rotate_heads
from mea_compress.modeling.section_mea import rotary_pairs
from mea_compress.planning.sizes import SAMPLED_QUERIES
from mea_compress.processes import add_up

# Attention weights that sum to less leave something to a sink.
_WHOLE = 0.999


class SensitivityAccumulator:
    """Accumulate what errors of a layer's keys cost, through the softmax.

    Args:
        heads: H.
        pairs: The two channels of every rotary pair.
        products: What is computed in. Below float32 the sums within a batch are taken in float32; sums over batches
            are float64 always.
    """

    sums: tuple[str, ...] = ("key_covariance", "sensitivity", "tokens", "queries")
    """Names of the attributes that are added up over processes."""
    metric: torch.Tensor
    """What the layer makes of errors of each query head's output, JᵀJ, (H, G, d, d)."""
    head_norm: Any = None
    """The RMSNorm that follows on each query head's output, or None."""

    def __init__(self, heads: int, pairs: tuple[list[int], list[int]], products: torch.dtype) -> None:
        self.products, self.pairs = products, pairs
        self.tokens = 0
        self.queries = 0
        self.key_covariance = torch.zeros(len(pairs[0]), heads, heads, dtype=torch.complex128)
        self.sensitivity = torch.zeros(heads, len(pairs[0]), dtype=torch.float64)

    def add_processes(self) -> None:
        """Take the sums of all processes, each of which has seen its own sequences."""
        for name in self.sums:
            own = getattr(self, name)
            total = add_up(torch.as_tensor(own))
            setattr(self, name, total if isinstance(own, torch.Tensor) else total.item())

    def accumulate_key_sensitivity(
        self, weights: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate the first-order sensitivity of one sequence's attention output to key errors, through the softmax.

        To first order, errors e[t] of the logits of one query move the output of its head by sum over t of
        A[t] W_O (v[t] - o) e[t]. What all of them have in common changes nothing; the variance of e under A counts,
        times r = sum of A² ‖W_O (v - o)‖² / (1 - sum of A²), with which both agree on independent errors. An error of
        rotary pair p of the keys has e[t] = Re(conj(q[p]) k[t, p]) after RoPE, so it costs r |q[p]|² times the
        variance of k[t, p] under A. Each head and pair sums that up with the attention of its own query heads; inner
        products of heads, which need one attention for both, take the average that is most important.

        Args:
            weights: A, (H, G, S, T), of the G query heads of every key/value head.
            queries: (H, G, S, d), rotated.
            keys: (H, T, d), rotated.
            values: (H, T, d).

        Returns:
            r of every query, (H, G, S).
        """
        # Variances do not see it, and in float32 they would be lost beside the square of a large mean. Only beside an
        # attention sink, whose logit no error moves, is what all keys have in common an error as well.
        if float(weights.sum(-1).mean()) > _WHOLE:
            keys = keys - keys.mean(1, keepdim=True)
        leverage = self._leverage(weights, values)
        importance = leverage[..., None] * self._energy(queries)  # (H, G, S, P)
        rows = weights.flatten(1, 2)  # (H, G S, T)
        variance = rows @ self._energy(keys) - self._energy(rows @ keys)  # (H, G S, P)
        self.sensitivity += (importance.flatten(1, 2) * variance.clamp(min=0)).sum(1).cpu().double()

        importance = importance.sum(-1)  # (H, G, S)
        common = torch.einsum("hgs,hgst->st", importance, weights)  # the average attention times its weight
        weight = importance.sum((0, 1))  # (S,)
        centre = common @ keys / weight.clamp(min=1e-30)[:, None]  # (H, S, d)
        self.key_covariance += self._inner(keys, common.sum(0)) - self._inner(centre, weight)
        return leverage

    def _leverage(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the output sensitivity of each query to its logits, r in `accumulate_key_sensitivity`: (H, G, S).

        Weights are (H, G, S, T), values (H, T, d).

        A head norm divides by the size of o and does not see what lies along it: v - o loses that part.
        """
        values = values[:, None]  # (H, 1, T, d)
        centre = weights @ values  # o, (H, G, S, d)
        along: Any = 1.0
        scale: Any = 1.0
        if self.head_norm is not None:
            scale = self.head_norm.scale(centre)[..., 0]  # (H, G, S)
            centre = centre / centre.square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()
            along = centre @ values.mT  # (H, G, S, T)
        seen = centre @ self.metric  # (H, G, S, d)
        own = ((values @ self.metric) * values).sum(-1)[:, :, None]  # (H, G, 1, T)
        inner = seen @ values.mT  # (H, G, S, T)
        size = (seen * centre).sum(-1, keepdim=True)  # (H, G, S, 1)
        change = (own - 2 * along * inner + along**2 * size).clamp(min=0)  # ‖W_O (v - o)‖²
        squares = weights.square()
        return (squares * change).sum(-1) * scale**2 / (1 - squares.sum(-1)).clamp(min=1e-3)

    def _energy(self, heads: torch.Tensor) -> torch.Tensor:
        """Return |z|² of the rotary pairs of heads (..., d): (..., P)."""
        first, second = self.pairs
        return heads[..., first].square() + heads[..., second].square()

    def _inner(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum over rows of weight (N,) times z[g] conj(z[h]) of heads (H, N, d): (P, H, H)."""
        first, second = self.pairs
        wide = (heads * weight.sqrt()[:, None]).double().permute(2, 0, 1)  # (d, H, N)
        pairs = torch.complex(wide[first], wide[second])  # (P, H, N)
        return (pairs @ pairs.mH).cpu()

    def _second_moment(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over rows of x xᵀ, float64, on the CPU."""
        if self.products == torch.float32 and x.device.type != "mps":
            x = x.double()
        return (x.mT @ x).cpu().double()

    def relative_sensitivity(self) -> torch.Tensor:
        """Return the squared output error per unit of key error, (H, P)."""
        size = self.key_covariance.diagonal(dim1=1, dim2=2).real.T.clamp(min=0)  # (H, P)
        # Layers whose keys, values or output are all zero cost nothing.
        if not (bool(self.sensitivity.max() > 0) and bool(size.max() > 0)):
            return torch.ones_like(size)
        return self.sensitivity / size.clamp(min=1e-12 * float(size.max()))


class StatisticsAccumulator(SensitivityAccumulator):
    """Accumulate the sums of `LayerStatistics` over batches.

    Args:
        attention: The attention whose inputs come.
        products: As `SensitivityAccumulator` has it.
    """

    sums = (*SensitivityAccumulator.sums, "moment", "attention_weighted_moment")

    def __init__(self, attention: Any, products: torch.dtype = torch.float32) -> None:
        super().__init__(attention.heads, rotary_pairs(attention.head_dim, attention.rotary_dim), products)
        self.attention = attention
        size = attention.q_proj.in_features + 1
        self.moment = torch.zeros(size, size, dtype=torch.float64)
        self.attention_weighted_moment = torch.zeros(size, size, dtype=torch.float64)
        output = attention.o_proj.weight.float().unflatten(1, (-1, attention.head_dim))  # (D, Hq, d)
        if attention.has_head_norm:
            self.head_norm = attention.head_norm
            output = output * attention.head_norm.weight
        metric = torch.einsum("xid,xie->ide", output, output).detach()  # W_Oᵀ W_O, (Hq, d, d)
        self.metric = metric.unflatten(0, (attention.heads, -1))  # (H, G, d, d)

    @torch.no_grad()
    def add(self, captured: CapturedAttention, scores: OriginalScores | None = None) -> None:
        """Add one batch of the attention's inputs.

        Args:
            captured: The inputs.
            scores: Gets what makes the scores of sampled queries, as far as it wants more sequences.
        """
        attention = self.attention
        cos, sin = captured.position_embeddings
        x = captured.inputs  # (B, T, D)
        ones = x.new_ones(*x.shape[:-1], 1)
        wide = torch.cat((x, ones), dim=-1).float()  # (B, T, D + 1)
        self.moment += self._second_moment(wide.flatten(0, 1))
        self.tokens += wide.shape[0] * wide.shape[1]

        length = x.shape[1]
        at = torch.linspace(0, length - 1, min(length, SAMPLED_QUERIES), device=x.device).round().long()
        with torch.autocast(x.device.type, self.products, enabled=self.products != x.dtype):
            queries = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))[:, at]  # (B, S, Hq, d)
            if attention.qk_norm:
                queries = attention.q_norm(queries)
            queries = rotate_heads(queries, cos[:, at], sin[:, at]).transpose(1, 2)
            keys, values = attention.expand(*attention.project(x, cos, sin), (cos, sin))
        repeated = attention.heads // keys.shape[1]  # pooled heads stand for several
        keys, values = (side.float().repeat_interleave(repeated, dim=1) for side in (keys, values))  # (B, H, T, d)
        queries = queries.float().unflatten(1, (attention.heads, -1))  # (B, H, G, S, d)
        visible = torch.arange(length, device=x.device) <= at[:, None]
        if attention.sliding_window:
            visible &= torch.arange(length, device=x.device) > at[:, None] - attention.sliding_window
        hidden = torch.zeros(visible.shape, device=x.device).masked_fill(~visible, float("-inf"))
        # One sequence at a time, since each is several A in size.
        for stream, query, key, value in zip(wide, queries, keys, values, strict=True):
            logits = query.flatten(1, 2) @ key.mT * attention.scaling  # (H, G S, T)
            weights = (logits.unflatten(1, query.shape[1:3]) + hidden).softmax(-1)  # (H, G, S, T)
            averaged = weights.flatten(0, 2) @ stream  # (Hq S, D + 1)
            self.attention_weighted_moment += self._second_moment(averaged) / attention.query_heads
            leverage = self.accumulate_key_sensitivity(weights, query, key, value)
            if scores is not None and scores.wants_more:
                scores.add(query, key, leverage, at, hidden)
        self.queries += len(at) * len(x)

    def finish(self) -> LayerStatistics:
        """Return the means.

        Raises:
            RequestError: Something is not finite.
        """
        means = (
            self.moment / self.tokens,
            self.attention_weighted_moment / self.queries,
            self.key_covariance / self.queries,
            self.relative_sensitivity(),
        )
        check_finite(*means)
        return LayerStatistics(self.tokens, *(mean.numpy() for mean in means))


def check_finite(*sums: torch.Tensor) -> None:
    """Check that calibration met ordinary numbers.

    Raises:
        RequestError: Something is not finite.
    """
    if not all(torch.isfinite(one).all() for one in sums):
        raise RequestError(
            "calibration met NaN or infinite activations; use an undamaged checkpoint, other `text`, or float32"
        )


def check_tokens(sequences: torch.Tensor, hidden_size: int) -> None:
    """Check that there are tokens enough: second moments of D inputs need more than D to mean anything.

    Raises:
        RequestError: There are fewer than 2 D tokens.
    """
    needed = 2 * hidden_size
    if sequences.numel() < needed:
        raise RequestError(
            f"the calibration text gives {sequences.numel()} tokens and this model needs at least {needed}; "
            "give a longer `text` or raise `sequences`"
        )
