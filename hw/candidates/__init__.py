"""Organizations of both PEs that were compared before the choice in docs/architecture.md.

Units of `hw` that a candidate shares with the design are not repeated: scale units of any number
of lanes are `hw.scale_unit.ScaleUnit`, the compactor that all PEs share is `hw.compactor`.
"""
