"""Look at recorded sessions, or at a converted dataset: one HTML page that works without a network.

python scripts/inspect_data.py --data_path path/to/runs --output_file outputs/inspection.html
python scripts/inspect_data.py --data_path training_data --model_name_or_path google/gemma-3-4b-it

The page shows every turn with its picture, filters, button transitions, duplicates, presses without effect, a timeline
for each session, and the conversation of a sample: with --model_name_or_path as the model's chat template writes it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.inspection.inspect import check_page, choose_layout, format_counts, inspect_path, write_page
from pokegemma.data.inspection.page import message_blocks
from pokegemma.data.prompts import Layout
from pokegemma.environment import usable_cores
from pokegemma.errors import check_range, check_ranges
from pokegemma.options import option


@dataclass
class InspectOptions:
    data_path: str = option(..., "Folder of recorded sessions, at any depth; or a dataset's folder or JSONL file.")
    output_file: str = option("outputs/inspection.html", "The page; an earlier one is replaced.")
    layout: Layout | None = option(
        None, "Layout of the conversations. Default: grid, or frames where there are no grid pictures."
    )
    model_name_or_path: str | None = option(None, "Show conversations as this model's chat template writes them.")
    max_sessions: int = option(500, "Of more sessions, show so many, evenly spread.")
    num_workers: int = option(0, "Processes. 0: one for each core.")
    json: bool = option(False, "Print the counts as JSON.")

    def __post_init__(self) -> None:
        check_range("--max_sessions", self.max_sessions, at_least=1)
        check_ranges(self, "num_workers", at_least=0)


def main() -> None:
    (options,) = parse_options(InspectOptions, description=__doc__)
    path, page = Path(options.data_path), Path(options.output_file)
    check_page(page)
    inspection = inspect_path(
        path, max_sessions=options.max_sessions, num_workers=options.num_workers or usable_cores()
    )
    layout = choose_layout(inspection, options.layout)
    if options.model_name_or_path is None:
        blocks = message_blocks(inspection.samples, layout)
        note = f"Messages of --layout {layout}. With --model_name_or_path the model's chat template writes them."
    else:
        from pokegemma.gemma.batches.conversation_texts import conversation_texts  # torch takes seconds
        from pokegemma.gemma.loading import open_checkpoint

        collator = open_checkpoint(options.model_name_or_path).collator(layout=layout, dataset_folder=path)
        blocks = conversation_texts(collator, inspection.samples)
        note = (
            f"--layout {layout}, as the chat template of {options.model_name_or_path} writes it. The answer is learned."
        )
    num_bytes = write_page(page, inspection, blocks, prompt_note=note)
    if options.json:
        json.dump(inspection.summary, sys.stdout, indent=2)
        print()
    else:
        print(format_counts(inspection, page=page, num_bytes=num_bytes))


if __name__ == "__main__":
    run(main)
