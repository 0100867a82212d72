"""REINFORCE leave-one-out (arXiv 2402.14740): TRL's RLOOTrainer on chunks."""

from trl import RLOOTrainer

from chunkft.recipes import rollouts
from chunkft.recipes.job import Job


class ChunkRLOOTrainer(rollouts.RolloutTrainer, RLOOTrainer):
    """TRL's trainer on chunks."""

    kl_is_summed = True


def run(job: Job) -> int:
    """Do the job; returns the exit code."""
    return rollouts.run(job, ChunkRLOOTrainer)
