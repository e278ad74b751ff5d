"""The query decoder: queries read the image features through the masks they predict, and predict better masks.

Shapes: b samples, q queries, c channels ("width"), z, y, x the working grid. `valid` (b, q) tells queries from padding;
what stands in padded rows reaches no valid one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ValueRangeError
from .backbone import IN_PLANE, conv
from .masks import QueryMasks


class QueryHead(nn.Module):
    """One stage's prediction: each query becomes a kernel, its mask the kernel's response to the mask features.

    kernel = BN(W query); mask logit = BN(kernel . features); background logit = BN(conv(features)).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(width, width, bias=False)
        self.kernel_norm = nn.BatchNorm1d(width)
        self.mask_norm = nn.BatchNorm1d(1)
        self.background = nn.Sequential(conv(width, 1, IN_PLANE), nn.BatchNorm3d(1))

    def forward(self, queries: Tensor, valid: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of masks (b, q, z, y, x), -inf for padding, and of the background (b, 1, z, y, x)."""
        kernels = self.kernel(queries)
        # Statistics over valid queries only: padding must not move them.
        kernels = _scatter(self.kernel_norm(kernels[valid]), valid, 0.0)
        masks = torch.bmm(kernels, features.flatten(2))
        rows = masks.flatten(0, 1) if bool(valid.all()) else masks[valid]  # choosing copies
        scaled = self.mask_norm(rows.flatten()[None, None]).reshape(-1, masks.shape[2])
        return _scatter(scaled, valid, -torch.inf).unflatten(2, features.shape[2:]), self.background(features)

    def masks_of(self, queries: Tensor, features: Tensor) -> QueryMasks:
        """The masks of one sample's queries (q, c) with features (c, z, y, x), in evaluation mode."""
        norm = self.mask_norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return QueryMasks(
            kernels=self.kernel_norm(self.kernel(queries)) * scale,
            offset=norm.bias - norm.running_mean * scale,
            features=features.flatten(1).t().contiguous(),
            background=self.background(features[None])[0, 0],
        )


def _scatter(rows: Tensor, valid: Tensor, filling: float) -> Tensor:
    """Rows (n, k) of the n valid queries back in their places (b, q, k); `filling` elsewhere."""
    if bool(valid.all()):
        return rows.reshape(*valid.shape, -1)
    return rows.new_full((*valid.shape, rows.shape[1]), filling).index_put((valid,), rows)


class KernelUpdate(nn.Module):
    """Gated dynamic update of a query by the features it has gathered (Zhang et al., K-Net, NeurIPS 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_features = nn.Linear(width, 2 * width)
        self.from_query = nn.Linear(width, 2 * width)
        self.feature_gate = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Sigmoid())
        self.query_gate = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Sigmoid())
        self.feature_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.out = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())

    def forward(self, gathered: Tensor, queries: Tensor) -> Tensor:
        """New queries (b, q, c) from gathered features (b, q, c) and old queries (b, q, c)."""
        feature_key, feature_value = self.from_features(gathered).chunk(2, dim=-1)
        query_key, query_value = self.from_query(queries).chunk(2, dim=-1)
        common = feature_key * query_key
        new = self.feature_gate(common) * self.feature_norm(feature_value)
        kept = self.query_gate(common) * self.query_norm(query_value)
        return self.out(new + kept)


class QueryAttention(nn.Module):
    """Transformer layer among the queries of a sample, normalised after each residual sum; (b, q, c) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.from_heads = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, valid: Tensor) -> Tensor:
        """Queries of the same shape; each attends to the valid ones of its sample."""
        # three of (b, heads, q, c / heads)
        query, key, value = self.to_qkv(queries).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :])
        queries = self.attention_norm(queries + self.from_heads(mixed.transpose(1, 2).flatten(2)))
        return self.mlp_norm(queries + self.mlp(queries))


class QueryDecoder(nn.Module):
    """Masks from queries, refined in a few iterations.

    Parameters
    ----------
    width : int
        Channels of queries and features.
    iterations : int
        Refinements; there is one stage of predictions more.
    heads : int
        Attention heads; a divisor of `width`.
    component_prior : float
        Logit by which a query prefers its own component at the start of training, >= 0; learnt for each stage. 0 means
        that queries know nothing of where they come from, as published.
    """

    def __init__(self, width: int, iterations: int, heads: int, component_prior: float = 0.0) -> None:
        super().__init__()
        self.prior = (
            nn.Parameter(torch.full((iterations + 1,), float(component_prior))) if component_prior > 0 else None
        )
        self.predict = nn.ModuleList(QueryHead(width) for _ in range(iterations + 1))
        self.update = nn.ModuleList(KernelUpdate(width) for _ in range(iterations))
        self.attend = nn.ModuleList(QueryAttention(width, heads) for _ in range(iterations))

    def forward(
        self,
        queries: Tensor,
        valid: Tensor,
        mask_features: Tensor,
        instance_features: Tensor,
        components: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per stage the logits of masks (b, q, z, y, x), -inf for padding, and of the background (b, 1, z, y, x).

        `components` (b, q, z, y, x), 0 or 1, is needed with a prior, and only then.
        """
        masks: list[Tensor] = []
        backgrounds: list[Tensor] = []
        for stage, predict in enumerate(self.predict):
            if stage > 0:
                # Voxels are shared out among the queries; the background takes no part.
                shares = masks[-1].flatten(2).softmax(dim=1)
                gathered = torch.bmm(shares, instance_features.flatten(2).transpose(1, 2).to(shares.dtype))
                queries = self.attend[stage - 1](self.update[stage - 1](gathered, queries), valid)
            mask, background = predict(queries, valid, mask_features)
            if self.prior is not None:
                if components is None:
                    raise ValueRangeError("A component prior needs the components of the queries. Got none.")
                mask = mask + self.prior[stage] * components
            masks.append(mask)
            backgrounds.append(background)
        return masks, backgrounds

    def last_masks(
        self, queries: Tensor, mask_features: Tensor, instance_features: Tensor, components: Tensor | None = None
    ) -> QueryMasks:
        """Masks of the last stage for one sample, as from :meth:`forward` in evaluation mode.

        Parameters
        ----------
        queries : torch.Tensor
            (q, c).
        mask_features, instance_features : torch.Tensor
            (c, z, y, x).
        components : torch.Tensor, optional
            (z, y, x) int64: the index of the query that a voxel is a component of, or -1. Needed with a prior.

        Returns
        -------
        QueryMasks
            In float32, if the weights are and autocast is off.
        """
        if self.training:
            raise ValueRangeError("Masks are computed in pieces in evaluation mode only: statistics need all of them.")
        queries, mask_features = queries.float(), mask_features.float()
        features = instance_features.float().flatten(1).t().contiguous()
        masks = self._masks_of_stage(0, queries, mask_features, components)
        valid = torch.ones(1, len(queries), dtype=torch.bool, device=queries.device)
        for stage, (update, attend) in enumerate(zip(self.update, self.attend, strict=True), start=1):
            gathered = torch.zeros_like(queries)
            for piece in masks.pieces():
                gathered.addmm_(masks.logits(piece).softmax(dim=1).t(), features[piece])
            queries = attend(update(gathered[None], queries[None]), valid)[0]
            masks = self._masks_of_stage(stage, queries, mask_features, components)
        return masks

    def _masks_of_stage(self, stage: int, queries: Tensor, features: Tensor, components: Tensor | None) -> QueryMasks:
        head = self.predict[stage]
        assert isinstance(head, QueryHead)
        masks = head.masks_of(queries, features)
        if self.prior is None:
            return masks
        if components is None:
            raise ValueRangeError("A component prior needs the components of the queries. Got none.")
        return replace(masks, prior=(components.flatten(), self.prior[stage]))
