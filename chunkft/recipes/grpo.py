"""Group relative policy optimization (arXiv 2402.03300): TRL's GRPOTrainer on chunks."""

from trl import GRPOTrainer

from chunkft.recipes import rollouts
from chunkft.recipes.job import Job


class ChunkGRPOTrainer(rollouts.RolloutTrainer, GRPOTrainer):
    """TRL's trainer on chunks."""


def run(job: Job) -> int:
    """Do the job; returns the exit code."""
    return rollouts.run(job, ChunkGRPOTrainer)
