"""Context parallel: ranks share each sequence, and attention alone needs what the others have.

As in Llama 3 (Dubey et al. 2024) keys and values are gathered and queries stay: with grouped heads they are the smaller
part. A sequence is cut into 2·cp pieces and rank r takes pieces r and 2·cp-1-r, so that under the causal mask every rank
has as much to do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from trainer.model import Block, Decoder, SameDocument, Sight


def own_positions(seq: int, *, rank: int, cp: int) -> Tensor:
    """The positions of a sequence that are `rank`'s, shape (seq / cp,)."""
    pieces = torch.arange(seq).chunk(2 * cp)
    return torch.cat([pieces[rank], pieces[2 * cp - 1 - rank]])


class GatheredAttention(nn.Module):
    """Causal attention of this rank's positions to all that come before them, wherever those are."""

    def __init__(self, group: ProcessGroup, *, rank: int, cp: int) -> None:
        super().__init__()
        self._group, self._rank, self._cp = group, rank, cp

    def forward(self, q_BHLW: Tensor, k_BKLW: Tensor, v_BKLW: Tensor, mask_B1LM: Tensor | None) -> Tensor:
        """The mask has this rank's L positions down, and all M across."""
        # (cp, 2, B, K, L, W): the gathered dimension is the first, and its halves are the two pieces of each rank.
        own = torch.stack([k_BKLW, v_BKLW]).unsqueeze(0)
        every = all_gather_tensor_autograd(own.contiguous(), gather_dim=0, group=self._group)
        early, late = every.chunk(2, dim=-2)
        k_BKLW, v_BKLW = torch.cat([*early.unbind(0), *late.flip(0).unbind(0)], dim=-2).unbind(0)
        piece = q_BHLW.shape[-2] // 2
        ends = ((self._rank + 1) * piece, (2 * self._cp - self._rank) * piece)
        masks = (None, None) if mask_B1LM is None else mask_B1LM.split(piece, dim=-2)
        pieces = zip(q_BHLW.split(piece, dim=-2), ends, masks, strict=True)
        return torch.cat(
            [_attend(q, k_BKLW[..., :end, :], v_BKLW[..., :end, :], mask) for q, end, mask in pieces], dim=-2
        )


def _attend(q_BHLW: Tensor, k_BKMW: Tensor, v_BKMW: Tensor, mask_B1LM: Tensor | None) -> Tensor:
    """Without a mask the last query sees every key, the one before it all but the last key, and so on."""
    grouped, seen = q_BHLW.shape[1] != k_BKMW.shape[1], k_BKMW.shape[-2]
    mask = causal_lower_right(q_BHLW.shape[-2], seen) if mask_B1LM is None else mask_B1LM[..., :seen]
    return F.scaled_dot_product_attention(q_BHLW, k_BKMW, v_BKMW, attn_mask=mask, enable_gqa=grouped)  # pyright: ignore[reportArgumentType]


class OwnSight(SameDocument):
    """The rows of this rank's positions; every rank knows the documents of whole sequences."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self._own = own

    def forward(self, documents_BL: Tensor) -> Sight:
        """A mask (B, 1, own, L)."""
        mask_B1LL, first_BL = super().forward(documents_BL)
        return Sight(mask_B1LL[:, :, self._own], first_BL[:, self._own])


def apply_context_parallel(decoder: Decoder, mesh: DeviceMesh, *, seq: int) -> None:
    """Attention that gathers, and rotary tables that hold the rows of this rank's positions."""
    rank, cp = mesh.get_local_rank(), mesh.size()
    for layer in decoder.model.layers:
        if isinstance(layer, Block):
            layer.self_attn.register_module("attend", GatheredAttention(mesh.get_group(), rank=rank, cp=cp))
    own = own_positions(seq, rank=rank, cp=cp).to(decoder.model.cos_LW.device)
    decoder.model.cos_LW, decoder.model.sin_LW = decoder.model.cos_LW[own], decoder.model.sin_LW[own]
    decoder.model.sight = OwnSight(own)
