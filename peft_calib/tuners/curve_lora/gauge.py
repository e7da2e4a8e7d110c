"""The gauge of LoRA factors: `(B, A) -> (B G, G^-1 A)` leaves the update as it is, but not what lies between two.

The straight line between two adapters in factor space depends on the gauge of either, so a barrier on it can be an
artefact. Balancing and rotating the factors gives a line to compare with.
"""

from __future__ import annotations

import torch

from ..factors import Pair


def balance(A: torch.Tensor, B: torch.Tensor) -> Pair:
    """Factors of the same product that share its singular values evenly, `A = S^1/2 V^T`, `B = U S^1/2`."""
    r = A.shape[-2]
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = S.sqrt()
    new_A, new_B = root.unsqueeze(-1) * (Vh @ q_a.mT), (q_b @ U) * root.unsqueeze(-2)
    missing = r - S.shape[-1]
    if missing:
        new_A = torch.nn.functional.pad(new_A, (0, 0, 0, missing))
        new_B = torch.nn.functional.pad(new_B, (0, missing))
    return new_A, new_B


def rotate_to(A: torch.Tensor, B: torch.Tensor, A_to: torch.Tensor, B_to: torch.Tensor) -> Pair:
    """Orthogonal Procrustes: `(G^T A, B G)` nearest to given factors, `G = U V^T`, `U S V^T = B^T B_to + A A_to^T`."""
    U, _, Vh = torch.linalg.svd(B.mT @ B_to + A @ A_to.mT)
    G = U @ Vh
    return G.mT @ A, B @ G


def align(anchors: list[list[Pair]]) -> list[list[Pair]]:
    """Balance the factors of every adapter and rotate them to the first one's, slot by slot; in float64."""
    balanced = [[balance(A.double(), B.double()) for A, B in pairs] for pairs in anchors]
    first = balanced[0]
    aligned = [
        [rotate_to(*pair, *goal) for pair, goal in zip(pairs, first, strict=True)] if index else pairs
        for index, pairs in enumerate(balanced)
    ]
    return [[(A.float(), B.float()) for A, B in pairs] for pairs in aligned]
