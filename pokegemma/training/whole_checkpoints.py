"""What every trainer here does with checkpoints: each is either complete, or ignored."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from pokegemma.training.run_folder import COMPLETE_FILE


class WholeCheckpoints:
    """A part of trainers, before transformers' Trainer among the bases of a class."""

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)
        else:  # continued from its last step: transformers would train one step more before it checks
            self.control.should_training_stop = True

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Save a checkpoint, mark it complete once every process has written its part, then delete older ones.

        transformers deletes them as soon as the first process has finished. A run that is killed at that moment could
        have no complete checkpoint.
        """
        folder = Path(self.args.output_dir)
        mark = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / COMPLETE_FILE
        if self.args.should_save:
            mark.unlink(missing_ok=True)  # an earlier run may have written this one
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(*args, **options)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark.touch()
            rotate_checkpoints(
                folder, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )
