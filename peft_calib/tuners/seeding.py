"""Private random generators keyed by integers, so that no call of this package moves the global random state."""

from __future__ import annotations

import torch


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for a seed and further integers; neighbouring keys give unrelated streams.

    Args:
        seed: Any integer.
        key: Further integers, such as a purpose and the index of a draw.

    Returns:
        A generator of its own.

    Example:
        >>> a, b = keyed_generator(0, 1), keyed_generator(0, 1)
        >>> bool(torch.rand(3, generator=a).equal(torch.rand(3, generator=b)))
        True
    """
    state = seed & (2**63 - 1)
    for part in key:
        mixed = torch.Generator().manual_seed((state * 6364136223846793005 + part + 1442695040888963407) % 2**63)
        state = int(torch.randint(2**62, (), generator=mixed))
    return torch.Generator().manual_seed(state)
