"""Which licences may be joined in one collection.

A small table, on the safe side: what it does not know is only joined with itself. Each chain goes from fewer conditions
to more, and what is joined gets the last licence of those present, whose conditions include all the others'.
"""

from collections.abc import Sequence

from ..errors import UsageError

CHAINS = (
    ("PDDL-1.0", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0"),
    ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"),  # non-commercial data only with their like
)


def joined_licence(licences: Sequence[str]) -> str:
    """Return the licence of a collection made from parts under `licences` (SPDX identifiers, at least one).

    Raises `UsageError` for a licence that forbids derived works (ND), and for two that the table does not join.
    """
    names = {licence.lower(): licence for licence in licences}
    if forbidden := [name for lower, name in names.items() if "-nd" in lower]:
        raise UsageError(f"licence {forbidden[0]} allows no derived works, expected one that does; ask its owner")
    if len(names) == 1:
        return licences[0]
    for chain in CHAINS:
        ranks = {name.lower(): rank for rank, name in enumerate(chain)}
        if names.keys() <= ranks.keys():
            return chain[max(ranks[name] for name in names)]
    listed = " and ".join(names.values())
    known = "; ".join(" < ".join(chain) for chain in CHAINS)
    raise UsageError(f"licences {listed} are not known to be compatible, expected the same or some of: {known}")
