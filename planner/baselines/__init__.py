"""Plans that people make by rules of thumb, to compare searched plans with.

Each is an ordinary plan for any experiment and cluster: placed by the rule its system is known for, and
fitted to memory as its users do, by micro-batches, recomputation, more model parallelism and offload. The
runtime is ours in every case: a baseline says what the rule costs, not what another system measures.
"""

from planner.baselines.styles import BASELINES, Baseline, savings

__all__ = ["BASELINES", "Baseline", "savings"]
