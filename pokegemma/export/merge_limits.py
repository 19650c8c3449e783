"""How far merged weights may be from adapter + base; apart, since asking for it should not load torch."""

MERGE_TOLERANCE = 1e-4
"""Largest relative difference of logits between adapter + base and merged weights, both in float32."""

STORED_TOLERANCE: dict[str, float] = {"float32": 1e-4, "bfloat16": 3e-2}
"""The same for the checkpoint read back from disk, whose weights were rounded to its type."""

UNEXPLAINED_CHANGE = 0.1
"""How much of a weight's change by the adapter may be missing or left over, in root mean square: 1 if it were lost."""

WEIGHT_NOISE: dict[str, float] = {"float32": 1e-6, "bfloat16": 1e-4}
"""What is added to it, in parts of the weight: products summed in another order, and then rounded to the other side."""
