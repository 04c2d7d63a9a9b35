"""Where metrics go besides metrics.jsonl: TensorBoard, wandb, trackio."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rethinker.config import Config


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where numbers go: `log(numbers, step)` and `close()`."""

    name: str
    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def start_tracker(name: str, config: Config, folder: Path, chart: str, rows: int) -> Tracker:
    """Connect to a tracker.

    Args:
        name: tensorboard, wandb or trackio; installed.
        config: the run's settings, which wandb and trackio show.
        folder: the run's.
        chart: what tells this run from others of its name.
        rows: steps that have been logged already, by the run that this one continues.
    """
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run logged after its last checkpoint is hidden: it comes again.
        writer = SummaryWriter(str(folder), flush_secs=10, purge_step=rows + 1 if rows else None)

        def write(numbers: dict[str, float], step: int) -> None:
            for metric, value in numbers.items():
                writer.add_scalar(metric, value, step)

        return Tracker(name, write, writer.close)
    settings = dataclasses.asdict(config)
    if name == "wandb":
        import wandb

        # wandb keeps what it has of steps that come again.
        run = wandb.init(
            project="rethinker",
            name=config.run.name,
            id=f"{config.run.name}-{chart}",
            resume="allow",
            dir=str(folder),
            config=settings,
        )
        return Tracker(name, lambda numbers, step: run.log(numbers, step=step), run.finish)
    import trackio

    run = trackio.init(project="rethinker", name=config.run.name, config=settings, resume="allow" if rows else "never")
    return Tracker(name, lambda numbers, step: run.log(numbers, step=step), run.finish)
