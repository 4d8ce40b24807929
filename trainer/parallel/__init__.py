"""Everything that knows of more than one process; one process is simply a world of one, without a group.

`ranks` says who is who and what they tell one another; `apply` lays a model over them, in one readable order, with the
dimensions in files of their own: `tensor` (matrices), `context` (sequences), `pipeline` (layers), `memory` (recompute).
`shared` is how ranks of one machine add up.
"""

from trainer.parallel.apply import Laid, lay_out
from trainer.parallel.ranks import Ranks, join_ranks
from trainer.parallel.step import accumulate, gradient_norm

__all__ = ["Laid", "Ranks", "accumulate", "gradient_norm", "join_ranks", "lay_out"]
